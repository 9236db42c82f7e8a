"""Optimizers of a config, as tables of numbers an update.

The compiled step holds one kernel, MindSpore's fused AdamWeightDecay:

    m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g^2
    parameter -= rate * (m / (sqrt(v) + epsilon) + decay * parameter)

What an optimizer is, beside the betas, is the numbers (rate, epsilon, decay) of its k-th update,
computed here in float64. They are data, not constants of the graph: it looks them up by the count
of applied updates. So a skipped step does not advance a schedule, nothing is computed with
1 - beta^k in float32, and another learning rate or beta is the same graph.
"""

from __future__ import annotations

import numpy as np

from sdxl_host.errors import ConfigError
from sdxl_host.settings.declarations import OptimSettings
from sdxl_host.settings.targets import build
from sdxl_host.training.lr_schedulers import learning_rates

__all__ = [
    "AdamW",
    "AdamWeightDecay",
    "Optimizer",
    "configured",
]


class Optimizer:
    """What both optimizers share: betas, epsilon and decoupled weight decay.

    Decay applies to matrices and kernels only; biases and norms are never decayed.
    """

    def __init__(self, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not (beta >= 0.0 and np.float32(beta) < 1.0):
                raise ValueError(f"{name} must lie in [0, 1) in float32, not {beta}")
        if eps <= 0 or weight_decay < 0:
            raise ValueError(
                f"eps must be above 0 and weight_decay at least 0, not {eps} and {weight_decay}"
            )
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        # The first update's is the smallest. Subnormal numbers may be 0 to a kernel, and what has
        # no gradient would be 0 / 0.
        damping = float(self._corrections(np.ones(1))[1][0])
        least = float(np.finfo(np.float32).tiny)
        if not np.float32(eps * damping) >= least:
            raise ValueError(
                f"eps must be at least {least:.3g} in float32 at every update, and {eps} is "
                f"{eps * damping:.3g} at the first"
            )

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
        # The betas as the kernel has them: of 1 - 0.999 float32 knows five digits, which would be
        # seen in the first thousand updates if it were not the same number here.
        beta1, beta2 = float(np.float32(self.beta1)), float(np.float32(self.beta2))
        first, second = 1.0 - beta1**k, np.sqrt(1.0 - beta2**k)
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


def configured(
    settings: OptimSettings, updates: int, scale: int = 1
) -> tuple[Optimizer, np.ndarray]:
    """The optimizer that a config names, and its learning rates (updates,) float64.

    scale: what the base rate is multiplied by. Raises ConfigError, also for a schedule that
    does not fit the run.
    """
    optimizer = build(settings.optimizer_config, "optimizer", "optim.optimizer_config")
    schedule = None
    if settings.scheduler_config:
        schedule = build(settings.scheduler_config, "scheduler", "optim.scheduler_config")
    try:
        rates = learning_rates(settings.base_learning_rate * scale, schedule, updates)
    except ValueError as error:
        raise ConfigError(f"optim.scheduler_config.params: {error}") from error
    return optimizer, rates
