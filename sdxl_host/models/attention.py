"""Attention, and the transformer that the U-Net puts between its convolutions.

Parameter names are those of the original single file (`attn1.to_q`, `ff.net.0.proj`, ...).
"""

# MindSpore declares that calling a cell may give None.
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from sdxl_host.models.layers import Dense

__all__ = [
    "ATTENTION_TYPES",
    "FLASH_WIDTH",
    "BlockwiseAttention",
    "CrossAttention",
    "SelfAttention",
    "SpatialTransformer",
    "attention",
    "attention_in_use",
    "flash_attention",
    "gelu",
    "mask_bias",
]

ATTENTION_TYPES = ("flash-attention", "vanilla")
FLASH_WIDTH = 16  # that a head's channels must be a multiple of, for Ascend's operator

# Added to the scores of masked keys. Finite, so float16 holds it and a softmax over it is
# defined; its exponential underflows to exactly 0 beside any attended score.
MASKED_SCORE = -30000.0

# Scores of self-attention that may be held at once; a longer sequence is taken in blocks.
_BLOCK_BYTES = 64 << 20
_HALF_TYPES = (ms.float16, ms.bfloat16)


def mask_bias(mask: Tensor) -> Tensor:
    """The additive form (B, 1, L) float32 of a mask (B, L), True where attended."""
    return ((1.0 - mask.astype(ms.float32)) * MASKED_SCORE).expand_dims(1)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Softmax attention: query (B, Lq, C), key and value (B, Lk, C) -> (B, Lq, C).

    C is split into `heads`; scores are scaled by 1/sqrt(C / heads). bias: (B, 1, Lk), added to
    the scores of every head and query, or None. The whole score matrix is held.
    """
    batch, length, channels = query.shape
    width = channels // heads
    q = _split_heads(query * width**-0.5, heads)
    k = _split_heads(key, heads)
    v = _split_heads(value, heads)
    scores = ops.bmm(q, k.swapaxes(1, 2))
    if bias is not None:
        by_head = scores.reshape(batch, heads, length, -1) + bias.expand_dims(1).astype(
            scores.dtype
        )
        scores = by_head.reshape(scores.shape)
    # In float32 at every precision level, as in `BlockwiseAttention`.
    weights = ops.softmax(scores.astype(ms.float32), axis=-1).astype(v.dtype)
    return _join_heads(ops.bmm(weights, v), heads)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """The same without a bias by Ascend's fused operator, in float16 or bfloat16.

    The head's width C / heads must be a multiple of FLASH_WIDTH. Only Ascend has the operator.
    """
    width = query.shape[-1] // heads
    return ops.flash_attention_score(
        query, key, value, heads, scalar_value=width**-0.5, input_layout="BSH"
    )


def attention_in_use(configured: str, device: str, half: bool, width: int) -> str:
    """What self-attention runs as, and why where it is not what the config names.

    device: "Ascend" or "CPU". half: whether the network computes in float16 or bfloat16. width: of
    a head, in channels.
    """
    if configured == "flash-attention":
        if device == "Ascend" and half and width % FLASH_WIDTH == 0:
            return "flash-attention"
        lacking = f"heads of a multiple of {FLASH_WIDTH} channels"
        if not half:
            lacking = "float16 or bfloat16"
        if device != "Ascend":
            lacking = "an Ascend device"
        return f"plain, in blocks where sequences are long (flash-attention needs {lacking})"
    return "plain, in blocks where sequences are long"


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B * heads, L, C / heads)."""
    batch, length, channels = x.shape
    split = x.reshape(batch, length, heads, channels // heads).swapaxes(1, 2)
    return split.reshape(batch * heads, length, channels // heads)


def _join_heads(x: Tensor, heads: int) -> Tensor:
    """(B * heads, L, C / heads) -> (B, L, C)."""
    rows, length, width = x.shape
    joined = x.reshape(rows // heads, heads, length, width).swapaxes(1, 2)
    return joined.reshape(rows // heads, length, heads * width)


def _block_length(rows: int, keys: int) -> int:
    """Queries in a block: its scores over `keys`, for `rows` of batch times heads, fill the limit.

    Rounded up rather than by `max`, which the compiler can't take in a `bprop`.
    """
    return 1 + (_BLOCK_BYTES - 1) // (4 * rows * keys)


class BlockwiseAttention(nn.Cell):
    """Softmax attention without bias that never holds more than a block of the scores.

    The backward pass makes each block's softmax again, so it holds no more than the forward one.
    """

    def __init__(self) -> None:
        super().__init__()
        # Primitives, because the compiler can't take the functions `ops.softmax` and `ops.bmm`
        # in a `bprop`.
        self.softmax = ops.Softmax(axis=-1)
        self.cast = ops.Cast()
        self.multiply = ops.BatchMatMul()
        self.multiply_transposed = ops.BatchMatMul(transpose_b=True)  # a b^T
        self.transposed_multiply = ops.BatchMatMul(transpose_a=True)  # a^T b
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self, query, key, value):
        """query (N, Lq, D), scaled; key and value (N, Lk, D) -> (N, Lq, D); N: batch * heads."""
        length = _block_length(key.shape[0], key.shape[1])
        outputs = ()
        for start in range(0, query.shape[1], length):
            block = query[:, start : start + length]
            if outputs:
                # One block after another: side by side they would need all the memory at once.
                block = ops.depend(block, outputs[-1])
            probabilities = self._probabilities(block, key)
            outputs = (*outputs, self.multiply(probabilities, value))
        return ops.concat(outputs, axis=1)

    def _probabilities(self, block, key):
        # In float32 at every precision level: with many keys, float16 would round small ones away.
        scores = self.cast(self.multiply_transposed(block, key), ms.float32)
        return self.cast(self.softmax(scores), key.dtype)

    def bprop(self, query, key, value, out, d_out):
        # Softmax's gradient is p * (dp - c) with c = sum(p * dp), which is out . d_out. One more
        # channel takes c away within the product: on CPU, broadcasting c over a block would need
        # index tables several times the block's size.
        centre = self.sum(out * d_out, -1)
        slopes = ops.concat((d_out, -centre), axis=-1)  # pyright: ignore[reportOptionalOperand]
        values = ops.concat((value, ops.ones_like(value[:, :, :1])), axis=-1)
        length = _block_length(key.shape[0], key.shape[1])
        d_query = ()
        d_key = ops.zeros_like(key)
        d_value = ops.zeros_like(value)
        for start in range(0, query.shape[1], length):
            stop = start + length
            # Through d_key each block waits for the one before.
            block = ops.depend(query[:, start:stop], d_key)
            slope = ops.depend(slopes[:, start:stop], d_key)
            probabilities = self._probabilities(block, key)
            d_value = d_value + self.transposed_multiply(probabilities, d_out[:, start:stop])
            d_scores = probabilities * self.multiply_transposed(slope, values)
            d_query = (*d_query, self.multiply(d_scores, key))
            d_key = d_key + self.transposed_multiply(d_scores, block)
        return ops.concat(d_query, axis=1), d_key, d_value


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, x * Phi(x), of any shape.

    Spelled out, because `ops.gelu(approximate="none")` takes three times as long on CPU.
    """
    return 0.5 * x * (1.0 + ops.erf(x * 0.5**0.5))


class CrossAttention(nn.Cell):
    """Multi-head attention over a context.

    Its keys are few (77 to some hundreds) and some may be masked, so the plain form serves.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Dense(query_dim, query_dim, has_bias=False)
        self.to_k = Dense(context_dim, query_dim, has_bias=False)
        self.to_v = Dense(context_dim, query_dim, has_bias=False)
        self.to_out = nn.SequentialCell(Dense(query_dim, query_dim))

    def construct(self, x, context, bias):
        """x (B, L, C), context (B, Lk, context_dim), bias (B, 1, Lk) or None -> (B, L, C)."""
        mixed = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, bias)
        return self.to_out(mixed)


class SelfAttention(CrossAttention):
    """Multi-head attention of a sequence to itself.

    flash: use Ascend's fused operator wherever it takes the input's type.
    """

    def __init__(self, dim: int, heads: int, flash: bool = False) -> None:
        super().__init__(dim, dim, heads)
        self.flash = flash
        self.scale = (dim // heads) ** -0.5
        self.blockwise = BlockwiseAttention()

    def construct(self, x):
        """x (B, L, C) -> (B, L, C)."""
        query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.flash and query.dtype in _HALF_TYPES:
            return self.to_out(flash_attention(query, key, value, self.heads))
        mixed = self.blockwise(
            _split_heads(query * self.scale, self.heads),
            _split_heads(key, self.heads),
            _split_heads(value, self.heads),
        )
        return self.to_out(_join_heads(mixed, self.heads))


class GEGLU(nn.Cell):
    """Linear to twice the width; one half gates the other by the exact GELU (Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = Dense(dim, inner_dim * 2)

    def construct(self, x):
        """(B, L, dim) -> (B, L, inner_dim)."""
        value, gate = ops.chunk(self.proj(x), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nn.Cell):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Identity stands for the original's dropout, so that the last layer is `net.2`.
        self.net = nn.SequentialCell(GEGLU(dim, dim * 4), nn.Identity(), Dense(dim * 4, dim))

    def construct(self, x):
        """(B, L, dim) -> (B, L, dim)."""
        return self.net(x)


class BasicTransformerBlock(nn.Cell):
    """Self-attention, cross-attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.attn1 = SelfAttention(dim, heads, flash)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = nn.LayerNorm((dim,), epsilon=1e-5)
        self.norm2 = nn.LayerNorm((dim,), epsilon=1e-5)
        self.norm3 = nn.LayerNorm((dim,), epsilon=1e-5)

    def construct(self, x, context, bias):
        """x (B, L, dim), context (B, Lk, context_dim), bias (B, 1, Lk) -> (B, L, dim)."""
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context, bias) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Cell):
    """Transformer blocks over the pixels of a feature map, as a residual.

    flash: see `SelfAttention`.
    """

    def __init__(
        self, channels: int, heads: int, depth: int, context_dim: int, flash: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = Dense(channels, channels)
        self.transformer_blocks = nn.CellList(
            [BasicTransformerBlock(channels, context_dim, heads, flash) for _ in range(depth)]
        )
        self.proj_out = Dense(channels, channels)

    def construct(self, x, context, bias):
        """x (B, C, H, W), context (B, Lk, context_dim), bias (B, 1, Lk) -> (B, C, H, W)."""
        batch, channels, height, width = x.shape
        h = self.norm(x).reshape(batch, channels, height * width).swapaxes(1, 2)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context, bias)
        h = self.proj_out(h).swapaxes(1, 2).reshape(batch, channels, height, width)
        return h + x
