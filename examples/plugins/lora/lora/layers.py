"""The cell that takes a dense layer's place. Only imported where a network is built, because it
imports MindSpore."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn

__all__ = ["AdaptedDense"]


class AdaptedDense(nn.Dense):
    """A dense layer with a low-rank part beside it: W x + b + scale * up(down(x)).

    down: (rank, inputs) float32, what the part starts from; up starts at 0, so at first the layer
    is what it was.
    """

    def __init__(self, dense: nn.Dense, down: np.ndarray, scale: float) -> None:
        inputs, outputs, rank = dense.in_channels, dense.out_channels, len(down)
        super().__init__(inputs, outputs, dense.weight, dense.bias, dense.has_bias)
        self.lora_down = nn.Dense(inputs, rank, Tensor(down), has_bias=False)
        self.lora_up = nn.Dense(rank, outputs, "zeros", has_bias=False)
        self.scale = scale

    def construct(self, x):
        """(B, L, inputs) -> (B, L, outputs)."""
        return super().construct(x) + self.scale * self.lora_up(self.lora_down(x))
