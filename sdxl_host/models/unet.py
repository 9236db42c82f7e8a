"""SDXL's U-Net (Podell et al. 2023), built from the keys of its original config.

Parameter names are those under `model.diffusion_model.` of the original single file.
"""

# MindSpore declares that calling a cell may give None.
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import nn, ops

from sdxl_host.device import on_ascend
from sdxl_host.models.attention import (
    ATTENTION_TYPES,
    FLASH_WIDTH,
    SpatialTransformer,
    mask_bias,
)
from sdxl_host.models.layers import Conv2d, Dense, sinusoidal_embedding

__all__ = ["UNetModel"]

_GROUPS = 32  # of every group norm in the original


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, stride, padding=1)


class ResBlock(nn.Cell):
    """Two convolutions with the time embedding added between them, as a residual."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.SequentialCell(
            nn.GroupNorm(_GROUPS, channels), nn.SiLU(), _conv3x3(channels, out_channels)
        )
        self.emb_layers = nn.SequentialCell(nn.SiLU(), Dense(emb_channels, out_channels))
        # Identity stands for the original's dropout, so that the convolution is `out_layers.3`.
        self.out_layers = nn.SequentialCell(
            nn.GroupNorm(_GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),
            _conv3x3(out_channels, out_channels),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)
        )

    def construct(self, x, emb):
        """x (B, channels, H, W), emb (B, emb_channels) -> (B, out_channels, H, W)."""
        h = self.in_layers(x) + self.emb_layers(emb).expand_dims(-1).expand_dims(-1)
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Cell):
    """Halves height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = _conv3x3(channels, channels, stride=2)

    def construct(self, x):
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.op(x)


class Upsample(nn.Cell):
    """Doubles height and width by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def construct(self, x):
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        batch, channels, height, width = x.shape
        # Repetition by broadcasting: nearest-neighbour resizing without a resize operator.
        x = x.reshape(batch, channels, height, 1, width, 1)
        x = ops.broadcast_to(x, (batch, channels, height, 2, width, 2))
        return self.conv(x.reshape(batch, channels, height * 2, width * 2))


class Stage(nn.SequentialCell):
    """Layers applied in turn; residual blocks get the embedding, transformers the context."""

    def construct(self, x, emb, context, bias):
        """x (B, C, H, W), emb (B, E), context (B, L, D), bias (B, 1, L) -> (B, C', H', W')."""
        for layer in self.cell_list:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, bias)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Cell):
    """The denoising network F of SDXL.

    Args (the keys of the original config):
        in_channels, out_channels: channels of the latent (4) and of the output (4).
        model_channels: width of the first level (320), a multiple of 32.
        channel_mult: width of each level as a multiple of `model_channels`.
        num_res_blocks: residual blocks in each level.
        attention_resolutions: downsampling factors at which transformers stand.
        transformer_depth: transformer blocks in each level (one number serves all).
        num_head_channels: width of an attention head.
        context_dim: width of the text context.
        adm_in_channels: width of the vector (pooled text and sizes).
        num_classes: "sequential", SDXL's vector conditioning.
        use_spatial_transformer, use_linear_in_transformer: True, as in SDXL.
        spatial_transformer_attn_type: "flash-attention", Ascend's fused operator for the
            self-attention wherever the network computes in float16 or bfloat16; or "vanilla".
        use_recompute: trade time for memory in the backward pass, block by block.
        legacy: False, as in SDXL.

    Raises ValueError for a value whose structure is not SDXL's, naming the key.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        transformer_depth: Sequence[int] | int,
        num_head_channels: int,
        context_dim: int,
        adm_in_channels: int,
        num_classes: str = "sequential",
        use_spatial_transformer: bool = True,
        use_linear_in_transformer: bool = True,
        spatial_transformer_attn_type: str = "flash-attention",
        use_recompute: bool = False,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        depths = (
            [transformer_depth] * levels
            if isinstance(transformer_depth, int)
            else list(transformer_depth)
        )
        _require(num_classes == "sequential", "num_classes", num_classes, '"sequential"')
        _require(use_spatial_transformer, "use_spatial_transformer", False, "True")
        _require(use_linear_in_transformer, "use_linear_in_transformer", False, "True")
        _require(not legacy, "legacy", legacy, "False")
        _require(
            spatial_transformer_attn_type in ATTENTION_TYPES,
            "spatial_transformer_attn_type",
            spatial_transformer_attn_type,
            " or ".join(ATTENTION_TYPES),
        )
        _require(len(depths) == levels, "transformer_depth", depths, f"{levels} numbers")
        _require(
            model_channels % _GROUPS == 0, "model_channels", model_channels, "a multiple of 32"
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.adm_in_channels = adm_in_channels
        self.context_dim = context_dim
        self.downsampling = 2 ** (levels - 1)
        self.attention_type = spatial_transformer_attn_type
        self.num_head_channels = num_head_channels
        self.use_recompute = use_recompute
        flash = (
            self.attention_type == "flash-attention"
            and on_ascend()
            and num_head_channels % FLASH_WIDTH == 0
        )
        emb_dim = model_channels * 4
        self.time_embed = nn.SequentialCell(
            Dense(model_channels, emb_dim), nn.SiLU(), Dense(emb_dim, emb_dim)
        )
        self.label_emb = nn.SequentialCell(
            nn.SequentialCell(Dense(adm_in_channels, emb_dim), nn.SiLU(), Dense(emb_dim, emb_dim))
        )

        def transformer(channels: int, level: int) -> SpatialTransformer:
            _require(
                channels % num_head_channels == 0,
                "num_head_channels",
                num_head_channels,
                f"a divisor of the level's {channels} channels",
            )
            return SpatialTransformer(
                channels, channels // num_head_channels, depths[level], context_dim, flash
            )

        def has_attention(level: int) -> bool:
            return 2**level in attention_resolutions and depths[level] > 0

        channels = model_channels
        stages = [Stage([_conv3x3(in_channels, channels)])]
        skips = [channels]
        for level, multiple in enumerate(channel_mult):
            width = model_channels * multiple
            for _ in range(num_res_blocks):
                layers: list[nn.Cell] = [ResBlock(channels, emb_dim, width)]
                channels = width
                if has_attention(level):
                    layers.append(transformer(channels, level))
                stages.append(Stage(layers))
                skips.append(channels)
            if level < levels - 1:
                stages.append(Stage([Downsample(channels)]))
                skips.append(channels)
        self.input_blocks = nn.CellList(stages)

        self.middle_block = Stage(
            [
                ResBlock(channels, emb_dim, channels),
                transformer(channels, levels - 1),
                ResBlock(channels, emb_dim, channels),
            ]
        )

        stages = []
        for level in reversed(range(levels)):
            width = model_channels * channel_mult[level]
            for block in range(num_res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), emb_dim, width)]
                channels = width
                if has_attention(level):
                    layers.append(transformer(channels, level))
                if level > 0 and block == num_res_blocks:
                    layers.append(Upsample(channels))
                stages.append(Stage(layers))
        self.output_blocks = nn.CellList(stages)

        self.out = nn.SequentialCell(
            nn.GroupNorm(_GROUPS, channels), nn.SiLU(), _conv3x3(channels, out_channels)
        )

    def construct(self, x, c_noise, context, vector, mask):
        """F(x; c_noise), the network of the preconditioned denoiser.

        x (B, in_channels, H, W); c_noise (B,) float32, the noise level as the time embedding
        takes it; context (B, L, context_dim); vector (B, adm_in_channels); mask (B, L), above 0
        where the context is attended. Returns (B, out_channels, H, W).
        """
        emb = self.time_embed(sinusoidal_embedding(c_noise, self.model_channels))
        emb = emb + self.label_emb(vector)
        bias = mask_bias(mask)
        skips = ()
        h = x
        for stage in self.input_blocks:
            h = stage(h, emb, context, bias)
            skips = (*skips, h)
        h = self.middle_block(h, emb, context, bias)
        last = len(skips) - 1
        for index, stage in enumerate(self.output_blocks):
            h = stage(ops.concat((h, skips[last - index]), axis=1), emb, context, bias)
        return self.out(h)

    def recompute_blocks(self) -> None:
        """Sets the blocks to be recomputed, if `use_recompute`.

        Call it after the last parameter was added: in eager mode MindSpore silently computes no
        gradient for parameters that a block gets after this.
        """
        if self.use_recompute:
            for stage in [*self.input_blocks, self.middle_block, *self.output_blocks]:
                stage.recompute()

    def zero_initialized(self) -> list[ms.Parameter]:
        """Parameters that start at 0 when trained from scratch: each residual's last layer."""
        cells = [self.out[2]]
        for _, cell in self.cells_and_names():
            if isinstance(cell, ResBlock):
                cells.append(cell.out_layers[3])
            elif isinstance(cell, SpatialTransformer):
                cells.append(cell.proj_out)
        return [parameter for cell in cells for parameter in cell.get_parameters()]


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"UNetModel: {key} must be {expected}, not {value!r}")
