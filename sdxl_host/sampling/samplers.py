"""Samplers: from noise to a latent, as plain functions over `model(x, sigma)`.

`model` is the denoiser D. Noise levels descend and end with 0. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from sdxl_host.diffusion.schedule import Schedule
from sdxl_host.model import Sampling

__all__ = ["euler", "karras_sigmas", "noise_levels", "trailing_sigmas"]

Denoise = Callable[[np.ndarray, float], np.ndarray]


def euler(model: Denoise, x: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Euler's method on dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, algorithm 1
    without its correction). x: (B, C, H, W) noise at sigmas[0]; returns the same shape."""
    for sigma, following in pairwise(sigmas):
        slope = (x - model(x, float(sigma))) / sigma
        x = (x + slope * (following - sigma)).astype(np.float32)
    return x


def trailing_sigmas(schedule: Schedule, steps: int) -> np.ndarray:
    """(steps + 1,): evenly spaced timesteps from the noisiest down, cut to whole ones, then 0."""
    timesteps = np.linspace(len(schedule) - 1, 0, steps, endpoint=False).astype(int)
    return np.append(schedule.sigmas[timesteps], 0.0)


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """(steps + 1,): Karras et al. 2022, eq. 5, then 0."""
    ramp = np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0.0)


def noise_levels(sampling: Sampling, schedule: Schedule, steps: int) -> np.ndarray:
    """(steps + 1,) the noise levels of a model's own spacing."""
    if sampling.spacing == "karras":
        return karras_sigmas(sampling.sigma_min, sampling.sigma_max, steps)
    return trailing_sigmas(schedule, steps)
