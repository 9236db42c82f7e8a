"""Mixed precision: the types that cells compute in, and the loss scale.

Steps are eager but for one compiled step. Whole runs are in test_levels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError
from sdxl_host.models.layers import Conv2d, Dense, sinusoids
from sdxl_host.models.precision import LEVELS, apply_precision, is_half, set_precision
from sdxl_host.models.unet import UNetModel
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.plugins.step_result import StepResult
from sdxl_host.training import step as step_module
from sdxl_host.training.optimizer import AdamW
from sdxl_host.training.step import StepRunner, TrainStep
from sdxl_host.training.update_table import update_table
from sdxl_host.weights.networks import build_networks

pytestmark = pytest.mark.usefixtures("device")

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
BATCH, CHANNELS, SIDE = 2, 2, 4
# With so large an epsilon an update grows with the gradient, as a wrong scale would show.
OPTIMIZER = AdamW(eps=0.1, weight_decay=0.1)
RATES = np.full(200, 0.01)

Arrays = dict[str, np.ndarray]


class Tiny(nn.Cell):
    """A few layers of each kind that a precision level sets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 4, 3, pad_mode="pad", padding=1, has_bias=True)
        self.groups = nn.GroupNorm(2, 4)
        self.dense = nn.Dense(3, 4)
        self.norm = nn.LayerNorm((4,))
        self.act = nn.SiLU()
        self.out = nn.Conv2d(4, CHANNELS, 1, has_bias=True)

    def construct(self, x, c_noise, context, vector, mask):
        level = self.dense(vector + c_noise.expand_dims(1) + context.mean(axis=1) * mask)
        level = self.norm(level).expand_dims(-1).expand_dims(-1)
        return self.out(self.act(self.groups(self.conv(x)) + level))


def make_step(
    loss_scale: float | None, level: str = "O0", max_grad_norm: float | None = None
) -> TrainStep:
    network = Tiny()
    generator = np.random.default_rng(5)
    for parameter in network.get_parameters():
        values = generator.standard_normal(parameter.shape) * 0.5 + 0.1
        parameter.set_data(Tensor(values.astype(np.float32)))
    apply_precision(network, level)
    step = TrainStep(network, list(network.get_parameters()), loss_scale=loss_scale)
    step.load_rows(update_table(OPTIMIZER, RATES, max_grad_norm))
    return step


def make_inputs(seed: int = 0, *, spoiled: bool = False) -> list[Tensor]:
    """Inputs of a step in its order; spoiled: with an infinite noise."""
    generator = np.random.default_rng(seed)
    latents, noise = generator.standard_normal((2, BATCH, CHANNELS, SIDE, SIDE))
    if spoiled:
        noise[0, 1, 0, 0] = np.inf
    arrays = (
        latents,
        noise,
        generator.uniform(0.3, 1.5, (6, BATCH)),
        generator.standard_normal((BATCH, 5, 3)),
        generator.standard_normal((BATCH, 3)),
        np.ones((BATCH, 3)),
    )
    return [Tensor(array.astype(np.float32)) for array in arrays]


def run(step: Callable[..., Any], inputs: list[Tensor]) -> StepResult:
    noise: Any = SimpleNamespace(sigma=np.ones(BATCH))
    return StepResult(1, noise, np.ones(BATCH), ["a", "b"], step(*inputs))


def everything(step: TrainStep) -> Arrays:
    """Parameters, moments and the count of updates. `asnumpy` shows the memory updates write to."""
    kept = [*step.parameters, *step.moments1, *step.moments2, step.applied]
    return {parameter.name: parameter.asnumpy().copy() for parameter in kept}


def scale_and_age(step: TrainStep) -> tuple[float, int]:
    return float(step.scale.asnumpy()), int(step.unchanged.asnumpy())


def assert_same_bits(first: Arrays, second: Arrays) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.tobytes() == second[name].tobytes(), name


def assert_close(actual: Arrays, expected: Arrays, tolerance: float) -> None:
    """To `tolerance` of each array's peak."""
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        difference = np.abs(actual[name] - values).max()
        assert difference <= tolerance * np.abs(values).max(), name


# ---- types


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_what_each_cell_of_the_network_computes_in(level, monkeypatch):
    """The type of each cell's input, what it is multiplied in and what comes out of it; and what
    does not change with the level: sinusoids, parameters and gradients are float32."""
    network = UNetModel(3, 3, 32, [1, 2], 1, [2], [0, 1], 32, 32, 64)
    apply_precision(network, level)
    names = {id(cell): name for name, cell in network.cells_and_names()}
    given: dict[str, Any] = {}
    computed: dict[str, Any] = {}
    answered: dict[str, Any] = {}
    times = []
    kinds = (Dense, Conv2d, nn.LayerNorm, nn.GroupNorm, nn.SiLU)

    def watch(kind, seen):
        construct = kind.construct

        def watched(self, x):
            output = construct(self, x)
            # Inputs are cast where an operator of the cell takes them, so one must, to be seen.
            given[names[id(self)]] = ops.neg(x).dtype
            seen[names[id(self)]] = output.dtype
            return output

        monkeypatch.setattr(kind, "construct", watched)

    for kind in kinds:
        watch(kind, answered)
    for kind in (nn.Dense, nn.Conv2d):
        watch(kind, computed)
    network.time_embed.register_forward_hook(lambda cell, inputs, output: times.append(inputs[0]))
    parameters = list(network.get_parameters())
    scale = 256.0 if is_half(level) else None
    step = TrainStep(network, parameters, loss_scale=scale)
    generator = np.random.default_rng(0)
    shapes = [(1, 3, 4, 4), (1, 3, 4, 4), (6, 1), (1, 5, 32), (1, 64), (1, 5)]
    arrays = [generator.uniform(0.5, 1.0, shape).astype(np.float32) for shape in shapes]
    arrays[2][5] = 999.3  # c_noise; float16 would make 999.5 of it
    (_, loss, _), gradients = step.gradient(*map(Tensor, arrays))

    assert np.isfinite(loss.asnumpy())
    low = ms.float32 if level == "O0" else ms.float16
    rest = ms.float16 if level == "O3" else ms.float32
    cells = {name: cell for name, cell in network.cells_and_names() if isinstance(cell, kinds)}
    assert given.keys() == answered.keys() == cells.keys()
    for name, cell in cells.items():
        if not isinstance(cell, Dense | Conv2d):
            assert given[name] == answered[name] == rest, name
            continue
        assert given[name] == computed[name] == low, name
        is_summed = level == "O1" and not name.endswith((".to_q", ".to_k", ".to_v"))
        assert answered[name] == (ms.float32 if is_summed else low), name
    assert {type(cell) for cell in cells.values()} == set(kinds)
    assert [time.dtype for time in times] == [ms.float32]
    np.testing.assert_allclose(times[0].asnumpy(), sinusoids(arrays[2][5], 32), atol=1e-4)
    assert loss.dtype == ms.float32
    assert {p.dtype for p in parameters} == {ms.float32}
    assert [g.dtype for g in gradients] == [ms.float32] * len(parameters)


def test_the_level_is_a_setting():
    assert load(["--config", TINY]).train.ms_amp_level == "O0"
    for level in LEVELS:
        assert load(["--config", TINY, "--ms_amp_level", level]).train.ms_amp_level == level
    with pytest.raises(ConfigError, match=r"ms_amp_level.*O4"):
        load(["--config", TINY, "--ms_amp_level", "O4"])


# ---- what the scale leaves as it is


@pytest.mark.parametrize("share", [None, 0.5, 100.0])
@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_loss_norm_and_updates_do_not_depend_on_the_scale(scale, share):
    """share: the norm that is clipped to, as a part of the gradients' own norm."""
    norm = run(make_step(None).construct, make_inputs()).gradient_norm
    limit = None if share is None else share * norm
    plain, scaled = make_step(None, "O0", limit), make_step(scale, "O0", limit)
    for seed in range(3):
        expected, actual = (run(s.construct, make_inputs(seed)) for s in (plain, scaled))
        assert not expected.skipped
        assert not actual.skipped
        assert actual.loss == pytest.approx(expected.loss, rel=1e-6)
        np.testing.assert_allclose(actual.per_sample_loss, expected.per_sample_loss, rtol=1e-6)
        assert actual.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-6)
        assert actual.learning_rate == expected.learning_rate
        assert (expected.loss_scale, actual.loss_scale) == (1.0, scale)
    assert_close(everything(scaled), everything(plain), 1e-6)


def test_gradients_that_float16_would_lose_survive_by_the_scale():
    """Of a loss weighted by 1e-8, gradients in float16 are 0 unless it is scaled."""
    inputs = make_inputs()
    numbers = inputs[2].asnumpy()
    numbers[4] = 1e-8
    inputs[2] = Tensor(numbers)
    expected = run(make_step(None).construct, inputs).gradient_norm
    scaled = run(make_step(2.0**20, "O2").construct, inputs).gradient_norm
    assert scaled == pytest.approx(expected, rel=0.01)
    assert run(make_step(None, "O2").construct, inputs).gradient_norm < 0.5 * expected


# ---- overflows


@pytest.mark.parametrize("level", ["O0", "O2"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_an_overflow_skips_the_update_and_halves_the_scale(level, limit):
    """Loss and losses are those of the step; only gradients overflow."""
    step, plain = make_step(1024.0, level, limit), make_step(None, level, limit)
    run(step.construct, make_inputs(1))
    state = step.state()
    state["loss_scale"] = np.array(1e38, np.float32)
    step.load_state(state)
    for parameter, own in zip(plain.parameters, step.parameters, strict=True):
        parameter.set_data(Tensor(own.asnumpy().copy()))
    before = everything(step)
    result = run(step.construct, make_inputs(2))
    assert result.skipped is not False
    assert not np.isfinite(result.gradient_norm)
    assert result.loss == run(plain.construct, make_inputs(2)).loss
    assert result.loss_scale == pytest.approx(1e38)
    assert_same_bits(everything(step), before)
    assert scale_and_age(step) == (pytest.approx(5e37), 0)


@pytest.mark.parametrize(("level", "exponent"), [("O0", 80), ("O2", 30)])
def test_halving_ends_where_gradients_are_finite_again(level, exponent):
    """The update applied then is the one without a scale."""
    step, plain = make_step(2.0**exponent, level), make_step(None)
    skipped = 0
    while (result := run(step.construct, make_inputs())).skipped:
        assert result.loss_scale == 2.0 ** (exponent - skipped)
        skipped += 1
        assert skipped < exponent
    assert skipped > 5
    assert result.loss_scale == 2.0 ** (exponent - skipped)
    assert step.applied.asnumpy() == 1
    run(plain.construct, make_inputs())
    assert_close(everything(step), everything(plain), 1e-5 if level == "O0" else 0.02)


@pytest.mark.parametrize(("scale", "after"), [(1024.0, 512.0), (2.0, 1.0), (1.5, 1.0), (1.0, 1.0)])
def test_the_scale_is_never_below_1(scale, after):
    step = make_step(scale)
    before = everything(step)
    assert run(step.construct, make_inputs(spoiled=True)).skipped
    assert scale_and_age(step) == (after, 0)
    assert_same_bits(everything(step), before)
    result = run(step.construct, make_inputs())
    assert (not result.skipped, result.loss_scale, step.applied.asnumpy()) == (True, after, 1)


# ---- growth

# Of seven steps that double the scale after two updates, the fourth spoiled.
USED = [64.0, 64.0, 128.0, 128.0, 64.0, 64.0, 128.0]
AGES = [1, 0, 1, 0, 1, 0, 1]


def test_the_scale_grows_with_age_and_an_overflow_restarts_it(monkeypatch):
    monkeypatch.setattr(step_module, "_GROWTH_INTERVAL", 2)
    step = make_step(64.0)
    seen = [
        (run(step.construct, make_inputs(k, spoiled=k == 3)).loss_scale, scale_and_age(step)[1])
        for k in range(7)
    ]
    assert seen == list(zip(USED, AGES, strict=True))
    assert scale_and_age(step) == (128.0, 1)


def test_the_scale_is_doubled_after_2000_updates():
    step = make_step(64.0)
    step.load_state(step.state() | {"loss_scale_age": np.array(1998, np.int32)})
    run(step.construct, make_inputs(1))
    assert scale_and_age(step) == (64.0, 1999)
    run(step.construct, make_inputs(2))
    assert scale_and_age(step) == (128.0, 0)


def test_compiled_equals_eager(monkeypatch):
    """At O2, over a growth and an overflow; the scale reported is the one that was used."""
    monkeypatch.setattr(step_module, "_GROWTH_INTERVAL", 2)
    table = update_table(OPTIMIZER, RATES, 2.0)
    steps = [make_step(64.0, "O2") for _ in range(2)]
    runners = (
        StepRunner(s, table, None if e else ms.jit)
        for s, e in zip(steps, (False, True), strict=True)
    )
    graph, eager = (
        lambda *inputs, runner=runner: runner([[array.asnumpy() for array in inputs]])
        for runner in runners
    )
    for k, used in enumerate(USED):
        inputs = make_inputs(k, spoiled=k == 3)
        actual, expected = run(graph, inputs), run(eager, inputs)
        assert actual.loss_scale == expected.loss_scale == used
        assert actual.skipped == expected.skipped == (k == 3)
        if not actual.skipped:
            assert actual.loss == pytest.approx(expected.loss, rel=2e-3)
            assert actual.gradient_norm == pytest.approx(expected.gradient_norm, rel=2e-3)
        assert scale_and_age(steps[0]) == scale_and_age(steps[1])
    assert scale_and_age(steps[0]) == (128.0, AGES[-1])
    assert_close(everything(steps[0]), everything(steps[1]), 5e-3)


# ---- state


def test_the_state_holds_scale_and_age_only_when_there_is_a_scale():
    plain, scaled = make_step(None), make_step(64.0)
    for step in (plain, scaled):
        run(step.construct, make_inputs())
    state = scaled.state()
    assert set(state) - set(plain.state()) == {"loss_scale", "loss_scale_age"}
    assert (state["loss_scale"], state["loss_scale"].dtype) == (64.0, np.float32)
    assert (state["loss_scale_age"], state["loss_scale_age"].dtype) == (1, np.int32)


def test_state_round_trip():
    first, second = make_step(64.0), make_step(4.0)
    run(first.construct, make_inputs(spoiled=True))
    run(first.construct, make_inputs())
    second.load_state({name: array.copy() for name, array in first.state().items()})
    assert scale_and_age(second) == (32.0, 1)
    assert run(second.construct, make_inputs()).loss_scale == 32.0
    assert scale_and_age(second) == (32.0, 2)


# ---- the first stage

NETWORK = "model.params.network_config.params"
AUTOENCODER = (
    "model.params.first_stage_config={target: sdxl_host.AutoencoderKL, params: {embed_dim: 4, "
    "ddconfig: {double_z: true, z_channels: 4, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1], "
    "num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}}}"
)


def test_the_first_stage_keeps_float32() -> None:
    """Its latents at O2 are those at O0, bit for bit, but where the switch is off."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)

    def latents(level: str, switch: str) -> np.ndarray:
        config = load([
            "--config", TINY, "--plugins=none", AUTOENCODER, f"{NETWORK}.in_channels=4",
            f"{NETWORK}.out_channels=4", f"{NETWORK}.channel_mult=[1]",
            f"{NETWORK}.transformer_depth=[1]", f"--ms_amp_level={level}",
            f"model.params.disable_first_stage_amp={switch}",
        ])  # fmt: skip
        model = make_hooks(config.plugins).build_model(config.tree)
        build_networks(model, 0)
        set_precision(model, config.train)
        return model.first_stage.encode(pixels, np.zeros((1, 4, 16, 16), np.float32))

    full = latents("O0", "True")
    np.testing.assert_array_equal(latents("O2", "True"), full)
    np.testing.assert_array_equal(latents("O0", "False"), full)
    half = latents("O2", "False")
    assert (half != full).any()
    np.testing.assert_allclose(half, full, atol=0.01 * np.abs(full).max())
