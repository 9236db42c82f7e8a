"""docs/from-mindone.md and docs/training.md: complete, and true of the program."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import importlib_metadata
import numpy as np
import pytest
import yaml

from sdxl_host.config import mindone, plugin_targets
from sdxl_host.config.load import load
from sdxl_host.config.yaml_files import packaged_configs
from sdxl_host.errors import ConfigError
from sdxl_host.settings import targets
from sdxl_host.settings.declarations import FLAGS, SCHEMAS, SETTINGS

DOCS = Path(__file__).parents[2] / "docs"
TINY = ["--config", str(packaged_configs() / "tiny.yaml"), "--plugins", "none"]

# What MindONE's train.py had, in the versions that are known.
OLD_TRAINERS_FLAGS = """
version config task cache_latent cache_text_embedding cache_path gradient_accumulation_steps
clip_grad max_grad_norm use_ema weight per_batch_size scale_lr timestep_bias_strategy
timestep_bias_multiplier timestep_bias_begin timestep_bias_end timestep_bias_portion snr_gamma seed
sd_xl_base_ratios data_path save_path save_path_with_time log_interval save_ckpt_interval
save_ckpt_only_rank_zero max_num_ckpt resume_step optimizer_weight save_optimizer data_sink
sink_size sink_queue_size dataset_load_tokenizer lpw max_embeddings_multiples infer_during_train
infer_interval device_target ms_mode jit_level ms_amp_level ms_enable_graph_kernel
ms_enable_allreduce_fusion param_fp16 overflow_still_update max_device_memory is_parallel
dynamic_shape enable_modelarts ckpt_url train_url multi_data_url pretrain_url ckpt_dir parallel_mode
"""

# What its YAML files had: a section's key, or a class and its param.
KEYS = """
version optim.base_learning_rate optim.optimizer_config optim.scheduler_config data.per_batch_size
data.total_step data.num_parallel_workers data.python_multiprocessing data.shuffle
data.dataset_config data.num_epochs DiffusionEngine.scale_factor
DiffusionEngine.disable_first_stage_amp DiffusionEngine.denoiser_config
DiffusionEngine.network_config DiffusionEngine.conditioner_config
DiffusionEngine.first_stage_config DiffusionEngine.sigma_sampler_config
DiffusionEngine.loss_fn_config DiffusionEngine.use_ema DiffusionEngine.ema_decay_rate
DiffusionEngine.input_key DiffusionEngine.log_keys DiffusionEngine.load_first_stage_model
DiffusionEngine.load_conditioner DiffusionEngine.latents_mean DiffusionEngine.latents_std
DiscreteDenoiser.weighting_config DiscreteDenoiser.scaling_config
DiscreteDenoiser.discretization_config DiscreteDenoiser.num_idx DiscreteDenoiser.do_append_zero
DiscreteDenoiser.quantize_c_noise DiscreteDenoiser.flip DiscreteSampling.discretization_config
DiscreteSampling.num_idx DiscreteSampling.flip UNetModel.adm_in_channels UNetModel.num_classes
UNetModel.in_channels UNetModel.out_channels UNetModel.model_channels
UNetModel.attention_resolutions UNetModel.num_res_blocks UNetModel.channel_mult
UNetModel.num_head_channels UNetModel.use_spatial_transformer UNetModel.use_linear_in_transformer
UNetModel.transformer_depth UNetModel.context_dim UNetModel.spatial_transformer_attn_type
UNetModel.legacy UNetModel.use_recompute GeneralConditioner.emb_models FrozenCLIPEmbedder.layer
FrozenCLIPEmbedder.layer_idx FrozenCLIPEmbedder.version FrozenOpenCLIPEmbedder2.arch
FrozenOpenCLIPEmbedder2.freeze FrozenOpenCLIPEmbedder2.layer
FrozenOpenCLIPEmbedder2.always_return_pooled FrozenOpenCLIPEmbedder2.legacy
FrozenOpenCLIPEmbedder2.require_pretrained ConcatTimestepEmbedderND.outdim AutoencoderKL.embed_dim
AutoencoderKL.ddconfig AutoencoderKL.monitor AutoencoderKL.lossconfig StandardDiffusionLoss.type
StandardDiffusionLoss.offset_noise_level StandardDiffusionLoss.keep_loss_fp32
AdamWeightDecay.beta1 AdamWeightDecay.beta2 AdamWeightDecay.eps AdamWeightDecay.weight_decay
LambdaWarmUpScheduler.warm_up_steps LambdaLinearScheduler.warm_up_steps
LambdaLinearScheduler.cycle_lengths LambdaLinearScheduler.f_start LambdaLinearScheduler.f_max
LambdaLinearScheduler.f_min Text2ImageDataset.target_size Text2ImageDataset.transforms
Text2ImageDataset.multi_aspect Text2ImageDataset.batched_transforms Resize.size
Resize.interpolation Rescaler.isfloat Transpose.type
"""

# The targets of its YAML files: those that are served, and the last words of those that are not.
SERVED = """
gm.models.diffusion.DiffusionEngine gm.modules.diffusionmodules.openaimodel.UNetModel
gm.modules.GeneralConditioner gm.modules.embedders.modules.FrozenCLIPEmbedder
gm.modules.embedders.modules.FrozenOpenCLIPEmbedder2
gm.modules.embedders.modules.ConcatTimestepEmbedderND gm.models.autoencoder.AutoencoderKL
gm.models.autoencoder.AutoencoderKLInferenceWrapper
gm.modules.diffusionmodules.denoiser.DiscreteDenoiser
gm.modules.diffusionmodules.denoiser.Denoiser
gm.modules.diffusionmodules.denoiser_scaling.EpsScaling
gm.modules.diffusionmodules.denoiser_scaling.VScaling
gm.modules.diffusionmodules.denoiser_scaling.EDMScaling
gm.modules.diffusionmodules.denoiser_weighting.EpsWeighting
gm.modules.diffusionmodules.denoiser_weighting.VWeighting
gm.modules.diffusionmodules.denoiser_weighting.UnitWeighting
gm.modules.diffusionmodules.denoiser_weighting.EDMWeighting
gm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization
gm.modules.diffusionmodules.discretizer.EDMDiscretization
gm.modules.diffusionmodules.sigma_sampling.DiscreteSampling
gm.modules.diffusionmodules.sigma_sampling.EDMSampling
gm.modules.diffusionmodules.loss.StandardDiffusionLoss mindspore.nn.AdamWeightDecay
gm.lr_scheduler.LambdaWarmUpScheduler gm.lr_scheduler.LambdaLinearScheduler
gm.lr_scheduler.LambdaWarmUpCosineScheduler gm.lr_scheduler.LambdaWarmUpCosineScheduler2
gm.lr_scheduler.MultiStepLR gm.data.dataset.Text2ImageDataset gm.data.mappers.Resize
gm.data.mappers.Rescaler gm.data.mappers.AddOriginalImageSizeAsTupleAndCropToSquare
gm.data.mappers.Transpose
"""
NOT_SERVED = """
UNetModel_lora DiffusionEngineDreamBooth Text2ImageDatasetDreamBooth ControlnetUnetModel ControlNet
Text2ImageControlNetDataset BatchedResizedAndRandomCrop BatchedRescaler BatchedTranspose
T2I_Webdataset T2I_Webdataset_RndAcs DiscreteSamplingForZero3
"""

# What it wrote: the ends of the names.
FILES = ["N.ckpt", "_ema.ckpt", "_lora.ckpt", "_lora_ema.ckpt", "_ti.ckpt", "unet_N.ckpt"]
FILES += ["optimizer.ckpt", "cfg.yaml"]

# Where it meant something else by the same name: words of the rows that must be there.
MEANINGS = """
clip_grad overflow decay correction total_step schedule accumulation use_ema offset_noise_level
c_noise timestep_bias_... snr_gamma latents size captions resuming param_fp16 order unknown
"""


def tables(page: str) -> dict[str, list[list[str]]]:
    """The rows of the tables below each heading, without their heads."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in (DOCS / page).read_text("utf-8").splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif line.startswith("|"):
            found.setdefault(title, []).append([c.strip() for c in line.strip("|").split(" | ")])
    return {
        title: [row for i, row in enumerate(rows) if not _is_head(rows, i)]
        for title, rows in found.items()
    }


def _is_head(rows: list[list[str]], index: int) -> bool:
    """A line of dashes, or the one above it."""
    return any(set("".join(row)) <= set("-| ") for row in rows[index : index + 2])


PAGE = tables("from-mindone.md")
ROWS = {title: {row[0].strip("`"): row[1] for row in rows} for title, rows in PAGE.items()}
TRAINING = tables("training.md")


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def own_flags() -> set[str]:
    """Every flag of train but those of plugins."""
    return {"config", "plugins", *FLAGS}


@cache
def plugin_flags() -> frozenset[str]:
    """The flags of the plugins that this page names, and their switches."""
    flags: set[str] = set()
    for name in ("snr", "timestep_bias", "lpw", "edm"):
        options: Any = load([*TINY[:2], f"--{name}"]).plugins[0].options
        flags |= {name, *(f"{name}_{field}" for field in type(options).__dataclass_fields__)}
    return frozenset(flags)


# ---- every name has its row


@pytest.mark.parametrize(
    ("title", "kept"),
    [
        ("Flags", [f"--{name}" for name in OLD_TRAINERS_FLAGS.split()]),
        ("Config keys", KEYS.split()),
        ("Targets", SERVED.split() + NOT_SERVED.split()),
    ],
)
def test_every_old_name_has_one_row(title: str, kept: list[str]) -> None:
    assert sorted(row[0].strip("`") for row in PAGE[title]) == sorted(kept)


def test_every_old_file_has_a_row() -> None:
    names = list(ROWS["Files"])
    assert len(names) == len(FILES)
    for end in FILES:
        assert any(name.endswith(end) for name in names), end


@pytest.mark.parametrize("word", MEANINGS.split())
def test_every_difference_in_meaning_has_a_row(word: str) -> None:
    rows = [row for row in PAGE["Differences in meaning"] if word in row[0]]
    assert len(rows) == 1
    assert len(rows[0]) == 3
    assert all(rows[0])


def test_every_target_with_an_old_name_is_on_the_page() -> None:
    """So that one which is added gets its row."""
    assert set(mindone.TARGETS) <= set(SERVED.split())
    assert set(mindone.OLD_FLAGS) <= set(OLD_TRAINERS_FLAGS.split())


# ---- every row is true


@pytest.mark.parametrize("name", OLD_TRAINERS_FLAGS.split())
def test_a_flag_is_what_its_row_says(name: str) -> None:
    here = ROWS["Flags"][f"--{name}"]
    if here == "refused":
        with pytest.raises(ConfigError, match=rf"^--{name}\b.*: was a flag"):
            load([*TINY, f"--{name}", "1"])
        return
    (flag,) = codes(here)
    assert flag.removeprefix("--") in own_flags() | plugin_flags()
    assert (name in mindone.OLD_FLAGS) == (flag != f"--{name}")


def test_no_cell_names_a_flag_key_or_target_that_is_not_here() -> None:
    known = own_flags() | plugin_flags() | set(OLD_TRAINERS_FLAGS.split())
    cells = [cell for rows in PAGE.values() for row in rows for cell in row]
    for code in [code for cell in cells for code in codes(cell)]:
        for flag in re.findall(r"--(\w+)", code):
            assert flag in known, code
        section, _, key = code.partition(".")
        if key and section in SCHEMAS and code not in KEYS.split():
            assert key in SCHEMAS[section].__dataclass_fields__, code
        if section == "sdxl_host":
            assert targets.is_known(code) or code in plugin_target_names(), code


def plugin_target_names() -> set[str]:
    return {point.name for point in importlib_metadata.entry_points(group=plugin_targets.GROUP)}


@pytest.mark.parametrize("name", SERVED.split())
def test_an_old_target_means_ours(name: str) -> None:
    ours = codes(ROWS["Targets"][name])[0]
    if name in mindone.TARGETS:
        assert f"sdxl_host.{mindone.TARGETS[name]}" == ours
        assert targets.is_known(ours)
        return
    assert (
        "of the plugin edm" in ROWS["Targets"][name]
        or "plugin edm refuses" in (ROWS["Targets"][name])
    )
    points = importlib_metadata.entry_points(group=plugin_targets.GROUP)
    old, new = (next(p for p in points if p.name == one) for one in (name, ours))
    assert (old.value, old.dist.name) == (new.value, "sdxl-edm")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NOT_SERVED.split())
def test_a_target_that_is_not_here_is_refused(name: str) -> None:
    names = [*(f"sdxl_host.{target.name}" for target in targets.TARGETS), *plugin_target_names()]
    assert name not in {known.rpartition(".")[2] for known in names}
    for code in codes(ROWS["Targets"][name]):
        assert any(known.endswith(f".{code}") for known in names)


@pytest.mark.parametrize("key", KEYS.split())
def test_a_key_is_what_its_row_says(key: str, tmp_path: Path) -> None:
    here = ROWS["Config keys"][key]
    owner, _, name = key.partition(".")
    if owner in SCHEMAS:
        assert here == ("same" if name in SCHEMAS[owner].__dataclass_fields__ else "refused")
    elif not name:
        assert here == "no effect"
        file = tmp_path / "old.yaml"
        file.write_text(f"{key}: SDXL-base-1.0\n{Path(TINY[1]).read_text('utf-8')}", "utf-8")
        assert load(["--config", str(file)]).notices[0].startswith(f"{key} has no effect: ")
    else:
        (target,) = [one for one in targets.TARGETS if one.name == owner]
        module, _, cls = target.path.partition(":")
        signature = inspect.signature(getattr(importlib.import_module(module), cls))
        read, idle = name in signature.parameters, name in mindone.IDLE_PARAMS.get(owner, {})
        assert not (read and idle)
        assert here == ("no effect" if idle else "same" if read else "refused")


def test_a_refused_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^data\.num_epochs: there is no such option"):
        load([*TINY, "data.num_epochs=3"])
    node = {"target": "sdxl_host.DiffusionEngine", "params": {"latents_mean": [0.0]}}
    with pytest.raises(ConfigError, match=r"^model\.params\.latents_mean: .* no such parameter"):
        targets.build(node, "model", "model")


def test_files_of_ours_are_those_that_a_checkpoint_has(device: str) -> None:
    from sdxl_host.checkpoints.layout import (
        CONFIG_FILE,
        EMA_FILE,
        FROZEN_FILE,
        NETWORK_FILE,
        OPTIMIZER_FILE,
    )

    text = " ".join(ROWS["Files"].values())
    named = {Path(code).name for code in codes(text) if code.endswith((".safetensors", ".yaml"))}
    assert named == {EMA_FILE, FROZEN_FILE, NETWORK_FILE, CONFIG_FILE, OPTIMIZER_FILE}


# ---- the page of our own flags


def test_the_page_of_flags_has_every_flag_once_and_no_other() -> None:
    rows = [row for rows in TRAINING.values() for row in rows if row[0].startswith("`--")]
    assert sorted(row[0].strip("`").removeprefix("--") for row in rows) == sorted(own_flags())
    for row in rows:
        assert len(row) == 2
        assert len(row[1].split()) >= 3, row


def test_the_page_of_flags_has_every_other_key_once() -> None:
    rows = [row[0].strip("`") for row in TRAINING["Keys that are no flags"]]
    assert sorted(rows) == sorted(key for key, setting in SETTINGS.items() if not setting.flag)


def test_the_page_of_flags_names_no_flag_or_key_that_is_not_here() -> None:
    text = (DOCS / "training.md").read_text("utf-8")
    for code in codes(text):
        for flag in re.findall(r"--(\w+)", code):
            assert flag in own_flags(), code
        for section, key in re.findall(r"\b(train|data|optim)\.(\w+)", code):
            assert key in SCHEMAS[section].__dataclass_fields__, code


def test_the_numbers_of_the_loss_scale_are_those_of_the_program(device: str) -> None:
    from sdxl_host.models import precision
    from sdxl_host.training import observers, step

    text = " ".join((DOCS / "training.md").read_text("utf-8").split())
    assert precision.LOSS_SCALE == 65536
    assert f"{precision.LOSS_SCALE:.0f} at first" in text
    assert f"after {step._GROWTH_INTERVAL} updates without" in text
    assert f"at most 2^{np.log2(precision.LARGEST_LOSS_SCALE):.0f}" in text
    assert f"the {observers._OVERFLOWS + 1}th in a row ends the run" in text


# ---- names are rewritten while a config is read


def written(tmp_path: Path, **sections: Any) -> list[str]:
    """Arguments that name the tiny config with other sections."""
    tree = yaml.safe_load(Path(TINY[1]).read_text("utf-8"))
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({**tree, **sections}, sort_keys=False), "utf-8")
    return ["--config", str(file), "--plugins", "none"]


def with_old_names(node: Any) -> Any:
    """A part of a config with every target under its old name, where it had one."""
    old = {f"sdxl_host.{ours}": name for name, ours in mindone.TARGETS.items()}
    if isinstance(node, dict):
        return {key: with_old_names(value) for key, value in node.items()}
    if isinstance(node, list):
        return [with_old_names(value) for value in node]
    return old.get(node, node) if isinstance(node, str) else node


def test_a_file_of_old_names_is_the_file_of_ours(tmp_path: Path) -> None:
    tree = yaml.safe_load(Path(TINY[1]).read_text("utf-8"))
    old = with_old_names(tree)
    assert old["model"] != tree["model"]
    assert old["data"] != tree["data"]
    config = load(written(tmp_path, **old))
    assert config.tree == load(TINY).tree
    assert config.origins == {**load(TINY).origins} | {
        place: "old.yaml" for place, origin in config.origins.items() if origin == "old.yaml"
    }


def test_an_old_name_may_be_put_together_or_overridden(tmp_path: Path) -> None:
    target = "data.dataset_config.params.transforms[0].target"
    for name in ("gm.data.mappers.Resize", "gm.data.${.word}.Resize"):
        words = [f"{target}={name}"]
        if "word" in name:
            words.append(f"{target.removesuffix('target')}word=mappers")
        tree = load([*TINY, *words]).tree
        assert tree.data.dataset_config.params.transforms[0].target == "sdxl_host.Resize"


def test_keys_without_effect_are_taken_out_and_named_once(tmp_path: Path) -> None:
    tree = yaml.safe_load(Path(TINY[1]).read_text("utf-8"))
    params = tree["model"]["params"]
    params |= {"use_ema": False, "input_key": "image"}
    params["denoiser_config"] = {
        "target": "gm.modules.diffusionmodules.denoiser.DiscreteDenoiser",
        "params": {"num_idx": 1000, "flip": True},
    }
    # An idle key may still be what another one refers to.
    params["sigma_sampler_config"] = {
        "target": "sdxl_host.DiscreteSampling",
        "params": {
            "num_idx": 1000,
            "discretization_config": {
                "target": "sdxl_host.LegacyDDPMDiscretization",
                "params": {"num_timesteps": "${...num_idx}"},
            },
        },
    }
    params["first_stage_config"] = {
        "target": "gm.models.autoencoder.AutoencoderKL",
        "params": {"monitor": "x", "ddconfig": {"resolution": 256, "ch": 32}},
    }
    config = load(written(tmp_path, **tree, version="SDXL-base-1.0"))
    named = [line.partition(" has no effect: ") for line in config.notices]
    assert all(reason for _, _, reason in named)
    assert [key for key, _, _ in named] == [
        "version",
        "model.params.use_ema",
        "model.params.input_key",
        "model.params.first_stage_config.params.monitor",
        "model.params.first_stage_config.params.ddconfig.resolution",
        "model.params.denoiser_config.params.num_idx",
        "model.params.denoiser_config.params.flip",
        "model.params.sigma_sampler_config.params.num_idx",
    ]
    left = config.tree.model.params
    assert "version" not in config.tree
    assert left.first_stage_config.params == {"ddconfig": {"ch": 32}}
    discretization = left.sigma_sampler_config.params.discretization_config
    assert left.sigma_sampler_config.params == {"discretization_config": discretization}
    assert discretization.params.num_timesteps == 1000


def test_an_old_name_that_nobody_stands_for_is_refused_with_a_suggestion() -> None:
    words = [*TINY, "data.dataset_config.params.transforms[0].target=gm.data.mappers.Resise"]
    with pytest.raises(ConfigError, match=r"^data\.dataset_config\..*\[0\]\.target: .*Resize\?"):
        load(words)


@pytest.mark.parametrize("name", mindone.OLD_FLAGS)
def test_an_old_flag_is_refused_with_what_to_do_instead(name: str) -> None:
    advice = mindone.OLD_FLAGS[name]
    for words in ([f"--{name}"], [f"--{name}=True"]):
        with pytest.raises(ConfigError, match=rf"^--{name}: was a flag .*{re.escape(advice)}$"):
            load(words)
    for other in re.findall(r"--(\w+)", advice):
        assert other in own_flags() | plugin_flags()


def test_a_plugin_may_have_a_flag_that_was_an_old_one(site: Any) -> None:
    site.add("parallel", "mode: int = 1")
    assert load([*TINY[:2], "--parallel_mode=3"]).plugins[0].options.mode == 3
