"""SDXL's two frozen text encoders, under the names of the original single file.

CLIP-L has the names of transformers' `CLIPTextModel` below `transformer.text_model.`; OpenCLIP
bigG has open_clip's below `model.`. Both are the same causal transformer; they differ in the
activation, in how query, key and value are stored, and in their outputs.
"""

# MindSpore declares that a cell, and what calling it gives, may be None.
# pyright: reportOptionalCall=false

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from sdxl_host.models.attention import MASKED_SCORE, gelu

__all__ = ["FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder2"]

CONTEXT_LENGTH = 77
VOCABULARY_SIZE = 49408
BEGIN_OF_TEXT = 49406
END_OF_TEXT = 49407

# width, layers, heads, width of the feed-forward, by the name the original configs use
_CLIP_SIZES = {"openai/clip-vit-large-patch14": (768, 12, 12, 3072)}
_OPEN_CLIP_SIZES = {"ViT-bigG-14-Text": (1280, 32, 20, 5120), "ViT-bigG-14": (1280, 32, 20, 5120)}


def _zeros(shape: tuple[int, ...]) -> Parameter:
    """A parameter to be filled; it takes no memory where parameters are built without values."""
    return Parameter(initializer("zeros", shape, ms.float32))


def _causal_bias(length: int) -> Tensor:
    """(1, L, L) float32: 0 on and below the diagonal, the masked score above it."""
    return Tensor(np.triu(np.full((1, length, length), MASKED_SCORE, np.float32), k=1))


def _attend(query, key, value, heads, bias):
    """Causal attention: each (B, L, C), bias (1, L, L) -> (B, L, C)."""
    batch, length, channels = query.shape
    width = channels // heads

    def split(x):
        x = x.reshape(batch, length, heads, width).swapaxes(1, 2)
        return x.reshape(batch * heads, length, width)

    scores = ops.bmm(split(query) * width**-0.5, split(key).swapaxes(1, 2))
    mixed = ops.bmm(ops.softmax(scores + bias.astype(scores.dtype), axis=-1), split(value))
    return mixed.reshape(batch, heads, length, width).swapaxes(1, 2).reshape(query.shape)


def _size(
    owner: str,
    name: str,
    known: dict[str, tuple[int, int, int, int]],
    given: tuple[int | None, ...],
) -> tuple[int, int, int, int]:
    """(width, layers, heads, feed-forward width): the named model's, or all as given."""
    if all(value is None for value in given):
        if name not in known:
            raise ValueError(f"{owner}: {name!r} is not known; it must be {' or '.join(known)}")
        return known[name]
    width, layers, heads = given
    if width is None or layers is None or heads is None:
        raise ValueError(
            f"{owner}: width, layers and heads must be given together, or none of them"
        )
    if width % heads:
        raise ValueError(f"{owner}: width {width} must be a multiple of heads {heads}")
    return width, layers, heads, 4 * width


# ---- CLIP-L -----------------------------------------------------------------------------------


class _ClipAttention(nn.Cell):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Dense(width, width)
        self.v_proj = nn.Dense(width, width)
        self.q_proj = nn.Dense(width, width)
        self.out_proj = nn.Dense(width, width)

    def construct(self, x, bias):
        mixed = _attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, bias)
        return self.out_proj(mixed)


class _ClipMLP(nn.Cell):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Dense(width, inner)
        self.fc2 = nn.Dense(inner, width)

    def construct(self, x):
        h = self.fc1(x)
        # "Quick GELU", the sigmoid approximation that OpenAI trained CLIP-L with.
        return self.fc2(h * ops.sigmoid(1.702 * h))


class _ClipLayer(nn.Cell):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.self_attn = _ClipAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm((width,), epsilon=1e-5)
        self.mlp = _ClipMLP(width, inner)
        self.layer_norm2 = nn.LayerNorm((width,), epsilon=1e-5)

    def construct(self, x, bias):
        x = x + self.self_attn(self.layer_norm1(x), bias)
        return x + self.mlp(self.layer_norm2(x))


class _ClipEmbeddings(nn.Cell):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, width, embedding_table="zeros")
        self.position_embedding = nn.Embedding(CONTEXT_LENGTH, width, embedding_table="zeros")

    def construct(self, ids):
        return self.token_embedding(ids) + self.position_embedding.embedding_table.expand_dims(0)


class _ClipEncoder(nn.Cell):
    def __init__(self, width: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.CellList([_ClipLayer(width, heads, inner) for _ in range(layers)])


class _ClipTextModel(nn.Cell):
    def __init__(self, width: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.embeddings = _ClipEmbeddings(width)
        self.encoder = _ClipEncoder(width, layers, heads, inner)
        self.final_layer_norm = nn.LayerNorm((width,), epsilon=1e-5)


class _ClipTransformer(nn.Cell):
    def __init__(self, width: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.text_model = _ClipTextModel(width, layers, heads, inner)


class FrozenCLIPEmbedder(nn.Cell):
    """CLIP-L's text tower; SDXL's first encoder.

    Args:
        version: "openai/clip-vit-large-patch14", whose size is used unless the next three are set.
        width, layers, heads: another size, for small models.
        layer: "hidden", the output of one layer without the final norm.
        layer_idx: which one, counting the embeddings as 0; SDXL's is 11 of 0..12.
    """

    pad = END_OF_TEXT

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        layer: str = "hidden",
        layer_idx: int = 11,
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        size = _size("FrozenCLIPEmbedder", version, _CLIP_SIZES, (width, layers, heads))
        if layer != "hidden":
            raise ValueError(
                f'FrozenCLIPEmbedder: layer must be "hidden", as in SDXL, not {layer!r}'
            )
        if not 0 <= layer_idx <= size[1]:
            raise ValueError(
                f"FrozenCLIPEmbedder: layer_idx must lie in 0..{size[1]}, not {layer_idx}"
            )
        self.width, self.heads = size[0], size[2]
        self.pooled_width = 0
        self.layer_idx = layer_idx
        self.transformer = _ClipTransformer(*size)
        self.bias = _causal_bias(CONTEXT_LENGTH)

    def construct(self, ids):
        """ids (N, 77) int32 -> hidden (N, 77, width) of layer `layer_idx`, and no pooled output."""
        x = self.transformer.text_model.embeddings(ids)
        for layer in self.transformer.text_model.encoder.layers[: self.layer_idx]:
            x = layer(x, self.bias)
        return x, None


# ---- OpenCLIP bigG ----------------------------------------------------------------------------


class _OpenClipAttention(nn.Cell):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = _zeros((3 * width, width))
        self.in_proj_bias = _zeros((3 * width,))
        self.out_proj = nn.Dense(width, width)

    def construct(self, x):
        """x (N, L, width) -> query, key and value, each (N, L, width)."""
        projected = ops.matmul(x, self.in_proj_weight.swapaxes(0, 1)) + self.in_proj_bias
        return ops.chunk(projected, 3, axis=-1)


class _OpenClipMLP(nn.Cell):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Dense(width, inner)
        self.c_proj = nn.Dense(inner, width)

    def construct(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


class _OpenClipBlock(nn.Cell):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm((width,), epsilon=1e-5)
        self.attn = _OpenClipAttention(width, heads)
        self.ln_2 = nn.LayerNorm((width,), epsilon=1e-5)
        self.mlp = _OpenClipMLP(width, inner)

    def construct(self, x, bias):
        query, key, value = self.attn(self.ln_1(x))  # pyright: ignore[reportAssignmentType, reportGeneralTypeIssues]
        x = x + self.attn.out_proj(_attend(query, key, value, self.attn.heads, bias))
        return x + self.mlp(self.ln_2(x))


class _OpenClipTransformer(nn.Cell):
    def __init__(self, width: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.resblocks = nn.CellList([_OpenClipBlock(width, heads, inner) for _ in range(layers)])


class _OpenClipText(nn.Cell):
    def __init__(self, width: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.positional_embedding = _zeros((CONTEXT_LENGTH, width))
        self.text_projection = _zeros((width, width))
        # Part of the trained file; it scales image-text similarity and has no use here.
        self.logit_scale = Parameter(Tensor(np.log(1 / 0.07), ms.float32))
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, width, embedding_table="zeros")
        self.transformer = _OpenClipTransformer(width, layers, heads, inner)
        self.ln_final = nn.LayerNorm((width,), epsilon=1e-5)


class FrozenOpenCLIPEmbedder2(nn.Cell):
    """OpenCLIP bigG's text tower; SDXL's second encoder.

    Args:
        arch: "ViT-bigG-14-Text", whose size is used unless the next three are set.
        width, layers, heads: another size, for small models.
        layer: "penultimate", the input of the last block without the final norm.
        always_return_pooled: True, the pooled output is part of SDXL's vector.
        freeze: True. legacy: False. require_pretrained: False; weights come by `--weight`.
    """

    pad = 0

    def __init__(
        self,
        arch: str = "ViT-bigG-14-Text",
        layer: str = "penultimate",
        always_return_pooled: bool = True,
        freeze: bool = True,
        legacy: bool = False,
        require_pretrained: bool = False,
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        size = _size("FrozenOpenCLIPEmbedder2", arch, _OPEN_CLIP_SIZES, (width, layers, heads))
        wanted = {
            "layer": (layer, "penultimate"),
            "always_return_pooled": (always_return_pooled, True),
            "freeze": (freeze, True),
            "legacy": (legacy, False),
            "require_pretrained": (require_pretrained, False),
        }
        for key, (value, expected) in wanted.items():
            if value != expected:
                raise ValueError(
                    f"FrozenOpenCLIPEmbedder2: {key} must be {expected!r}, as in SDXL, "
                    f"not {value!r}"
                )
        self.width, self.heads = size[0], size[2]
        self.pooled_width = size[0]
        self.model = _OpenClipText(*size)
        self.bias = _causal_bias(CONTEXT_LENGTH)

    def construct(self, ids):
        """ids (N, 77) int32 -> hidden (N, 77, width), pooled (N, width).

        hidden is the penultimate layer's output without the final norm; pooled is the final norm
        of the last layer at the first end of text, times the text projection.
        """
        model = self.model
        x = model.token_embedding(ids) + model.positional_embedding.expand_dims(0)
        hidden = x
        for block in model.transformer.resblocks:
            hidden = x
            x = block(x, self.bias)
        is_end = (ids == END_OF_TEXT).astype(ms.float32)
        # 1 at the first end of text of each row and 0 elsewhere: later ones are padding.
        first = is_end * (ops.cumsum(is_end, axis=1) == 1.0).astype(ms.float32)
        pooled = (model.ln_final(x) * first.expand_dims(-1)).sum(axis=1)
        return hidden, ops.matmul(pooled, model.text_projection)
