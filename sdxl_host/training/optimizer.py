"""Optimizers and learning-rate schedules of a config, as tables of numbers an update.

The compiled step holds one kernel, MindSpore's fused AdamWeightDecay:

    m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g^2
    parameter -= rate * (m / (sqrt(v) + epsilon) + decay * parameter)

What an optimizer is, beside the betas, is the numbers (rate, epsilon, decay) of its k-th update,
computed here in float64. They are looked up in the graph by the count of applied updates, so a
skipped step does not advance a schedule and nothing is computed with 1 - beta^k in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sdxl_host.errors import ConfigError
from sdxl_host.settings import OptimSettings
from sdxl_host.targets import build

__all__ = [
    "AdamW",
    "AdamWeightDecay",
    "LambdaLinearScheduler",
    "LambdaWarmUpScheduler",
    "Optimizer",
    "configured",
    "learning_rates",
]


class Schedule(Protocol):
    """A factor on the base learning rate for each update."""

    def factors(self, updates: int) -> np.ndarray:
        """(updates,) float64, of update 1, 2, ..."""
        ...


class LambdaWarmUpScheduler:
    """Linear warm-up, then constant: update k has the factor min(1, k / warm_up_steps)."""

    def __init__(self, warm_up_steps: int) -> None:
        if warm_up_steps < 0:
            raise ValueError(
                f"LambdaWarmUpScheduler: warm_up_steps must be at least 0, not {warm_up_steps}"
            )
        self.warm_up_steps = warm_up_steps

    def factors(self, updates: int) -> np.ndarray:
        k = np.arange(1, updates + 1, dtype=np.float64)
        return np.minimum(1.0, k / max(self.warm_up_steps, 1))


class LambdaLinearScheduler:
    """Cycles of linear warm-up and linear decay, as in the original latent diffusion code.

    Each argument has one number a cycle. In a cycle, update n = 0, 1, ... has the factor that goes
    from f_start to f_max over `warm_up_steps`, and from then on the line that joins f_max at n = 0
    to f_min at the cycle's end, `cycle_lengths`.
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
                "LambdaLinearScheduler: warm_up_steps, f_min, f_max, f_start and cycle_lengths "
                "must be lists of one length, one number a cycle"
            )
        if min(warm_up_steps) < 0 or min(cycle_lengths) <= 0:
            raise ValueError(
                "LambdaLinearScheduler: warm_up_steps must be at least 0 and cycle_lengths above 0"
            )
        if min(*f_min, *f_max, *f_start) < 0:
            raise ValueError("LambdaLinearScheduler: f_min, f_max and f_start must be at least 0")
        self.warm_up_steps, self.cycle_lengths = warm_up_steps, cycle_lengths
        self.f_min, self.f_max, self.f_start = f_min, f_max, f_start

    def factors(self, updates: int) -> np.ndarray:
        ends = np.cumsum(np.asarray(self.cycle_lengths, np.float64))
        if updates > ends[-1]:
            raise ValueError(
                f"LambdaLinearScheduler: the cycles end after {ends[-1]:.0f} updates, and the run "
                f"has {updates}; lengthen the last of cycle_lengths"
            )
        k = np.arange(updates, dtype=np.float64)
        cycle = np.searchsorted(ends, k, side="right")
        n = k - np.append(0.0, ends)[cycle]
        warm_up, length, low, high, start = (
            np.asarray(values, np.float64)[cycle]
            for values in (
                self.warm_up_steps, self.cycle_lengths, self.f_min, self.f_max, self.f_start
            )
        )  # fmt: skip
        rising = start + (high - start) * n / np.maximum(warm_up, 1.0)
        falling = low + (high - low) * (length - n) / length
        return np.where(n < warm_up, rising, falling)


def learning_rates(base: float, schedule: Schedule | None, updates: int) -> np.ndarray:
    """(updates,) float64 learning rates of update 1, 2, ..., constant without a schedule."""
    return base * (np.ones(updates) if schedule is None else schedule.factors(updates))


class Optimizer:
    """What both optimizers share: betas, epsilon and decoupled weight decay.

    Decay applies to matrices and kernels only; biases and norms are never decayed.
    """

    def __init__(self, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), not {beta}")
        if eps <= 0 or weight_decay < 0:
            raise ValueError(
                f"eps must be above 0 and weight_decay at least 0, not {eps} and {weight_decay}"
            )
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay

    def table(self, rates: np.ndarray) -> np.ndarray:
        """(updates, 4) float32: learning rate, then the kernel's rate, epsilon and decay."""
        scale, damping = self._corrections(np.arange(1, len(rates) + 1, dtype=np.float64))
        columns = (rates, rates * scale, self.eps * damping, self.weight_decay / scale)
        return np.stack(columns, axis=1).astype(np.float32)

    def _corrections(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factors on the kernel's rate and epsilon at update k."""
        return np.ones_like(k), np.ones_like(k)

    def notes(self) -> list[str]:
        """What the start of a run should say of this optimizer."""
        return []


class AdamW(Optimizer):
    """AdamW with bias correction (Loshchilov and Hutter 2019, algorithm 2).

    m_hat / (sqrt(v_hat) + eps) is sqrt(1 - beta2^k) / (1 - beta1^k) times the kernel's quotient
    with eps * sqrt(1 - beta2^k), so both corrections are folded into its inputs.
    """

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(beta1, beta2, eps, weight_decay)

    def _corrections(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = 1.0 - self.beta1**k, np.sqrt(1.0 - self.beta2**k)
        return second / first, second


class AdamWeightDecay(Optimizer):
    """`mindspore.nn.AdamWeightDecay`: the same without bias correction."""

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(beta1, beta2, eps, weight_decay)

    def notes(self) -> list[str]:
        return [
            "AdamWeightDecay corrects no bias, so its first updates are larger than AdamW's; "
            "sdxl_host.AdamW does"
        ]


def configured(settings: OptimSettings, updates: int) -> tuple[Optimizer, np.ndarray]:
    """The optimizer that a config names, and its learning rates (updates,) float64.

    Raises ConfigError, also for a schedule that is shorter than the run.
    """
    optimizer = build(settings.optimizer_config, "optimizer", "optim.optimizer_config")
    schedule = None
    if settings.scheduler_config:
        schedule = build(settings.scheduler_config, "scheduler", "optim.scheduler_config")
    try:
        return optimizer, learning_rates(settings.base_learning_rate, schedule, updates)
    except ValueError as error:
        raise ConfigError(f"optim.scheduler_config.params: {error}") from error
