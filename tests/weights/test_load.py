"""Weights: their names, files that are read strictly, and initial values."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from safetensors import safe_open

from sdxl_host.errors import DataError
from sdxl_host.files.arrays import read_arrays, write_arrays
from sdxl_host.models.initialization import initialize_network, initialize_text_encoder
from sdxl_host.models.text_encoders import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder2
from sdxl_host.models.unet import UNetModel
from sdxl_host.weights.architecture import NETWORK_PREFIX
from sdxl_host.weights.load import load
from sdxl_host.weights.names import single_file_parameters
from sdxl_host.weights.source import Source

pytestmark = pytest.mark.usefixtures("device")

Arrays = dict[str, np.ndarray]


class Inner(nn.Cell):
    """A norm of each kind, and a parameter of its own called as MindSpore calls a norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm((4,))
        self.group = nn.GroupNorm(2, 4)
        self.gamma = Parameter(Tensor(np.zeros(3, np.float32)))


class Outer(nn.Cell):
    """Every kind of layer that the networks have, two deep."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.parts = nn.SequentialCell(nn.Dense(4, 4), nn.SiLU(), nn.Conv2d(4, 2, 1, has_bias=True))
        self.inner = Inner()
        self.beta = Parameter(Tensor(np.zeros((2, 2), np.float32)))


SHAPES = {
    "embedding.weight": (5, 4),
    "parts.0.weight": (4, 4),
    "parts.0.bias": (4,),
    "parts.2.weight": (2, 4, 1, 1),
    "parts.2.bias": (2,),
    "inner.layer.weight": (4,),
    "inner.layer.bias": (4,),
    "inner.group.weight": (4,),
    "inner.group.bias": (4,),
    "inner.gamma": (3,),
    "beta": (2, 2),
}


def values_of(parameters: dict[str, Parameter]) -> Arrays:
    return {name: parameter.asnumpy().copy() for name, parameter in parameters.items()}


def random_arrays(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    generator = np.random.default_rng(0)
    return {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


# ---- names


def test_names_are_mapped_by_layer_type():
    """A norm's gamma and beta and an embedding's table; a parameter called gamma stays gamma."""
    found = single_file_parameters(Outer())
    assert {name: tuple(parameter.shape) for name, parameter in found.items()} == SHAPES


def test_names_begin_with_the_prefix():
    names = single_file_parameters(Outer(), "model.diffusion_model.")
    assert set(names) == {f"model.diffusion_model.{name}" for name in SHAPES}


def test_every_parameter_has_one_name():
    cell = Outer()
    found = single_file_parameters(cell)
    assert {id(p) for p in found.values()} == {id(p) for p in cell.get_parameters()}
    assert len(found) == len(list(cell.get_parameters()))


def test_names_do_not_change_with_mindspore_s_own():
    """MindSpore's names are made unique in a graph; the file's are those of the structure."""
    cell = Outer()
    cell.update_parameters_name("somewhere.")
    assert set(single_file_parameters(cell)) == set(SHAPES)


# ---- loading from a source


def changed(shapes: dict[str, tuple[int, ...]], change: dict) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in (shapes | change).items() if shape is not None}


MISFITS = pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner.gamma": None}, "lacks inner.gamma; use"),
        ({"zeta": (2,)}, "holds weights that the model does not have: zeta; use"),
        (
            {"parts.0.bias": (5,), "beta": (2,)},
            "holds weights of another shape: beta (2,) instead of (2, 2), parts.0.bias (5,) "
            "instead of (4,); use",
        ),
        ({"parts.0.weight": (16,)}, "parts.0.weight (16,) instead of (4, 4); use"),
        (
            {name: None for name in SHAPES if name.startswith(("inner.", "parts.2."))},
            "lacks all 2 of parts.2., all 5 of inner.; use",
        ),
        (
            {"inner.group.weight": None, "inner.group.bias": None, "parts.0.bias": None},
            "lacks parts.0.bias, all 2 of inner.group.; use",
        ),
        (
            {"ema.a": (1,), "ema.b.c": (1,), "inner.more": (1,)},
            "does not have: all 2 of ema., inner.more; use",
        ),
        (
            dict.fromkeys(SHAPES),
            "lacks beta, embedding.weight, all 4 of parts., all 5 of inner.; use",
        ),
        (
            {"beta": None, "alpha": (1,), "parts.2.bias": (3,)},
            "lacks beta; holds weights that the model does not have: alpha; holds weights of "
            "another shape: parts.2.bias (3,) instead of (2,); use",
        ),
    ],
    ids=["missing", "unknown", "misshapen", "flat", "parts", "pairs", "extra", "empty", "all"],
)


def source_of(arrays: Arrays, seen: list[str] | None = None) -> Source:
    """A source that holds these; `seen` gets the names in the order they are read."""

    def read(name: str) -> np.ndarray:
        if seen is not None:
            seen.append(name)
        return arrays[name]

    shapes = {name: array.shape for name, array in arrays.items()}
    return Source(shapes, dict.fromkeys(shapes, "fp32"), read, description="w.safetensors")


def test_load_sets_every_parameter():
    parameters = single_file_parameters(Outer())
    arrays = random_arrays(SHAPES)
    arrays["beta"] = arrays["beta"].astype(np.float16)
    arrays["parts.0.bias"] = arrays["parts.0.bias"].astype(ml_dtypes.bfloat16)
    arrays["inner.gamma"] = arrays["inner.gamma"].astype(np.float64)
    seen: list[str] = []
    load(parameters, source_of(arrays, seen))
    assert seen == list(parameters)
    for name, values in values_of(parameters).items():
        assert values.dtype == np.float32
        assert np.array_equal(values, arrays[name].astype(np.float32)), name


def test_load_takes_the_parts_it_is_given():
    """And reads nothing else, nor position_ids, which no cell has as a parameter."""
    parameters = single_file_parameters(Outer(), "net.")
    arrays = random_arrays({f"net.{name}": shape for name, shape in SHAPES.items()})
    arrays |= {"net.inner.embeddings.position_ids": np.arange(3), "other.x": np.zeros(1)}
    seen: list[str] = []
    load(parameters, source_of(arrays, seen), ["net."])
    assert seen == list(parameters)
    with pytest.raises(DataError, match=r"does not have: other\.x; use"):
        load(parameters, source_of(arrays))


@MISFITS
def test_load_is_strict(change, message):
    """The message names file and every weight, and nothing is changed unless all fit."""
    parameters = single_file_parameters(Outer())
    before = values_of(parameters)
    source = source_of(random_arrays(changed(SHAPES, change)))
    with pytest.raises(DataError, match=r"^w\.safetensors: .*model that the config") as raised:
        load(parameters, source)
    assert message in str(raised.value)
    for name, values in values_of(parameters).items():
        assert np.array_equal(values, before[name]), name


# ---- files


def test_files_round_trip(tmp_path):
    """Names, shapes, types and bits come back, and the metadata is in the file."""
    arrays = random_arrays(SHAPES) | {"half": np.arange(6, dtype=np.float16).reshape(2, 3)}
    arrays |= {"count": np.array(7, np.int32), "turned": random_arrays({"x": (3, 4)})["x"].T}
    path = tmp_path / "w.safetensors"
    write_arrays(path, arrays, {"format": "sdxl-host", "step": "3"})
    read = read_arrays(path)
    assert read.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert read[name].dtype == expected.dtype
        assert np.array_equal(read[name], expected), name
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "sdxl-host", "step": "3"}


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_pickled_files_are_never_read(tmp_path, suffix):
    """Not even one whose bytes are safetensors."""
    path = tmp_path / f"model{suffix}"
    write_arrays(path, {"x": np.zeros(2, np.float32)}, {})
    with pytest.raises(DataError, match=rf"model\{suffix}: .* may hold code .* convert it"):
        read_arrays(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"w\.safetensors: there is no such file"):
        read_arrays(tmp_path / "w.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 60, -4])
def test_a_truncated_file_is_named(tmp_path, kept):
    """Cut in its length, its header or its numbers."""
    path = tmp_path / "w.safetensors"
    write_arrays(path, random_arrays(SHAPES), {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"w\.safetensors: can't be read as safetensors .*again"):
        read_arrays(path)


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_text("<html>404</html> " * 20)
    with pytest.raises(DataError, match=r"w\.safetensors: can't be read as safetensors"):
        read_arrays(path)


# ---- initial weights


def make_unet() -> UNetModel:
    return UNetModel(
        in_channels=3,
        out_channels=3,
        model_channels=32,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[2],
        transformer_depth=[0, 1],
        num_head_channels=32,
        context_dim=16,
        adm_in_channels=24,
    )


@pytest.fixture(scope="module")
def initial(device: str) -> dict[int, Arrays]:
    """Initial weights of a small U-Net by seed; each of a network of its own."""
    made = {}
    for seed in (1, 2):
        unet = make_unet()
        parameters = single_file_parameters(unet, NETWORK_PREFIX)
        initialize_network(parameters, {id(p) for p in unet.zero_initialized()}, seed)
        made[seed] = values_of(parameters)
    return made


def test_initial_weights_are_functions_of_seed_and_name(initial):
    """The same again, whatever the order and whatever other parameters there are."""
    unet = make_unet()
    parameters = single_file_parameters(unet, NETWORK_PREFIX)
    backwards = dict(reversed(list(parameters.items())))
    for name in list(backwards)[::2]:
        del backwards[name]
    initialize_network(backwards, {id(p) for p in unet.zero_initialized()}, seed=1)
    assert len(backwards) > 30
    for name, values in values_of(backwards).items():
        assert np.array_equal(values, initial[1][name]), name


def test_initial_weights_differ_by_seed_and_by_name(initial):
    drawn = {n: v for n, v in initial[1].items() if v.ndim >= 2 and v.any()}
    assert len(drawn) > 30
    for name, values in drawn.items():
        assert not np.array_equal(values, initial[2][name]), name
    firsts = [values.ravel()[0] * np.prod(values.shape[1:]) ** 0.5 for values in drawn.values()]
    assert len(np.unique(np.round(firsts, 6))) == len(firsts)


def test_initial_weights_of_the_network(initial):
    """Uniform in +-1/sqrt(fan in), norms 1 and 0, biases 0, the ends of residuals 0."""
    ends = ("out_layers.3.weight", "proj_out.weight", ".out.2.weight")
    for name, values in initial[1].items():
        assert values.dtype == np.float32
        if values.ndim < 2:
            is_norm = name.endswith(("in_layers.0.weight", "out_layers.0.weight", "out.0.weight"))
            is_norm |= ".norm" in name and name.endswith("weight")
            assert (values == (1 if is_norm else 0)).all(), name
        elif name.endswith(ends):
            assert (values == 0).all(), name
        else:
            bound = np.prod(values.shape[1:]) ** -0.5
            assert 0.9 * bound < np.abs(values).max() <= bound * (1 + 1e-6), name
            assert np.abs(values.mean()) < 5 * bound / (3 * values.size) ** 0.5, name
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.1), name


def deviation(name: str, values: np.ndarray) -> float:
    """The standard deviation of a text encoder's matrix or table."""
    if name.endswith("token_embedding.weight"):
        return 1.0
    if "position" in name:
        return 0.3
    return values.shape[1] ** -0.5 * (3.0 if name.endswith("out_proj.weight") else 1.0)


@pytest.mark.parametrize("cls", [FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder2])
def test_initial_weights_of_a_text_encoder(cls):
    """Tokens have unit variance, positions less, matrices 1/fan in and attention's output more;
    norms are 1 and 0 and biases 0.

    All are functions of seed and name: two encoders of one seed are equal bit for bit.
    """
    index = {"layer_idx": 1} if cls is FrozenCLIPEmbedder else {}
    made = []
    for seed in (1, 1, 2):
        cell = cls(width=16, layers=1, heads=2, **index)
        parameters = single_file_parameters(cell)
        initialize_text_encoder(cell, parameters, seed)
        made.append(values_of(parameters))
    first, again, other = made
    for name, values in first.items():
        assert np.array_equal(values, again[name]), name
        if values.ndim >= 2:
            assert not np.array_equal(values, other[name]), name
            assert values.std() == pytest.approx(deviation(name, values), rel=0.15), name
        elif name.endswith("logit_scale"):
            assert values == pytest.approx(np.log(1 / 0.07), rel=1e-6)
        else:
            assert (values == (1 if name.endswith("weight") else 0)).all(), name
