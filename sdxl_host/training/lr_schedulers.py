"""Learning-rate schedules: a factor on the base learning rate for each update.

Update k = 1, 2, ... is one change of the weights, however many batches it takes. A warm-up gives
update k the factor k / warm_up_steps, so update `warm_up_steps` is the first at the base rate.

The `Lambda...` schedules of old configs but for the warm-up alone count n = k - 1, as the original
latent diffusion code does: their first update is at `f_start` or `lr_start`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

__all__ = [
    "CosineScheduler",
    "LambdaLinearScheduler",
    "LambdaWarmUpCosineScheduler",
    "LambdaWarmUpCosineScheduler2",
    "LambdaWarmUpScheduler",
    "LinearScheduler",
    "MultiStepScheduler",
    "Schedule",
    "learning_rates",
]


class Schedule(Protocol):
    """A factor on the base learning rate for each update."""

    def factors(self, updates: int) -> np.ndarray:
        """(updates,) float64, of update 1, 2, ... Raises ValueError for a run that does not fit."""
        ...


def learning_rates(base: float, schedule: Schedule | None, updates: int) -> np.ndarray:
    """(updates,) float64 learning rates of update 1, 2, ..., constant without a schedule."""
    return base * (np.ones(updates) if schedule is None else schedule.factors(updates))


class LambdaWarmUpScheduler:
    """Linear warm-up, then constant: update k has the factor min(1, k / warm_up_steps)."""

    def __init__(self, warm_up_steps: int) -> None:
        self.warm_up_steps = _checked_warm_up(self, warm_up_steps)

    def factors(self, updates: int) -> np.ndarray:
        return _warm_up(updates, self.warm_up_steps)


class _Falling(ABC):
    """Linear warm-up to 1, then a fall to `end_factor`, which update `end_step` is the first to
    have and later ones keep.

    end_step: none for the last update of the run. The fall begins after update
    max(warm_up_steps, 1).
    """

    def __init__(
        self, end_factor: float = 0.0, warm_up_steps: int = 0, end_step: int | None = None
    ) -> None:
        if not 0.0 <= end_factor <= 1.0:
            raise ValueError(
                f"{_name(self)}: end_factor must lie in [0, 1], not {end_factor}; it is a share of "
                "base_learning_rate"
            )
        self.end_factor, self.end_step = end_factor, end_step
        self.warm_up_steps = _checked_warm_up(self, warm_up_steps)
        if end_step is not None and end_step <= max(warm_up_steps, 1):
            raise ValueError(
                f"{_name(self)}: end_step must be above warm_up_steps and 1, not {end_step}"
            )

    def factors(self, updates: int) -> np.ndarray:
        peak = max(self.warm_up_steps, 1)
        end = updates if self.end_step is None else self.end_step
        if end <= peak:
            raise ValueError(
                f"{_name(self)}: the rate is to fall from update {peak} to the run's last, which "
                f"is {updates}; lower warm_up_steps or raise data.total_step"
            )
        k = np.arange(1, updates + 1, dtype=np.float64)
        left = self._left(np.clip((k - peak) / (end - peak), 0.0, 1.0))
        falling = self.end_factor + (1.0 - self.end_factor) * left
        return np.where(k <= peak, _warm_up(updates, peak), falling)

    @abstractmethod
    def _left(self, progress: np.ndarray) -> np.ndarray:
        """What is left of the fall, from 1 at progress 0 to exactly 0 at progress 1."""


class LinearScheduler(_Falling):
    """A straight line from 1 to `end_factor`: torch's LinearLR, with a warm-up before it."""

    def _left(self, progress: np.ndarray) -> np.ndarray:
        return 1.0 - progress


class CosineScheduler(_Falling):
    """Half a cosine from 1 to `end_factor` (Loshchilov and Hutter 2017, eq. 5, one period)."""

    def _left(self, progress: np.ndarray) -> np.ndarray:
        return _half_cosine(progress)


class MultiStepScheduler:
    """Constant between milestones, and `gamma` times as much after each: torch's MultiStepLR.

    milestones: updates, ascending, after which the rate drops: update m is the last before, m + 1
    the first with it. Each has an effect, so they lie after the warm-up and within the run.
    """

    def __init__(
        self, milestones: Sequence[int], gamma: float = 0.1, warm_up_steps: int = 0
    ) -> None:
        self.warm_up_steps = _checked_warm_up(self, warm_up_steps)
        if not milestones:
            raise ValueError(
                f"{_name(self)}: milestones is empty; name one, or use LambdaWarmUpScheduler"
            )
        if any(b <= a for a, b in pairwise(milestones)):
            raise ValueError(
                f"{_name(self)}: milestones must ascend, each once, not {list(milestones)}; sort "
                "them"
            )
        if milestones[0] < max(warm_up_steps, 1):
            raise ValueError(
                f"{_name(self)}: milestone {milestones[0]} must be at least 1 and not within the "
                f"warm-up; warm_up_steps is {warm_up_steps}"
            )
        if not 0.0 < gamma < 1.0:
            raise ValueError(f"{_name(self)}: gamma must lie between 0 and 1, not {gamma}")
        self.milestones, self.gamma = milestones, gamma

    def factors(self, updates: int) -> np.ndarray:
        if self.milestones[-1] >= updates:
            raise ValueError(
                f"{_name(self)}: milestone {self.milestones[-1]} has no update after it in a run "
                f"of {updates}; remove it or raise data.total_step"
            )
        passed = np.searchsorted(self.milestones, np.arange(updates), side="right")
        return _warm_up(updates, self.warm_up_steps) * self.gamma**passed


class LambdaWarmUpCosineScheduler:
    """A line from lr_start to lr_max over `warm_up_steps`, then half a cosine to lr_min.

    All three are factors. max_decay_steps: the n at which lr_min is reached, and kept from then
    on; -1: the number of updates, so that the last update comes just before it.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
    ) -> None:
        self.warm_up_steps = _checked_warm_up(self, warm_up_steps)
        if min(lr_min, lr_max, lr_start) < 0:
            raise ValueError(f"{_name(self)}: lr_min, lr_max and lr_start must be at least 0")
        if max_decay_steps != -1 and max_decay_steps <= warm_up_steps:
            raise ValueError(
                f"{_name(self)}: max_decay_steps must be above warm_up_steps, or -1 for the whole "
                f"run, not {max_decay_steps}"
            )
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start
        self.max_decay_steps = max_decay_steps

    def factors(self, updates: int) -> np.ndarray:
        end = updates if self.max_decay_steps == -1 else self.max_decay_steps
        if end <= self.warm_up_steps:
            raise ValueError(
                f"{_name(self)}: the warm-up of {self.warm_up_steps} updates fills the run of "
                f"{updates}; lower warm_up_steps or raise data.total_step"
            )
        n = np.arange(updates, dtype=np.float64)
        warm_up = self.warm_up_steps
        rising = self.lr_start + (self.lr_max - self.lr_start) * n / max(warm_up, 1)
        left = _half_cosine(np.clip((n - warm_up) / (end - warm_up), 0.0, 1.0))
        return np.where(n < warm_up, rising, self.lr_min + (self.lr_max - self.lr_min) * left)


class _Cycles(ABC):
    """Cycles of a linear warm-up and a fall, as in the original latent diffusion code.

    Each argument has one number a cycle. In a cycle the factor goes from f_start to f_max over
    `warm_up_steps`, then falls towards f_min, which it has at n = `cycle_lengths`; the next cycle
    begins with the n after it, as its own n = 1.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[float],
    ) -> None:
        cycles = {len(warm_up_steps), len(f_min), len(f_max), len(f_start), len(cycle_lengths)}
        if len(cycles) != 1 or 0 in cycles:
            raise ValueError(
                f"{_name(self)}: warm_up_steps, f_min, f_max, f_start and cycle_lengths "
                "must be lists of one length, one number a cycle"
            )
        if min(warm_up_steps) < 0 or min(cycle_lengths) <= 0:
            raise ValueError(
                f"{_name(self)}: warm_up_steps must be at least 0 and cycle_lengths above 0"
            )
        if min(*f_min, *f_max, *f_start) < 0:
            raise ValueError(f"{_name(self)}: f_min, f_max and f_start must be at least 0")
        self.warm_up_steps, self.cycle_lengths = warm_up_steps, cycle_lengths
        self.f_min, self.f_max, self.f_start = f_min, f_max, f_start
        self._check_falls()

    def factors(self, updates: int) -> np.ndarray:
        ends = np.cumsum(np.asarray(self.cycle_lengths, np.float64))
        if updates - 1 > ends[-1]:
            raise ValueError(
                f"{_name(self)}: the cycles end after {np.floor(ends[-1]) + 1:.0f} updates, and "
                f"the run has {updates}; lengthen the last of cycle_lengths"
            )
        n = np.arange(updates, dtype=np.float64)
        cycle = np.searchsorted(ends, n, side="left")
        n -= np.append(0.0, ends)[cycle]
        warm_up, length, low, high, start = (
            np.asarray(values, np.float64)[cycle]
            for values in (
                self.warm_up_steps, self.cycle_lengths, self.f_min, self.f_max, self.f_start
            )
        )  # fmt: skip
        rising = start + (high - start) * n / np.maximum(warm_up, 1.0)
        falling = low + (high - low) * self._left(n, warm_up, length)
        return np.where(n < warm_up, rising, falling)

    def _check_falls(self) -> None:  # noqa: B027 - any cycle has room for a line
        """Raises ValueError where a cycle leaves no room for its fall."""

    @abstractmethod
    def _left(self, n: np.ndarray, warm_up: np.ndarray, length: np.ndarray) -> np.ndarray:
        """What is left of the fall at n of a cycle, 0 at n = length."""


class LambdaLinearScheduler(_Cycles):
    """Cycles whose fall is the line that joins f_max at n = 0 to f_min at n = `cycle_lengths`.

    So a cycle with a warm-up drops when that ends: it then goes on along the line.
    """

    def _left(self, n: np.ndarray, warm_up: np.ndarray, length: np.ndarray) -> np.ndarray:
        return (length - n) / length


class LambdaWarmUpCosineScheduler2(_Cycles):
    """Cycles whose fall is half a cosine from f_max, where the warm-up ends, to f_min."""

    def _check_falls(self) -> None:
        cycles = zip(self.warm_up_steps, self.cycle_lengths, strict=True)
        if any(warm_up >= length for warm_up, length in cycles):
            raise ValueError(f"{_name(self)}: each of warm_up_steps must be below its cycle_length")

    def _left(self, n: np.ndarray, warm_up: np.ndarray, length: np.ndarray) -> np.ndarray:
        return _half_cosine(np.clip((n - warm_up) / (length - warm_up), 0.0, 1.0))


def _warm_up(updates: int, steps: int) -> np.ndarray:
    """(updates,) float64: min(1, k / steps)."""
    k = np.arange(1, updates + 1, dtype=np.float64)
    return np.minimum(1.0, k / max(steps, 1))


def _half_cosine(progress: np.ndarray) -> np.ndarray:
    """From 1 at 0 to exactly 0 at 1."""
    return 0.5 * (1.0 + np.cos(np.pi * progress))


def _checked_warm_up(schedule: object, steps: int) -> int:
    if steps < 0:
        raise ValueError(f"{_name(schedule)}: warm_up_steps must be at least 0, not {steps}")
    return steps


def _name(schedule: object) -> str:
    return type(schedule).__name__
