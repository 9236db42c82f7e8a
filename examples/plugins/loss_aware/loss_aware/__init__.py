"""Draws timesteps in proportion to their measured loss: importance sampling by the second moment
(Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672,
section 3.3).

    L = E_{t ~ q}[ L_t * p_t / q_t ]        q_t ~ p_t * sqrt(E[L_t^2])

has the mean of E_{t ~ p}[L_t] whatever q is, and the least variance with this one. The moments are
running means over ranges of timesteps (`bins`); p is what would be drawn without the plugin.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sdxl_host import (
    NoiseDistribution,
    NoiseLevels,
    NoiseSchedule,
    StepResult,
    TrainerView,
    hookimpl,
    option,
)

__all__ = ["LossAware", "Options"]


@dataclass
class Options:
    """decay 0 keeps only the last measurement of a bin; floor 1 changes nothing."""

    bins: int = option(
        20, help="ranges of timesteps whose losses are told apart", minimum=1, maximum=1000
    )
    decay: float = option(
        0.9, help="share of the old moment that stays at a new one", minimum=0.0, maximum=0.9999
    )
    floor: float = option(
        0.1, help="share of the draws that are made as without the plugin", above=0.0, maximum=1.0
    )
    warmup: int = option(100, help="steps that are only measured", minimum=0)
    importance_correction: bool = option(
        True, help="divide the loss by the change of density, so that its mean stays the same"
    )


class LossAware:
    """Adapts `sample_timesteps` and `weight_loss`, and observes `on_step_end`.

    moments: (bins,) running mean of the squared weighted loss, NaN where nothing was measured.
    """

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self.moments = np.full(options.bins, np.nan)
        self.steps = 0
        self._source_and_drawn: tuple[NoiseDistribution, NoiseDistribution] | None = None

    @hookimpl(wrapper=True)
    def sample_timesteps(self) -> Generator[None, NoiseDistribution, NoiseDistribution]:
        """The distribution reweighted by the moments: one object while neither changes."""
        source = yield
        if self._source_and_drawn is None or self._source_and_drawn[0] is not source:
            self._source_and_drawn = source, self._reweighted(source)
        return self._source_and_drawn[1]

    @hookimpl(wrapper=True)
    def weight_loss(self, noise: NoiseLevels) -> Generator[None, np.ndarray, np.ndarray]:
        """lambda * p(sigma) / q(sigma), at most lambda / floor."""
        weights = yield
        if not self.options.importance_correction:
            return weights
        return weights / self._change(noise.sigma)

    @hookimpl
    def on_step_end(self, trainer: TrainerView, result: StepResult) -> None:
        """Takes this step's losses, as they would weigh without the correction, into the moments.

        Losses that are not finite are left out. The moments are equal on all ranks, because the
        losses are those of the whole batch.
        """
        losses = result.per_sample_loss.astype(np.float64)
        finite = np.isfinite(losses)
        sigma = result.noise.sigma[finite]
        c_out = trainer.model.preconditioning.c_out(sigma)
        # What the host minimises: a weight on |D - z|^2 is worth weight * c_out^2 here.
        losses = losses[finite] * result.loss_weight[finite] * c_out**2
        if self.options.importance_correction:
            losses *= self._change(sigma)
        schedule = trainer.model.schedule
        bins = self._bins(schedule)[schedule.nearest(sigma)]
        draws = np.bincount(bins, minlength=self.options.bins)
        means = np.bincount(bins, losses**2, self.options.bins) / np.maximum(draws, 1)
        old = np.where(np.isnan(self.moments), means, self.moments)
        mixed = self.options.decay * old + (1.0 - self.options.decay) * means
        self.moments = np.where(draws > 0, mixed, self.moments)
        self.steps += 1
        if finite.any() or self.steps == self.options.warmup:
            self._source_and_drawn = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit."""
        return {"moments": self.moments, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there; the host has made sure that the options are the same."""
        self.moments, self.steps = state["moments"], state["steps"]
        self._source_and_drawn = None

    def notes(self) -> list[str]:
        """Options with which it does nothing."""
        reasons = {"floor is 1": self.options.floor == 1, "bins is 1": self.options.bins == 1}
        return [f"does nothing: {reason}" for reason, holds in reasons.items() if holds]

    def _bins(self, schedule: NoiseSchedule) -> np.ndarray:
        """The bin of each timestep, int64 (N,)."""
        return np.arange(len(schedule)) * self.options.bins // len(schedule)

    def _change(self, sigma: np.ndarray) -> np.ndarray:
        """q(sigma) / p(sigma) of this plugin alone, whatever else reweights."""
        if self._source_and_drawn is None:
            return np.ones_like(sigma)
        source, drawn = self._source_and_drawn
        return drawn.density_ratio(sigma) / source.density_ratio(sigma)

    def _reweighted(self, source: NoiseDistribution) -> NoiseDistribution:
        measured = self.moments[~np.isnan(self.moments)]
        if self.steps < self.options.warmup or not measured.any():
            return source
        # A range of which nothing is known yet is taken for an average one.
        roots = np.sqrt(np.nan_to_num(self.moments, nan=measured.mean()))
        wanted = roots[self._bins(source.schedule)]
        inner = source.cdf(source.schedule.edges[1:-1])
        masses = np.diff(np.concatenate([[0.0], inner, [1.0]]))
        floor = self.options.floor
        return source.reweighted(floor + (1.0 - floor) * wanted / (masses @ wanted))
