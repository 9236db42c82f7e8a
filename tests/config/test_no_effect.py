"""Settings that have no effect beside others are named at the start of a run, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from sdxl_host.config.load import load
from sdxl_host.config.no_effect import _OF_PARAMS
from sdxl_host.config.yaml_files import packaged_configs
from sdxl_host.errors import ConfigError
from sdxl_host.settings.declarations import SETTINGS

# No plugin is installed as far as these tests see.
pytestmark = pytest.mark.usefixtures("site")

FIRST_STAGE = "model.params.disable_first_stage_amp"
SCORE = "data.dataset_config.params.aesthetic_score"
BASE = "training/sd_xl_base_finetune_910b.yaml"
REFINER = "training/sd_xl_refiner_finetune_910b.yaml"
DEFAULT = yaml.safe_load((packaged_configs() / "default.yaml").read_text("utf-8"))
O2 = "--ms_amp_level=O2"

# A setting, and what it is given beside so that it has no effect, and so that it has one.
NEEDS = [
    ("train.max_grad_norm", 1.0, ["--clip_grad=False"], ["--clip_grad=True"]),
    ("train.sink_size", 100, [], ["--data_sink"]),
    ("train.sink_queue_size", 10, [], ["--data_sink"]),
    ("train.ema_decay", 0.9999, [], ["--use_ema"]),
    ("train.jit_level", "O1", ["--ms_mode=1"], ["--ms_mode=0"]),
    ("train.compile_cache", "graphs", ["--ms_mode=1"], ["--ms_mode=0"]),
    ("train.sample_count", 4, ["train.sample_prompts=[a]"], []),
    ("train.negative_prompt", "blur", ["--guidance_scale=1"], ["--guidance_scale=2"]),
    ("train.allow_changes", True, [], ["--resume=latest"]),
    ("train.allow_changes", True, [], ["--weight=a/checkpoints/step_2", "--resume_step=2"]),
    ("train.save_path", "b", ["--resume=a/checkpoints/step_2"], ["--resume=latest"]),
    ("train.save_path", "b", ["--weight=a/c/s", "--resume_step=2"], ["--resume=b/d/checkpoints/s"]),
    ("train.cache_path", "kept", [], ["--cache_latent"]),
    ("train.cache_path", "kept", [], ["--cache_text_embedding"]),
    ("train.cache_dtype", "float16", [], ["--task=cache"]),
    ("data.keep_tags", 1, [], ["--shuffle_tags=True"]),
    ("train.ms_amp_dtype", "float16", ["--ms_amp_level=O0"], [O2]),
    (FIRST_STAGE, False, ["--ms_amp_level=O0"], None),
    (FIRST_STAGE, False, [O2], None),
    (SCORE, 5.0, [], None),
]  # fmt: skip


@pytest.fixture
def arguments(tmp_path: Path) -> Any:
    """Arguments that name the default config with only this in `train`, or at this dotted key."""

    def write(train: dict[str, Any], key: str = "", value: Any = None) -> list[str]:
        tree = OmegaConf.create({**DEFAULT, "train": train})
        if key:
            OmegaConf.update(tree, key, value, force_add=True)
        file = tmp_path / "mine.yaml"
        OmegaConf.save(tree, file)
        return ["--config", str(file)]

    return write


def named(*words: str) -> list[str]:
    return [line.partition(" ")[0] for line in load(words).notices if "no effect" in line]


def test_every_need_has_its_case() -> None:
    keys = {key for key, setting in SETTINGS.items() if setting.needs is not None}
    assert keys | {rule.key for rule in _OF_PARAMS} == {case[0] for case in NEEDS}


@pytest.mark.parametrize(("key", "value", "beside", "at_work"), NEEDS)
def test_in_a_file_it_is_named(
    arguments: Any, key: str, value: Any, beside: list[str], at_work: list[str] | None
) -> None:
    """A file may serve many runs. A value that is the default is named where it is written."""
    file = arguments({}, key, value)
    assert named(*file, *beside) == [key]
    assert named(*arguments({}), *beside) == []
    if at_work is not None:
        assert named(*file, *at_work) == []


@pytest.mark.parametrize(("key", "value", "beside", "at_work"), NEEDS)
def test_on_the_command_line_it_is_named_or_refused(
    arguments: Any, key: str, value: Any, beside: list[str], at_work: list[str] | None
) -> None:
    """With a remedy it is refused, and the remedy helps."""
    words = [*arguments({}), f"{key}={value}"]
    needs = SETTINGS[key].needs if key in SETTINGS else None
    if needs is None or not needs.remedy:
        assert named(*words, *beside) == [key]
    else:
        with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: has no effect, .*leave it out"):
            load([*words, *beside])
        for flag, text in re.findall(r"--(\w+) (\w+)", needs.remedy):
            others = [word for word in beside if not word.startswith(f"--{flag}=")]
            assert named(*words, *others, f"--{flag}={text}") == []
    if at_work is not None:
        assert named(*words, *at_work) == []


def test_a_negative_prompt_that_is_empty_asks_for_nothing(arguments: Any) -> None:
    assert named(*arguments({}), "train.negative_prompt=''", "--guidance_scale=1") == []


def test_the_first_stage_in_float32_is_what_there_always_is(arguments: Any) -> None:
    assert named(*arguments({}), f"{FIRST_STAGE}=True") == []


def test_a_flag_is_the_command_line_too() -> None:
    with pytest.raises(ConfigError, match=r"^train\.jit_level: .*; use --ms_mode 0, or leave"):
        load(["--config", "tiny.yaml", "--jit_level", "O1"])


def test_a_model_with_the_condition_heeds_the_score() -> None:
    assert named("--config", BASE, f"{SCORE}=5.0") == [SCORE]
    assert named("--config", REFINER) == []


def test_a_first_stage_with_a_network_follows_the_level() -> None:
    assert named("--config", BASE, f"{FIRST_STAGE}=False") == []
    assert named("--config", BASE, f"{FIRST_STAGE}=False", "--ms_amp_level=O0") == [FIRST_STAGE]


@pytest.mark.parametrize("file", ["default.yaml", "tiny.yaml", "learn_demo.yaml", BASE])
def test_no_packaged_config_holds_an_idle_setting(file: str) -> None:
    assert named("--config", file) == []


def test_what_a_run_wrote_names_no_default(tmp_path: Path) -> None:
    """Its file has every key; only another value than the default says that someone meant it."""
    file = tmp_path / "config.yaml"
    for words, expected in (([], []), (["--max_grad_norm=2"], ["train.max_grad_norm"])):
        config = load([*words, "--clip_grad=False", "train.sample_prompts=[a]"])
        file.write_text(OmegaConf.to_yaml(config.tree), "utf-8")
        assert named("--config", str(file)) == expected
        assert named("--config", str(file), "--seed=3") == expected
        # A run of an earlier version did not know every setting.
        lines = [line for line in file.read_text().splitlines() if "jit_level:" not in line]
        file.write_text("\n".join(lines), "utf-8")
        assert named("--config", str(file)) == expected


@pytest.mark.parametrize(
    "model",
    [
        {"target": "sdxl_host.DiffusionEngine"},
        {"params": {"conditioner_config": {"params": {"emb_models": [3]}}}},
        {"params": {"conditioner_config": 3}},
    ],
)
def test_a_model_that_is_refused_later_is_no_trouble_here(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**DEFAULT, "model": model}), "utf-8")
    assert named("--config", str(file), f"{SCORE}=5.0") == [SCORE]
