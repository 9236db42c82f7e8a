"""Whole runs at every precision level of a CPU: laws 2 and 7, and how near to float32 they are.

A float16 operator takes milliseconds on a CPU however small it is, and several when it is eager, so
the network has fewer layers than tiny.yaml's, and the long runs are the compiled ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file

from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError
from sdxl_host.models.precision import LEVELS, LOSS_SCALE, is_half
from sdxl_host.plugins import discovery
from sdxl_host.sampling.load import restore_sampler
from sdxl_host.training import build, summary
from sdxl_host.training import step as step_module
from sdxl_host.training.build import make_trainer
from sdxl_host.training.observers import Grids
from sdxl_host.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
SMALLEST = ["channel_mult=[1]", "transformer_depth=[1]"]
# Steps of the compiled runs, and of the one that is resumed; after so many updates of these the
# loss scale is doubled.
MANY, FEW = 6, 3
GROWTH = {MANY: MANY - 1, FEW: 2}

# Each level compiles a graph of its own, so two of the four are left to `make soak`.
EACH_LEVEL = [
    pytest.param(level, marks=[pytest.mark.soak] * (level in ("O1", "O3"))) for level in LEVELS
]

MOMENTS = "adam_m."  # the optimizer's first moments: parts of the gradients

Run = tuple[Trainer, list[str]]
Runs = Callable[[str], Run]


def train(folder: Path, level: str, steps: int, *arguments: str) -> Run:
    """A run without images, one of `MANY` steps compiled; the trainer and what it said."""
    said: list[str] = []
    words = ["--config", TINY, "--plugins=none", *(f"{NETWORK}.{word}" for word in SMALLEST)]
    words += [f"--save_path={folder}", f"--total_step={steps}", f"--ms_amp_level={level}"]
    words += [f"--ms_mode={int(steps != MANY)}", "--save_ckpt_interval=1", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "_GROWTH_INTERVAL", GROWTH.get(steps, 2000))
        patch.setattr(Grids, "on_step_end", lambda self, **given: None)
        made = make_trainer(load(words), say=lambda fact: said.extend(lines_of(fact)))
        made.run()
    return made, said


@pytest.fixture(scope="module")
def begun(device: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag that starts from weights of which none are zeros any more: those of a new network
    let no gradient through."""
    made, _ = train(tmp_path_factory.mktemp("begun"), "O0", 6)
    return f"--weight={made.save_path / 'checkpoints' / 'latest'}"


@pytest.fixture(scope="module")
def compiled(begun: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The compiled run at a level."""
    return cache(lambda level: train(tmp_path_factory.mktemp(level), level, MANY, begun))


@pytest.fixture(scope="module")
def eager(begun: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The eager run at a level: of one step, or of those that a resumed run is compared with."""
    steps = {"O2": FEW}
    return cache(
        lambda level: train(tmp_path_factory.mktemp(level), level, steps.get(level, 1), begun)
    )


def metrics(run: Run) -> list[dict[str, float]]:
    text = (run[0].save_path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def column(run: Run, name: str) -> np.ndarray:
    return np.array([line[name] for line in metrics(run)])


def arrays(run: Run, name: str, step: int) -> dict[str, np.ndarray]:
    """Of a checkpoint."""
    return load_file(run[0].save_path / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


def assert_same_bits(one: Run, other: Run, step: int) -> None:
    for file in ("network", "optimizer"):
        first, second = (arrays(run, file, step) for run in (one, other))
        assert first.keys() == second.keys()
        for name, array in first.items():
            assert array.tobytes() == second[name].tobytes(), name


# ---- beside float32


@pytest.mark.parametrize("level", EACH_LEVEL[1:])
def test_losses_are_those_of_float32(compiled: Runs, level: str) -> None:
    """Of six steps, within 2 %, and not the same: float16 did round."""
    full, half = compiled("O0"), compiled(level)
    first, second = column(full, "loss"), column(half, "loss")
    assert len(first) == len(second) == MANY
    np.testing.assert_allclose(second, first, rtol=0.02)
    assert (second != first).mean() > 0.5
    assert second[-2:].mean() < 0.9 * second[:2].mean()


@pytest.mark.parametrize("level", EACH_LEVEL)
def test_the_lines_tell_of_the_scale_where_there_is_one(compiled: Runs, level: str) -> None:
    lines = metrics(compiled(level))
    assert ("loss_scale" in lines[0], "skipped" in lines[0]) == (is_half(level),) * 2
    if is_half(level):
        scales = [LOSS_SCALE] * (MANY - 1) + [2 * LOSS_SCALE]
        assert [line["loss_scale"] for line in lines] == scales
        assert {line["skipped"] for line in lines} == {0.0}


# ---- laws


@pytest.mark.parametrize("level", EACH_LEVEL)
def test_compiled_equals_eager(compiled: Runs, eager: Runs, level: str) -> None:
    """Law 7, within the rounding of the level: a step's losses and gradients."""
    runs = compiled(level), eager(level)
    for name in ("loss", "unweighted_loss", "gradient_norm"):
        found, expected = (column(run, name)[0] for run in runs)
        assert found == pytest.approx(expected, rel=1e-3 if is_half(level) else 1e-5)
    found, expected = (arrays(run, "optimizer", 1) for run in runs)
    assert found.keys() == expected.keys()
    gradients = {name: array for name, array in expected.items() if name.startswith(MOMENTS)}
    peaks = {name: np.abs(array).max() for name, array in gradients.items()}
    # Some gradients are 0 but for rounding: those of biases that a norm takes away again.
    least = 1e-3 * max(peaks.values())
    assert np.mean([peak > least for peak in peaks.values()]) > 0.2
    for name, array in gradients.items():
        tolerance = (0.02 if is_half(level) else 1e-4) * max(peaks[name], least)
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("level", EACH_LEVEL)
def test_an_installed_plugin_that_is_not_selected_changes_nothing(
    begun: str, eager: Runs, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2: a step with the plugins installed, and one with none to be found."""
    assert {plugin.name for plugin in discovery.discover()} >= {
        "edm",
        "lpw",
        "snr",
        "timestep_bias",
    }
    beside = eager(level)
    monkeypatch.setattr(discovery, "discover", lambda: [])
    alone = train(tmp_path, level, 1, begun)
    assert metrics(alone) == metrics(beside)[:1]
    assert_same_bits(alone, beside, 1)


def test_a_resumed_run_at_o2_is_bit_identical(
    eager: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale's age goes on, so it is doubled after the same update; the scale that a run starts
    with is another when it is resumed, and is not taken."""
    whole = eager("O2")
    assert column(whole, "loss_scale").tolist() == [LOSS_SCALE, LOSS_SCALE, 2 * LOSS_SCALE]
    part = shutil.copytree(whole[0].save_path, tmp_path / "part", symlinks=True)
    monkeypatch.setattr(build, "LOSS_SCALE", 8.0)
    resume = f"--resume={part}/checkpoints/step_00000001"
    resumed = train(tmp_path, "O2", FEW, resume)
    assert resumed[0].save_path == part
    assert metrics(resumed) == metrics(whole)
    assert_same_bits(resumed, whole, FEW)
    with pytest.raises(ConfigError, match="ms_amp_level is 'O2' there and 'O3' here"):
        train(tmp_path, "O3", FEW, resume)


# ---- what is said, and what is drawn


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_the_start_says_the_precision(
    eager: Runs, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """And, on Ascend, whether its fused attention takes it."""
    made, said = eager(level)
    told = {"O0": "float32", "O2": "float16 but for norms and SiLU, weights in float32"}
    assert f"precision   {level}, {told[level]}" in said
    monkeypatch.setattr(summary, "on_ascend", lambda: True)
    rows = dict(summary.compute_rows(made.state.networks.cell, made.config.train))
    assert ("needs float16 or bfloat16" in rows["attention"]) == (level == "O0")


@pytest.mark.parametrize(("level", "dtype"), [("O0", ms.float32), ("O2", ms.float16)])
def test_images_are_drawn_in_the_precision_of_the_run(eager: Runs, level: str, dtype: Any) -> None:
    made, _ = eager(level)
    sampler, _ = restore_sampler(made.save_path / "checkpoints" / "latest")
    network = sampler.model.network
    given = Tensor(np.ones((1, network.model_channels), np.float32))
    assert network.time_embed[0](given).dtype == dtype
