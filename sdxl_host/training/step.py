"""One training step, compiled once for every objective: see `diffusion.objective`.

The graph takes numbers only. Which plugins made them it can't know, so changing a plugin or its
options never recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from sdxl_host.training.optimizer import Optimizer
from sdxl_host.training.precision import LARGEST_LOSS_SCALE

__all__ = ["TrainStep", "decayed"]

_square_sum = ops.MultitypeFuncGraph("square_sum")


@_square_sum.register("Tensor")
def _square_sum_of(gradient):
    return ops.square(gradient.astype(ms.float32)).sum()


# Updates without an overflow after which the loss scale is doubled.
_GROWTH_INTERVAL = 2000

_update = ops.MultitypeFuncGraph("update")


@_update.register(
    "Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor",
    "Bool", "Tensor", "Tensor", "Tensor", "Tensor",
)  # fmt: skip
def _update_one(
    kernel, scale, finite, rate, beta1, beta2, epsilon, decay, is_decayed, parameter, m, v, gradient
):
    """One parameter's update; `scale` clips. Where the step is not finite nothing changes: the
    rate and the gradient are 0 and the moments keep all of themselves."""
    gradient = ops.select(finite, gradient * scale, ops.zeros_like(gradient))
    own_decay = decay if is_decayed else decay * 0.0
    return kernel(parameter, m, v, rate, beta1, beta2, epsilon, own_decay, gradient)


def decayed(network: nn.Cell) -> set[str]:
    """Names of the parameters that weight decay applies to: matrices and kernels, by layer type.

    Norms and biases are left out; so is whatever else has fewer than two axes.
    """
    norms = {
        id(parameter)
        for _, cell in network.cells_and_names()
        if isinstance(cell, nn.LayerNorm | nn.GroupNorm)
        for parameter in cell.get_parameters()
    }
    return {p.name for p in network.get_parameters() if id(p) not in norms and p.ndim >= 2}


class TrainStep(nn.Cell):
    """Loss, gradients, clipping and the update of the trained parameters.

    network: F(x, c_noise, context, vector, mask). parameters: those of it that are trained.
    table: (updates, 4), see `optimizer`. max_grad_norm: global norm to clip to, or None.
    loss_scale: what the loss is first multiplied by, so that gradients in float16 do not vanish;
    it is halved when they overflow and doubled after 2000 updates without (Micikevicius et al.
    2018). None: no scaling.
    """

    def __init__(
        self,
        network: nn.Cell,
        parameters: Sequence[Parameter],
        optimizer: Optimizer,
        table: np.ndarray,
        max_grad_norm: float | None,
        loss_scale: float | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.parameters = ParameterTuple(parameters)
        self.moments1 = _zeros("adam_m.", parameters)
        self.moments2 = _zeros("adam_v.", parameters)
        # Updates applied so far. Skipped steps don't count: they take no place in the schedule.
        self.applied = Parameter(Tensor(0, ms.int32), name="applied", requires_grad=False)
        names = decayed(network)
        self.is_decayed = tuple(parameter.name in names for parameter in parameters)
        self.table = Tensor(table)
        self.last = len(table) - 1
        self.beta1 = Tensor(optimizer.beta1, ms.float32)
        self.beta2 = Tensor(optimizer.beta2, ms.float32)
        self.one = Tensor(1.0, ms.float32)
        self.zero = Tensor(0.0, ms.float32)
        self.is_scaled = loss_scale is not None
        self.scale = Parameter(
            Tensor(loss_scale or 1.0, ms.float32), name="loss_scale", requires_grad=False
        )
        # Updates applied since the scale last changed.
        self.unchanged = Parameter(Tensor(0, ms.int32), name="loss_scale_age", requires_grad=False)
        self.limit = None if max_grad_norm is None else Tensor(max_grad_norm, ms.float32)
        self.kernel = ops.AdamWeightDecay()
        self.map = ops.HyperMap()
        self.gradient = ops.value_and_grad(self.loss, None, self.parameters, has_aux=True)

    def loss(self, latents, noise, coefficients, context, vector, mask):
        """The mean of w * losses, scaled and as it is, and the losses (B,): see `construct`."""
        p, q, a, b, w, c_noise = (
            coefficients[0],
            coefficients[1],
            coefficients[2],
            coefficients[3],
            coefficients[4],
            coefficients[5],
        )
        output = self.network(
            _spread(p) * latents + _spread(q) * noise, c_noise, context, vector, mask
        )
        target = _spread(a) * latents + _spread(b) * noise
        error = ops.square(output.astype(ms.float32) - target)
        losses = error.mean(axis=(1, 2, 3))
        loss = (w * losses).mean()
        return loss * self.scale if self.is_scaled else loss, loss, losses

    def construct(self, latents, noise, coefficients, context, vector, mask):
        """One update.

        latents, noise (B, C, H, W); coefficients (6, B) as `Coefficients.stacked`; context
        (B, L, D); vector (B, V); mask (B, L). All float32. Returns the weighted loss, the losses
        (B,) unweighted, the global gradient norm, whether all was finite, the learning rate, and
        the loss scale of this update.
        """
        (_, loss, losses), gradients = self.gradient(
            latents, noise, coefficients, context, vector, mask
        )
        norm = ops.sqrt(ops.addn(self.map(_square_sum, gradients)))
        # What the gradients are multiplied by: clipping, and the loss scale taken back.
        scale = used = self.one
        if self.is_scaled:
            used = self.scale + self.zero
            norm = norm / used
        finite = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))
        if self.limit is not None:
            scale = ops.minimum(self.one, self.limit / norm)
        if self.is_scaled:
            scale = scale / used
        row = self.table[ops.minimum(self.applied, self.last)]
        done = self.map(
            ops.partial(
                _update,
                self.kernel,
                scale,
                finite,
                ops.select(finite, row[1], self.zero),
                ops.select(finite, self.beta1, self.one),
                ops.select(finite, self.beta2, self.one),
                row[2],
                row[3],
            ),
            self.is_decayed,
            self.parameters,
            self.moments1,
            self.moments2,
            gradients,
        )
        counted = ops.assign_add(self.applied, finite.astype(ms.int32))
        loss = ops.depend(loss, (done, counted))
        if self.is_scaled:
            loss = ops.depend(loss, self.rescale(finite, used))
        return loss, losses, norm, finite, row[0], used

    def rescale(self, finite, used):
        """Moves the loss scale after an update that was applied or not."""
        age = ops.select(finite, self.unchanged + 1, ops.zeros_like(self.unchanged))
        doubled = ops.minimum(used * 2.0, LARGEST_LOSS_SCALE)
        grown = ops.select(age >= _GROWTH_INTERVAL, doubled, used)
        shrunk = ops.maximum(used * 0.5, self.one)
        age = ops.select(age >= _GROWTH_INTERVAL, ops.zeros_like(age), age)
        changed = ops.assign(self.scale, ops.select(finite, grown, shrunk))
        return ops.depend(changed, ops.assign(self.unchanged, age))

    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state by name, as float32 and int32 arrays."""
        return {parameter.name: parameter.asnumpy() for parameter in self._state()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes back what `state` gave. Before the first step: see `compiled`."""
        for parameter in self._state():
            parameter.set_data(Tensor(state[parameter.name]))

    def _state(self) -> list[Parameter]:
        kept = [*self.moments1, *self.moments2, self.applied]
        return [*kept, self.scale, self.unchanged] if self.is_scaled else kept


def compiled(step: TrainStep, eager: bool) -> Callable[..., Any]:
    """The step as a callable: compiled at its first call, or eager.

    Parameters replaced by `set_data` after the first compiled call would not be seen, so weights
    and state are loaded before it.
    """
    return step.construct if eager else ms.jit(step.construct)


def _zeros(prefix: str, parameters: Sequence[Parameter]) -> ParameterTuple:
    return ParameterTuple(
        [
            Parameter(Tensor(np.zeros(p.shape, np.float32)), prefix + p.name, requires_grad=False)
            for p in parameters
        ]
    )


def _spread(values):
    """(B,) -> (B, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)
