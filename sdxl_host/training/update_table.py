"""The numbers of each update, which enter the compiled step as data and not as constants.

So a run with another learning rate, beta, schedule, length, clipping norm or EMA decay has the same
graph.
"""

from __future__ import annotations

import numpy as np

from sdxl_host.training.ema import ema_shares
from sdxl_host.training.optimizer import Optimizer

__all__ = ["COLUMNS", "update_table"]

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
