"""Both text encoders and the tokenizer against the originals; what is refused and remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from sdxl_host.diffusion.conditioning import TextEncoders, encode_truncated
from sdxl_host.models.conditioner import FrozenEncoder
from sdxl_host.models.text_encoders import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
)
from sdxl_host.models.tokenizer import tokenize

PARITY = 2e-5  # of the output's peak; the contract is 1e-4
SIZE = {"width": 64, "layers": 4, "heads": 4}
TINY = {"width": 8, "layers": 2, "heads": 2}


def golden_arrays(golden: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(golden / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def clip(fill: Callable) -> FrozenCLIPEmbedder:
    """The network of clip_l.npz: 4 layers, of which the third's output counts."""
    cell = FrozenCLIPEmbedder(layer_idx=3, **SIZE).set_train(False)
    fill(cell, "conditioner.embedders.0.")
    return cell


@pytest.fixture(scope="module")
def open_clip(fill: Callable) -> FrozenOpenCLIPEmbedder2:
    """The network of open_clip_g.npz."""
    cell = FrozenOpenCLIPEmbedder2(**SIZE).set_train(False)
    fill(cell, "conditioner.embedders.1.")
    return cell


def run(cell: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    hidden, pooled = cell(Tensor(ids.astype(np.int32)))
    return hidden.asnumpy(), None if pooled is None else pooled.asnumpy()


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= PARITY * np.abs(expected).max()


# ---- the originals' arithmetic


def test_golden_clip_l(golden, clip):
    """The hidden states are the penultimate layer's without the final norm; nothing is pooled."""
    arrays = golden_arrays(golden, "clip_l")
    hidden, pooled = run(clip, arrays["ids"])
    close(hidden, arrays["hidden"])
    assert pooled is None


def test_golden_open_clip_g(golden, open_clip):
    """Hidden as for CLIP-L; pooled is the final norm at the first end of text, projected."""
    arrays = golden_arrays(golden, "open_clip_g")
    hidden, pooled = run(open_clip, arrays["ids"])
    close(hidden, arrays["hidden"])
    assert pooled is not None
    close(pooled, arrays["pooled"])


def test_pooled_at_the_first_end_of_text(golden, open_clip):
    """What stands behind the first end of text, further ends included, is not pooled."""
    ids = golden_arrays(golden, "open_clip_g")["ids"]
    padded = ids.copy()
    for row in padded:
        row[np.flatnonzero(row == END_OF_TEXT)[0] + 1 :] = END_OF_TEXT
    assert (padded != ids).any(axis=1).sum() == 3  # the fourth row is full
    hidden, pooled = run(open_clip, ids)
    other_hidden, other_pooled = run(open_clip, padded)
    assert not np.array_equal(hidden, other_hidden)
    np.testing.assert_allclose(pooled, other_pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ["clip", "open_clip"])
def test_attention_is_causal(golden, request, encoder):
    """A position is a function of itself and of those before it, bit for bit."""
    cell = request.getfixturevalue(encoder)
    ids = golden_arrays(golden, "clip_l")["ids"][2:3]
    later = ids.copy()
    later[0, 20] = 1000
    first, second = run(cell, ids)[0][0], run(cell, later)[0][0]
    assert np.array_equal(first[:20], second[:20])
    assert (first[20:] != second[20:]).any(axis=1).all()


def test_layer_idx_counts_the_embeddings_as_0(golden, clip, fill):
    """layer_idx 0 gives the embeddings, 3 of 4 the penultimate layer, 4 the last."""
    ids = golden_arrays(golden, "clip_l")["ids"][:1]
    states = {}
    for layer_idx in (0, 4):
        cell = FrozenCLIPEmbedder(layer_idx=layer_idx, **SIZE).set_train(False)
        fill(cell, "conditioner.embedders.0.")
        states[layer_idx] = run(cell, ids)[0]
    embeddings = clip.transformer.text_model.embeddings
    table = embeddings.token_embedding.embedding_table.asnumpy()
    positions = embeddings.position_embedding.embedding_table.asnumpy()
    assert np.array_equal(states[0][0], table[ids[0]] + positions)
    third = run(clip, ids)[0]
    last = clip.transformer.text_model.encoder.layers[3]
    np.testing.assert_allclose(last(Tensor(third), clip.bias).asnumpy(), states[4], atol=1e-6)
    assert np.abs(third - states[4]).max() > 0.1


# ---- tokens


def test_golden_tokens(golden):
    """begin, up to 75 tokens, end, padded with CLIP-L's id: transformers' ids exactly."""
    arrays = golden_arrays(golden, "tokenizer")
    recorder = Recorder(pad=END_OF_TEXT)
    texts = [str(text) for text in arrays["texts"]]
    encode_truncated(texts, TextEncoders([recorder]))
    for text, actual, expected in zip(texts, recorder.ids, arrays["ids"], strict=True):
        assert actual.tolist() == expected.tolist(), text


def test_tokens_of_a_photo_of_a_cat():
    assert tokenize("a photo of a cat") == [320, 1125, 539, 320, 2368]


def test_tokens_are_not_cut():
    """The tokenizer gives all of them; who encodes decides what to cut."""
    assert len(tokenize("cat " * 500)) == 500
    assert tokenize("") == []


@pytest.mark.parametrize(("count", "kept"), [(74, 74), (75, 75), (76, 75), (300, 75)])
def test_plain_layout(count, kept):
    """begin, 75 tokens at the most, end, then the encoder's own padding."""
    recorder = Recorder(pad=0)
    encode_truncated(["cat " * count], TextEncoders([recorder]))
    expected = [BEGIN_OF_TEXT, *[2368] * kept, END_OF_TEXT]
    assert recorder.ids[0].tolist() == expected + [0] * (77 - len(expected))


class Recorder:
    """An encoder that keeps the ids it is given."""

    begin, end, length, width, pooled_width = BEGIN_OF_TEXT, END_OF_TEXT, 77, 1, 1

    def __init__(self, pad: int) -> None:
        self.pad = pad
        self.ids = np.empty((0, 77))

    def tokenize(self, text: str) -> list[int]:
        return tokenize(text)

    def encode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.ids = ids
        return np.zeros((len(ids), 77, 1), np.float32), np.zeros((len(ids), 1), np.float32)


# ---- behind the numpy interface


@pytest.mark.parametrize("encoder", ["clip", "open_clip"])
def test_frozen_encoder_gives_the_same_bits_in_any_batch(golden, request, encoder):
    """A row alone, in a batch, in another order and remembered: equal bit for bit."""
    cell = request.getfixturevalue(encoder)
    ids = golden_arrays(golden, "clip_l")["ids"].astype(np.int32)
    order = [2, 0, 0, 3]
    whole, whole_pooled = FrozenEncoder(cell).encode(ids)
    frozen = FrozenEncoder(cell)
    for rows in ([1], order, order, [1]):
        hidden, pooled = frozen.encode(ids[rows])
        assert np.array_equal(hidden, whole[rows])
        if encoder == "clip":
            assert pooled is None
        else:
            assert np.array_equal(pooled, whole_pooled[rows])


def test_frozen_encoder_is_the_cell(golden, open_clip):
    ids = golden_arrays(golden, "open_clip_g")["ids"]
    hidden, pooled = FrozenEncoder(open_clip).encode(ids)
    close(hidden, run(open_clip, ids)[0])
    close(pooled, run(open_clip, ids)[1])


def test_frozen_encoder_remembers(device):
    """A row encoded before is not encoded again."""
    cell = Counting()
    frozen = FrozenEncoder(cell)
    ids = np.arange(4)[:, None] + np.zeros((4, 77), np.int32)
    for rows in ([0, 1, 0], [1, 2], [0, 1, 2]):
        frozen.encode(ids[rows].astype(np.int32))
    assert cell.calls == 3


def test_changing_a_result_does_not_change_what_is_remembered(open_clip, golden):
    """What `encode` returns belongs to the caller."""
    ids = golden_arrays(golden, "open_clip_g")["ids"][:1]
    frozen = FrozenEncoder(open_clip)
    hidden, pooled = frozen.encode(ids)
    kept = hidden.copy(), pooled.copy()
    hidden[:] = pooled[:] = 0
    again = frozen.encode(ids)
    assert np.array_equal(again[0], kept[0])
    assert np.array_equal(again[1], kept[1])


class Counting:
    """Stands for a text encoder cell; counts its calls."""

    pad, width, pooled_width = 0, 2, 0

    def __init__(self) -> None:
        self.calls = 0

    def set_train(self, mode: bool) -> Counting:
        assert mode is False
        return self

    def __call__(self, ids: Tensor) -> tuple[Tensor, None]:
        self.calls += 1
        return Tensor(np.zeros((*ids.shape, 2), np.float32)), None


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"version": "openai/clip-vit-base-patch32"},
            "'openai/clip-vit-base-patch32' is not known",
        ),
        (TINY | {"layer": "last"}, "layer must be"),
        (TINY | {"layer_idx": 3}, r"layer_idx must lie in 0\.\.2, not 3"),
        (TINY | {"layer_idx": -1}, r"layer_idx must lie in 0\.\.2, not -1"),
        ({"width": 8}, "width, layers and heads must be given together"),
        (TINY | {"heads": 3}, "width 8 must be a multiple of heads 3"),
    ],
)
def test_refused_by_clip(device, settings, message):
    with pytest.raises(ValueError, match=f"FrozenCLIPEmbedder: {message}"):
        FrozenCLIPEmbedder(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "ViT-H-14"}, "'ViT-H-14' is not known"),
        (TINY | {"layer": "last"}, "layer must be 'penultimate'"),
        (TINY | {"always_return_pooled": False}, "always_return_pooled must be True"),
        (TINY | {"freeze": False}, "freeze must be True"),
        (TINY | {"legacy": True}, "legacy must be False"),
        (TINY | {"require_pretrained": True}, "require_pretrained must be False"),
        ({"layers": 2}, "width, layers and heads must be given together"),
    ],
)
def test_refused_by_open_clip(device, settings, message):
    with pytest.raises(ValueError, match=f"FrozenOpenCLIPEmbedder2: {message}"):
        FrozenOpenCLIPEmbedder2(**settings)


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (
            FrozenCLIPEmbedder,
            {
                "transformer.text_model.embeddings.token_embedding.weight": (49408, 8),
                "transformer.text_model.embeddings.position_embedding.weight": (77, 8),
                "transformer.text_model.encoder.layers.1.self_attn.k_proj.bias": (8,),
                "transformer.text_model.encoder.layers.0.mlp.fc1.weight": (32, 8),
                "transformer.text_model.encoder.layers.0.layer_norm2.weight": (8,),
                "transformer.text_model.final_layer_norm.bias": (8,),
            },
        ),
        (
            FrozenOpenCLIPEmbedder2,
            {
                "model.positional_embedding": (77, 8),
                "model.text_projection": (8, 8),
                "model.logit_scale": (),
                "model.token_embedding.weight": (49408, 8),
                "model.transformer.resblocks.1.attn.in_proj_weight": (24, 8),
                "model.transformer.resblocks.1.attn.in_proj_bias": (24,),
                "model.transformer.resblocks.0.attn.out_proj.weight": (8, 8),
                "model.transformer.resblocks.0.mlp.c_proj.weight": (8, 32),
                "model.transformer.resblocks.0.ln_1.bias": (8,),
                "model.ln_final.weight": (8,),
            },
        ),
    ],
)
def test_names_of_the_single_file(fill, cls, names):
    """36 and 30 tensors of two layers, under the single file's names."""
    parameters = fill(cls(**TINY | ({"layer_idx": 1} if cls is FrozenCLIPEmbedder else {})), "")
    assert {name: tuple(parameters[name].shape) for name in names} == names
    # Beside the layers: embeddings and final norm; in bigG also projection and scale.
    assert len(parameters) == (2 * 16 + 4 if cls is FrozenCLIPEmbedder else 2 * 12 + 6)
