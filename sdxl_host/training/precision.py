"""Mixed precision: which cells of the network compute in float16.

Parameters stay in float32 and are cast where they are used, so there is one copy of them and
updates are made in float32.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn

__all__ = ["LARGEST_LOSS_SCALE", "LOSS_SCALE", "PRECISIONS", "apply_precision", "is_half"]

PRECISIONS = {
    "O0": "float32",
    "O2": "float16 but for norms and SiLU, weights in float32",
    "O3": "float16 throughout, weights in float32",
}

# Of the first step. Too high a one costs a few skipped steps until it has been halved enough.
LOSS_SCALE = 65536.0
LARGEST_LOSS_SCALE = 2.0**24


def is_half(level: str) -> bool:
    """Whether matrices and convolutions are multiplied in float16 at this level."""
    return level != "O0"


def apply_precision(network: nn.Cell, level: str) -> None:
    """Sets the cells' types, before the network first runs.

    level: "O0", float32; "O2", float16 but for norms and SiLU, which stay float32; "O3", float16
    throughout (MindSpore's names). The sinusoids are float32 at every level.
    """
    if not is_half(level):
        return
    kept = () if level == "O3" else (nn.LayerNorm, nn.GroupNorm, nn.SiLU)
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.Dense | nn.Conv2d):
            cell.to_float(ms.float16)
        elif isinstance(cell, nn.LayerNorm | nn.GroupNorm | nn.SiLU):
            cell.to_float(ms.float32 if isinstance(cell, kept) else ms.float16)
