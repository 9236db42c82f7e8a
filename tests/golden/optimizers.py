"""Golden updates: torch's AdamW over 50 gradients that are given, in float64 and in float32.

Parameters begin as `deterministic.weight(name, shape)`; the gradient of update k is
`deterministic.array(f"adamw.{k}.{name}", shape)` times 0.1, every fifth one times 1: those are
clipped. The rate of update k is `rate * min(1, k / 10)`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from deterministic import array, weight
from loading import Arrays
from torch.optim.lr_scheduler import LinearLR

UPDATES, WARM_UP = 50, 10
KEPT = (1, 2, 10, 25, 50)
DECAYED = {"conv.weight": (4, 3, 3, 3), "dense.weight": (5, 7), "table.weight": (3, 6)}
NOT_DECAYED = {"conv.bias": (4,), "dense.bias": (5,), "norm.weight": (6,), "norm.bias": (6,)}
SHAPES = DECAYED | NOT_DECAYED


@dataclass
class Run:
    """What a run is made with; limit: the norm to clip to."""

    rate: float
    betas: tuple[float, float]
    eps: float
    decay: float
    limit: float | None


RUNS = {
    "plain": Run(1e-2, (0.9, 0.999), 1e-8, 0.1, None),
    "clipped": Run(3e-3, (0.8, 0.95), 1e-4, 0.5, 2.0),
}


def given(k: int, name: str) -> np.ndarray:
    """The gradient of update k, float32."""
    size = 1.0 if k % 5 == 0 else 0.1
    return array(f"adamw.{k}.{name}", SHAPES[name]) * np.float32(size)


def updates(run: Run, dtype: torch.dtype) -> Arrays:
    """Every parameter after the updates KEPT, by name, (5, ...); `norms` (50,) before clipping."""
    parameters = {
        name: torch.nn.Parameter(torch.from_numpy(weight(name, shape)).to(dtype))
        for name, shape in SHAPES.items()
    }
    groups = [
        {"params": [parameters[name] for name in names], "weight_decay": decay}
        for names, decay in ((DECAYED, run.decay), (NOT_DECAYED, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, betas=run.betas, eps=run.eps)
    warm_up = LinearLR(optimizer, start_factor=1 / WARM_UP, total_iters=WARM_UP - 1)
    limit = float("inf") if run.limit is None else run.limit
    norms, path = [], []
    for k in range(1, UPDATES + 1):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(given(k, name)).to(dtype)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
        norms.append(norm.item())
        optimizer.step()
        warm_up.step()
        if k in KEPT:
            path.append({name: p.detach().numpy().copy() for name, p in parameters.items()})
    arrays: Arrays = {name: np.stack([point[name] for point in path]) for name in SHAPES}
    return arrays | {"norms": np.array(norms)}


def golden_adamw() -> Arrays:
    """Both runs in both precisions, as `plain_float64.conv.weight`."""
    arrays: Arrays = {"kept": np.array(KEPT)}
    for label, run in RUNS.items():
        for dtype in (torch.float64, torch.float32):
            precision = str(dtype).removeprefix("torch.")
            for key, values in updates(run, dtype).items():
                arrays[f"{label}_{precision}.{key}"] = values
    return arrays
