"""The first stage: pixels to latents and back."""

from __future__ import annotations

import numpy as np

__all__ = ["IdentityFirstStage"]


class IdentityFirstStage:
    """Pixels are the latents: diffusion in pixel space, for small models without an autoencoder.

    channels: of a picture and of a latent. downsampling: pixels to a latent's side.
    """

    channels = 3
    downsampling = 1

    def __init__(self, scale_factor: float) -> None:
        self.scale_factor = scale_factor

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """pixels (B, 3, H, W) float32 in [-1, 1] -> latents of the same shape."""
        return pixels * np.float32(self.scale_factor)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """latents (B, 3, H, W) -> pixels of the same shape."""
        return latents / np.float32(self.scale_factor)
