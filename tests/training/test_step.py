"""The training step against numpy: loss, gradients, clipping, updates, skipped updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from support.nano_step import (
    BATCH,
    Arrays,
    make_batch,
    make_nano,
    make_step,
    nano_losses,
    run,
    tensors,
)

from sdxl_host.training.lr_schedulers import LambdaWarmUpScheduler, learning_rates
from sdxl_host.training.optimizer import AdamW, AdamWeightDecay, Optimizer
from sdxl_host.training.step import StepRunner, TrainStep, decayed
from sdxl_host.training.update_table import update_table

pytestmark = pytest.mark.usefixtures("device")


def copied(parameters: Iterable[Parameter]) -> Arrays:
    """Arrays by name. On CPU `asnumpy` shows the parameter's own memory, which updates write to."""
    return {parameter.name: parameter.asnumpy().copy() for parameter in parameters}


def weights_of(step: TrainStep) -> Arrays:
    return copied(step.parameters)


def gradients_of(step: TrainStep, batch: Arrays) -> Arrays:
    """What the step differentiates, before clipping."""
    _, gradients = step.gradient(*tensors(batch))
    return {p.name: g.asnumpy() for p, g in zip(step.parameters, gradients, strict=True)}


def everything(step: TrainStep) -> Arrays:
    return weights_of(step) | copied([*step.moments1, *step.moments2, step.applied])


def assert_same_bits(first: Arrays, second: Arrays) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.tobytes() == second[name].tobytes(), name


# ---- loss and gradients


def test_loss_and_losses():
    """loss = mean(w * losses), losses (B,) = mean |F(p z + q n, c_noise, ...) - (a z + b n)|^2."""
    step, batch = make_step(), make_batch()
    expected = nano_losses(weights_of(step), batch)
    loss, losses, *_ = run(step.construct, batch)
    assert losses.shape == (BATCH,)
    assert loss.dtype == losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, (batch["coefficients"][4] * expected).mean(), rtol=1e-5)


def test_gradients_are_the_loss_s_slopes():
    """Central differences of the float64 loss, for each of the 86 numbers."""
    step, batch = make_step(), make_batch()
    weights = {name: values.astype(np.float64) for name, values in weights_of(step).items()}
    w = batch["coefficients"][4].astype(np.float64)
    count = 0
    for name, gradient in gradients_of(step, batch).items():
        slopes = np.empty(gradient.shape)
        for place in np.ndindex(gradient.shape):
            kept = weights[name][place]
            ends = []
            for moved in (kept + 1e-5, kept - 1e-5):
                weights[name][place] = moved
                ends.append((w * nano_losses(weights, batch)).mean())
            weights[name][place] = kept
            slopes[place] = (ends[0] - ends[1]) / 2e-5
            count += 1
        np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=2e-6, err_msg=name)
    assert count == 86


def test_norm_is_the_global_one_before_clipping():
    step, batch = make_step(max_grad_norm=0.01), make_batch()
    gradients = gradients_of(step, batch)
    expected = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    assert run(step.construct, batch)[2] == pytest.approx(expected, rel=1e-5)


# ---- updates


def reference_update(
    optimizer: Optimizer, corrected: bool, k: int, rate: float, limit: float | None
) -> Callable[[Arrays, Arrays, Arrays, Arrays, set[str]], None]:
    """Update k in float64, in place, of weights and moments by gradients."""

    def update(weights: Arrays, m: Arrays, v: Arrays, gradients: Arrays, decays: set[str]) -> None:
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        scale = 1.0 if limit is None else min(1.0, limit / norm)
        b1, b2 = optimizer.beta1, optimizer.beta2
        for name, gradient in gradients.items():
            g = gradient * scale
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            first, second = (1 - b1**k, 1 - b2**k) if corrected else (1.0, 1.0)
            move = m[name] / first / (np.sqrt(v[name] / second) + optimizer.eps)
            decay = optimizer.weight_decay if name in decays else 0.0
            weights[name] = weights[name] - rate * (move + decay * weights[name])

    return update


@pytest.mark.parametrize(
    ("optimizer", "corrected", "limit"),
    [
        (AdamW(beta2=0.99, weight_decay=0.3), True, None),
        (AdamW(beta1=0.8, eps=1e-2, weight_decay=0.0), True, 0.5),
        (AdamWeightDecay(weight_decay=0.3), False, None),
    ],
    ids=["AdamW", "AdamW-clipped", "AdamWeightDecay"],
)
def test_twenty_updates(optimizer, corrected, limit):
    """Algorithm 2 of Loshchilov and Hutter in float64, given the step's own gradients.

    AdamWeightDecay is the same without bias correction. Warm-up over 8 updates, decay on the
    matrix and the kernels alone.
    """
    rates = learning_rates(0.01, LambdaWarmUpScheduler(8), 20)
    step = make_step(optimizer=optimizer, rates=rates, max_grad_norm=limit)
    before = weights_of(step)
    weights = {name: values.astype(np.float64) for name, values in before.items()}
    m = {name: np.zeros_like(values) for name, values in weights.items()}
    v = {name: np.zeros_like(values) for name, values in weights.items()}
    decays = {"conv.weight", "dense.weight", "out.weight"}
    for k, rate in enumerate(rates, start=1):
        batch = make_batch(k)
        gradients = {n: g.astype(np.float64) for n, g in gradients_of(step, batch).items()}
        reference_update(optimizer, corrected, k, rate, limit)(weights, m, v, gradients, decays)
        *_, finite, reported, _ = run(step.construct, batch)
        assert finite
        assert reported == pytest.approx(rate, rel=1e-6)
    state = step.state()
    for name, expected in weights.items():
        # Some end near 0; their rounding is that of where they were.
        scale = max(np.abs(expected).max(), np.abs(before[name]).max())
        assert np.abs(weights_of(step)[name] - expected).max() <= 1e-5 * scale, name
        # Of 1 - 0.999 float32 knows five digits.
        for prefix, moment, relative in (("adam_m.", m, 1e-5), ("adam_v.", v, 2e-5)):
            difference = np.abs(state[prefix + name] - moment[name]).max()
            assert difference <= relative * np.abs(moment[name]).max(), prefix + name
    assert state["applied"] == 20


def test_rate_stays_at_the_last_row():
    """Updates beyond the table use its last row."""
    step = make_step(rates=[0.1, 0.2, 0.3])
    reported = [float(run(step.construct, make_batch(k))[4]) for k in range(5)]
    np.testing.assert_allclose(reported, [0.1, 0.2, 0.3, 0.3, 0.3], rtol=1e-6)


def test_rows_are_renewed_where_the_device_runs_out_of_them():
    """With two rows at a time, compiled, over skipped steps: what all rows at once give.
    A skipped step uses up no row, so a row that was not reached comes with the next ones."""
    rates = np.arange(1, 9) / 1000
    table = update_table(AdamW(), rates, 2.0)
    ends = []
    for rows, eager in ((2, False), (100, True), (3, True)):
        network = make_nano()
        step = TrainStep(network, list(network.get_parameters()), rows=rows)
        runner = StepRunner(step, table, None if eager else ms.jit)
        reported = []
        for k in range(10):
            batch = spoiled("nan latent") if k in (1, 4, 5) else make_batch(k)
            *_, finite, rate, _ = runner([list(batch.values())])
            assert bool(finite.asnumpy()) == (k not in (1, 4, 5))
            reported.append(float(rate.asnumpy()))
        expected = rates[[0, 1, 1, 2, 3, 3, 3, 4, 5, 6]]
        np.testing.assert_allclose(reported, expected, rtol=1e-6)
        ends.append(everything(step))
    assert_same_bits(ends[1], ends[2])
    for name, values in ends[0].items():
        np.testing.assert_allclose(values, ends[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_step_of_a_checkpoint_begins_at_its_row():
    rates = np.arange(1, 9) / 1000
    step = make_step()
    step.load_state({"applied": np.array(5, np.int32)})
    runner = StepRunner(step, update_table(AdamW(), rates))
    *_, rate, _ = runner([list(make_batch().values())])
    assert float(rate.asnumpy()) == pytest.approx(rates[5])


def test_decay_alone():
    """With w = 0 there is no gradient: matrices and kernels shrink by 1 - rate * decay, and no
    bias or norm changes by one bit."""
    step = make_step(optimizer=AdamW(weight_decay=0.5), rates=[0.1])
    before = weights_of(step)
    loss, *_ = run(step.construct, make_batch(w=0.0))
    assert loss == 0
    after = weights_of(step)
    for name in ("conv.weight", "dense.weight", "out.weight"):
        np.testing.assert_allclose(after[name], before[name] * 0.95, rtol=1e-6)
    for name in ("conv.bias", "dense.bias", "out.bias", "norm.gamma", "norm.beta"):
        assert np.array_equal(after[name], before[name]), name


def test_decay_is_chosen_by_layer_type():
    """A norm over two axes is still a norm; names say nothing: see `norm` and `bias` below."""

    class Odd(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.LayerNorm((3, 4))
            self.groups = nn.GroupNorm(2, 4)
            self.norm = nn.Dense(3, 4)
            self.bias = nn.Conv2d(3, 4, 1, has_bias=True)
            self.table = nn.Embedding(5, 3)
            self.own = Parameter(Tensor(np.zeros((2, 3), np.float32)))

    names = {"norm.weight", "bias.weight", "table.embedding_table", "own"}
    assert decayed(Odd()) == names


def test_only_the_given_parameters_are_trained():
    network = make_nano()
    trained = [network.conv.weight, network.out.bias]
    before = copied(network.get_parameters())
    step = make_step(network, parameters=trained)
    run(step.construct, make_batch())
    changed = {p.name for p in network.get_parameters() if (p.asnumpy() != before[p.name]).any()}
    assert changed == {"conv.weight", "out.bias"}
    assert len(step.state()) == 5


# ---- clipping


@pytest.mark.parametrize("share", [0.01, 0.5, 1.001, 100.0])
def test_clipping_by_the_global_norm(share):
    """g * min(1, limit / norm), one factor for all: seen in the first moments, 0.1 times it."""
    batch = make_batch()
    plain = make_step()
    norm = float(run(plain.construct, batch)[2])
    clipped = make_step(max_grad_norm=share * norm)
    run(clipped.construct, batch)
    first, second = everything(plain), everything(clipped)
    for name in first:
        if name.startswith("adam_m."):
            expected = first[name] * min(1.0, share)
            np.testing.assert_allclose(second[name], expected, rtol=1e-5, err_msg=name)


def test_a_gradient_of_0_is_not_clipped():
    """limit / 0 is infinite and not a number must not come of it."""
    step = make_step(max_grad_norm=1.0)
    loss, _, norm, finite, *_ = run(step.construct, make_batch(w=0.0))
    assert (loss, norm) == (0, 0)
    assert finite
    assert all(np.isfinite(values).all() for values in everything(step).values())


# ---- updates that are not made


def spoiled(kind: str) -> Arrays:
    """A batch that makes a step not finite."""
    batch = make_batch(9)
    if kind == "nan latent":
        batch["latents"][1, 0, 2, 3] = np.nan
    elif kind == "infinite noise":
        batch["noise"][0, 1, 0, 0] = np.inf
    elif kind == "infinite weight":
        batch["coefficients"][4, 2] = np.inf
    elif kind == "overflowing loss":
        batch["coefficients"][2] = 1e25
    elif kind == "overflowing norm":
        batch["coefficients"][4] = 1e25  # the loss is finite, the squared gradients are not
    return batch


SPOILED = [
    "nan latent",
    "infinite noise",
    "infinite weight",
    "overflowing loss",
    "overflowing norm",
]


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("kind", SPOILED)
def test_a_step_that_is_not_finite_changes_nothing(kind, limit):
    """Parameters and moments keep every bit, and the schedule waits for the next update."""
    step = make_step(rates=np.arange(1, 11) / 100, max_grad_norm=limit)
    run(step.construct, make_batch(1))
    run(step.construct, make_batch(2))
    before = everything(step)
    loss, losses, _, finite, rate, _ = run(step.construct, spoiled(kind))
    assert not finite
    assert rate == pytest.approx(0.03)
    if kind == "nan latent":
        assert np.isfinite(losses).tolist() == [True, False, True]
    if kind == "overflowing norm":
        assert np.isfinite(loss)
    assert_same_bits(everything(step), before)
    *_, finite, rate, _ = run(step.construct, make_batch(3))
    assert finite
    assert rate == pytest.approx(0.03)
    assert step.state()["applied"] == 3


def test_a_skipped_step_leaves_no_trace():
    """With or without a skipped step in between, the run is the same bit for bit."""
    first, second = make_step(), make_step()
    for k in range(3):
        run(first.construct, make_batch(k))
        run(second.construct, make_batch(k))
        run(second.construct, spoiled("infinite noise"))
    assert_same_bits(everything(first), everything(second))


# ---- state


def test_state_round_trip():
    """Three steps, their weights and state into a new step, two more: the same bits as five."""
    whole, first = make_step(), make_step()
    for k in range(5):
        run(whole.construct, make_batch(k))
    for k in range(3):
        run(first.construct, make_batch(k))
    resumed = make_step(make_nano(seed=99))
    for parameter in resumed.parameters:
        parameter.set_data(Tensor(weights_of(first)[parameter.name]))
    resumed.load_state(first.state())
    assert_same_bits(resumed.state(), first.state())
    for k in range(3, 5):
        run(resumed.construct, make_batch(k))
    assert_same_bits(everything(resumed), everything(whole))


def test_state_names_and_types():
    """Two float32 moments a parameter, by its name, and the count of updates."""
    step = make_step()
    run(step.construct, make_batch())
    state = step.state()
    names = [parameter.name for parameter in step.parameters]
    assert set(state) == {f"adam_{x}.{n}" for x in "mv" for n in names} | {"applied"}
    assert {values.dtype for name, values in state.items() if name != "applied"} == {
        np.dtype(np.float32)
    }
    assert state["applied"].dtype == np.int32
    assert state["applied"] == 1


# ---- compiled


def test_compiled_equals_eager():
    """One graph for every objective: six batches, each with coefficients of its own and one of
    them not finite, give what eager steps give but for float32 rounding."""
    rates = np.arange(1, 11) / 1000
    table = update_table(AdamW(weight_decay=0.1), rates, 2.0)
    steps = [make_step() for _ in range(2)]
    runners = [
        StepRunner(step, table, None if eager else ms.jit)
        for step, eager in zip(steps, (False, True), strict=True)
    ]
    calls = [
        lambda *inputs, runner=runner: runner([[array.asnumpy() for array in inputs]])
        for runner in runners
    ]
    finites = []
    for k in range(6):
        batch = spoiled("nan latent") if k == 3 else make_batch(k)
        graph, eager = (run(call, batch) for call in calls)
        for actual, expected in zip(graph, eager, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
        finites.append(bool(graph[3]))
    assert finites == [True, True, True, False, True, True]
    graph_state, eager_state = (everything(step) for step in steps)
    assert graph_state["applied"] == eager_state["applied"] == 5
    for name, expected in eager_state.items():
        scale = np.abs(expected).max()
        assert np.abs(graph_state[name] - expected).max() <= 1e-5 * scale, name
