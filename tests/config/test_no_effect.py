"""Settings that have no effect beside others are named at the start of a run, or refused."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from sdxl_host.config import no_effect as unused
from sdxl_host.config.load import load, packaged_configs
from sdxl_host.config.no_effect import unused_lines, written_in
from sdxl_host.errors import ConfigError
from sdxl_host.settings.schema import TrainSettings

CONFIGS = packaged_configs()
FIRST_STAGE = "model.params.disable_first_stage_amp"
SCORE = "data.dataset_config.params.aesthetic_score"
BASE = "training/sd_xl_base_finetune_910b.yaml"
REFINER = "training/sd_xl_refiner_finetune_910b.yaml"
O2 = {"train.ms_amp_level": "O2"}

# The key, its value, what it is given beside, and why it then has no effect.
IDLE = [
    ("train.max_grad_norm", 1.0, {}, "clip_grad is off"),
    ("train.max_grad_norm", 2.0, {"train.clip_grad": False}, "clip_grad is off"),
    ("train.sink_size", 100, {}, "data_sink is off"),
    ("train.sink_queue_size", 10, {}, "data_sink is off"),
    ("train.ema_decay", 0.9999, {}, "use_ema is off"),
    ("train.jit_level", "O1", {"train.ms_mode": 1}, "ms_mode 1 compiles nothing"),
    ("train.compile_cache", "graphs", {"train.ms_mode": 1}, "ms_mode 1 compiles nothing"),
    ("train.sample_count", 4, {"train.sample_prompts": ["a"]}, "a grid shows the sample_prompts"),
    (
        "train.negative_prompt", "blur", {"train.guidance_scale": 1.0},
        "guidance_scale 1 is no guidance",
    ),
    ("train.allow_changes", True, {}, "no run is resumed"),
    (
        "train.save_path", "b", {"train.resume": "a/checkpoints/step_2"},
        "a resumed run goes on in its own folder",
    ),
    ("train.ms_amp_dtype", "float16", {}, "everything is float32 at ms_amp_level O0"),
    (FIRST_STAGE, False, {}, "everything is float32 at ms_amp_level O0"),
    (FIRST_STAGE, False, O2, "the first stage has no network"),
    (SCORE, 5.0, {}, "this model has no aesthetic_score among its embedders"),
]  # fmt: skip
# The same keys where they do what they say.
AT_WORK: list[tuple[str, Any, dict[str, Any]]] = [
    ("train.max_grad_norm", 2.0, {"train.clip_grad": True}),
    ("train.sink_size", 100, {"train.data_sink": True}),
    ("train.sink_queue_size", 10, {"train.data_sink": True}),
    ("train.ema_decay", 0.99, {"train.use_ema": True}),
    ("train.jit_level", "O1", {"train.ms_mode": 0}),
    ("train.compile_cache", "graphs", {"train.ms_mode": 0}),
    ("train.sample_count", 4, {}),
    ("train.negative_prompt", "blur", {}),
    ("train.negative_prompt", "", {"train.guidance_scale": 1.0}),
    ("train.allow_changes", True, {"train.resume": "latest"}),
    ("train.allow_changes", True, {"train.weight": "a/checkpoints/s", "train.resume_step": 2}),
    ("train.save_path", "b", {}),
    ("train.save_path", "b", {"train.resume": "latest"}),
    ("train.save_path", "b", {"train.resume": "b/2026.01.01/checkpoints/step_2"}),
    ("train.ms_amp_dtype", "float16", O2),
    (FIRST_STAGE, True, {}),
]
# Of the guide, which calls them effective only beside their switch; and what may well be meant so.
NOTED = {"train.max_grad_norm", "train.sink_size", "train.sink_queue_size", "train.save_path"}
NOTED |= {"train.ms_amp_dtype", FIRST_STAGE, SCORE}


DEFAULT = yaml.safe_load((CONFIGS / "default.yaml").read_text("utf-8"))


def tree(settings: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """The default config with `train` as it is given and the settings, by dotted key."""
    made = {**copy.deepcopy(DEFAULT), "train": dict(train)}
    for key, value in settings.items():
        *way, last = key.split(".")
        node = made
        for part in way:
            node = node[part]
        node[last] = value
    return made


def lines(settings: dict[str, Any], written: set[str], commanded: set[str]) -> list[str]:
    return unused_lines(tree(settings, asdict(TrainSettings())), written, commanded)


# ---- the table


def test_every_row_has_its_case() -> None:
    assert {(row.key, row.why) for row in unused._ROWS} == {(case[0], case[3]) for case in IDLE}
    assert {row.key for row in unused._ROWS} <= {case[0] for case in AT_WORK} | {SCORE}


@pytest.mark.parametrize(("key", "value", "beside", "why"), IDLE)
def test_in_a_file_it_is_named(key: str, value: Any, beside: dict[str, Any], why: str) -> None:
    """A file may serve many runs. A value that is the default is named where it is written."""
    settings = {key: value, **beside}
    expected = [f"{key} has no effect: {why}"]
    assert lines(settings, written_in(tree(settings, {})), set()) == expected
    is_own = not key.startswith("train.") or asdict(TrainSettings())[key[len("train.") :]] != value
    assert lines(settings, set(), set()) == (expected if is_own else [])


@pytest.mark.parametrize(("key", "value", "beside", "why"), IDLE)
def test_on_the_command_line_it_is_refused_or_named(
    key: str, value: Any, beside: dict[str, Any], why: str
) -> None:
    settings = {key: value, **beside}
    if key in NOTED:
        assert lines(settings, set(), {key}) == [f"{key} has no effect: {why}"]
        return
    with pytest.raises(ConfigError) as caught:
        lines(settings, set(), {key})
    message = str(caught.value)
    assert message.startswith(f"{key}: has no effect, {why}; ")
    assert message.endswith(", or leave it out")
    for name, word in re.findall(r"--(\w+) (\w+)", message):
        meant = settings | {f"train.{name}": yaml.safe_load(word)}
        assert lines(meant, set(), {key}) == []  # what the remedy says helps


@pytest.mark.parametrize(("key", "value", "beside"), AT_WORK)
def test_where_it_has_an_effect_nothing_is_said(
    key: str, value: Any, beside: dict[str, Any]
) -> None:
    assert lines({key: value, **beside}, {key}, {key, *beside}) == []


# ---- in a config


def told(*words: str) -> list[str]:
    return [line.partition(" ")[0] for line in load(words).notices if "no effect" in line]


@pytest.mark.parametrize("words", [["--jit_level", "O1"], ["train.jit_level=O1"]])
def test_a_flag_and_an_override_are_the_command_line(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^train\.jit_level: .*; use --ms_mode 0, or leave"):
        load(["--config", "tiny.yaml", *words])
    assert told("--config", "tiny.yaml", "--ms_mode=0", *words) == []


def test_a_model_with_the_condition_hears_the_score() -> None:
    assert told("--config", BASE, f"{SCORE}=5.0") == [SCORE]
    assert told("--config", REFINER) == []


def test_a_first_stage_with_a_network_follows_the_level() -> None:
    assert told("--config", BASE, f"{FIRST_STAGE}=False") == []
    assert told("--config", BASE, f"{FIRST_STAGE}=False", "--ms_amp_level=O0") == [FIRST_STAGE]


@pytest.mark.parametrize("file", ["default.yaml", "tiny.yaml", "learn_demo.yaml", BASE])
def test_no_packaged_config_holds_an_idle_setting(file: str) -> None:
    assert told("--config", file) == []


def test_a_default_that_a_file_writes_is_named(tmp_path: Path) -> None:
    """Whoever writes the norm down takes it for the one that is clipped to."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**DEFAULT, "train": {"max_grad_norm": 1.0}}), "utf-8")
    assert told("--config", str(file)) == ["train.max_grad_norm"]
    assert told("--config", str(file), "--clip_grad") == []


def test_what_a_run_wrote_names_no_default(tmp_path: Path) -> None:
    """Its file has every key; only a value of its own says that someone meant it."""
    file = tmp_path / "config.yaml"
    for words, expected in (([], []), (["--max_grad_norm=2"], ["train.max_grad_norm"])):
        config = load([*words, "--clip_grad=False", "train.sample_prompts=[a]"])
        file.write_text(OmegaConf.to_yaml(config.tree), "utf-8")
        assert told("--config", str(file)) == expected


@pytest.mark.parametrize(
    "model",
    [{}, {"params": 5}, {"params": {"conditioner_config": {"params": {"emb_models": [3]}}}}],
)
def test_a_model_that_is_refused_later_is_no_trouble_here(model: dict[str, Any]) -> None:
    sections = {"model": model, "train": asdict(TrainSettings()), "data": {}}
    assert unused_lines(sections, (), ()) == []
    sections["data"] = {"dataset_config": {"params": {"aesthetic_score": 5.0}}}
    assert unused_lines(sections, (), ()) == [f"{SCORE} has no effect: {IDLE[-1][3]}"]
