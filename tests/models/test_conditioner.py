"""Text and sizes as the network takes them, and caption dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_host.diffusion.conditioning import PromptEmbedding, unconditional
from sdxl_host.errors import ConfigError
from sdxl_host.models.conditioner import NUMBERS, ConcatTimestepEmbedderND, GeneralConditioner
from sdxl_host.models.layers import sinusoidal_embedding, sinusoids

SIZE_KEYS = tuple(NUMBERS)[:3]  # the base model's
BATCH, LENGTH, OUTDIM = 4, 90, 6
CLIP_WIDTH, OPEN_CLIP_WIDTH = 6, 10
U = np.array([0.05, 0.25, 0.45, 0.85])  # one uniform a sample


def clip(**changes: Any) -> dict[str, Any]:
    params = {"layer_idx": 1, "width": CLIP_WIDTH, "layers": 1, "heads": 1}
    node = {"target": "sdxl_host.FrozenCLIPEmbedder", "input_key": "txt", "params": params}
    return node | {"is_trainable": False} | changes


def open_clip(**changes: Any) -> dict[str, Any]:
    params = {"width": OPEN_CLIP_WIDTH, "layers": 1, "heads": 1}
    node = {"target": "sdxl_host.FrozenOpenCLIPEmbedder2", "input_key": "txt", "params": params}
    return node | changes


def size(key: str, **changes: Any) -> dict[str, Any]:
    node = {"target": "sdxl_host.ConcatTimestepEmbedderND", "params": {"outdim": OUTDIM}}
    return node | {"input_key": key} | changes


def make(
    first: float = 0.0, second: float = 0.0, sizes: tuple[float, ...] = (0.0, 0.0, 0.0)
) -> GeneralConditioner:
    """SDXL's five embedders at a small size, each with its ucg_rate."""
    nodes = [clip(ucg_rate=first), open_clip(ucg_rate=second)]
    nodes += [size(key, ucg_rate=rate) for key, rate in zip(SIZE_KEYS, sizes, strict=True)]
    return GeneralConditioner(nodes)


@pytest.fixture
def embedding() -> PromptEmbedding:
    """Four prompts over 90 positions, of which the first 80 are attended."""
    generator = np.random.default_rng(0)
    context = generator.standard_normal((BATCH, LENGTH, CLIP_WIDTH + OPEN_CLIP_WIDTH))
    pooled = generator.standard_normal((BATCH, OPEN_CLIP_WIDTH))
    mask = np.tile(np.arange(LENGTH) < 80, (BATCH, 1))
    return PromptEmbedding(context.astype(np.float32), pooled.astype(np.float32), mask)


@pytest.fixture
def sizes() -> dict[str, np.ndarray]:
    numbers = np.arange(BATCH * 6).reshape(3, BATCH, 2) * 37 + 64
    return dict(zip(SIZE_KEYS, numbers, strict=True))


pytestmark = pytest.mark.usefixtures("device")


# ---- sinusoids and the vector


@pytest.mark.parametrize("width", [16, 320])
def test_golden_sinusoids(golden: Path, width):
    """cos then sin, max period 10000; float32 bounds how well an angle of 4099 is known."""
    with np.load(golden / "timestep_embedding.npz") as file:
        values, expected = file["values"], file[f"embedding_{width}"]
    actual = sinusoids(values, width)
    assert actual.dtype == np.float32
    allowed = 3e-7 * np.maximum(values, 1)[:, None]
    assert (np.abs(actual - expected) <= allowed).all()


@pytest.mark.parametrize("width", [16, 320])
def test_golden_sinusoids_of_a_tensor(golden: Path, width):
    """The network computes its own in the same way."""
    from mindspore import Tensor

    with np.load(golden / "timestep_embedding.npz") as file:
        values, expected = file["values"], file[f"embedding_{width}"]
    actual = sinusoidal_embedding(Tensor(values.astype(np.float32)), width).asnumpy()
    assert (np.abs(actual - expected) <= 3e-7 * np.maximum(values, 1)[:, None]).all()


def test_sinusoids_are_cosines_then_sines_of_falling_frequencies():
    """Entry i of each half has the angular frequency 10000^(-i / half)."""
    frequencies = 10000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate([np.cos(3.5 * frequencies), np.sin(3.5 * frequencies)])
    np.testing.assert_allclose(sinusoids(np.array(3.5), 8), expected, atol=1e-6)


def test_vector_layout(embedding, sizes):
    """Pooled text, then original size, crop and target size: height's sinusoids before width's."""
    vector = make().vector(embedding, sizes)
    parts = [embedding.pooled]
    parts += [sinusoids(sizes[key][:, axis], OUTDIM) for key in SIZE_KEYS for axis in (0, 1)]
    assert vector.dtype == np.float32
    assert np.array_equal(vector, np.concatenate(parts, axis=1))


def test_context_is_clip_then_open_clip():
    """The encoders answer in the order in which the config lists them."""
    encoders = make().encoders
    assert [encoder.width for encoder in encoders] == [CLIP_WIDTH, OPEN_CLIP_WIDTH]
    assert [encoder.pooled_width for encoder in encoders] == [0, OPEN_CLIP_WIDTH]
    assert [encoder.pad for encoder in encoders] == [49407, 0]


def test_parameter_names_tell_the_encoders_apart():
    """conditioner.embedders.0 and .1: a graph refuses two parameters of one name."""
    names = [p.name for e in make().encoders for p in e.cell.get_parameters()]
    assert len(set(names)) == len(names)
    starts = {name.split(".")[2] for name in names}
    assert starts == {"0", "1"}


# ---- caption dropout


def test_rate_0_drops_nothing(embedding, sizes):
    conditioner = make()
    vector = conditioner.vector(embedding, sizes)
    kept, same = conditioner.drop(embedding, vector, U)
    assert np.array_equal(kept.context, embedding.context)
    assert np.array_equal(kept.pooled, embedding.pooled)
    assert np.array_equal(kept.mask, embedding.mask)
    assert np.array_equal(same, vector)


def test_rate_1_is_the_unconditional_embedding(embedding, sizes):
    """Every sample becomes what guidance subtracts from at inference, its sizes kept."""
    conditioner = make(1.0, 1.0)
    dropped, vector = conditioner.drop(embedding, conditioner.vector(embedding, sizes), U)
    zero = unconditional(embedding)
    assert np.array_equal(dropped.context, zero.context)
    assert np.array_equal(dropped.pooled, zero.pooled)
    assert np.array_equal(dropped.mask, zero.mask)
    assert np.array_equal(vector, conditioner.vector(zero, sizes))


def test_a_dropped_row_attends_the_first_77(embedding, sizes):
    """And no kept row's mask changes."""
    conditioner = make(0.3, 0.3)
    dropped, _ = conditioner.drop(embedding, conditioner.vector(embedding, sizes), U)
    assert dropped.mask.sum(axis=1).tolist() == [77, 77, 80, 80]
    assert dropped.mask[:, :77].all()


def test_without_a_mask_none_is_made(embedding, sizes):
    plain = PromptEmbedding(embedding.context, embedding.pooled)
    conditioner = make(0.3, 0.3)
    dropped, _ = conditioner.drop(plain, conditioner.vector(plain, sizes), U)
    assert dropped.mask is None
    assert (dropped.context[:2] == 0).all()


def test_each_embedder_has_its_own_rate(embedding, sizes):
    """One uniform a sample, compared with each rate: what a lower rate drops, a higher one does.

    u is 0.05, 0.25, 0.45, 0.85; the rates 0.1, 0.3 and 0.5, 0.9, 0.
    """
    conditioner = make(0.1, 0.3, (0.5, 0.9, 0.0))
    before = conditioner.vector(embedding, sizes)
    dropped, vector = conditioner.drop(embedding, before, U)

    def zeroed(part: np.ndarray) -> list[bool]:
        flat = part.reshape(BATCH, -1)
        assert ((flat == 0).all(axis=1) | (flat != 0).any(axis=1)).all()
        return (flat == 0).all(axis=1).tolist()

    assert zeroed(dropped.context[..., :CLIP_WIDTH]) == [True, False, False, False]
    assert zeroed(dropped.context[..., CLIP_WIDTH:]) == [True, True, False, False]
    assert zeroed(dropped.pooled) == [True, True, False, False]
    ends = np.cumsum([OPEN_CLIP_WIDTH, 2 * OUTDIM, 2 * OUTDIM, 2 * OUTDIM])
    parts = np.split(vector, ends[:-1], axis=1)
    assert [sum(zeroed(part)) for part in parts] == [2, 3, 4, 0]
    assert np.array_equal(parts[0], dropped.pooled)
    assert np.array_equal(parts[3], before[:, ends[2] :])
    # Only where no text is left does the mask become the unconditional one.
    assert dropped.mask.sum(axis=1).tolist() == [77, 80, 80, 80]


def test_a_uniform_equal_to_the_rate_is_kept(embedding, sizes):
    """u < rate drops, so a rate of 0 never does and P(drop) is the rate."""
    conditioner = make(0.25, 0.25)
    dropped, _ = conditioner.drop(embedding, conditioner.vector(embedding, sizes), U)
    assert (dropped.context == 0).all(axis=(1, 2)).tolist() == [True, False, False, False]


def test_dropping_changes_nothing_it_was_given(embedding, sizes):
    conditioner = make(1.0, 1.0, (1.0, 1.0, 1.0))
    vector = conditioner.vector(embedding, sizes)
    given = [
        array.copy() for array in (embedding.context, embedding.pooled, embedding.mask, vector)
    ]
    conditioner.drop(embedding, vector, U)
    for array, kept in zip(
        (embedding.context, embedding.pooled, embedding.mask, vector), given, strict=True
    ):
        assert np.array_equal(array, kept)


# ---- refusals

WHERE = r"model\.params\.conditioner_config\.params\.emb_models"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (clip(is_trainable=True), r"\.is_trainable: True is not supported"),
        (clip(legacy_ucg_value=""), r"\.legacy_ucg_value is not supported"),
        (clip(ucg_rate=1.5), r"\.ucg_rate: 1.5 is out of range"),
        (clip(ucg_rate=-0.1), r"\.ucg_rate: -0.1 is out of range"),
        (clip(input_key="caption"), r"\.input_key: 'caption' does not fit"),
        (clip(input_key=SIZE_KEYS[0]), r"\.input_key: 'original_size_as_tuple' does not fit"),
        (size("txt"), r"\.input_key: 'txt' does not fit"),
        (size("size"), r"\.input_key: 'size' does not fit"),
    ],
)
def test_refused_at_its_place(node, message):
    """A message begins with the embedder's place in the config."""
    with pytest.raises(ValueError, match=rf"^{WHERE}\[1\]{message}"):
        GeneralConditioner([open_clip(), node])


def test_an_odd_outdim_is_refused():
    """Half of the width are cosines and half are sines."""
    node = size(SIZE_KEYS[0], params={"outdim": 7})
    with pytest.raises(ConfigError, match=rf"^{WHERE}\[1\]\.params: .*outdim must be even, not 7"):
        GeneralConditioner([open_clip(), node])
    with pytest.raises(ValueError, match="outdim must be even, not 0"):
        ConcatTimestepEmbedderND(0)


def test_text_after_sizes_is_refused():
    """The vector's layout is pooled text first."""
    with pytest.raises(ValueError, match=rf"^{WHERE}\[2\]: text embedders come before the sizes"):
        GeneralConditioner([open_clip(), size(SIZE_KEYS[0]), clip()])


def test_no_text_embedder_is_refused():
    with pytest.raises(ValueError, match="at least one text embedder is needed"):
        GeneralConditioner([size(SIZE_KEYS[0])])
