"""A diffusion objective as six numbers a sample.

With x = z + s * n and D(x; s) = c_skip * x + c_out * F(c_in * x, c_noise), the weighted error
lambda(s) * |D - z|^2 is the same as w * |F - target|^2 with

    network input   p * z + q * n      p = c_in                    q = c_in * s
    network target  a * z + b * n      a = (1 - c_skip) / c_out    b = -c_skip * s / c_out
    weight          w = lambda * c_out^2

so the compiled step needs (p, q, a, b, w, c_noise) and nothing else of the objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdxl_host.diffusion.arrays import FloatArray, floats
from sdxl_host.diffusion.distributions import NoiseDistribution
from sdxl_host.diffusion.preconditioning import Preconditioning
from sdxl_host.diffusion.schedule import NoiseSchedule

__all__ = ["Coefficients", "NoiseLevels", "coefficients", "denoise"]


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of one step, each field float64 of shape (G,), G the global batch.

    sigma: standard deviation of the noise. snr: 1 / sigma^2. timestep: float position on the
    schedule. distribution: the one they were drawn from, after all adapters.
    """

    sigma: FloatArray
    snr: FloatArray
    timestep: FloatArray
    distribution: NoiseDistribution

    @classmethod
    def at(
        cls, sigma: FloatArray, schedule: NoiseSchedule, distribution: NoiseDistribution
    ) -> NoiseLevels:
        """The noise levels `sigma` (G,) with what follows from them."""
        levels = floats(sigma)
        return cls(levels, 1.0 / levels**2, schedule.timestep(levels), distribution)


@dataclass(frozen=True)
class Coefficients:
    """The six numbers, each float64 (G,); see the module for their meaning."""

    p: FloatArray
    q: FloatArray
    a: FloatArray
    b: FloatArray
    w: FloatArray
    c_noise: FloatArray

    def stacked(self) -> np.ndarray:
        """(6, G) float32 in the order p, q, a, b, w, c_noise: what enters the compiled step."""
        rows = (self.p, self.q, self.a, self.b, self.w, self.c_noise)
        # What is too large for float32 becomes infinite: the step then applies no update.
        with np.errstate(over="ignore"):
            return np.stack(rows).astype(np.float32)


def coefficients(
    preconditioning: Preconditioning, sigma: FloatArray, loss_weight: FloatArray
) -> Coefficients:
    """The six numbers at sigma (G,) for lambda = loss_weight (G,) on |D - z|^2."""
    s = floats(sigma)
    c_out, c_in = preconditioning.c_out(s), preconditioning.c_in(s)
    return Coefficients(
        p=c_in,
        q=c_in * s,
        a=preconditioning.one_minus_c_skip(s) / c_out,
        b=-preconditioning.c_skip(s) * s / c_out,
        w=floats(loss_weight) * c_out**2,
        c_noise=floats(preconditioning.c_noise(s)),
    )


def denoise(
    preconditioning: Preconditioning, x: np.ndarray, sigma: float, output: np.ndarray
) -> np.ndarray:
    """D(x; sigma), given output = F(c_in * x, c_noise); x and output have one shape."""
    s = floats(sigma)
    return preconditioning.c_skip(s) * x + preconditioning.c_out(s) * output
