"""Sinusoidal embeddings of a number: a noise level in the network, sizes beside it."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

__all__ = ["sinusoidal_embedding", "sinusoids"]

_MAX_PERIOD = 10000.0  # Vaswani et al. 2017; the same in SDXL


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
