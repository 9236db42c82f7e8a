"""SDXL's autoencoder (Rombach et al. 2022): pixels to the moments of a latent, and back.

Parameter names are those under `first_stage_model.` of the original single file.
"""

# MindSpore declares that calling a cell may give None.
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mindspore import nn, ops

from sdxl_host.errors import did_you_mean
from sdxl_host.models.attention import BlockwiseAttention
from sdxl_host.models.layers import Conv2d
from sdxl_host.models.unet import Upsample

__all__ = ["AutoencoderKL"]

_KEYS = ("ch", "ch_mult", "num_res_blocks", "z_channels", "in_channels", "out_ch")
_GROUPS = 32  # of every group norm in the original


def _conv(in_channels: int, out_channels: int, kernel: int) -> Conv2d:
    return Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class _ResnetBlock(nn.Cell):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = _conv(channels, out_channels, 3)
        self.norm2 = _norm(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        self.is_same = channels == out_channels
        if not self.is_same:
            self.nin_shortcut = _conv(channels, out_channels, 1)

    def construct(self, x):
        h = self.conv1(ops.silu(self.norm1(x)))
        h = self.conv2(ops.silu(self.norm2(h)))
        return h + (x if self.is_same else self.nin_shortcut(x))


class _AttnBlock(nn.Cell):
    """Self-attention over the pixels with one head; its projections are 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**-0.5
        self.norm = _norm(channels)
        self.q = _conv(channels, channels, 1)
        self.k = _conv(channels, channels, 1)
        self.v = _conv(channels, channels, 1)
        self.proj_out = _conv(channels, channels, 1)
        self.blockwise = BlockwiseAttention()

    def construct(self, x):
        batch, channels, height, width = x.shape

        def rows(h):
            return h.reshape(batch, channels, height * width).swapaxes(1, 2)

        h = self.norm(x)
        mixed = self.blockwise(rows(self.q(h) * self.scale), rows(self.k(h)), rows(self.v(h)))
        return x + self.proj_out(mixed.swapaxes(1, 2).reshape(batch, channels, height, width))


class _Downsample(nn.Cell):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # One row and one column of zeros, below and to the right only, as in the original.
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x):
        return self.conv(x)


class _Level(nn.Cell):
    """The blocks of one resolution, and the way to the next one if there is one."""

    def __init__(
        self, channels: int, out_channels: int, blocks: int, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (blocks - 1)
        self.block = nn.CellList([_ResnetBlock(width, out_channels) for width in widths])
        self.down, self.up = down, up
        if down:
            self.downsample = _Downsample(out_channels)
        if up:
            self.upsample = Upsample(out_channels)

    def construct(self, x):
        for block in self.block:
            x = block(x)
        if self.down:
            x = self.downsample(x)
        if self.up:
            x = self.upsample(x)
        return x


class _Middle(nn.Cell):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResnetBlock(channels, channels)
        self.attn_1 = _AttnBlock(channels)
        self.block_2 = _ResnetBlock(channels, channels)

    def construct(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class _Encoder(nn.Cell):
    def __init__(self, in_channels: int, moments: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = _conv(in_channels, widths[0], 3)
        self.down = nn.CellList(
            [
                _Level(widths[max(i - 1, 0)], width, blocks, down=i < last)
                for i, width in enumerate(widths)
            ]
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv(widths[-1], moments, 3)

    def construct(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(ops.silu(self.norm_out(self.mid(h))))


class _Decoder(nn.Cell):
    def __init__(self, z_channels: int, out_ch: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = _conv(z_channels, widths[-1], 3)
        self.mid = _Middle(widths[-1])
        # Numbered from the finest level, and run from the coarsest.
        self.up = nn.CellList(
            [
                _Level(widths[min(i + 1, last)], width, blocks + 1, up=i > 0)
                for i, width in enumerate(widths)
            ]
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv(widths[0], out_ch, 3)

    def construct(self, z):
        h = self.mid(self.conv_in(z))
        for level in self.up[::-1]:
            h = level(h)
        return self.conv_out(ops.silu(self.norm_out(h)))


class AutoencoderKL(nn.Cell):
    """Encoder and decoder of SDXL's latents.

    Args (the keys of the original config):
        embed_dim: channels of the latent (4).
        ddconfig: ch, width of the finest level (128, a multiple of 32); ch_mult, each level's
            multiple of it; num_res_blocks in a level; z_channels; in_channels and out_ch of an
            image; double_z, True; attn_resolutions, empty; attn_type, "vanilla"; dropout, 0.

    Raises ValueError for a value whose structure is not SDXL's, naming the key.
    """

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int = 4) -> None:
        super().__init__()
        config = dict(ddconfig)
        try:
            ch, ch_mult = config.pop("ch"), list(config.pop("ch_mult"))
            blocks, z_channels = config.pop("num_res_blocks"), config.pop("z_channels")
        except KeyError as error:
            raise ValueError(f"ddconfig.{error.args[0]}: AutoencoderKL needs it; add it") from error
        in_channels, out_ch = config.pop("in_channels", 3), config.pop("out_ch", 3)
        wanted = {"double_z": True, "attn_resolutions": [], "attn_type": "vanilla", "dropout": 0.0}
        for key, only in wanted.items():
            value = config.pop(key, only)
            if value != only:
                raise ValueError(f"ddconfig.{key} must be {only!r}, as in SDXL, not {value!r}")
        for key in config:
            raise ValueError(
                f"ddconfig.{key}: AutoencoderKL has no such key"
                f"{did_you_mean(str(key), (*_KEYS, *wanted))}"
            )
        if ch % _GROUPS:
            raise ValueError(f"ddconfig.ch must be a multiple of {_GROUPS}, not {ch}")
        widths = [ch * multiple for multiple in ch_mult]
        self.channels = embed_dim
        self.downsampling = 2 ** (len(widths) - 1)
        self.encoder = _Encoder(in_channels, 2 * z_channels, widths, blocks)
        self.decoder = _Decoder(z_channels, out_ch, widths, blocks)
        self.quant_conv = _conv(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = _conv(embed_dim, z_channels, 1)

    def moments(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> (B, 2 * embed_dim, h, w): the posterior's mean, then
        its log variance, unclipped. H and W are multiples of `downsampling`."""
        return self.quant_conv(self.encoder(pixels))

    def decode_latents(self, latents):
        """latents (B, embed_dim, h, w), unscaled -> pixels (B, 3, H, W)."""
        return self.decoder(self.post_quant_conv(latents))
