"""EMA: the exponential moving average of the trained weights.

    ema_k = ema_{k-1} + (1 - d_k) (weight_k - ema_{k-1}),   d_k = min(ema_decay, (1 + k) / (10 + k))

with k = 0, 1, ... the number of updates applied before. An EMA of few updates forgets faster,
so the first weights, which are random, do not stay in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

__all__ = ["EMA", "ema_shares"]

_move = ops.MultitypeFuncGraph("move")


@_move.register("Tensor", "Tensor", "Tensor")
def _move_one(share, ema, weight):
    return ops.assign_add(ema, share * (weight - ema))


def ema_shares(ema_decay: float, updates: int) -> np.ndarray:
    """(updates,) float64: 1 - d_k, what share of the weights after each update enters the EMA."""
    k = np.arange(updates, dtype=np.float64)
    return 1.0 - np.minimum(ema_decay, (1.0 + k) / (10.0 + k))


class EMA(nn.Cell):
    """The EMA of each of `parameters`, in float32; it begins with their first values.

    weights: what holds each parameter's value in float32, in the same order; see `TrainStep`.
    """

    def __init__(self, parameters: Sequence[Parameter], weights: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.ema = ParameterTuple(
            [
                Parameter(Tensor(weight.asnumpy().copy()), f"ema.{p.name}", requires_grad=False)
                for p, weight in zip(parameters, weights, strict=True)
            ]
        )
        self.map = ops.HyperMap()

    def construct(self, share, weights):
        """Moves every EMA by `share`, a float32 scalar, of the way to its weight."""
        return self.map(ops.partial(_move, share), self.ema, weights)

    def values(self) -> Mapping[int, Parameter]:
        """Each trained parameter's EMA, by the parameter's `id`."""
        return {id(p): ema for p, ema in zip(self.parameters, self.ema, strict=True)}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the network computes with the EMA; afterwards with its weights again."""
        weights = [parameter.asnumpy().copy() for parameter in self.parameters]
        try:
            for parameter, ema in zip(self.parameters, self.ema, strict=True):
                # Assigned, because a compiled graph does not see `set_data`.
                ops.assign(parameter, ema.astype(parameter.dtype))
            yield
        finally:
            for parameter, weight in zip(self.parameters, weights, strict=True):
                ops.assign(parameter, Tensor(weight))
