"""What a run learns where: p(t), how often a timestep is drawn, and w(t), what its error weighs.

A noise level belongs to the nearest of the schedule's timesteps. With the active distribution's
cumulative F and the schedule's edges e_t,

    p(t) = F(e_{t+1}) - F(e_t)              w(t) = lambda(s_t) * c_out(s_t)^2

lambda is what the `weight_loss` chain returns on |D - z|^2, so w is the factor on the network's own
squared error, and p(t) * w(t), as a share of its sum, is where the run learns. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
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

__all__ = ["Curve", "curve", "curves", "host_curve", "probabilities", "start_lines", "table_lines"]

_QUARTERS = 4
_TENTHS = 10
_BAR = 24  # characters of the longest bar
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


# ---- in words


def start_lines(before: Curve, after: Curve) -> list[str]:
    """What the start of a run prints: quarters of the timesteps, without plugins -> with them."""
    rows = [
        ("draws p", *(_percent(_sums(each.p, _QUARTERS)) for each in (before, after))),
        ("p*w", *(_percent(_sums(each.share, _QUARTERS)) for each in (before, after))),
        ("mean w", *(f"{each.mean_weight:.3f}" for each in (before, after))),
    ]
    changed = not after.is_like(before)
    title = "curves      quarters of the timesteps, clean to noisy"
    lines = [f"{title}; without plugins -> with them" if changed else title]
    for name, first, second in rows:
        lines.append(f"  {name:<10}{first}{f'  ->  {second}' if changed else ''}")
    return lines


def table_lines(before: Curve, after: Curve) -> list[str]:
    """Tenths of the timesteps, without plugins -> with them; bars of p * w: `#` with, `|` without.

    weight is the mean of w over a tenth's timesteps, each counted once.
    """
    count = len(after.sigma)
    borders = _borders(count, _TENTHS)
    shares = [_sums(each.share, _TENTHS) for each in (before, after)]
    draws = [_sums(each.p, _TENTHS) for each in (before, after)]
    # At least 1e-300, for a loss whose every weight is 0.
    longest = max(shares[0].max(), shares[1].max(), 1e-300)
    lines = [f"{'timesteps':<10}{'sigma':<13}{'draws p, %':^16}  {'weight w':^18}  {'p*w, %':^16}"]
    for row, (first, last) in enumerate(pairwise(borders)):
        weights = [_mean(each, first, last) for each in (before, after)]
        sigma = f"{after.sigma[first]:.3g}-{after.sigma[last - 1]:.3g}"
        bar = list("#" * round(_BAR * shares[1][row] / longest))
        mark = round(_BAR * shares[0][row] / longest)
        bar += " " * (mark + 1 - len(bar))
        bar[mark] = "|"
        cells = [f"{first}-{last - 1}".ljust(9), sigma.ljust(12)]
        cells += [f" {100 * draws[0][row]:5.1f} -> {100 * draws[1][row]:5.1f}"]
        cells += [f"{_short(weights[0]):>7} -> {_short(weights[1]):>7}"]
        cells += [f"{100 * shares[0][row]:5.1f} -> {100 * shares[1][row]:5.1f}", "".join(bar)]
        lines.append(" ".join([*cells[:2], "  ".join(cells[2:])]))
    return [line.rstrip() for line in lines]


def _borders(count: int, parts: int) -> list[int]:
    """Where `parts` parts of the timesteps begin and end; fewer where there are fewer timesteps."""
    parts = min(count, parts)
    return [round(count * part / parts) for part in range(parts + 1)]


def _sums(values: FloatArray, parts: int) -> FloatArray:
    """Sums over `parts` parts of the timesteps, as even as can be."""
    pairs = pairwise(_borders(len(values), parts))
    return np.array([values[first:last].sum() for first, last in pairs])


def _mean(of: Curve, first: int, last: int) -> float:
    """Mean weight of the timesteps from `first` up to `last`, each counted once."""
    return float(of.w[first:last].mean())


def _percent(parts: Sequence[float] | FloatArray) -> str:
    return " ".join(f"{100 * part:5.1f}" for part in parts) + " %"


def _short(number: float) -> str:
    return f"{number:.3f}" if 0.001 <= number < 1000 or number == 0 else f"{number:.2g}"
