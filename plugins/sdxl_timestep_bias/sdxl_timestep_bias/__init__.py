"""Draws some timesteps more often than others, as `--timestep_bias_strategy` of diffusers'
training scripts does.

The weights w_t over the timesteps are 1, and `multiplier` where the bias lies; a noise level is
then drawn with density p(sigma) * w(t(sigma)) / Z, where t(sigma) is the nearest timestep and p
what would have been drawn without. "later" timesteps are noisier.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sdxl_host import DiffusionModel, NoiseDistribution, NoiseLevels, hookimpl, option

__all__ = ["Options", "TimestepBias"]


@dataclass
class Options:
    """begin and end belong to the strategy range, portion to earlier and later.

    Raises ValueError when the strategy is range and 0 <= begin < end <= 1000 does not hold.
    """

    strategy: Literal["earlier", "later", "range", "none"] = option(
        "none", help="which timesteps are drawn more often: earlier, later (noisier), range, none"
    )
    multiplier: float = option(1.0, help="weight of those timesteps; the others weigh 1", above=0.0)
    begin: int = option(0, help="first timestep of the range")
    end: int = option(1000, help="timestep after the last of the range")
    portion: float = option(
        0.25, help="share of the timesteps that are earlier or later", above=0.0, maximum=1.0
    )
    importance_correction: bool = option(
        False, help="divide the loss by the change of density, so that its mean stays the same"
    )

    def __post_init__(self) -> None:
        if self.strategy == "range" and not 0 <= self.begin < self.end <= 1000:
            raise ValueError(
                f"begin {self.begin} and end {self.end} are no range of timesteps; "
                "choose 0 <= begin < end <= 1000"
            )


class TimestepBias:
    """Adapts `sample_timesteps`, and `weight_loss` where importance_correction is on."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self._source_and_biased: tuple[NoiseDistribution, NoiseDistribution] | None = None
        self._idle: dict[int, bool] = {}  # asked each step

    def weights(self, count: int) -> np.ndarray:
        """w_t for the timesteps 0 to count - 1, float64 (count,); only their ratios matter."""
        weights = np.ones(count)
        size = int(self.options.portion * count)
        favoured = {
            "earlier": slice(0, size),
            # Not slice(-size, None), which is everything where size is 0.
            "later": slice(count - size, count),
            "range": slice(self.options.begin, self.options.end),
            "none": slice(0, 0),
        }
        weights[favoured[self.options.strategy]] = self.options.multiplier
        return weights

    def is_idle(self, count: int) -> bool:
        """Whether all of count timesteps weigh the same, so that nothing changes."""
        if count not in self._idle:
            weights = self.weights(count)
            self._idle[count] = bool((weights == weights[0]).all())
        return self._idle[count]

    @hookimpl(wrapper=True)
    def sample_timesteps(self) -> Generator[None, NoiseDistribution, NoiseDistribution]:
        """The reweighted distribution: one object as long as it is given one object."""
        distribution = yield
        count = len(distribution.schedule)
        if self.is_idle(count):
            return distribution
        if self._source_and_biased is None or self._source_and_biased[0] is not distribution:
            self._source_and_biased = distribution, distribution.reweighted(self.weights(count))
        return self._source_and_biased[1]

    @hookimpl(wrapper=True)
    def weight_loss(self, noise: NoiseLevels) -> Generator[None, np.ndarray, np.ndarray]:
        """lambda over q(sigma) / p(sigma): importance sampling, which leaves the mean unbiased.

        p and q are what this plugin was given and what it made of that; others correct their own.
        """
        weights = yield
        if not self.options.importance_correction or self._source_and_biased is None:
            return weights
        source, biased = self._source_and_biased
        return weights * source.density_ratio(noise.sigma) / biased.density_ratio(noise.sigma)

    def notes(self, model: DiffusionModel, distribution: NoiseDistribution) -> list[str]:
        """Where the draws go in the end, and options that have no effect beside the others."""
        chosen, count = self.options, len(model.schedule)
        if chosen.strategy == "none":
            return ["does nothing: strategy is none; choose earlier, later or range"]
        if chosen.multiplier == 1:
            return ["does nothing: multiplier is 1"]
        biased = self.weights(count) != 1
        if self.is_idle(count):
            return [
                f"does nothing: strategy {chosen.strategy} biases {biased.sum()} of {count} "
                "timesteps"
            ]
        share = distribution.expect(lambda sigma: biased[model.schedule.nearest(sigma)] * 1.0)
        told = f"{share:.2%} of the draws fall on the {biased.sum()} timesteps of weight "
        others = (("begin", chosen.begin, 0), ("end", chosen.end, 1000))
        if chosen.strategy == "range":
            others = (("portion", chosen.portion, None),)
        return [told + f"{chosen.multiplier:g}"] + [
            f"{name} {value:g} has no effect with strategy {chosen.strategy}"
            for name, value, default in others
            if value != default
        ]
