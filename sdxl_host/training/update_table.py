"""The numbers of each update, which enter the compiled step as data and not as constants.

So a run with another learning rate, beta, schedule, length, clipping norm or EMA decay has the same
graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdxl_host.training.ema import ema_shares
from sdxl_host.training.optimizer import Optimizer

if TYPE_CHECKING:
    from sdxl_host.training.step import TrainStep

__all__ = ["COLUMNS", "UpdateRows", "update_table"]

COLUMNS = (
    "learning_rate", "rate", "epsilon", "decay", "beta1", "beta2", "max_grad_norm", "ema_share"
)  # fmt: skip


def update_table(
    optimizer: Optimizer,
    rates: np.ndarray,
    max_grad_norm: float | None = None,
    ema_decay: float = 0.0,
) -> np.ndarray:
    """(updates, 8) float32: the numbers of update 1, 2, ... in the order of `COLUMNS`.

    rates: (updates,) learning rates. max_grad_norm: the global norm that gradients are clipped to;
    None: they are not clipped.
    """
    limit = np.inf if max_grad_norm is None else max_grad_norm
    constant = np.tile((optimizer.beta1, optimizer.beta2, limit), (len(rates), 1))
    shares = ema_shares(ema_decay, len(rates))[:, None]
    return np.hstack((optimizer.table(rates), constant, shares)).astype(np.float32)


class UpdateRows:
    """Sees to it that the rows of a step's next updates are on the device.

    How many updates were applied is known there alone, because a step whose numbers are not finite
    is skipped; so the rows are renewed only when as many steps have run as there are rows.
    """

    def __init__(self, step: TrainStep, table: np.ndarray) -> None:
        self._step, self._table = step, table
        self._left = 0

    def provide(self, steps: int = 1) -> None:
        """Before the next `steps` steps, which are at most as many as the step has rows."""
        if self._left < steps:
            self._step.load_rows(self._table)
            self._left = self._step.rows.shape[0]
        self._left -= steps
