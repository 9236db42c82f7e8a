"""Samplers: from noise to a latent, as plain functions over `model(x, sigma)`.

`model` is the denoiser D. Noise levels descend and end with 0; x is (B, C, H, W) noise at the
first of them, and what comes back has its shape and dtype. The coefficients are float64. numpy
only.

The probability flow is dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, eqs. 1 and 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sdxl_host.diffusion.model import SamplingDefaults
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.errors import ConfigError, did_you_mean

__all__ = [
    "AUTO",
    "SAMPLERS",
    "SPACINGS",
    "Sampler",
    "dpmpp_2m",
    "edm_sigmas",
    "euler",
    "euler_ancestral",
    "heun",
    "karras_sigmas",
    "noise_levels",
    "none_if_auto",
    "sample",
    "trailing_sigmas",
]

Denoise = Callable[[np.ndarray, float], np.ndarray]
StepNoise = Callable[[int], np.ndarray]

AUTO = "auto"  # as a setting: the model's default

EDM_SIGMA_MIN, EDM_SIGMA_MAX = 0.002, 80.0  # Karras et al. 2022, table 1


def none_if_auto(name: str) -> str | None:
    """The name of a sampler or spacing, or None where the setting leaves it to the model."""
    return None if name == AUTO else name


# Samplers -----------------------------------------------------------------------------------------


def euler(model: Denoise, x: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Euler's method (Karras et al. 2022, algorithm 1 without its correction)."""
    for sigma, following in pairwise(sigmas):
        slope = (x - model(x, float(sigma))) / sigma
        x = (x + slope * (following - sigma)).astype(x.dtype)
    return x


def euler_ancestral(
    model: Denoise, x: np.ndarray, sigmas: np.ndarray, noise: StepNoise
) -> np.ndarray:
    """Euler's method to below the next noise level, then fresh noise up to it: DDPM's step (Song,
    Meng and Ermon 2021, arXiv 2010.02502, eqs. 12 and 16 with eta = 1, in sigma).

    noise(i) gives the i-th step's unit noise, like x; the last step, to 0, asks for none.
    """
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        # up^2 + down^2 = following^2, and up^2 is the variance of x_following given x_sigma, z.
        up = following * np.sqrt(1.0 - (following / sigma) ** 2)
        down = following**2 / sigma
        slope = (x - model(x, float(sigma))) / sigma
        moved = x + slope * (down - sigma)
        x = (moved + noise(index) * up if following > 0 else moved).astype(x.dtype)
    return x


def heun(model: Denoise, x: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Heun's method of second order (Karras et al. 2022, algorithm 1 without churn).

    The last step, to 0, is Euler's: the slope is not defined there.
    """
    for sigma, following in pairwise(sigmas):
        slope = (x - model(x, float(sigma))) / sigma
        moved = (x + slope * (following - sigma)).astype(x.dtype)
        if following > 0:
            corrected = (moved - model(moved, float(following))) / following
            moved = (x + 0.5 * (slope + corrected) * (following - sigma)).astype(x.dtype)
        x = moved
    return x


def dpmpp_2m(model: Denoise, x: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) for alpha = 1.

    D is extrapolated along lambda = -ln sigma to the middle of the step, from this step's and the
    one's before. The first step and the last, which returns D, are of first order.
    """
    before = before_h = None
    for sigma, following in pairwise(sigmas):
        denoised = middle = model(x, float(sigma))
        h = np.log(sigma / following) if following > 0 else np.inf
        if before is not None and following > 0:
            middle = denoised + (denoised - before) * (0.5 * h / before_h)
        ratio = following / sigma  # exp(-h)
        x = (ratio * x + (1.0 - ratio) * middle).astype(x.dtype)
        before, before_h = denoised, h
    return x


@dataclass(frozen=True)
class Sampler:
    """A sampler and what it costs.

    run: `run(model, x, sigmas)`, with `noise` as a fourth if `takes_noise`. calls: of the model in
    a step; the last step costs one whatever the sampler.
    """

    run: Callable[..., np.ndarray]
    calls: int = 1
    takes_noise: bool = False


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler),
    "euler_a": Sampler(euler_ancestral, takes_noise=True),
    "heun": Sampler(heun, calls=2),
    "dpmpp_2m": Sampler(dpmpp_2m),
}


def sample(
    name: str, model: Denoise, x: np.ndarray, sigmas: np.ndarray, noise: StepNoise
) -> np.ndarray:
    """Runs the sampler called `name`; `noise(i)` is asked only by those that take noise.

    Raises ConfigError for a name that SAMPLERS does not have.
    """
    if name not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ConfigError(
            f"sampler: {name!r} is not known{did_you_mean(name, SAMPLERS)}; use one of {known}"
        )
    sampler = SAMPLERS[name]
    if sampler.takes_noise:
        return sampler.run(model, x, sigmas, noise)
    return sampler.run(model, x, sigmas)


# Noise levels -------------------------------------------------------------------------------------


def trailing_sigmas(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """(steps + 1,): evenly spaced timesteps from the noisiest down, cut to whole ones, then 0."""
    timesteps = np.linspace(len(schedule) - 1, 0, steps, endpoint=False).astype(int)
    return np.append(schedule.sigmas[timesteps], 0.0)


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """(steps + 1,): Karras et al. 2022, eq. 5, then 0."""
    ramp = np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0.0)


def edm_sigmas(steps: int) -> np.ndarray:
    """(steps + 1,): Karras et al. 2022, eq. 5, over the range of their table 1, then 0."""
    return karras_sigmas(EDM_SIGMA_MIN, EDM_SIGMA_MAX, steps)


def _trailing(sampling: SamplingDefaults, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    if steps > len(schedule):
        raise ConfigError(
            f"spacing: trailing cannot make {steps} steps of {len(schedule)} timesteps; "
            "use fewer steps or karras"
        )
    return trailing_sigmas(schedule, steps)


def _karras(sampling: SamplingDefaults, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return karras_sigmas(sampling.sigma_min, sampling.sigma_max, steps)


def _edm(sampling: SamplingDefaults, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    if sampling.sigma_min > EDM_SIGMA_MIN or sampling.sigma_max < EDM_SIGMA_MAX:
        raise ConfigError(
            f"spacing: edm needs noise levels from {EDM_SIGMA_MIN} to {EDM_SIGMA_MAX}, and "
            f"this model was trained from {sampling.sigma_min:.4g} to "
            f"{sampling.sigma_max:.4g}; use karras"
        )
    return edm_sigmas(steps)


SPACINGS = {"trailing": _trailing, "karras": _karras, "edm": _edm}


def noise_levels(
    sampling: SamplingDefaults, schedule: NoiseSchedule, steps: int, spacing: str | None = None
) -> np.ndarray:
    """(steps + 1,) the noise levels of `spacing`, or of the model's own where that is None.

    Raises ConfigError for an unknown spacing, for "edm" on a model that was not trained over the
    whole of its range, and for "trailing" with more steps than the schedule has timesteps.
    """
    spacing = sampling.spacing if spacing is None else spacing
    if spacing not in SPACINGS:
        raise ConfigError(
            f"spacing: {spacing!r} is not known{did_you_mean(spacing, SPACINGS)}; "
            f"use one of {', '.join(SPACINGS)}"
        )
    return SPACINGS[spacing](sampling, schedule, steps)
