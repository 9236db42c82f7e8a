"""Which noise levels are drawn: distributions of sigma, sampled by their inverse CDF.

A distribution is a pure function of uniforms, so the host owns all randomness and a plugin
only shapes it. Everything here is numpy float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from sdxl_host.diffusion.arrays import FloatArray, floats
from sdxl_host.diffusion.schedule import NoiseSchedule

__all__ = ["DiscreteDistribution", "NoiseDistribution", "ReweightedDistribution"]

# expect() averages a continuous distribution at this many equally probable sigmas.
_QUADRATURE_POINTS = 1 << 16
_LARGEST_UNIFORM = 1.0 - 2.0**-53


class NoiseDistribution(ABC):
    """A distribution of noise levels.

    `schedule` gives every sigma its position on the timestep scale, on which `reweighted` works.
    A subclass gives `quantile` and `cdf`; a continuous one keeps cdf(quantile(u)) = u.
    """

    schedule: NoiseSchedule

    @abstractmethod
    def quantile(self, u: FloatArray) -> FloatArray:
        """Sigma at the uniforms u, each in (0, 1); same shape as u, non-decreasing."""

    @abstractmethod
    def cdf(self, sigma: FloatArray) -> FloatArray:
        """Probability of drawing a noise level of at most sigma; same shape as sigma."""

    def expect(self, f: Callable[[FloatArray], FloatArray]) -> float:
        """Mean of f(sigma); f takes and returns float64 arrays of one shape (M,)."""
        u = (np.arange(_QUADRATURE_POINTS) + 0.5) / _QUADRATURE_POINTS
        return float(np.mean(f(self.quantile(u))))

    def reweighted(self, weights: FloatArray) -> NoiseDistribution:
        """This distribution with its density multiplied by weights[nearest timestep].

        weights: (N,) over the schedule's timesteps, finite and greater than 0; their scale does
        not matter. Exact for discrete and for continuous distributions alike.
        """
        return ReweightedDistribution(self, _checked_weights(weights, len(self.schedule)))

    def density_ratio(self, sigma: FloatArray) -> FloatArray:
        """This density over the density before any `reweighted`: 1 unless it was reweighted."""
        return np.ones_like(floats(sigma))


class DiscreteDistribution(NoiseDistribution):
    """Timesteps of the schedule, each with a probability; uniform when none are given.

    probabilities: (N,) non-negative with a positive sum; they are normalised.
    quantile(cdf(s_t)) = s_t wherever the timestep t has a probability above 0.
    """

    def __init__(self, schedule: NoiseSchedule, probabilities: FloatArray | None = None) -> None:
        self.schedule = schedule
        if probabilities is None:
            probabilities = np.ones(len(schedule))
        masses = floats(probabilities)
        if masses.shape != (len(schedule),) or not np.isfinite(masses).all() or (masses < 0).any():
            raise ValueError(
                f"probabilities must have shape ({len(schedule)},) and be finite and not negative"
            )
        if masses.sum() <= 0:
            raise ValueError("probabilities must not all be 0")
        cumulative = np.cumsum(masses)
        self.probabilities = masses / cumulative[-1]
        self._cumulative = cumulative / cumulative[-1]

    def quantile(self, u: FloatArray) -> FloatArray:
        return self.schedule.sigmas[np.searchsorted(self._cumulative, floats(u), side="left")]

    def cdf(self, sigma: FloatArray) -> FloatArray:
        reached = np.searchsorted(self.schedule.sigmas, floats(sigma), side="right")
        return np.concatenate([[0.0], self._cumulative])[reached]

    def expect(self, f: Callable[[FloatArray], FloatArray]) -> float:
        return float(np.sum(self.probabilities * f(self.schedule.sigmas)))


class ReweightedDistribution(NoiseDistribution):
    """`base` with density p(s) * w(t(s)) / Z, where t(s) is the nearest timestep.

    Sampled exactly: piece j between the edges e_j and e_{j+1} carries the mass
    w_j * (F(e_{j+1}) - F(e_j)), and inside a piece the base's own quantile answers.
    """

    def __init__(self, base: NoiseDistribution, weights: FloatArray) -> None:
        self.base = base
        self.schedule = base.schedule
        self._weights = weights
        finite = base.cdf(self.schedule.edges[1:-1])
        self._base_cdf = np.concatenate([[0.0], finite, [1.0]])
        masses = weights * np.diff(self._base_cdf)
        cumulative = np.concatenate([[0.0], np.cumsum(masses)])
        self._total = cumulative[-1]
        self._cumulative = cumulative / self._total
        # How much faster this CDF grows than the base's, inside each piece.
        self._ratios = weights / self._total

    def quantile(self, u: FloatArray) -> FloatArray:
        u = floats(u)
        # The piece whose upper border is the first to reach u; empty pieces are passed.
        piece = np.searchsorted(self._cumulative[1:], u, side="left")
        piece = np.minimum(piece, len(self.schedule) - 1)
        inside = (u - self._cumulative[piece]) / self._ratios[piece]
        base_u = np.clip(
            self._base_cdf[piece] + inside, self._base_cdf[piece], self._base_cdf[piece + 1]
        )
        return self.base.quantile(np.clip(base_u, np.finfo(float).tiny, _LARGEST_UNIFORM))

    def cdf(self, sigma: FloatArray) -> FloatArray:
        piece = self.schedule.nearest(sigma)
        base_u = self.base.cdf(sigma)
        inside = self._cumulative[piece] + self._ratios[piece] * (base_u - self._base_cdf[piece])
        # A piece that is used up gives its border to the bit, so quantile(cdf(s)) finds s again.
        used_up = base_u >= self._base_cdf[piece + 1]
        return np.where(used_up, self._cumulative[piece + 1], inside)

    def expect(self, f: Callable[[FloatArray], FloatArray]) -> float:
        # The base may know an exact mean (a discrete one does); the ratio carries the weights.
        return self.base.expect(lambda sigma: self.density_ratio(sigma) * f(sigma))

    def reweighted(self, weights: FloatArray) -> NoiseDistribution:
        # Flat, so `density_ratio` always refers to the distribution before any reweighting.
        return self.base.reweighted(self._weights * _checked_weights(weights, len(self.schedule)))

    def density_ratio(self, sigma: FloatArray) -> FloatArray:
        return self._ratios[self.schedule.nearest(sigma)]


def _checked_weights(weights: FloatArray, count: int) -> FloatArray:
    values = floats(weights)
    if values.shape != (count,) or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"weights must have shape ({count},) and be finite and greater than 0")
    return values
