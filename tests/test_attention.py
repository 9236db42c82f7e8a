"""Attention against a float64 softmax, masks that let nothing through, and the exact GELU."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mindspore import Tensor

from sdxl_host.models.attention import (
    GEGLU,
    CrossAttention,
    SpatialTransformer,
    attention,
    gelu,
    mask_bias,
)

pytestmark = pytest.mark.usefixtures("device")

BATCH, QUERIES, KEYS, CHANNELS = 2, 5, 7, 12
MASK = np.array([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]], np.float32)


def inputs(seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query (2, 5, 12), key and value (2, 7, 12), float32."""
    generator = np.random.default_rng(seed)
    lengths = (QUERIES, KEYS, KEYS)
    made = [generator.standard_normal((BATCH, n, CHANNELS)) * scale for n in lengths]
    return tuple(values.astype(np.float32) for values in made)


def reference(query, key, value, heads: int, mask: np.ndarray | None) -> np.ndarray:
    """softmax(q k^T / sqrt(width) over attended keys) v, head by head, in float64."""
    width = CHANNELS // heads
    output = np.zeros(query.shape)
    for row in range(BATCH):
        attended = np.ones(KEYS, bool) if mask is None else mask[row] > 0
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            q, k, v = (x[row, :, part].astype(np.float64) for x in (query, key, value))
            scores = q @ k[attended].T / math.sqrt(width)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            output[row, :, part] = weights @ v[attended]
    return output


def attend(query, key, value, heads: int, mask: np.ndarray | None) -> np.ndarray:
    bias = None if mask is None else mask_bias(Tensor(mask))
    return attention(Tensor(query), Tensor(key), Tensor(value), heads, bias).asnumpy()


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_attention_is_the_softmax_over_attended_keys(heads, mask):
    query, key, value = inputs()
    output = attend(query, key, value, heads, mask)
    np.testing.assert_allclose(output, reference(query, key, value, heads, mask), atol=2e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_masked_keys_have_no_influence(scale):
    """Whatever masked keys and values hold, not one bit of the output changes."""
    query, key, value = inputs(scale=scale)
    before = attend(query, key, value, 3, MASK)
    out = MASK == 0
    key[out] = inputs(1)[1][out] * 10
    value[out] = 1e6
    assert np.array_equal(attend(query, key, value, 3, MASK), before)


def test_one_attended_key_gives_its_value():
    query, key, value = inputs()
    output = attend(query, key, value, 3, MASK)
    assert np.array_equal(output[1], np.broadcast_to(value[1, 4], (QUERIES, CHANNELS)))


def test_scores_too_large_for_exp_are_finite():
    """The softmax subtracts the largest score: e^90 would overflow float32."""
    query, key, value = inputs(scale=40.0)
    output = attend(query, key, value, 1, None)
    assert np.isfinite(output).all()
    np.testing.assert_allclose(output, reference(query, key, value, 1, None), atol=1e-2)


def test_mask_bias_is_0_where_attended():
    """(B, L) -> (B, 1, L): 0, or a score far enough below every other, finite in float16."""
    bias = mask_bias(Tensor(MASK)).asnumpy()
    assert bias.shape == (BATCH, 1, KEYS)
    assert bias.dtype == np.float32
    assert (bias[:, 0][MASK == 1] == 0).all()
    assert (bias[:, 0][MASK == 0] < -1e4).all()
    assert np.isfinite(bias.astype(np.float16)).all()


def test_mask_bias_of_booleans():
    """A mask of booleans means the same as one of 0 and 1."""
    of_bools = mask_bias(Tensor(MASK.astype(bool))).asnumpy()
    assert np.array_equal(of_bools, mask_bias(Tensor(MASK)).asnumpy())


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """x * Phi(x) in float64, by the error function."""
    values = x.astype(np.float64)
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in values.ravel()])


def test_gelu_is_the_exact_one():
    """Within float32's rounding; the tanh form would be off by up to 5e-4."""
    x = np.linspace(-6, 6, 1201, dtype=np.float32)
    difference = np.abs(gelu(Tensor(x)).asnumpy() - exact_gelu(x)).max()
    assert difference < 2e-6


def test_geglu_gates_the_first_half_by_the_second():
    """proj(x) = (value, gate); the output is value * gelu(gate)."""
    cell = GEGLU(3, 5)
    generator = np.random.default_rng(2)
    weight = generator.standard_normal((10, 3)).astype(np.float32)
    cell.proj.weight.set_data(Tensor(weight))
    cell.proj.bias.set_data(Tensor(np.arange(10, dtype=np.float32) / 10))
    x = generator.standard_normal((2, 4, 3)).astype(np.float32)
    projected = x.astype(np.float64) @ weight.T + np.arange(10) / 10
    gated = projected[..., :5] * exact_gelu(projected[..., 5:]).reshape(2, 4, 5)
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), gated, atol=1e-5)


def test_self_attention_ignores_the_order_of_its_context():
    """Attention is a sum over keys: reordering key and value together changes rounding only."""
    query, key, value = inputs()
    order = np.random.default_rng(3).permutation(KEYS)
    first = attend(query, key, value, 3, MASK)
    second = attend(query, key[:, order], value[:, order], 3, MASK[:, order])
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_queries_keys_and_values_have_no_bias():
    """to_q, to_k and to_v have none, as in the original; to_out has one."""
    names = [name for name, _ in CrossAttention(8, 6, 2).parameters_and_names()]
    ends = ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]
    assert names == ends


def test_a_transformer_whose_projection_is_0_is_the_identity():
    """x + proj_out(...): the residual goes around norm and projections."""
    cell = SpatialTransformer(32, 2, 1, 6)
    cell.proj_out.weight.set_data(Tensor(np.zeros((32, 32), np.float32)))
    cell.proj_out.bias.set_data(Tensor(np.zeros(32, np.float32)))
    x = np.random.default_rng(4).standard_normal((2, 32, 2, 3)).astype(np.float32)
    context = Tensor(np.ones((2, 3, 6), np.float32))
    output = cell(Tensor(x), context, mask_bias(Tensor(np.ones((2, 3), np.float32))))
    assert np.array_equal(output.asnumpy(), x)
