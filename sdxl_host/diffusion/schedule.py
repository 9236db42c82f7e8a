"""The 1000-step noise schedule of the trained model, and where any sigma lies on it.

`sigma` is the standard deviation of the noise on a clean latent of unit variance
(variance exploding): ``x = z + sigma * n``. Everything here is numpy float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sdxl_host.diffusion.arrays import FloatArray, floats

__all__ = ["NoiseSchedule"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise levels of the discrete timesteps 0..N-1.

    sigmas: (N,) float64, strictly increasing in the timestep ("later" is noisier),
    finite and positive. Raises ValueError otherwise: a schedule that reaches zero terminal
    signal-to-noise ratio has an infinite last sigma and cannot be trained this way.
    """

    sigmas: FloatArray

    def __post_init__(self) -> None:
        sigmas = floats(self.sigmas)
        if sigmas.ndim != 1 or sigmas.size < 2:
            raise ValueError(
                f"schedule: sigmas must have shape (N,) with N >= 2, not {sigmas.shape}"
            )
        if not np.isfinite(sigmas).all() or sigmas[0] <= 0:
            raise ValueError(
                "schedule: every sigma must be finite and greater than 0 (the last one is "
                f"{sigmas[-1]}); use betas whose cumulative product does not reach 0"
            )
        if (np.diff(sigmas) <= 0).any():
            raise ValueError("schedule: sigmas must increase with the timestep")
        object.__setattr__(self, "sigmas", sigmas)

    @classmethod
    def scaled_linear(
        cls, linear_start: float = 0.00085, linear_end: float = 0.012, num_timesteps: int = 1000
    ) -> NoiseSchedule:
        """SDXL's schedule: beta is linear in its square root (Rombach et al. 2022, DDPM form).

        With alpha_bar the cumulative product of 1 - beta, sigma_t = sqrt((1 - alpha_bar_t) /
        alpha_bar_t). The defaults are those of Stable Diffusion XL: sigma_0 = 0.02917,
        sigma_999 = 14.6146.
        """
        if not 0 < linear_start <= linear_end < 1:
            raise ValueError(
                "schedule: 0 < linear_start <= linear_end < 1 must hold, "
                f"not {linear_start} and {linear_end}"
            )
        beta = np.linspace(linear_start**0.5, linear_end**0.5, num_timesteps) ** 2
        # log1p/expm1 keep the first timesteps exact, where 1 - alpha_bar is small.
        log_alpha_bar = np.cumsum(np.log1p(-beta))
        return cls(np.sqrt(np.expm1(-log_alpha_bar)))

    def __len__(self) -> int:
        return self.sigmas.size

    @cached_property
    def log_sigmas(self) -> FloatArray:
        """(N,) natural logarithms of the sigmas."""
        return np.log(self.sigmas)

    @cached_property
    def edges(self) -> FloatArray:
        """(N + 1,) borders between timesteps: 0, sigma(t = j - 0.5) for j = 1..N-1, infinity."""
        middle = self.sigma(np.arange(1, len(self)) - 0.5)
        return np.concatenate([[0.0], middle, [np.inf]])

    def sigma(self, timestep: FloatArray | float) -> FloatArray:
        """Sigma at a fractional timestep, linear in ln sigma, clamped to [0, N - 1]."""
        position = floats(timestep)
        return np.exp(np.interp(position, np.arange(len(self)), self.log_sigmas))

    def timestep(self, sigma: FloatArray | float) -> FloatArray:
        """Position of sigma on the schedule, a float in [0, N - 1], linear in ln sigma."""
        return np.interp(np.log(floats(sigma)), self.log_sigmas, np.arange(len(self), dtype=float))

    def nearest(self, sigma: FloatArray | float) -> np.ndarray:
        """Index of the nearest timestep (int64): the j with edges[j] <= sigma < edges[j + 1]."""
        return np.searchsorted(self.edges[1:-1], floats(sigma), side="right")
