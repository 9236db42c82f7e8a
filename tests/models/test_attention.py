"""Attention against a float64 softmax, masks that let nothing through, and the exact GELU."""

from __future__ import annotations

import inspect
import math
import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from sdxl_host.models import attention as module
from sdxl_host.models.attention import (
    GEGLU,
    BlockwiseAttention,
    CrossAttention,
    SelfAttention,
    SpatialTransformer,
    attention,
    attention_in_use,
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


# ---- blocks of queries


def blockwise_case(length: int, keys: int) -> tuple[np.ndarray, ...]:
    """Query, key, value and the slope of the output for 3 rows of width 8, float32."""
    generator = np.random.default_rng(length)
    shapes = [(3, length, 8), (3, keys, 8), (3, keys, 8), (3, length, 8)]
    return tuple(generator.standard_normal(shape).astype(np.float32) for shape in shapes)


def softmax_gradients(query, key, value, slope) -> tuple[np.ndarray, ...]:
    """Output, and the gradients of sum(output * slope), in float64 from the whole matrix."""
    q, k, v, g = (x.astype(np.float64) for x in (query, key, value, slope))
    weights = np.exp(q @ k.swapaxes(1, 2))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = g @ v.swapaxes(1, 2)
    centre = (d_weights * weights).sum(axis=-1, keepdims=True)
    d_scores = weights * (d_weights - centre)
    return (
        weights @ v,
        d_scores @ k,
        d_scores.swapaxes(1, 2) @ q,
        weights.swapaxes(1, 2) @ g,
    )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("length", "keys", "block"), [(12, 12, 12), (12, 12, 5), (7, 12, 1)], ids=str
)
def test_blocks_give_the_softmax_and_its_gradients(monkeypatch, jit, length, keys, block):
    """One block, blocks that do not divide the length, and blocks of one query."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 3 * keys * block)
    case = blockwise_case(length, keys)
    cell = BlockwiseAttention()

    class Weighted(nn.Cell):
        def __init__(self):
            super().__init__()
            self.inner = cell

        def construct(self, query, key, value, slope):
            out = self.inner(query, key, value)
            return (out * slope).sum(), out

    function = ms.value_and_grad(Weighted(), (0, 1, 2), has_aux=True)
    if jit:
        function = ms.jit(function)
    (_, out), gradients = function(*map(Tensor, case))
    for made, expected in zip((out, *gradients), softmax_gradients(*case), strict=True):
        np.testing.assert_allclose(made.asnumpy(), expected, atol=5e-6)


def test_the_scores_of_a_long_sequence_are_never_whole(monkeypatch):
    """4096 tokens, 10 heads of SDXL: no product exceeds the limit, in either pass."""
    sizes: list[int] = []
    cell = BlockwiseAttention()

    def recording(product):
        def multiply(a, b):
            result = product(a, b)
            sizes.append(4 * result.size)
            return result

        return multiply

    for name in ("multiply", "multiply_transposed", "transposed_multiply"):
        monkeypatch.setattr(cell, name, recording(getattr(cell, name)))
    x = Tensor(np.zeros((10, 4096, 2), np.float32))
    out = cell.construct(x, x, x)
    cell.bprop(x, x, x, out, out)
    assert len(sizes) == 10 * 2 + 10 * 5  # ten blocks
    assert max(sizes) < 1.01 * module._BLOCK_BYTES < 10 * 4096 * 4096


def test_self_attention_is_cross_attention_to_itself():
    cell, other = SelfAttention(12, 3), CrossAttention(12, 12, 3)
    generator = np.random.default_rng(1)
    for mine, theirs in zip(cell.get_parameters(), other.get_parameters(), strict=True):
        values = Tensor(generator.standard_normal(mine.shape).astype(np.float32))
        mine.set_data(values)
        theirs.set_data(values)
    x = Tensor(generator.standard_normal((2, 9, 12)).astype(np.float32))
    np.testing.assert_allclose(cell(x).asnumpy(), other(x, x, None).asnumpy(), atol=1e-5)


# ---- Ascend's operator, which can't run here


def flash_attention_stand_in(
    query,
    key,
    value,
    head_num,
    real_shift=None,
    drop_mask=None,
    padding_mask=None,
    attn_mask=None,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    keep_prob=1.0,
    scalar_value=1.0,
    pre_tokens=2147483647,
    next_tokens=2147483647,
    inner_precise=0,
    input_layout="BSH",
    sparse_mode=0,
):
    """What the docstring of mindspore.ops.flash_attention_score says, in numpy."""
    for tensor in (query, key, value):
        if tensor.dtype not in (ms.float16, ms.bfloat16):
            raise TypeError(
                f"flash_attention_score: takes float16 and bfloat16, not {tensor.dtype}"
            )
    assert sparse_mode == 0
    q, k, v = (tensor.asnumpy().astype(np.float64) for tensor in (query, key, value))
    if input_layout == "BSH":
        q, k, v = (x.reshape(*x.shape[:2], head_num, -1).swapaxes(1, 2) for x in (q, k, v))
    elif input_layout == "BSND":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    else:
        assert input_layout == "BNSD"
    if q.shape[-1] % 16:
        raise ValueError(f"head size {q.shape[-1]} is no multiple of 16")
    scores = scalar_value * (q @ k.swapaxes(2, 3))
    if attn_mask is not None:
        scores = np.where(attn_mask.asnumpy().astype(bool), -np.inf, scores)  # 1: discard
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
    if input_layout != "BNSD":
        mixed = mixed.swapaxes(1, 2)
    return Tensor(mixed.reshape(query.shape).astype(np.float16))


def test_the_stand_in_has_the_installed_signature():
    installed = inspect.signature(ops.flash_attention_score)
    assert installed == inspect.signature(flash_attention_stand_in)


def test_flash_attention_is_plain_attention(monkeypatch):
    """Scale, layout and heads are those of the plain form, to float16's rounding."""
    monkeypatch.setattr(ops, "flash_attention_score", flash_attention_stand_in)
    generator = np.random.default_rng(2)
    x = [generator.standard_normal((2, n, 64)).astype(np.float16) for n in (9, 5, 5)]
    made = module.flash_attention(*map(Tensor, x), 4).asnumpy()
    plain = attention(*[Tensor(each.astype(np.float32)) for each in x], 4, None).asnumpy()
    np.testing.assert_allclose(made, plain, atol=2e-3)


@pytest.mark.parametrize(("flash", "dtype", "used"), [
    (True, ms.float16, True), (True, ms.float32, False), (False, ms.float16, False),
])  # fmt: skip
def test_self_attention_takes_the_operator_where_it_may(monkeypatch, flash, dtype, used):
    """In float16 where the cell was built for it; in float32 the plain form, never an error."""
    calls: list[int] = []

    def operator(*arguments, **options):
        calls.append(1)
        return flash_attention_stand_in(*arguments, **options)

    monkeypatch.setattr(ops, "flash_attention_score", operator)
    cell = SelfAttention(32, 2, flash).to_float(dtype)
    for part in (cell.to_q, cell.to_k, cell.to_v, cell.to_out[0]):
        part.to_float(dtype)
    x = Tensor(np.random.default_rng(3).standard_normal((1, 5, 32)), dtype)
    out = cell(x)
    assert out.dtype == dtype
    assert bool(calls) == used


@pytest.mark.parametrize(
    ("configured", "device_name", "half", "width", "begins"),
    [
        ("flash-attention", "Ascend", True, 64, "flash-attention$"),
        ("flash-attention", "Ascend", False, 64, "plain, .* needs float16 or bfloat16"),
        (
            "flash-attention",
            "Ascend",
            True,
            24,
            "plain, .* needs heads of a multiple of 16 channels",
        ),
        ("flash-attention", "CPU", False, 24, "plain, .* needs an Ascend device"),
        ("vanilla", "Ascend", True, 64, "plain, in blocks where sequences are long$"),
    ],
)
def test_what_is_used_is_said(configured, device_name, half, width, begins):
    said = attention_in_use(configured, device_name, half, width)
    assert re.match(begins, said)
