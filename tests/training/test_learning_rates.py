"""Learning-rate schedules of configs, and the learning rates of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError
from sdxl_host.settings.declarations import OptimSettings
from sdxl_host.settings.targets import build
from sdxl_host.training.lr_schedulers import (
    CosineScheduler,
)
from sdxl_host.training.optimizer import configured

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"

# ---- in a config

AS_NAMED = {
    "sdxl_host.LambdaWarmUpScheduler": ("{warm_up_steps: 2}", [0.5, 1, 1, 1]),
    "gm.lr_scheduler.LambdaWarmUpScheduler": ("{warm_up_steps: 4}", [0.25, 0.5, 0.75, 1]),
    "sdxl_host.LinearScheduler": ("{end_factor: 0.1}", [1, 0.7, 0.4, 0.1]),
    "sdxl_host.CosineScheduler": ("{warm_up_steps: 2}", [0.5, 1, 0.5, 0]),
    "sdxl_host.MultiStepScheduler": ("{milestones: [1, 3], gamma: 0.5}", [1, 0.5, 0.5, 0.25]),
    "gm.lr_scheduler.MultiStepLR": ("{milestones: [2], verbose: True}", [1, 1, 0.1, 0.1]),
    "gm.lr_scheduler.LambdaWarmUpCosineScheduler": (
        "{warm_up_steps: 1, lr_min: 0.2, lr_max: 1, lr_start: 0.5, max_decay_steps: 3, "
        "verbosity_interval: 5}",
        [0.5, 1, 0.6, 0.2],
    ),
    "gm.lr_scheduler.LambdaWarmUpCosineScheduler2": (
        "{warm_up_steps: [1], f_min: [0.2], f_max: [1], f_start: [0.5], cycle_lengths: [3]}",
        [0.5, 1, 0.6, 0.2],
    ),
    "gm.lr_scheduler.LambdaLinearScheduler": (
        "{warm_up_steps: [1], f_min: [0.2], f_max: [1], f_start: [0.5], cycle_lengths: [4]}",
        [0.5, 0.8, 0.6, 0.4],
    ),
}


Words = Callable[..., list[str]]


@pytest.fixture
def settings(tmp_path: Path) -> Words:
    """Words for a run of tiny.yaml with another scheduler in it, of 4 updates or as many as said.

    A file of its own, because params on the command line would join those of the file.
    """

    def write(target: str, params: str, updates: int = 4) -> list[str]:
        before = "sdxl_host.LambdaWarmUpScheduler\n    params: {warm_up_steps: 2}\n"
        first, second = TINY.read_text("utf-8").split(before)
        path = tmp_path / "own.yaml"
        path.write_text(f"{first}{target}\n    params: {params}\n{second}", "utf-8")
        return ["--config", str(path), "--plugins", "none", f"data.total_step={updates}"]

    return write


@pytest.mark.parametrize("target", AS_NAMED)
def test_every_name_gives_its_learning_rates(settings: Words, target: str):
    params, factors = AS_NAMED[target]
    config = load(settings(target, params))
    _, rates = configured(config.optim, config.data.total_step)
    base = config.optim.base_learning_rate
    np.testing.assert_allclose(rates, base * np.array(factors), rtol=1e-12, atol=1e-18)


def test_what_an_old_schedule_printed_is_named_as_idle(settings: Words):
    """`verbose` and `verbosity_interval` printed rates; metrics.jsonl has them all."""
    for target, key in (
        ("gm.lr_scheduler.MultiStepLR", "verbose"),
        ("gm.lr_scheduler.LambdaWarmUpCosineScheduler", "verbosity_interval"),
    ):
        params, _ = AS_NAMED[target]
        notices = load(settings(target, params)).notices
        where = f"optim.scheduler_config.params.{key}"
        assert f"{where} has no effect: metrics.jsonl holds every learning rate" in notices


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("LinearScheduler", "{end_factor: 2}", "LinearScheduler: end_factor must lie in"),
        ("LinearScheduler", "{warm_up_steps: 4}", "LinearScheduler: the rate is to fall"),
        ("CosineScheduler", "{warm_up_steps: 4}", "CosineScheduler: the rate is to fall"),
        ("MultiStepScheduler", "{milestones: [4]}", "MultiStepScheduler: milestone 4 has no"),
        (
            "LambdaLinearScheduler",
            "{warm_up_steps: [1], cycle_lengths: [2], f_start: [0], f_max: [1], f_min: [0]}",
            "LambdaLinearScheduler: the cycles end after 3 updates, and the run has 4",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_at_its_place(settings, target, params, message):
    config = load(settings(f"sdxl_host.{target}", params))
    with pytest.raises(ConfigError, match=rf"^optim\.scheduler_config\.params: {message}") as told:
        configured(config.optim, config.data.total_step)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("MultiStepScheduler", {}, "milestones: MultiStepScheduler needs it; add it"),
        ("MultiStepScheduler", {"milestones": 5}, "milestones: 5 does not fit its type"),
        ("MultiStepScheduler", {"milestones": [1.5]}, r"milestones: \[1.5\] does not fit"),
        ("LinearScheduler", {"end_step": 2.5}, r"end_step: 2.5 does not fit its type, int \| None"),
        ("CosineScheduler", {"end_factor": math.nan}, "end_factor: nan is not a finite number"),
        ("CosineScheduler", {"endfactor": 0.1}, r"endfactor: .* \(did you mean end_factor\?\)"),
    ],
)
def test_params_of_a_schedule_are_checked(target, params, message):
    node = {"target": f"sdxl_host.{target}", "params": params}
    with pytest.raises(ConfigError, match=rf"^here\.params\.{message}"):
        build(node, "scheduler", "here")


@pytest.mark.parametrize("scale", [1, 2, 48])
def test_a_scale_multiplies_every_rate(scale):
    """Of the base, before the schedule: its shape stays."""
    optim = OptimSettings(
        base_learning_rate=1e-4,
        optimizer_config={"target": "sdxl_host.AdamW"},
        scheduler_config={"target": "sdxl_host.CosineScheduler", "params": {"warm_up_steps": 3}},
    )
    _, rates = configured(optim, 20, scale)
    expected = 1e-4 * scale * CosineScheduler(warm_up_steps=3).factors(20)
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


# ---- in a run

Rates = Callable[..., list[float]]

SMALLEST = (
    "model.params.network_config.params.channel_mult=[1]",
    "model.params.network_config.params.transformer_depth=[1]",
    "--guidance_scale=1",
)


@pytest.fixture
def rates_of_run(device: str, tmp_path: Path) -> Rates:
    """Trains and gives the learning rates in metrics.jsonl."""
    from sdxl_host.training.build import make_trainer

    def run(*words: str) -> list[float]:
        made = make_trainer(
            load([*words, *SMALLEST, "--save_path", str(tmp_path)]), lambda line: None
        )
        made.run()
        lines = (made.save_path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["learning_rate"] for line in lines]

    return run


@pytest.mark.parametrize("target", [name for name in AS_NAMED if name.startswith("sdxl_host.")])
def test_the_rates_of_a_run_are_its_schedule_s(rates_of_run: Rates, settings: Words, target: str):
    """metrics.jsonl has what each update was made with, which the step looked up."""
    params, factors = AS_NAMED[target]
    told = rates_of_run(*settings(target, params))
    np.testing.assert_allclose(told, 1e-3 * np.array(factors), rtol=1e-6, atol=1e-12)


def test_an_old_name_runs_and_a_step_is_one_update_of_several_batches(
    rates_of_run: Rates, settings: Words
):
    """The schedule advances once per update, not per batch."""
    target = "gm.lr_scheduler.LambdaWarmUpCosineScheduler"
    params, factors = AS_NAMED[target]
    words = ("--gradient_accumulation_steps", "2", "--per_batch_size", "1")
    told = rates_of_run(*settings(target, params), *words)
    np.testing.assert_allclose(told, 1e-3 * np.array(factors), rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "samples"),
    [
        (("--scale_lr", "False", "--per_batch_size", "3"), 1),
        (("--scale_lr", "True", "--per_batch_size", "3"), 3),
        (("--scale_lr=True", "--per_batch_size=2", "--gradient_accumulation_steps=2"), 4),
    ],
)
def test_scale_lr_multiplies_by_the_samples_of_an_update(
    rates_of_run: Rates, settings: Words, words: tuple[str, ...], samples: int
):
    """per_batch_size times gradient_accumulation_steps."""
    target = "sdxl_host.LambdaWarmUpScheduler"
    told = rates_of_run(*settings(target, "{warm_up_steps: 2}", 2), *words)
    np.testing.assert_allclose(told, 1e-3 * samples * np.array([0.5, 1.0]), rtol=1e-6)


def test_scale_lr_counts_the_ranks(
    device: str, settings: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two ranks with two batches of three: 12 samples in an update. Rank 0 stands for both."""
    from sdxl_host.training.build import make_trainer
    from sdxl_host.training.distributed import Ranks

    monkeypatch.setattr(Ranks, "texts", lambda self, text: [text, text])
    words = settings("sdxl_host.LambdaWarmUpScheduler", "{warm_up_steps: 4}")
    words += ["--scale_lr=True", "--per_batch_size=3", "--gradient_accumulation_steps=2"]
    config = load([*words, *SMALLEST, "--save_path", str(tmp_path)])
    made = make_trainer(config, lambda line: None, Ranks(0, 2))
    assert made.batch_size == 12
    rates = made.run_step._run._rows._table[:, 0]
    np.testing.assert_allclose(rates, 12e-3 * np.array([0.25, 0.5, 0.75, 1.0]), rtol=1e-6)
    made.folder.close()
