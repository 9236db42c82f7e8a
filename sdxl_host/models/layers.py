"""The layers that networks are made of: dense layers, convolutions, sinusoidal embeddings."""

# MindSpore declares that a cell, and what calling it gives, may be None.
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

__all__ = ["Conv2d", "Dense", "sinusoidal_embedding", "sinusoids"]

_MAX_PERIOD = 10000.0  # Vaswani et al. 2017; the same in SDXL


class Dense(nn.Dense):
    """`nn.Dense`; its output is cast to `output_type` (see `precision`), unless that is None."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, has_bias=has_bias)
        self.output_type = None

    def construct(self, x):
        """(..., in_channels) -> (..., out_channels)."""
        output = super().construct(x)
        return output if self.output_type is None else output.astype(self.output_type)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with a bias; `output_type` as in `Dense`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            pad_mode="pad",
            padding=padding,
            has_bias=True,
        )
        self.output_type = None

    def construct(self, x):
        """(B, in_channels, H, W) -> (B, out_channels, H', W')."""
        output = super().construct(x)
        return output if self.output_type is None else output.astype(self.output_type)


def frequencies(width: int) -> np.ndarray:
    """(width / 2,) float32 angular frequencies, from 1 down towards 1 / max period."""
    half = width // 2
    return np.exp(-math.log(_MAX_PERIOD) * np.arange(half) / half).astype(np.float32)


def sinusoidal_embedding(values: Tensor, width: int) -> Tensor:
    """values (B,) -> (B, width) float32, cosines then sines, in a compiled or eager cell.

    Always float32: float16 would round 999.3 to 999.5.
    """
    angles = values.astype(ms.float32).expand_dims(1) * Tensor(frequencies(width)).expand_dims(0)
    return ops.concat((ops.cos(angles), ops.sin(angles)), axis=1)


def sinusoids(values: np.ndarray, width: int) -> np.ndarray:
    """values (...,) -> (..., width) float32, cosines then sines: the same in numpy."""
    angles = np.asarray(values, np.float32)[..., None] * frequencies(width)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
