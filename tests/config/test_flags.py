"""Every flag of `sdxl-host train`, config key and target: the list of them, and the guide's.

`python tests/config/test_flags.py` writes flags.txt anew. What each does, tests/training shows: see
test_effects.py there.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_host.commands.train import train as train_command
from sdxl_host.config import mindone
from sdxl_host.config.load import load
from sdxl_host.settings.declarations import FLAGS, SCHEMAS
from sdxl_host.settings.options import describe
from sdxl_host.settings.targets import TARGETS, Target

TESTS = Path(__file__).parents[1]
LIST = TESTS / "flags.txt"

# ---- the golden list


def flag_lines() -> Iterator[str]:
    """`--flag -> key`."""
    homes = {name: setting.key for name, setting in FLAGS.items()}
    homes |= {"config": "not a key", "plugins": "not a key"}
    yield from (f"--{name} -> {home}" for name, home in sorted(homes.items()))


def key_lines() -> Iterator[str]:
    """`section.key type = default`."""
    for section, schema in SCHEMAS.items():
        for row in sorted(describe(schema), key=lambda row: row["name"]):
            yield f"{section}.{row['name']} {row['type']} = {row['default']!r}"


def target_params(target: Target) -> list[str]:
    """What a config may give it, and what it accepts without effect."""
    module, _, name = target.path.partition(":")
    taken = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    given = [name for name in taken if name not in target.provided]
    return sorted(given) + [
        f"({name})" for name in sorted(mindone.IDLE_PARAMS.get(target.name, {}))
    ]


def target_lines() -> Iterator[str]:
    """`slot name params`, idle ones in brackets, and its old names below it."""
    for target in sorted(TARGETS, key=lambda target: (target.slot, target.name)):
        yield f"{target.slot} sdxl_host.{target.name}: {', '.join(target_params(target)) or '-'}"
        yield from (f"  = {old}" for old, ours in mindone.TARGETS.items() if ours == target.name)


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
    told = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert sorted(told) == [line.partition(" ")[0][2:] for line in flag_lines()]


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


@pytest.mark.parametrize("name", GUIDE_FLAGS)
def test_each_flag_of_the_guide_is_accepted(name: str) -> None:
    load([f"--{name}", GUIDE_FLAGS[name]])


def test_each_key_of_the_guide_is_one_here_with_an_effect() -> None:
    """The file is the guide's; a key with another name would be refused, at its place."""
    config = load(["--config", str(TESTS / "configs" / "guide.yaml")])
    written: Any = yaml.safe_load((TESTS / "configs" / "guide.yaml").read_text("utf-8"))
    for key in GUIDE_KEYS:
        assert not any(line.startswith(f"{key} ") for line in config.notices), key
        node = written
        for part in re.split(r"\.|(?=\[)", key):
            node = node[int(part[1:-1])] if part.startswith("[") else node[part]


if __name__ == "__main__":
    LIST.write_text(listed(), "utf-8")
