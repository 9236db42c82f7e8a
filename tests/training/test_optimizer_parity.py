"""The step's updates on gradients that are given: against torch, and against closed forms.

Everything here runs `TrainStep` itself, on a network whose gradients are whatever its context says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from sdxl_host.training.lr_schedulers import LambdaWarmUpScheduler, learning_rates
from sdxl_host.training.optimizer import AdamW, Optimizer
from sdxl_host.training.step import StepRunner, TrainStep
from sdxl_host.training.update_table import update_table

pytestmark = pytest.mark.usefixtures("device")

Arrays = dict[str, np.ndarray]

UPDATES, WARM_UP = 50, 10
# The golden file's names, and ours of the same layers.
OURS = {
    "conv.weight": "conv.weight",
    "conv.bias": "conv.bias",
    "dense.weight": "dense.weight",
    "dense.bias": "dense.bias",
    "norm.weight": "norm.gamma",
    "norm.bias": "norm.beta",
    "table.weight": "table.embedding_table",
}


class Given(nn.Cell):
    """A network that answers 0.5 with the gradient given in `context`, (1, 182, 1).

    Its output is S - stop_gradient(S) + 0.5 with S = sum(parameter * given); towards 0 and with
    weight 1 the loss is 0.25 and its slope by S is 1. NaN in `context` makes nothing finite.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, has_bias=True)
        self.dense = nn.Dense(7, 5)
        self.norm = nn.LayerNorm((6,))
        self.table = nn.Embedding(3, 6)

    def construct(self, x, c_noise, context, vector, mask):
        given = context.reshape(-1)
        total = (self.conv.weight.reshape(-1) * given[:108]).sum()
        total = total + (self.conv.bias * given[108:112]).sum()
        total = total + (self.dense.weight.reshape(-1) * given[112:147]).sum()
        total = total + (self.dense.bias * given[147:152]).sum()
        total = total + (self.norm.gamma * given[152:158]).sum()
        total = total + (self.norm.beta * given[158:164]).sum()
        total = total + (self.table.embedding_table.reshape(-1) * given[164:182]).sum()
        return (total - ops.stop_gradient(total) + 0.5).reshape(1, 1, 1, 1) + 0.0 * x


SHAPES = {name: tuple(p.shape) for name, p in Given().parameters_dict().items()}
COUNT = sum(math.prod(shape) for shape in SHAPES.values())


class Driver:
    """A step on given gradients; `start` are its parameters' first values, by name.

    batches: in how many parts each gradient comes. Part i is the gradient plus the i-th of
    deviations that add up to 0, as large as the gradient.
    """

    def __init__(
        self,
        start: Arrays,
        optimizer: Optimizer,
        rates: Sequence[float] | np.ndarray,
        limit: float | None = None,
        *,
        batches: int = 1,
        loss_scale: float | None = None,
        ema_decay: float | None = None,
    ) -> None:
        network = Given()
        for name, parameter in network.parameters_dict().items():
            parameter.set_data(Tensor(start[name].astype(np.float32)))
        self.step = TrainStep(
            network,
            network.trainable_params(),
            loss_scale=loss_scale,
            batches=batches,
            has_ema=ema_decay is not None,
        )
        table = update_table(optimizer, np.asarray(rates, np.float64), limit, ema_decay or 0.0)
        self.names = [parameter.name for parameter in self.step.parameters]
        self.batches = batches
        self.run = StepRunner(self.step, table)
        self._deviations = np.random.default_rng(3)

    def update(self, gradients: Arrays) -> tuple[np.ndarray, ...]:
        """loss, losses, norm, finite, learning rate, loss scale."""
        return tuple(output.asnumpy() for output in self.run(self._inputs(gradients)))

    def values(self, prefix: str = "") -> Arrays:
        """The parameters, or what the step keeps beside them ("ema.", "adam_m."), in float64."""
        kept: Any = {"": self.step.parameters, "adam_m.": self.step.moments1}
        if self.step.ema is not None:
            kept["ema."] = self.step.ema.ema
        pairs = zip(self.names, kept[prefix], strict=True)
        return {name: parameter.asnumpy().astype(np.float64) for name, parameter in pairs}

    def _inputs(self, gradients: Arrays) -> list[list[Tensor]]:
        whole = np.concatenate([gradients[name].ravel() for name in self.names]).astype(np.float32)
        deviations = self._deviations.standard_normal((self.batches, whole.size))
        deviations = (deviations - deviations.mean(axis=0)) * np.abs(whole)
        parts = whole + deviations.astype(np.float32) if self.batches > 1 else [whole]
        return [inputs(part) for part in parts]


def inputs(given: np.ndarray) -> list[Tensor]:
    """Latents and noise 0, coefficients (0, 0, 0, 0, w = 1, 0): error is output^2, once."""
    six = np.zeros((6, 1), np.float32)
    six[4] = 1.0
    latent, rest = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    arrays = (latent, latent, six, given.reshape(1, -1, 1), rest, rest)
    return [Tensor(np.ascontiguousarray(values, np.float32)) for values in arrays]


def random_arrays(seed: int, size: float = 1.0) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) * size for name, shape in SHAPES.items()}


def global_norm(arrays: Arrays) -> float:
    return math.sqrt(sum((values.astype(np.float64) ** 2).sum() for values in arrays.values()))


def assert_close(actual: Arrays, expected: Arrays, relative: float = 1e-6) -> None:
    """Each array to `relative` of its peak."""
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        difference = np.abs(actual[name] - values).max()
        assert difference <= relative * np.abs(values).max(), name


def test_the_network_has_the_gradient_that_is_given():
    """To the bit, and a loss of 0.25."""
    driver, gradients = Driver(random_arrays(0), AdamW(), [0.1]), random_arrays(1)
    (given,) = driver._inputs(gradients)
    step: Any = driver.step
    (_, loss, losses), found = step.gradient(*given)
    assert (loss, losses.asnumpy().tolist()) == (0.25, [0.25])
    for name, gradient in zip(driver.names, found, strict=True):
        np.testing.assert_array_equal(gradient.asnumpy(), gradients[name].astype(np.float32))


# ---- AdamW against torch's


@pytest.fixture(scope="module")
def torch_runs(golden: Path) -> Arrays:
    with np.load(golden / "adamw.npz") as file:
        return dict(file)


GIVEN = {
    "plain": (AdamW(0.9, 0.999, 1e-8, 0.1), 1e-2, None),
    "clipped": (AdamW(0.8, 0.95, 1e-4, 0.5), 3e-3, 2.0),
}


@pytest.fixture(scope="module")
def path(deterministic: ModuleType) -> Callable[..., tuple[dict[int, Arrays], np.ndarray]]:
    """Runs the golden file's 50 updates: the parameters after some, and the norms (50,)."""

    def run(label: str, batches: int, kept: Sequence[int]) -> Any:
        shapes = {theirs: SHAPES[ours] for theirs, ours in OURS.items()}
        start = {OURS[n]: deterministic.weight(n, shape) for n, shape in shapes.items()}
        optimizer, rate, limit = GIVEN[label]
        rates = learning_rates(rate, LambdaWarmUpScheduler(WARM_UP), UPDATES)
        driver = Driver(start, optimizer, rates, limit, batches=batches)
        points, norms = {}, []
        for k in range(1, UPDATES + 1):
            size = 1.0 if k % 5 == 0 else 0.1
            gradients = {
                OURS[n]: deterministic.array(f"adamw.{k}.{n}", shape) * np.float32(size)
                for n, shape in shapes.items()
            }
            _, _, norm, finite, told, _ = driver.update(gradients)
            assert finite
            assert told == pytest.approx(rates[k - 1], rel=1e-6)
            norms.append(norm)
            if k in kept:
                points[k] = driver.values()
        return points, np.array(norms)

    return run


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("label", GIVEN)
def test_fifty_updates_are_those_of_torch(torch_runs, path, label, batches):
    """AdamW with decay on matrices and kernels, warm-up and clipping; in one part and in two.

    To 1e-6 of each parameter's peak in float64; torch in float32 is itself 7e-7 from that.
    """
    kept = torch_runs["kept"].tolist()
    points, norms = path(label, batches, kept)
    for precision, relative in (("float64", 1e-6), ("float32", 2e-6)):
        run = {k: v for k, v in torch_runs.items() if k.startswith(f"{label}_{precision}.")}
        theirs = {key.partition(".")[2]: values for key, values in run.items()}
        np.testing.assert_allclose(norms, theirs.pop("norms"), rtol=1e-6)
        for place, k in enumerate(kept):
            expected = {OURS[name]: values[place] for name, values in theirs.items()}
            assert_close(points[k], expected, relative)


# ---- clipping


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("share", [0.3, 0.999, 1.001, 50.0])
def test_clipping_is_the_formula_however_the_gradient_comes(share, batches, loss_scale):
    """g * min(1, limit / |g|), of the whole gradient: its parts are longer. Seen in the first
    moment, which is 0.1 times it; the norm that is told is the one before."""
    gradients = random_arrays(2, 0.05)
    norm = global_norm(gradients)
    driver = Driver(
        *(random_arrays(0), AdamW(), [0.01], share * norm), batches=batches, loss_scale=loss_scale
    )
    _, _, told, finite, *_ = driver.update(gradients)
    assert finite
    assert told == pytest.approx(norm, rel=1e-6)
    expected = {name: 0.1 * g * min(1.0, share) for name, g in gradients.items()}
    assert_close(driver.values("adam_m."), expected)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_accumulating_is_the_update_of_the_whole_gradient(limit):
    """Ten updates in two and in three parts end where one part does, but for rounding."""
    ends = []
    for batches in (1, 2, 3):
        driver = Driver(random_arrays(0), AdamW(eps=1e-3), [0.01] * 10, limit, batches=batches)
        for k in range(10):
            loss, losses, *_ = driver.update(random_arrays(10 + k, 0.2))
            assert loss == pytest.approx(0.25, rel=1e-6)
            assert losses.tolist() == [0.25] * batches
        ends.append(driver.values())
    for other in ends[1:]:
        assert_close(other, ends[0])


# ---- EMA


def closed_form(start: np.ndarray, weights: Sequence[np.ndarray], decay: float) -> np.ndarray:
    """The EMA after updates to these weights, as a sum: the i-th enters with 1 - d_i and is
    kept by every later d_j, and so is the start by all."""
    d = [min(decay, (1 + k) / (10 + k)) for k in range(len(weights))]
    ema = math.prod(d) * start
    for i, value in enumerate(weights):
        ema = ema + (1 - d[i]) * math.prod(d[i + 1 :]) * value
    return ema


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("decay", [0.8, 0.9999])
def test_fifty_updates_of_the_ema(decay, batches):
    """In float64 from the weights of each update that was applied; (1 + k) / (10 + k) is below
    0.8 until k = 35. What was skipped, with a gradient that is not a number, has no part in it."""
    start = random_arrays(0)
    skipped = {1, 8, 9, 31, 50}
    driver = Driver(
        *(start, AdamW(weight_decay=0.1), [0.05] * UPDATES), batches=batches, ema_decay=decay
    )
    assert_close(driver.values("ema."), driver.values())
    applied = []
    for k in range(1, UPDATES + 1):
        gradients = random_arrays(100 + k)
        if k in skipped:
            gradients["dense.bias"][2] = np.nan
        *_, finite, _, _ = driver.update(gradients)
        assert bool(finite) == (k not in skipped)
        if finite:
            applied.append(driver.values())
        if k in (1, 2, 10, 40, UPDATES):
            expected = {
                name: closed_form(
                    values.astype(np.float32).astype(float), [w[name] for w in applied], decay
                )
                for name, values in start.items()
            }
            assert_close(driver.values("ema."), expected)
    assert len(applied) == UPDATES - len(skipped)
    assert driver.step.state()["applied"] == len(applied)


def test_the_ema_is_not_what_is_trained():
    """With and without it the weights are the same, bit for bit."""
    ends = []
    for ema_decay in (None, 0.5):
        driver = Driver(random_arrays(0), AdamW(), [0.05] * 5, ema_decay=ema_decay)
        for k in range(5):
            driver.update(random_arrays(k))
        ends.append(driver.values())
    assert_close(ends[1], ends[0], 0.0)
