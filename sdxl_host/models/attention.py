"""Attention, and the transformer that the U-Net puts between its convolutions.

Parameter names are those of the original single file (`attn1.to_q`, `ff.net.0.proj`, ...).
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

__all__ = ["CrossAttention", "SpatialTransformer", "attention", "gelu", "mask_bias"]

# Added to the scores of masked keys. Finite, so float16 holds it and a softmax over it is
# defined; its exponential underflows to exactly 0 beside any attended score.
MASKED_SCORE = -30000.0


def mask_bias(mask: Tensor) -> Tensor:
    """The additive form (B, 1, L) float32 of a mask (B, L), True where attended."""
    return ((1.0 - mask.astype(ms.float32)) * MASKED_SCORE).expand_dims(1)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Softmax attention: query (B, Lq, C), key and value (B, Lk, C) -> (B, Lq, C).

    C is split into `heads`; scores are scaled by 1/sqrt(C / heads). bias: (B, 1, Lk), added to
    the scores of every head and query, or None.
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
    mixed = ops.bmm(ops.softmax(scores, axis=-1), v)
    return mixed.reshape(batch, heads, length, width).swapaxes(1, 2).reshape(query.shape)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B * heads, L, C / heads)."""
    batch, length, channels = x.shape
    split = x.reshape(batch, length, heads, channels // heads).swapaxes(1, 2)
    return split.reshape(batch * heads, length, channels // heads)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, x * Phi(x), of any shape.

    Spelled out, because `ops.gelu(approximate="none")` takes three times as long on CPU.
    """
    return 0.5 * x * (1.0 + ops.erf(x * 0.5**0.5))


class CrossAttention(nn.Cell):
    """Multi-head attention over a context; over the sequence itself when there is none."""

    def __init__(self, query_dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Dense(query_dim, query_dim, has_bias=False)
        self.to_k = nn.Dense(context_dim, query_dim, has_bias=False)
        self.to_v = nn.Dense(context_dim, query_dim, has_bias=False)
        self.to_out = nn.SequentialCell(nn.Dense(query_dim, query_dim))

    def construct(self, x, context, bias=None):
        """x (B, L, C), context (B, Lk, context_dim), bias (B, 1, Lk) or None -> (B, L, C)."""
        mixed = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, bias)
        return self.to_out(mixed)


class GEGLU(nn.Cell):
    """Linear to twice the width; one half gates the other by the exact GELU (Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Dense(dim, inner_dim * 2)

    def construct(self, x):
        """(B, L, dim) -> (B, L, inner_dim)."""
        value, gate = ops.chunk(self.proj(x), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nn.Cell):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The empty place in the middle is the original's dropout: it keeps `net.2` in its place.
        self.net = nn.SequentialCell(GEGLU(dim, dim * 4), nn.Identity(), nn.Dense(dim * 4, dim))

    def construct(self, x):
        """(B, L, dim) -> (B, L, dim)."""
        return self.net(x)


class BasicTransformerBlock(nn.Cell):
    """Self-attention, cross-attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = nn.LayerNorm((dim,), epsilon=1e-5)
        self.norm2 = nn.LayerNorm((dim,), epsilon=1e-5)
        self.norm3 = nn.LayerNorm((dim,), epsilon=1e-5)

    def construct(self, x, context, bias):
        """x (B, L, dim), context (B, Lk, context_dim), bias (B, 1, Lk) -> (B, L, dim)."""
        normed = self.norm1(x)
        x = self.attn1(normed, normed) + x
        x = self.attn2(self.norm2(x), context, bias) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Cell):
    """Transformer blocks over the pixels of a feature map, as a residual."""

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Dense(channels, channels)
        self.transformer_blocks = nn.CellList(
            [BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth)]
        )
        self.proj_out = nn.Dense(channels, channels)

    def construct(self, x, context, bias):
        """x (B, C, H, W), context (B, Lk, context_dim), bias (B, 1, Lk) -> (B, C, H, W)."""
        batch, channels, height, width = x.shape
        h = self.norm(x).reshape(batch, channels, height * width).swapaxes(1, 2)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context, bias)
        h = self.proj_out(h).swapaxes(1, 2).reshape(batch, channels, height, width)
        return h + x
