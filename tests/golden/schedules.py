"""Golden learning rates: torch's schedules over a run of 30 updates from a base rate of 1.

torch sets the rate after an update, so update k = 1, 2, ... is made at its `last_epoch` k - 1. A
warm-up over 8 updates is its LinearLR from 1/8, which hands over at update 8, with 1.
"""

from collections.abc import Callable

import numpy as np
import torch
from loading import Arrays
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

UPDATES, WARM_UP = 30, 8

Scheduler = Callable[[torch.optim.Optimizer, int], LRScheduler]


def linear(optimizer: torch.optim.Optimizer, length: int) -> LRScheduler:
    """To 0.1."""
    return LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=length)


def cosine(optimizer: torch.optim.Optimizer, length: int) -> LRScheduler:
    """To 0.1."""
    return CosineAnnealingLR(optimizer, T_max=length, eta_min=0.1)


def multi_step(optimizer: torch.optim.Optimizer, length: int) -> LRScheduler:
    """At updates 12, 20 and 21 of a run whose last is `length` updates away."""
    before = UPDATES - 1 - length
    return MultiStepLR(optimizer, [at - before for at in (12, 20, 21)], gamma=0.3)


def rates(make: Scheduler, warm_up: int, end: int = UPDATES) -> np.ndarray:
    """(30,) float64 learning rates; `end` is the update that has the last of the curve."""
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64, requires_grad=True)], lr=1.0)
    if warm_up:
        rising = LinearLR(optimizer, start_factor=1 / warm_up, total_iters=warm_up - 1)
        falling = make(optimizer, end - warm_up)
        scheduler = SequentialLR(optimizer, [rising, falling], milestones=[warm_up - 1])
    else:
        scheduler = make(optimizer, end - 1)
    told = []
    for _ in range(UPDATES):
        told.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(told, dtype=np.float64)


def golden_learning_rates() -> Arrays:
    """Each schedule with and without a warm-up, and a line that ends at update 20."""
    arrays: Arrays = {"linear_to_20": rates(linear, 0, end=20)}
    for make in (linear, cosine, multi_step):
        arrays[make.__name__] = rates(make, 0)
        arrays[f"{make.__name__}_warm_up"] = rates(make, WARM_UP)
    return arrays
