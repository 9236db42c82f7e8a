"""One training step, compiled once for every objective: see `diffusion.objective`.

The graph takes numbers only. It does not know which plugins made them, so changing a plugin that
makes numbers, or its options, never recompiles. A plugin that changes the network, or the length of
the context, has a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from sdxl_host.models.precision import LARGEST_LOSS_SCALE
from sdxl_host.training.ema import EMA
from sdxl_host.training.update_table import COLUMNS

__all__ = ["StepRunner", "TrainStep", "UpdateRows", "decayed"]

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
    gradient = gradient.astype(ms.float32) * scale
    gradient = ops.select(finite, gradient, ops.zeros_like(gradient))
    decay = decay if is_decayed else decay * 0.0
    return kernel(parameter, m, v, rate, beta1, beta2, epsilon, decay, gradient)


_reduce = ops.MultitypeFuncGraph("reduce")
_add = ops.MultitypeFuncGraph("add_gradient")
_publish = ops.MultitypeFuncGraph("publish")


@_reduce.register("Function", "Tensor")
def _reduce_one(operator, gradient):
    return operator(gradient.astype(ms.float32))


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


@_add.register("Tensor", "Tensor", "Tensor")
def _add_one(is_first, total, gradient):
    """Adds a gradient to its sum; the first one replaces what stood there, finite or not."""
    gradient = gradient.astype(ms.float32)
    return ops.assign(total, ops.select(is_first, gradient, total + gradient))


@_publish.register("Bool", "Tensor", "Tensor")
def _publish_one(is_half, parameter, weight):
    """Gives a parameter that is kept in 16 bits the value of its float32 copy."""
    return ops.assign(parameter, weight.astype(parameter.dtype)) if is_half else weight


class TrainStep(nn.Cell):
    """Loss, gradients, clipping and the update of the trained parameters.

    network: F(x, c_noise, context, vector, mask). parameters: those of it that are trained.
    loss_scale: what the loss is first multiplied by, so that gradients in float16 do not vanish;
    it is halved when they overflow and doubled after 2000 updates without (Micikevicius et al.
    2018). None: no scaling. batches: how many make an update, of one size each. has_ema: whether
    an EMA of the weights is kept. float32: values of parameters kept in 16 bits, by the
    parameter's `id`: their copies are what is updated. ranks: how many devices share an update.
    rows: how many rows of the update table the device holds at a time, at least the steps of a
    call.

    Everything here is in the compiled graph, so no number of an optimizer or a schedule is: those
    are rows of the table that `load_rows` puts on the device.
    """

    def __init__(
        self,
        network: nn.Cell,
        parameters: Sequence[Parameter],
        *,
        loss_scale: float | None = None,
        batches: int = 1,
        has_ema: bool = False,
        float32: Mapping[int, np.ndarray] | None = None,
        ranks: int = 1,
        rows: int = 1024,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.network: Any = network  # MindSpore says that calling a cell may give None
        self.parameters = ParameterTuple(parameters)
        # What is updated: the parameters themselves, but for those kept in 16 bits.
        copies = float32 or {}
        self.is_half = tuple(id(parameter) in copies for parameter in parameters)
        self.has_half = any(self.is_half)
        self.weights = ParameterTuple(
            [_named("weight.", p, copies[id(p)]) if id(p) in copies else p for p in parameters]
        )
        self.moments1 = _zeros("adam_m.", parameters)
        self.moments2 = _zeros("adam_v.", parameters)
        # Updates applied so far. Skipped steps don't count: they use up no row of the table.
        self.applied = _scalar("applied", 0)
        # Rows of the update table, and the number of applied updates that the first belongs to.
        self.rows = Parameter(
            Tensor(np.zeros((rows, len(COLUMNS)), np.float32)), "update_rows", requires_grad=False
        )
        self.first = _scalar("update_rows_first", 0)
        self.last = rows - 1
        names = decayed(network)
        self.is_decayed = tuple(parameter.name in names for parameter in parameters)
        self.one = Tensor(1.0, ms.float32)
        self.zero = Tensor(0.0, ms.float32)
        self.is_scaled = loss_scale is not None
        self.scale = _scalar("loss_scale", loss_scale or 1.0)
        # Updates applied since the scale last changed.
        self.unchanged = _scalar("loss_scale_age", 0)
        # One batch's part in the loss of the update.
        self.batches, self.ranks = batches, ranks
        self.share = 1.0 / (batches * ranks)
        self.sums = _zeros("sum.", parameters if batches > 1 else [])
        self.has_ema = has_ema
        self.ema = EMA(parameters, self.weights) if has_ema else None
        if ranks > 1:
            self.reduce = ops.AllReduce()
            self.gather = ops.AllGather()
        self.kernel = ops.AdamWeightDecay()
        self.map = ops.HyperMap()
        self.gradient: Any = ops.value_and_grad(self.loss, None, self.parameters, has_aux=True)

    def loss(self, latents, noise, coefficients, context, vector, mask):
        """This batch's share of the mean of w * losses, scaled and as it is, and the losses (B,):
        see `construct`."""
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
        loss = (w * losses).mean() * self.share
        return loss * self.scale if self.is_scaled else loss, loss, losses

    def construct(self, latents, noise, coefficients, context, vector, mask):
        """One update from one batch.

        latents, noise (B, C, H, W); coefficients (6, B) as `Coefficients.stacked`; context
        (B, L, D); vector (B, V); mask (B, L). All float32. Returns the weighted loss, the losses
        (G,) unweighted, the global gradient norm, whether all was finite, the learning rate, and
        the loss scale of this update; over all ranks, in their order.
        """
        (_, loss, losses), gradients = self.gradient(
            latents, noise, coefficients, context, vector, mask
        )
        return self.update(loss, losses, gradients)

    def accumulate(self, is_first, latents, noise, coefficients, context, vector, mask):
        """Adds one batch's gradients to those of its update; its share of the loss, its losses."""
        (_, loss, losses), gradients = self.gradient(
            latents, noise, coefficients, context, vector, mask
        )
        added = self.map(ops.partial(_add, is_first), self.sums, gradients)
        return ops.depend(loss, added), losses

    def apply(self, loss, losses):
        """The update from what `accumulate` has added; returns as `construct`."""
        return self.update(loss, losses, self.sums)

    def update(self, loss, losses, gradients):
        """Averages over the ranks, unscales, clips, and makes the update if all is finite."""
        if self.ranks > 1:
            gradients = self.map(ops.partial(_reduce, self.reduce), gradients)
            loss, losses = self.reduce(loss), self.gather(losses)
        norm = ops.sqrt(ops.addn(self.map(_square_sum, gradients)))
        used = self.one
        if self.is_scaled:
            used = self.scale + self.zero
            norm = norm / used
        finite = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))
        row = self.rows[ops.minimum(self.applied - self.first, self.last)]
        # In the order of `COLUMNS`.
        learning_rate, rate, epsilon, decay, beta1, beta2, limit, ema_share = (
            row[0],
            row[1],
            row[2],
            row[3],
            row[4],
            row[5],
            row[6],
            row[7],
        )
        # What the gradients are multiplied by: clipping, and the loss scale taken back.
        scale = ops.minimum(self.one, limit / norm)
        if self.is_scaled:
            scale = scale / used
        done = self.map(
            ops.partial(
                _update,
                self.kernel,
                scale,
                finite,
                ops.select(finite, rate, self.zero),
                ops.select(finite, beta1, self.one),
                ops.select(finite, beta2, self.one),
                epsilon,
                decay,
            ),
            self.is_decayed,
            self.weights,
            self.moments1,
            self.moments2,
            gradients,
        )
        if self.has_ema:
            share = ops.depend(ops.select(finite, ema_share, self.zero), done)
            done = self.ema(share, self.weights)  # pyright: ignore[reportOptionalCall]
        if self.has_half:
            done = ops.depend(self.map(_publish, self.is_half, self.parameters, self.weights), done)
        counted = ops.assign_add(self.applied, finite.astype(ms.int32))
        loss = ops.depend(loss, (done, counted))
        if self.is_scaled:
            loss = ops.depend(loss, self.rescale(finite, used))
        return loss, losses, norm, finite, learning_rate, used

    def rescale(self, finite, used):
        """Moves the loss scale after an update that was applied or not."""
        age = ops.select(finite, self.unchanged + 1, ops.zeros_like(self.unchanged))
        doubled = ops.minimum(used * 2.0, LARGEST_LOSS_SCALE)
        grown = ops.select(age >= _GROWTH_INTERVAL, doubled, used)
        shrunk = ops.maximum(used * 0.5, self.one)
        age = ops.select(age >= _GROWTH_INTERVAL, ops.zeros_like(age), age)
        changed = ops.assign(self.scale, ops.select(finite, grown, shrunk))
        return ops.depend(changed, ops.assign(self.unchanged, age))

    def load_rows(self, table: np.ndarray) -> None:
        """Puts the rows of the next updates on the device; the last row stands for what follows it.

        table: (updates, 8) float32, see `update_table`. It waits for the steps before.
        """
        first = int(self.applied.asnumpy())
        updates = np.minimum(first + np.arange(self.rows.shape[0]), len(table) - 1)
        # Assigned, because a compiled graph does not see `set_data`.
        ops.assign(self.rows, Tensor(table[updates]))
        ops.assign(self.first, Tensor(first, ms.int32))

    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state by name, as float32 and int32 arrays."""
        return {parameter.name: parameter.asnumpy() for parameter in self.state_parameters()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restores what `state` gave; what is not in it keeps its first value.

        Before the first step and before `load_rows`: see `StepRunner`.
        """
        for parameter in self.state_parameters():
            if parameter.name in state:
                parameter.set_data(Tensor(state[parameter.name]))

    def values(self) -> dict[int, Parameter]:
        """What holds each trained parameter's value in float32, by the parameter's `id`."""
        return {id(p): value for p, value in zip(self.parameters, self.weights, strict=True)}

    def ema_values(self) -> Mapping[int, Parameter]:
        """Each trained parameter's EMA, by the parameter's `id`; empty without any."""
        return {} if self.ema is None else self.ema.values()

    def state_parameters(self) -> list[Parameter]:
        """What the optimizer's state is kept in."""
        kept = [*self.moments1, *self.moments2, self.applied]
        return [*kept, self.scale, self.unchanged] if self.is_scaled else kept


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


class StepRunner:
    """Calls a step at once, or batch by batch.

    table: (updates, 8) float32, see `update_table`. compiled: what makes a compiled function of a
    method, such as `ms.jit`; None: the step runs eagerly. Parameters replaced by `set_data` after
    the first compiled call would not be seen, so weights and state are loaded before it.
    """

    def __init__(
        self,
        step: TrainStep,
        table: np.ndarray,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        make = compiled or (lambda method: method)
        self._batches = step.batches
        self._rows = UpdateRows(step, table)
        self._whole = make(step.construct)
        self._accumulate = make(step.accumulate)
        self._apply = make(step.apply)

    def __call__(self, batches: Iterable[Sequence[np.ndarray]]) -> tuple[Any, ...]:
        """One update from the inputs of each of its batches, as `TrainStep.construct` takes them
        and returns."""
        self._rows.provide()
        if self._batches == 1:
            (arrays,) = batches
            return self._whole(*map(Tensor, arrays))
        shares, losses = [], []
        for index, arrays in enumerate(batches):
            share, its_losses = self._accumulate(Tensor(index == 0), *map(Tensor, arrays))
            shares.append(share)
            losses.append(its_losses)
        return self._apply(ops.addn(shares), ops.concat(losses))


def _zeros(prefix: str, parameters: Sequence[Parameter]) -> ParameterTuple:
    return ParameterTuple([_named(prefix, p, np.zeros(p.shape, np.float32)) for p in parameters])


def _named(prefix: str, parameter: Parameter, value: np.ndarray) -> Parameter:
    """A float32 parameter that is not the network's, named after one that is."""
    return Parameter(Tensor(value.copy()), prefix + parameter.name, requires_grad=False)


def _scalar(name: str, value: float) -> Parameter:
    """int32 for an int, else float32."""
    dtype = ms.int32 if isinstance(value, int) else ms.float32
    return Parameter(Tensor(value, dtype), name=name, requires_grad=False)


def _spread(values):
    """(B,) -> (B, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)
