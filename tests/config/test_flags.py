"""Every flag of `sdxl-host train`, config key and target: the list of them, and their effects.

`python tests/config/test_flags.py` writes flags.txt anew.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from sdxl_host.commands.train import train as train_command
from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError, DataError
from sdxl_host.settings import targets
from sdxl_host.settings.options import describe
from sdxl_host.settings.schema import FLAG_HOMES, NOT_YET, OLD_FLAGS, SCHEMAS, TrainSettings

TESTS = Path(__file__).parents[1]
LIST = TESTS / "flags.txt"
TINY = str(TESTS.parent / "configs" / "tiny.yaml")

# Flags that belong to no section.
OWN = ("config", "plugins")

# ---- the golden list


def flag_lines() -> Iterator[str]:
    """`--flag -> key`, or what it may only be."""
    homes = {f.name: f"train.{f.name}" for f in fields(TrainSettings)} | FLAG_HOMES
    homes |= dict.fromkeys(OWN, "not a key")
    for name, (allowed, _) in NOT_YET.items():
        homes[name] = f"refused but for {' or '.join(allowed)}" if allowed else "refused"
    yield from (f"--{name} -> {home}" for name, home in sorted(homes.items()))


def key_lines() -> Iterator[str]:
    """`section.key type = default`."""
    for section, schema in SCHEMAS.items():
        for row in sorted(describe(schema), key=lambda row: row["name"]):
            yield f"{section}.{row['name']} {row['type']} = {row['default']!r}"


def target_class(target: targets.Target) -> type:
    module, _, name = target.path.partition(":")
    return getattr(importlib.import_module(module), name)


def target_params(target: targets.Target) -> list[str]:
    """What a config may give it, and what it accepts without effect."""
    taken = inspect.signature(target_class(target)).parameters
    given = [name for name in taken if name not in PROVIDED.get(target.slot, ())]
    return sorted(given) + [f"({name})" for name in sorted(target.idle)]


# Arguments that the host fills in, by slot.
PROVIDED = {"first_stage": ("scale_factor",)}


def target_lines() -> Iterator[str]:
    """`slot name params`, idle ones in brackets, and its old names below it."""
    for target in sorted(targets._TARGETS, key=lambda target: (target.slot, target.name)):
        yield f"{target.slot} sdxl_host.{target.name}: {', '.join(target_params(target)) or '-'}"
        yield from (f"  = {old}" for old in target.old)


def listed() -> str:
    """The text that flags.txt holds."""
    parts = {"flags of train": flag_lines, "config keys": key_lines, "targets": target_lines}
    return "\n".join(f"# {title}\n" + "".join(f"{x}\n" for x in p()) for title, p in parts.items())


def test_flags_keys_and_targets_are_the_listed_ones(device: str) -> None:
    """What users may write is a promise: it grows on purpose and does not shrink by accident."""
    now, then = listed().splitlines(), LIST.read_text("utf-8").splitlines()
    gone, new = [x for x in then if x not in now], [x for x in now if x not in then]
    assert (gone, new) == ([], []), "if that is meant, `python tests/config/test_flags.py` lists it"
    assert now == then


def test_the_list_has_the_flags_of_the_help(site, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command(["--help"]) == 0
    text = capsys.readouterr().out
    refused = re.findall(r"--(\w+)", text.rpartition("and refused:")[2])
    told = re.findall(r"^  --(\w+)", text, re.MULTILINE) + refused
    assert sorted(told) == [line.partition(" ")[0][2:] for line in flag_lines()]


# ---- whose effect is tested where

REFUSED = "config/test_load.py::test_what_is_not_built_is_refused_by_name"
GRIDS = "config/test_flags.py::test_what_the_grids_are_drawn_with"
LAW_FIVE = "laws/test_ranks.py::test_law_one_batch_of_4_is_two_batches_of_2_and_two_workers"
DATA = "config/test_flags.py::test_without_shuffle_the_first_batch_has_the_first_names"
ONE_RUN = "config/test_flags.py::test_a_run_saves_logs_and_ends_when_it_is_told_to"

# By flag, and by key for what is no flag. Paths begin at the folder of this file.
EFFECTS = {
    "config": "config/test_load.py::test_a_file_on_disk_comes_before_a_packaged_one",
    "plugins": "plugins/test_selection.py::test_ways_to_select",
    "data_path": DATA,
    "per_batch_size": LAW_FIVE,
    "total_step": ONE_RUN,
    # the run
    "weight": "training/test_trainer.py::test_training_starts_from_given_weights",
    "seed": "training/test_trainer.py::test_another_seed_is_another_run",
    "save_path": "training/test_trainer.py::test_a_folder_that_holds_a_run_is_not_written_over",
    "save_path_with_time": "config/test_flags.py::test_a_folder_named_by_date_and_time",
    "resume": (
        "training/test_trainer.py::test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one"
    ),
    "allow_changes": (
        "config/test_flags.py::test_a_run_with_other_settings_goes_on_where_that_is_allowed"
    ),
    "resume_step": "config/test_flags.py::test_the_guides_way_to_resume_is_resume",
    "optimizer_weight": "config/test_flags.py::test_the_guides_way_to_resume_is_resume",
    "log_interval": ONE_RUN,
    "save_ckpt_interval": ONE_RUN,
    "max_num_ckpt": ONE_RUN,
    "save_optimizer": "config/test_flags.py::test_a_checkpoint_of_weights_alone_is_not_resumed",
    # the update
    "gradient_accumulation_steps": LAW_FIVE,
    "scale_lr": "config/test_flags.py::test_the_rate_is_that_of_the_global_batch",
    "use_ema": "config/test_flags.py::test_moving_averages_are_kept_and_drawn_from",
    "ema_decay": "config/test_flags.py::test_an_average_that_forgets_at_once_is_the_weights",
    "clip_grad": "config/test_flags.py::test_gradients_enter_the_moments_clipped",
    "max_grad_norm": "config/test_flags.py::test_gradients_enter_the_moments_clipped",
    # the images
    "sample_interval": GRIDS,
    "sample_prompts": GRIDS,
    "sample_count": GRIDS,
    "sample_steps": GRIDS,
    "guidance_scale": GRIDS,
    "negative_prompt": GRIDS,
    "sampler": GRIDS,
    "spacing": GRIDS,
    # the device
    "ms_mode": "config/test_flags.py::test_steps_are_compiled_at_the_level_or_eager",
    "jit_level": "config/test_flags.py::test_steps_are_compiled_at_the_level_or_eager",
    "ms_amp_level": "laws/test_levels.py::test_losses_are_those_of_float32",
    "ms_amp_dtype": "config/test_flags.py::test_bfloat16_where_the_device_has_it",
    "param_fp16": "config/test_flags.py::test_weights_in_16_bits_but_for_norms",
    "max_device_memory": "config/test_flags.py::test_the_devices_memory_is_limited",
    "is_parallel": LAW_FIVE,
    "compile_cache": "training/test_compile_cache.py::test_a_second_process_finds_the_graphs",
    "data_sink": "training/test_data_sink.py::test_columns_give_what_ordinary_steps_give",
    "sink_size": "training/test_data_sink.py::test_columns_give_what_ordinary_steps_give",
    "sink_queue_size": "config/test_flags.py::test_the_queue_holds_as_many_steps_as_it_is_told_to",
    "device_target": "config/test_flags.py::test_a_device_that_is_not_there_is_refused",
    # keys that are no flags
    "data.dataset_config": DATA,
    "data.shuffle": DATA,
    "data.num_parallel_workers": "config/test_flags.py::test_threads_change_speed_alone",
    "data.python_multiprocessing": (
        "config/test_load.py::test_processes_for_images_are_refused_with_the_remedy"
    ),
    "optim.base_learning_rate": "config/test_flags.py::test_the_rate_is_that_of_the_global_batch",
    "optim.optimizer_config": "config/test_flags.py::test_gradients_enter_the_moments_clipped",
    "optim.scheduler_config": "config/test_flags.py::test_the_rate_is_that_of_the_global_batch",
    "model.params.disable_first_stage_amp": (
        "config/test_flags.py::test_the_first_stage_keeps_float32"
    ),
    "model.params.network_config.params.use_recompute": (
        "config/test_flags.py::test_recomputed_blocks_are_called_again_backwards"
    ),
    # what is refused
    "task": REFUSED,
    "cache_latent": REFUSED,
    "cache_text_embedding": REFUSED,
    "cache_path": REFUSED,
}


def flags_and_keys() -> set[str]:
    """All that needs a row: the name of a flag, else the key."""
    flags = {line.partition(" ")[0][2:] for line in flag_lines()}
    homes = {key for name, key in FLAG_HOMES.items() if name in flags}
    keys = {
        f"{section}.{field.name}"
        for section, schema in SCHEMAS.items()
        for field in fields(schema)
        if schema is not TrainSettings
    }
    switches = {
        "model.params.disable_first_stage_amp",
        "model.params.network_config.params.use_recompute",
    }
    return flags | (keys - homes) | switches


def test_each_flag_and_key_has_a_row() -> None:
    assert set(EFFECTS) == flags_and_keys()


def test_what_is_refused_and_nothing_else_has_the_row_of_a_refusal() -> None:
    """So a flag that is no longer refused needs a test of what it does."""
    assert {name for name, where in EFFECTS.items() if where == REFUSED} == set(NOT_YET)


def source(file: str, function: str) -> str:
    """A test with what it uses of its file, fixtures included; empty where it is not there."""
    text = (TESTS / file).read_text("utf-8")
    parts: dict[str, ast.stmt] = {}
    for part in ast.parse(text).body:
        if isinstance(part, ast.FunctionDef | ast.ClassDef):
            parts[part.name] = part
        elif isinstance(part, ast.Assign):
            parts |= {n.id: part for n in ast.walk(part) if isinstance(n, ast.Name)}
    found: dict[str, str] = {}
    waiting = [function]
    while waiting:
        name = waiting.pop()
        if name in parts and name not in found:
            pieces = [parts[name], *getattr(parts[name], "decorator_list", [])]
            found[name] = "\n".join(ast.get_source_segment(text, p) or "" for p in pieces)
            nodes = list(ast.walk(parts[name]))
            waiting += [node.id for node in nodes if isinstance(node, ast.Name)]
            waiting += [node.arg for node in nodes if isinstance(node, ast.arg)]
    return "\n".join(found.values())


@pytest.mark.parametrize("name", EFFECTS)
def test_the_test_of_a_row_is_there_and_uses_the_flag(name: str) -> None:
    """Read, not run."""
    file, _, function = EFFECTS[name].partition("::")
    text = source(file, function)
    assert f"def {function}(" in text, f"{EFFECTS[name]}, the test of {name}, is not there"
    assert function.startswith("test_")
    named = name in NOT_YET or name.rpartition(".")[2] in text
    assert named, f"{EFFECTS[name]} never names {name}"


# ---- the guide

# The script parameters of its section 1, each with a value that the guide or the old trainer gives.
GUIDE_FLAGS = {
    "config": "configs/training/sd_xl_base_finetune_910b.yaml",
    "weight": "checkpoints/sd_xl_base_1.0_ms.ckpt",
    "data_path": "datasets/images",
    "per_batch_size": "1",
    "gradient_accumulation_steps": "2",
    "clip_grad": "True",
    "max_grad_norm": "1.0",
    "use_ema": "True",
    "scale_lr": "False",
    "max_device_memory": "59GB",
    "is_parallel": "True",
    "data_sink": "True",
    "sink_size": "100",
    "sink_queue_size": "10",
    "resume_step": "1000",
    "optimizer_weight": "runs/optimizer.ckpt",
    "save_optimizer": "True",
    "ms_amp_level": "O2",
    "param_fp16": "True",
    "timestep_bias_strategy": "range",
    "timestep_bias_multiplier": "2",
    "timestep_bias_begin": "200",
    "timestep_bias_end": "500",
    "timestep_bias_portion": "0.25",
    "snr_gamma": "5.0",
    "task": "cache",
    "cache_latent": "True",
    "cache_text_embedding": "True",
    "cache_path": "./cache_data",
    "lpw": "True",
}
# The keys of its section 2; those of a list are those of each of its entries.
GUIDE_KEYS = [
    "model.target",
    "model.params.disable_first_stage_amp",
    "model.params.first_stage_config.target",
    "model.params.first_stage_config.params",
    "model.params.network_config.target",
    "model.params.network_config.params.transformer_depth",
    "model.params.network_config.params.spatial_transformer_attn_type",
    "model.params.network_config.params.use_recompute",
    "model.params.conditioner_config.target",
    "model.params.conditioner_config.params.emb_models[0].is_trainable",
    "model.params.conditioner_config.params.emb_models[0].input_key",
    "model.params.conditioner_config.params.emb_models[0].target",
    "model.params.conditioner_config.params.emb_models[0].params.layer",
    "model.params.conditioner_config.params.emb_models[0].params.layer_idx",
    "model.params.conditioner_config.params.emb_models[0].params.version",
    "model.params.conditioner_config.params.emb_models[2].params.outdim",
    "model.params.loss_fn_config.target",
    "model.params.loss_fn_config.params.offset_noise_level",
    "model.params.denoiser_config",
    "model.params.sigma_sampler_config",
    "optim.base_learning_rate",
    "optim.optimizer_config.target",
    "optim.optimizer_config.params.beta1",
    "optim.optimizer_config.params.beta2",
    "optim.optimizer_config.params.weight_decay",
    "optim.scheduler_config.target",
    "optim.scheduler_config.params.warm_up_steps",
    "data.per_batch_size",
    "data.total_step",
    "data.num_parallel_workers",
    "data.python_multiprocessing",
    "data.shuffle",
    "data.dataset_config.target",
    "data.dataset_config.params.target_size",
    "data.dataset_config.params.transforms[0].target",
    "data.dataset_config.params.transforms[0].params.size",
    "data.dataset_config.params.transforms[0].params.interpolation",
    "data.dataset_config.params.transforms[1].params.isfloat",
    "data.dataset_config.params.transforms[3].params.type",
]
GUIDE_CONFIG = TESTS / "configs" / "guide.yaml"


@pytest.mark.parametrize("name", GUIDE_FLAGS)
def test_each_flag_of_the_guide_is_accepted_or_refused_by_name(name: str) -> None:
    if name not in NOT_YET:
        load([f"--{name}", GUIDE_FLAGS[name]])
        return
    with pytest.raises(ConfigError, match=rf"^--{name} {re.escape(GUIDE_FLAGS[name])}: ") as caught:
        load([f"--{name}", GUIDE_FLAGS[name]])
    allowed = NOT_YET[name][0]
    told = f"it can only be {' or '.join(allowed)}" if allowed else "leave it out"
    assert str(caught.value).endswith(told)


@pytest.mark.parametrize("key", GUIDE_KEYS)
def test_each_key_of_the_guide_is_one_here_with_an_effect(key: str) -> None:
    """The file is the guide's; a key with another name would be refused, at its place."""
    config = load(["--config", str(GUIDE_CONFIG)])
    assert not any(line.startswith(f"{key} ") for line in config.notices)
    node: Any = yaml.safe_load(GUIDE_CONFIG.read_text("utf-8"))
    owner: Any = None
    for part in re.split(r"\.|(?=\[)", key):
        node = node[int(part[1:-1])] if part.startswith("[") else node[part]
        if isinstance(node, dict) and part != "params":
            owner = node
    section, _, rest = key.partition(".")
    last = key.rpartition(".")[2]
    if ".params." in key and f"{last}" in owner.get("params", {}):
        assert last in target_params(targets._BY_NAME[owner["target"]])
    elif section in SCHEMAS and "." not in rest:
        assert rest in {field.name for field in fields(SCHEMAS[section])}
    else:
        # What a node is made of; and what the list of embedders says of each.
        assert last in ("target", "params", "is_trainable", "input_key") or last.endswith("_config")


# ---- flags of the old trainer


@pytest.mark.parametrize("name", OLD_FLAGS)
@pytest.mark.parametrize("words", [["--{}"], ["--{}", "True"], ["--{}=True"]])
def test_an_old_flag_is_refused_with_what_to_do_instead(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"^--{name}: was a flag of the old trainer; ") as caught:
        load([word.format(name) for word in words])
    told = str(caught.value)
    assert told.endswith(OLD_FLAGS[name])
    assert "\n" not in told
    # What it sends to is there.
    for other in re.findall(r"--(\w+)", OLD_FLAGS[name]):
        value = "True" if other == "is_parallel" else "2"
        load([f"--{other}", value])


def test_no_flag_of_ours_is_called_old() -> None:
    assert not set(OLD_FLAGS) & flags_and_keys()


def test_a_flag_that_no_trainer_had_gets_no_such_word() -> None:
    with pytest.raises(ConfigError, match=r"^--infer: there is no such flag"):
        load(["--infer"])


# ---- effects: runs of the smallest network


@dataclass
class Run:
    """A run that ended: its trainer, what it said, its steps, and its grids as they were asked
    for, each with the network's last bias at that moment."""

    trainer: Any
    said: list[str]
    results: list[Any]
    grids: list[dict[str, Any]]

    @property
    def folder(self) -> Path:
        return self.trainer.save_path

    @property
    def metrics(self) -> list[dict[str, float]]:
        text = (self.folder / "metrics.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step_*"))

    def arrays(self, name: str, step: str = "latest") -> dict[str, np.ndarray]:
        return load_file(self.folder / "checkpoints" / step / name)


NETWORK = "model.params.network_config.params"
SMALLER = [f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"]
BIAS = "model.diffusion_model.out.2.bias"

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(device: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A trainer of tiny.yaml, smaller still, with the arguments given."""
    from sdxl_host.training.trainer import Trainer

    def trainer(*arguments: str, said: list[str] | None = None) -> Any:
        words = ["--config", TINY, "--plugins=none", *SMALLER]
        given = {word.partition("=")[0] for word in arguments}
        words = [word for word in words if word.partition("=")[0] not in given]
        if "--save_path" not in given:
            words += [f"--save_path={tmp_path_factory.mktemp('runs')}"]
        made = Trainer(load([*words, *arguments]), [].append if said is None else said.append)
        made.folder.release()  # the tests hold no folder against each other
        return made

    return trainer


@pytest.fixture(scope="module")
def run(make: Make) -> Callable[..., Run]:
    """The same, run; images are not drawn, but asked for."""
    from sdxl_host.sampling.pipeline import ImageSampler
    from sdxl_host.training.observers import FiniteGuard

    def run_with(*arguments: str) -> Run:
        said: list[str] = []
        results: list[Any] = []
        grids: list[dict[str, Any]] = []
        trainer = make(*arguments, said=said)
        guard = FiniteGuard.on_step_end

        def draw(self: Any, prompts: Any, steps: int, guidance: float, seed: int, **more: Any):
            bias = trainer.parts.network[BIAS].asnumpy().copy()
            asked = {"prompts": prompts, "steps": steps, "guidance": guidance, "seed": seed}
            grids.append({"step": trainer.step, "bias": bias, **asked, **more})
            return np.zeros((len(prompts), 3, 16, 16), np.float32)

        def on_step_end(self: Any, trainer: Any, result: Any) -> None:
            results.append(result)
            guard(self, trainer, result)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ImageSampler, "draw", draw)
            patch.setattr(FiniteGuard, "on_step_end", on_step_end)
            trainer.run()
        return Run(trainer, said, results, grids)

    return run_with


@pytest.fixture(scope="module")
def plain(run: Callable[..., Run]) -> Run:
    """Three steps, each with a checkpoint."""
    return run("--save_ckpt_interval=1")


@pytest.fixture
def part(plain: Run, tmp_path: Path) -> Path:
    """The checkpoints of a copy of that run, as after two steps."""
    folder = shutil.copytree(plain.folder, tmp_path / "part", symlinks=True) / "checkpoints"
    shutil.rmtree(folder / "step_00000003")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step_00000002")
    return folder


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=0, atol=atol, err_msg=name)


def test_a_run_saves_logs_and_ends_when_it_is_told_to(run: Callable[..., Run], plain: Run) -> None:
    found = run(
        "--total_step=5", "--log_interval=2", "--save_ckpt_interval=2", "--max_num_ckpt=2"
    )  # fmt: skip
    assert [result.step for result in found.results] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in found.metrics] == [2, 4, 5]
    assert found.checkpoints == ["step_00000004", "step_00000005"]
    assert [line["step"] for line in plain.metrics] == [1, 2, 3]
    assert plain.checkpoints == ["step_00000001", "step_00000002", "step_00000003"]


def test_a_folder_named_by_date_and_time(make: Make, tmp_path: Path) -> None:
    timed = make("--save_path_with_time=True", f"--save_path={tmp_path}").save_path
    assert timed.parent == tmp_path
    assert re.fullmatch(r"\d{4}\.\d\d\.\d\d-\d\d\.\d\d\.\d\d", timed.name)
    named = make("--save_path_with_time=False", f"--save_path={tmp_path / 'mine'}").save_path
    assert named == tmp_path / "mine"


# ---- resuming


def test_a_run_with_other_settings_goes_on_where_that_is_allowed(
    run: Callable[..., Run], plain: Run, part: Path
) -> None:
    changed = [f"--resume={part / 'latest'}", "optim.base_learning_rate=0.0005"]
    told = "optim.base_learning_rate is 0.001 there and 0.0005 here"
    with pytest.raises(ConfigError, match=f"{re.escape(told)}.*--allow_changes True$"):
        run(*changed)
    found = run(*changed, "--allow_changes=True", "--save_ckpt_interval=1")
    assert f"changed     {told}" in found.said
    rates = [line["learning_rate"] for line in found.metrics]
    assert rates == pytest.approx([0.0005, 0.001, 0.0005])
    before = [line["loss"] for line in plain.metrics]
    assert [line["loss"] for line in found.metrics] == before  # the third is of the same weights
    # It is of that once: the run that comes of it is checked against what it now is.
    assert load(["--config", str(found.folder / "config.yaml")]).train.allow_changes is False


@pytest.mark.parametrize(
    "words",
    [
        ["--resume_step=2"],
        ["--optimizer_weight={}/optimizer.safetensors"],
        ["--optimizer_weight={}", "--resume_step=2"],
    ],
)
def test_the_guides_way_to_resume_is_resume(
    run: Callable[..., Run], plain: Run, part: Path, words: list[str]
) -> None:
    checkpoint = part / "step_00000002"
    found = run(
        f"--weight={checkpoint}", *(word.format(checkpoint) for word in words),
        "--save_ckpt_interval=1",
    )  # fmt: skip
    assert found.folder == part.parent
    assert f"resumed     {checkpoint} at step 2" in found.said
    assert found.metrics == plain.metrics
    for name in ("network.safetensors", "optimizer.safetensors"):
        arrays, expected = found.arrays(name), plain.arrays(name)
        assert arrays.keys() == expected.keys()
        assert all(arrays[key].tobytes() == expected[key].tobytes() for key in expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight={0}", "--resume_step=1"], r"^--resume_step 1: .* is of step 2; give that"),
        (["--resume={0}", "--resume_step=1"], r"^--resume_step 1: .* is of step 2; give that"),
        (["--resume_step=2"], r"^--resume_step 2: continues .* --weight \(nothing\) is none"),
        (
            ["--weight={0}/network.safetensors", "--resume_step=2"],
            r"^--resume_step 2: .*network\.safetensors is none; give --weight RUN/checkpoints/",
        ),
        (
            ["--weight={0}", "--optimizer_weight={1}/optimizer.safetensors"],
            r"^--optimizer_weight .*step_00000001/optimizer\.safetensors: is not that of",
        ),
        (["--optimizer_weight={0}"], r"^--optimizer_weight .*: continues a checkpoint folder"),
        (
            ["--resume={0}", "--optimizer_weight={0}"],
            r"^--optimizer_weight .*: has no use beside --resume; leave it out",
        ),
    ],
)
def test_a_way_to_resume_that_names_two_things_is_refused(
    make: Make, part: Path, words: list[str], message: str
) -> None:
    places = part / "step_00000002", part / "step_00000001"
    with pytest.raises(ConfigError, match=message):
        make(*(word.format(*places) for word in words))


def test_a_checkpoint_of_weights_alone_is_not_resumed(run: Callable[..., Run], make: Make) -> None:
    found = run("--save_optimizer=False", "--total_step=1")
    latest = found.folder / "checkpoints" / "latest"
    assert not (latest / "optimizer.safetensors").exists()
    with pytest.raises(DataError, match=r"holds weights alone .* new run from it with --weight"):
        make(f"--resume={latest}", "--total_step=2")
    fresh = make(f"--weight={latest}")
    assert_close(
        {name: value.asnumpy() for name, value in fresh.parts.network.items()},
        found.arrays("network.safetensors"),
        atol=0,
    )


# ---- the update


def test_the_rate_is_that_of_the_global_batch(make: Make) -> None:
    """base * samples of an update * the schedule's factor, which warms up over 2 updates."""
    words = ["--per_batch_size=3", "--gradient_accumulation_steps=2", "--total_step=3"]
    words.append("optim.base_learning_rate=0.0001")

    def rates(*more: str) -> list[float]:
        return make(*words, *more).cell.table.asnumpy()[:, 0].tolist()

    warm_up = "optim.scheduler_config.params.warm_up_steps=2"
    assert rates(warm_up, "--scale_lr=True") == pytest.approx([3e-4, 6e-4, 6e-4])
    assert rates(warm_up, "--scale_lr=False") == pytest.approx([0.5e-4, 1e-4, 1e-4])
    assert rates("optim.scheduler_config=null") == pytest.approx([1e-4, 1e-4, 1e-4])


@pytest.mark.parametrize(("clip_grad", "share"), [("True", 0.25), ("True", 4.0), ("False", 0.25)])
def test_gradients_enter_the_moments_clipped(
    run: Callable[..., Run], plain: Run, clip_grad: str, share: float
) -> None:
    """After one step m = (1 - beta1) g min(1, c / |g|), with the global norm |g|."""
    norm = plain.metrics[0]["gradient_norm"]
    found = run(
        "--total_step=1", f"--clip_grad={clip_grad}", f"--max_grad_norm={share * norm}",
        "optim.optimizer_config.params.beta1=0.75",
    )  # fmt: skip
    assert found.metrics[0]["gradient_norm"] == norm
    moments = found.arrays("optimizer.safetensors")
    squares = [np.square(v, dtype=np.float64).sum() for n, v in moments.items() if "adam_m." in n]
    kept = min(1.0, share) if clip_grad == "True" else 1.0
    assert np.sqrt(np.sum(squares)) == pytest.approx(0.25 * norm * kept, rel=1e-5)


def test_moving_averages_are_kept_and_drawn_from(run: Callable[..., Run], plain: Run) -> None:
    from sdxl_host.sampling.load import restore_sampler

    found = run("--use_ema=True", "--save_ckpt_interval=1")
    weights, averages = found.arrays("network.safetensors"), found.arrays("ema.safetensors")
    assert_close(weights, plain.arrays("network.safetensors"), atol=0)
    earlier = found.arrays("ema.safetensors", "step_00000002")
    decay = 3 / 12  # (1 + k) / (10 + k) of the third update
    expected = {n: decay * earlier[n] + (1 - decay) * weights[n] for n in weights}
    assert_close(averages, expected, atol=1e-6)
    assert (averages[BIAS] != weights[BIAS]).any()
    np.testing.assert_array_equal(found.grids[-1]["bias"], averages[BIAS])
    latest = found.folder / "checkpoints" / "latest"
    for use_ema, drawn in ((True, averages), (None, averages), (False, weights)):
        sampler, _ = restore_sampler(latest, use_ema)
        parameters = {p.name: p.asnumpy() for p in sampler.model.network.get_parameters()}
        np.testing.assert_array_equal(parameters[bias_of(parameters)], drawn[BIAS])
    # Without the flag there are none.
    assert not (plain.folder / "checkpoints" / "latest" / "ema.safetensors").exists()
    np.testing.assert_array_equal(plain.grids[-1]["bias"], weights[BIAS])
    with pytest.raises(ConfigError, match=r"^--use_ema True: .* keeps no moving averages"):
        restore_sampler(plain.folder / "checkpoints" / "latest", True)


def bias_of(names: Any) -> str:
    return next(name for name in names if name.endswith("out.2.bias"))


def test_an_average_that_forgets_at_once_is_the_weights(run: Callable[..., Run]) -> None:
    found = run("--use_ema", "--ema_decay=0", "--total_step=2")
    assert_close(found.arrays("ema.safetensors"), found.arrays("network.safetensors"), atol=1e-6)
    with pytest.raises(ConfigError, match=r"^train\.ema_decay: 1\.5 is out of range"):
        load(["--ema_decay", "1.5"])


# ---- the images


def test_what_the_grids_are_drawn_with(run: Callable[..., Run], plain: Run) -> None:
    found = run(
        "--sample_interval=2", "--sample_prompts=[a, b]", "--sample_steps=4",
        "--guidance_scale=2.5", "--negative_prompt=c", "--sampler=heun", "--spacing=karras",
    )  # fmt: skip
    asked = {"prompts": ["a", "b"], "steps": 4, "guidance": 2.5, "seed": 42}
    asked |= {"negative_prompt": "c", "sampler": "heun", "spacing": "karras"}
    kept = [{k: v for k, v in grid.items() if k != "bias"} for grid in found.grids]
    assert kept == [{"step": 2, **asked}, {"step": 3, **asked}]
    names = sorted(path.name for path in (found.folder / "samples").iterdir())
    assert names == ["step_00000002.png", "step_00000003.png"]
    # Unless told otherwise: at the end, the first captions, as the model's own sampler draws.
    (grid,) = plain.grids
    own = {"negative_prompt": None, "sampler": None, "spacing": None}
    assert {key: grid[key] for key in own} == own
    assert grid["step"] == 3
    (more,) = run("--sample_count=3", "--total_step=1").grids
    captions = [image.caption for image in plain.trainer.dataset.images]
    assert (grid["prompts"], more["prompts"]) == (captions[:1], captions[:3])


# ---- the data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six captioned images, a.png to f.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, name in enumerate("abcdef"):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"image {name}")
    return folder


def test_without_shuffle_the_first_batch_has_the_first_names(
    run: Callable[..., Run], images: Path
) -> None:
    seen = {}
    key = "data.dataset_config.params.data_path"
    for shuffle, place in (("True", "--data_path"), ("False", key)):
        found = run(f"{place}={images}", f"data.shuffle={shuffle}")
        seen[shuffle] = [name for result in found.results for name in result.sample_ids]
    assert seen["False"] == [f"{name}.png" for name in "abcdef"]
    assert sorted(seen["True"]) == seen["False"]
    assert seen["True"] != seen["False"]


def test_threads_change_speed_alone(
    run: Callable[..., Run], plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host.training import batches

    asked: list[int] = []

    def pool(threads: int, name: str) -> ThreadPoolExecutor:
        asked.append(threads)
        return ThreadPoolExecutor(threads, name)

    monkeypatch.setattr(batches, "ThreadPoolExecutor", pool)
    assert run("data.num_parallel_workers=5").metrics == plain.metrics
    assert asked == [5]


# ---- the device


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        (["--ms_mode=0"], {"O0"}),
        (["--ms_mode=0", "--jit_level=O1"], {"O1"}),
        (["--ms_mode=1"], set()),
    ],
)
def test_steps_are_compiled_at_the_level_or_eager(
    make: Make, monkeypatch: pytest.MonkeyPatch, words: list[str], levels: set[str]
) -> None:
    import mindspore as ms

    signature, asked = inspect.signature(ms.jit), []

    def jit(*given: Any, **options: Any) -> Any:
        asked.append(signature.bind(*given, **options).arguments["jit_level"])
        return given[0]

    monkeypatch.setattr(ms, "jit", jit)
    make(*words)
    assert set(asked) == levels


def test_the_queue_holds_as_many_steps_as_it_is_told_to(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mindspore as ms

    from sdxl_host.training import data_sink

    name = "MS_DATASET_SINK_QUEUE"
    monkeypatch.setattr(data_sink, "check", lambda *arguments: None)  # it wants an Ascend device
    monkeypatch.setattr(ms, "data_sink", lambda *given, **options: lambda: None)
    for words, told in ((["--sink_queue_size=3"], "3"), ([], "")):
        monkeypatch.setenv(name, "")
        trainer = make("--data_sink=True", *words)
        trainer._feed(SimpleNamespace(size=2), iter([[np.zeros(2, np.float32)] * 6]), 1)
        assert os.environ[name] == told


def test_bfloat16_where_the_device_has_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_host.models import precision

    words = ["--ms_amp_level=O2", "--ms_amp_dtype=bfloat16"]
    with pytest.raises(ConfigError, match=r"^--ms_amp_dtype bfloat16: this device does not"):
        make(*words)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    with pytest.raises(ConfigError, match=r"^--ms_amp_dtype bfloat16: has no use at ms_amp_level"):
        make(words[1])
    said: list[str] = []
    trainer = make(*words, said=said)
    assert "precision   O2, bfloat16 but for norms and SiLU, weights in float32" in said
    assert not trainer.cell.is_scaled  # its exponents reach as far as float32's
    assert make("--ms_amp_level=O2", "--ms_amp_dtype=float16").cell.is_scaled


def test_weights_in_16_bits_but_for_norms(make: Make) -> None:
    import mindspore as ms
    from mindspore import nn

    said: list[str] = []
    trainer = make("--ms_amp_level=O2", "--param_fp16=True", said=said)
    assert any(line.startswith("note        param_fp16: ") for line in said)
    types = {nn.Dense: ms.float16, nn.Conv2d: ms.float16}
    types |= {nn.GroupNorm: ms.float32, nn.LayerNorm: ms.float32}
    seen = set()
    for _, cell in trainer.parts.cell.cells_and_names():
        for kind, dtype in types.items():
            if isinstance(cell, kind):
                seen.add(kind)
                assert {p.dtype for p in cell.get_parameters(expand=False)} <= {dtype}
    assert seen == set(types)
    with pytest.raises(ConfigError, match=r"^--param_fp16 True: has no use at ms_amp_level O0"):
        make("--param_fp16=True")


def test_the_devices_memory_is_limited(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mindspore as ms

    from sdxl_host import device as devices
    from sdxl_host.commands.train import run as run_command

    signature, asked = inspect.signature(ms.runtime.set_memory), []
    monkeypatch.setattr(
        ms.runtime, "set_memory", lambda **given: asked.append(signature.bind(**given).arguments)
    )
    config = load(["--config", TINY, "--device_target=CPU", "--max_device_memory=59GB"])
    with pytest.raises(ConfigError, match=r"^--max_device_memory 59GB: limits an Ascend device"):
        run_command(config)
    monkeypatch.setattr(devices, "on_ascend", lambda: True)
    devices.limit_memory("")
    assert asked == []
    devices.limit_memory(config.train.max_device_memory)
    assert asked == [{"max_size": "59GB"}]
    for text in ("59", "59 GB", "59MB", "GB", "-1GB", "lots", "0GB", "0.0GB", "59GB\n"):
        message = rf"^--max_device_memory {text}: is no size above 0; write it as 59GB$"
        with pytest.raises(ConfigError, match=message):
            devices.limit_memory(text)


@pytest.mark.parametrize(
    ("device_target", "ascend", "chosen"),
    [
        ("auto", False, "CPU"),
        ("auto", True, "Ascend"),
        ("CPU", True, "CPU"),
        ("Ascend", True, "Ascend"),
        ("Ascend", False, None),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch, device_target: str, ascend: bool, chosen: str
) -> None:
    import mindspore as ms

    from sdxl_host.device import prepare_device

    asked: list[str] = []
    monkeypatch.setattr(ms.hal, "is_available", lambda target: ascend and target == "Ascend")
    monkeypatch.setattr(ms, "set_device", asked.append)
    target = load([f"--device_target={device_target}"]).train.device_target
    if chosen is None:
        with pytest.raises(ConfigError, match=r"^train\.device_target: .* --device_target CPU$"):
            prepare_device(target)
    else:
        assert prepare_device(target) == chosen
    assert asked == ([chosen] if chosen else [])


# ---- the config's own switches

AUTOENCODER = (
    "model.params.first_stage_config={target: sdxl_host.AutoencoderKL, params: {embed_dim: 4, "
    "ddconfig: {double_z: true, z_channels: 4, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1], "
    "num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}}}"
)


def test_the_first_stage_keeps_float32(device: str) -> None:
    """Its latents at O2 are those at O0, bit for bit, but where the switch is off."""
    from sdxl_host.models.precision import set_precision
    from sdxl_host.plugins.hooks import make_hooks
    from sdxl_host.weights.networks import build_networks

    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)

    def latents(level: str, switch: str) -> np.ndarray:
        config = load([
            "--config", TINY, "--plugins=none", *SMALLER, AUTOENCODER, f"{NETWORK}.in_channels=4",
            f"{NETWORK}.out_channels=4", f"--ms_amp_level={level}",
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


def test_recomputed_blocks_are_called_again_backwards(
    run: Callable[..., Run], plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host.models import unet

    calls: list[int] = []
    construct = unet.Stage.construct

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        return construct(self, *arguments)

    monkeypatch.setattr(unet.Stage, "construct", counted)
    counts = []
    for use_recompute in ("False", "True"):
        calls.clear()
        found = run(f"{NETWORK}.use_recompute={use_recompute}", "--total_step=2")
        counts.append(len(calls))
        np.testing.assert_allclose(
            [line["loss"] for line in found.metrics],
            [line["loss"] for line in plain.metrics[:2]],
            rtol=1e-6,
        )
    assert counts[1] == 2 * counts[0]


if __name__ == "__main__":
    LIST.write_text(listed(), "utf-8")
