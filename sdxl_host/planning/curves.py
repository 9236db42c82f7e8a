"""What a run learns where: p(t), how often a timestep is drawn, and w(t), what its error weighs.

A noise level belongs to the nearest of the schedule's timesteps. With the active distribution's
cumulative F and the schedule's edges e_t,

    p(t) = F(e_{t+1}) - F(e_t)              w(t) = lambda(s_t) * c_out(s_t)^2

lambda is what the `weight_loss` chain returns on |D - z|^2, so w is the factor on the network's own
squared error, and p(t) * w(t), as a share of its sum, is where the run learns. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sdxl_host.diffusion.arrays import FloatArray
from sdxl_host.diffusion.distributions import NoiseDistribution
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.diffusion.objective import NoiseLevels, coefficients
from sdxl_host.errors import PluginError
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.hooks import Hooks

__all__ = [
    "Curve",
    "Quarters",
    "Tenth",
    "curve",
    "curves",
    "host_curve",
    "probabilities",
    "quarters",
    "tenths",
]

_QUARTERS = 4
_TENTHS = 10
_EXACT = 1e-12  # between two curves that are one: rounding of sums over 1000 numbers


@dataclass(frozen=True)
class Curve:
    """p and w over the N timesteps, each float64 (N,); sigma (N,) is the noise level of each.

    p sums to 1. w is taken at s_t, also for noise levels that are drawn around it.
    """

    sigma: FloatArray
    p: FloatArray
    w: FloatArray

    @property
    def mean_weight(self) -> float:
        """Mean of w over the draws: by how much the gradient shrinks or grows."""
        return float(np.sum(self.p * self.w))

    @property
    def share(self) -> FloatArray:
        """p * w as a share of its sum, (N,): what part of the loss's weight lies on a timestep."""
        product = self.p * self.w
        total = product.sum()
        return product / total if total > 0 else product

    def is_like(self, other: Curve) -> bool:
        """Whether both are the same curve, within rounding."""
        return all(
            np.allclose(mine, theirs, rtol=1e-9, atol=_EXACT)
            for mine, theirs in ((self.p, other.p), (self.w, other.w))
        )


def curve(hooks: Hooks, model: DiffusionModel, step: int = 1) -> Curve:
    """The curve that the plugins of `hooks` make of `model` at `step`.

    It calls `sample_timesteps` and `weight_loss`, the latter for one noise level a timestep. A
    plugin may keep state, with or without a `state_dict`, so a run that goes on gives
    `Hooks.copy()` and not the hooks of its steps.

    Raises PluginError for a distribution whose `cdf` is none.
    """
    distribution = hooks.sample_timesteps(model, step)
    sigma = model.schedule.sigmas
    noise = NoiseLevels.at(sigma, model.schedule, distribution)
    weights = hooks.weight_loss(model, noise, step)
    try:
        p = probabilities(distribution)
    except ValueError as error:
        raise PluginError(
            f"sample_timesteps: {hooks.chain('sample_timesteps')}: {error}; mend the plugin, or "
            "run without it"
        ) from error
    return Curve(sigma, p, coefficients(model.preconditioning, sigma, weights).w)


def host_curve(model: DiffusionModel) -> Curve:
    """The curve of `model` without plugins: its own distribution, its preconditioning's lambda."""
    return curve(Hooks(Defaults()), model)


def curves(hooks: Hooks, model: DiffusionModel, config: Any) -> tuple[Curve, Curve]:
    """The curves without plugins and with them; hooks and model: see `curve`.

    config: the tree of a `RunConfig`, from which the host builds the model without plugins. Where a
    plugin claims `build_model` the host may not be able to, so the first is then the curve of the
    plugin's model without more plugins.
    """
    is_hosts = hooks.chain("build_model").startswith("host")
    unchanged = Defaults().build_model(config) if is_hosts else model
    return host_curve(unchanged), curve(hooks, model)


def probabilities(distribution: NoiseDistribution) -> FloatArray:
    """p(t), float64 (N,): the probability that a draw's nearest timestep is t; exact.

    Raises ValueError when the cdf falls, or leaves [0, 1].
    """
    edges = distribution.schedule.edges[1:-1]
    inner = np.asarray(distribution.cdf(edges), np.float64)
    p = np.diff(np.concatenate([[0.0], inner.ravel(), [1.0]]))
    # A cdf may fall by what is rounding.
    if inner.shape != edges.shape or not np.isfinite(p).all() or (p < -_EXACT).any():
        raise ValueError(
            f"{type(distribution).__name__}.cdf does not rise from 0 to 1 over the noise levels"
        )
    return np.maximum(p, 0.0)


# ---- in parts


@dataclass(frozen=True)
class Quarters:
    """What a run learns in each quarter of the timesteps, clean to noisy.

    Each pair is without plugins and with them. draws, shares: sums of p and of `Curve.share` over
    each quarter. mean_weights: see `Curve.mean_weight`. is_changed: whether plugins make a
    difference.
    """

    draws: tuple[list[float], list[float]]
    shares: tuple[list[float], list[float]]
    mean_weights: tuple[float, float]
    is_changed: bool


@dataclass(frozen=True)
class Tenth:
    """What a run learns in a tenth of the timesteps, from `first` to `last`.

    sigma: of the first and of the last. The other pairs are without plugins and with them: draws
    and share, the sums of p and of `Curve.share`; weight, the mean of w with each timestep counted
    once.
    """

    first: int
    last: int
    sigma: tuple[float, float]
    draws: tuple[float, float]
    weight: tuple[float, float]
    share: tuple[float, float]


def quarters(before: Curve, after: Curve) -> Quarters:
    """The curves without plugins and with them, summed over quarters of the timesteps."""
    return Quarters(
        (_sums(before.p, _QUARTERS), _sums(after.p, _QUARTERS)),
        (_sums(before.share, _QUARTERS), _sums(after.share, _QUARTERS)),
        (before.mean_weight, after.mean_weight),
        not after.is_like(before),
    )


def tenths(before: Curve, after: Curve) -> list[Tenth]:
    """The curves without plugins and with them, by tenths; fewer where there are fewer timesteps.

    Where all weights are 0, so are the shares.
    """
    return [
        Tenth(
            first,
            end - 1,
            (float(after.sigma[first]), float(after.sigma[end - 1])),
            (float(before.p[first:end].sum()), float(after.p[first:end].sum())),
            (float(before.w[first:end].mean()), float(after.w[first:end].mean())),
            (float(before.share[first:end].sum()), float(after.share[first:end].sum())),
        )
        for first, end in pairwise(_borders(len(after.sigma), _TENTHS))
    ]


def _borders(count: int, parts: int) -> list[int]:
    """Where `parts` parts of the timesteps begin and end; fewer where there are fewer timesteps."""
    parts = min(count, parts)
    return [round(count * part / parts) for part in range(parts + 1)]


def _sums(values: FloatArray, parts: int) -> list[float]:
    """Sums over `parts` parts of the timesteps, as even as can be."""
    pairs = pairwise(_borders(len(values), parts))
    return [float(values[first:end].sum()) for first, end in pairs]
