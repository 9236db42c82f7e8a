"""The first stage: pixels to latents and back.

A first stage has `channels` of a latent, `downsampling` (an image's side over its latent's),
`is_sampled` (whether `latents` takes noise), `moments`, `latents`, `encode`, `decode`, `cell` (its
network, or None) and `keeps_float32` (whether it does at every precision level).
"""

# MindSpore declares that calling a cell may give None.
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from sdxl_host.models.autoencoder import AutoencoderKL

__all__ = ["AutoencoderKLInferenceWrapper", "IdentityFirstStage"]

# Of the posterior's log variance, as in the original.
_LOG_VARIANCE = (-30.0, 20.0)


class _FirstStage(ABC):
    """What every first stage has."""

    @abstractmethod
    def moments(self, pixels: np.ndarray) -> np.ndarray:
        """What the network makes of pixels, before anything is sampled."""

    @abstractmethod
    def latents(self, moments: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Latents of what `moments` gave, sampled with unit noise where the stage samples."""

    def encode(self, pixels: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """pixels (B, 3, H, W) float32 in [-1, 1] -> latents (B, C, h, w), as `latents` says."""
        return self.latents(self.moments(pixels), noise)


class IdentityFirstStage(_FirstStage):
    """Pixels are the latents: diffusion in pixel space, for small models without an autoencoder."""

    channels = 3
    downsampling = 1
    is_sampled = False
    cell = None
    keeps_float32 = True

    def __init__(self, scale_factor: float) -> None:
        self.scale_factor = scale_factor

    def moments(self, pixels: np.ndarray) -> np.ndarray:
        """pixels (B, 3, H, W) float32 in [-1, 1] -> what `latents` takes: the pixels."""
        return pixels

    def latents(self, moments: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """moments (B, 3, H, W) -> latents of the same shape; nothing is sampled."""
        return moments * np.float32(self.scale_factor)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """latents (B, 3, H, W) -> pixels of the same shape."""
        return latents / np.float32(self.scale_factor)


class AutoencoderKLInferenceWrapper(_FirstStage):
    """SDXL's autoencoder, frozen, behind a numpy interface.

    Images are taken one at a time: a latent is the same bit for bit whatever batch it is in, and
    the memory needed is that of one image. keeps_float32: whether it computes in float32 at every
    precision level, as SDXL's must, whose activations overflow float16.
    """

    is_sampled = True
    keeps_float32 = True

    def __init__(
        self, ddconfig: Mapping[str, Any], scale_factor: float, embed_dim: int = 4
    ) -> None:
        self.cell = AutoencoderKL(ddconfig, embed_dim).set_train(False)
        self.cell.update_parameters_name("first_stage_model.")
        self.scale_factor = np.float32(scale_factor)
        self.channels = self.cell.channels
        self.downsampling = self.cell.downsampling

    def moments(self, pixels: np.ndarray) -> np.ndarray:
        """pixels (B, 3, H, W) float32 in [-1, 1] -> mean and log variance of the posterior,
        (B, 2 C, h, w) float32, unscaled."""
        rows = [self.cell.moments(Tensor(row[None], ms.float32)).asnumpy() for row in pixels]
        return np.concatenate(rows).astype(np.float32)

    def latents(self, moments: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """moments (B, 2 C, h, w) -> latents (B, C, h, w) float32, scaled.

        noise: unit noise (B, C, h, w) to sample the posterior with; None gives its mean.
        """
        mean, log_variance = np.split(moments, 2, axis=1)
        if noise is not None:
            mean = mean + np.exp(0.5 * np.clip(log_variance, *_LOG_VARIANCE)) * noise
        return self.scale_factor * mean

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """latents (B, C, h, w), scaled -> pixels (B, 3, H, W) float32, about in [-1, 1]."""
        unscaled = (latents / self.scale_factor).astype(np.float32)
        rows = [self.cell.decode_latents(Tensor(row[None])).asnumpy() for row in unscaled]
        return np.concatenate(rows).astype(np.float32)
