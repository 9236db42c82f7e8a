"""All that the host knows of MindONE's SDXL trainer: its names, rewritten while a config is read.

Its targets become ours; its keys that can have no effect here are taken out, each named once; its
flags that have no place here are refused with what to do instead. Targets that a plugin stands for,
such as EDMScaling, are that plugin's to know: see `plugin_targets`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdxl_host.errors import ConfigError, did_you_mean

__all__ = [
    "IDLE_PARAMS",
    "OLD_FLAGS",
    "PLUGIN_TARGETS",
    "TARGETS",
    "drop_idle_params",
    "drop_idle_sections",
    "rename_targets",
    "weight_name",
]

# Targets that a plugin stands for: only for the message that it is missing.
PLUGIN_TARGETS = {
    "EDMScaling": "edm",
    "EDMWeighting": "edm",
    "EDMSampling": "edm",
    "EDMDiscretization": "edm",
}

_DIFFUSION = "gm.modules.diffusionmodules."
_EMBEDDERS = "gm.modules.embedders.modules."
_MAPPERS = "gm.data.mappers."
_RATES = "gm.lr_scheduler."
_CROP = "AddOriginalImageSizeAsTupleAndCropToSquare"

# Its targets, and ours without "sdxl_host.".
TARGETS = {
    "gm.models.diffusion.DiffusionEngine": "DiffusionEngine",
    _DIFFUSION + "openaimodel.UNetModel": "UNetModel",
    "gm.modules.GeneralConditioner": "GeneralConditioner",
    _EMBEDDERS + "FrozenCLIPEmbedder": "FrozenCLIPEmbedder",
    _EMBEDDERS + "FrozenOpenCLIPEmbedder2": "FrozenOpenCLIPEmbedder2",
    _EMBEDDERS + "ConcatTimestepEmbedderND": "ConcatTimestepEmbedderND",
    "gm.models.autoencoder.AutoencoderKLInferenceWrapper": "AutoencoderKL",
    "gm.models.autoencoder.AutoencoderKL": "AutoencoderKL",
    _DIFFUSION + "denoiser.DiscreteDenoiser": "DiscreteDenoiser",
    _DIFFUSION + "denoiser.Denoiser": "Denoiser",
    _DIFFUSION + "denoiser_scaling.EpsScaling": "EpsScaling",
    _DIFFUSION + "denoiser_scaling.VScaling": "VScaling",
    _DIFFUSION + "denoiser_weighting.EpsWeighting": "EpsWeighting",
    _DIFFUSION + "denoiser_weighting.VWeighting": "VWeighting",
    _DIFFUSION + "denoiser_weighting.UnitWeighting": "UnitWeighting",
    _DIFFUSION + "discretizer.LegacyDDPMDiscretization": "LegacyDDPMDiscretization",
    _DIFFUSION + "sigma_sampling.DiscreteSampling": "DiscreteSampling",
    _DIFFUSION + "loss.StandardDiffusionLoss": "StandardDiffusionLoss",
    "mindspore.nn.AdamWeightDecay": "AdamWeightDecay",
    _RATES + "LambdaWarmUpScheduler": "LambdaWarmUpScheduler",
    _RATES + "MultiStepLR": "MultiStepScheduler",
    _RATES + "LambdaWarmUpCosineScheduler": "LambdaWarmUpCosineScheduler",
    _RATES + "LambdaWarmUpCosineScheduler2": "LambdaWarmUpCosineScheduler2",
    _RATES + "LambdaLinearScheduler": "LambdaLinearScheduler",
    "gm.data.dataset.Text2ImageDataset": "Text2ImageDataset",
    _MAPPERS + "Resize": "Resize",
    _MAPPERS + "Rescaler": "Rescaler",
    _MAPPERS + _CROP: _CROP,
    _MAPPERS + "Transpose": "Transpose",
}

_NUM_IDX = "the discretization's num_timesteps is that number"
_FLIP = "timesteps always ascend with the noise here"
_APPEND_ZERO = "training never uses the added zero"
_VERBOSE = "metrics.jsonl holds every learning rate"

# Params that have no effect here, by our target, and why; a dotted one is a key within a param.
IDLE_PARAMS: dict[str, dict[str, str]] = {
    "DiffusionEngine": {
        "use_ema": "the EMA is train.use_ema",
        "ema_decay_rate": "the EMA is train.use_ema",
        "input_key": "datasets here give images one name",
        "log_keys": "nothing here reads it",
        "load_first_stage_model": "parts are built when they are first used",
        "load_conditioner": "parts are built when they are first used",
    },
    "AutoencoderKL": {
        "monitor": "the autoencoder is not trained",
        "lossconfig": "the autoencoder is not trained",
        "ddconfig.resolution": "the autoencoder takes images of any size",
        "ddconfig.decoder_attn_dtype": "the autoencoder computes in float32",
    },
    "DiscreteDenoiser": {
        "num_idx": _NUM_IDX,
        "do_append_zero": _APPEND_ZERO,
        "quantize_c_noise": "the noise condition stays a float; on drawn timesteps it is whole",
        "flip": _FLIP,
    },
    "DiscreteSampling": {"num_idx": _NUM_IDX, "do_append_zero": _APPEND_ZERO, "flip": _FLIP},
    "StandardDiffusionLoss": {"keep_loss_fp32": "the loss is always computed in float32"},
    "MultiStepScheduler": {"verbose": _VERBOSE},
    "LambdaWarmUpCosineScheduler": {"verbosity_interval": _VERBOSE},
    "LambdaWarmUpCosineScheduler2": {"verbosity_interval": _VERBOSE},
    "LambdaLinearScheduler": {"verbosity_interval": _VERBOSE},
}

# Keys of the whole file that have no effect here, and why.
IDLE_SECTIONS = {"version": "it named the old trainer's checkpoint files"}

# Its flags that have no place here, and what to do instead.
_CLOUD = "files are not copied to or from a cloud here; copy them yourself and give their paths"
OLD_FLAGS: dict[str, str] = {
    "version": "the config says what model it is; leave it out",
    "sd_xl_base_ratios": "images are drawn at the size of the data; leave it out",
    "save_ckpt_only_rank_zero": "no other rank writes here; leave it out",
    "dataset_load_tokenizer": "captions become tokens with their embeddings here; leave it out",
    "max_embeddings_multiples": "it is the plugin's here; use --lpw_max_embeddings_multiples",
    "infer_during_train": "images are drawn every so many steps; use --sample_interval",
    "infer_interval": "images are drawn every so many steps; use --sample_interval",
    "ms_enable_graph_kernel": "it was for GPUs, which this program does not run on; leave it out",
    "ms_enable_allreduce_fusion": "ranks exchange each gradient by itself; leave it out",
    "overflow_still_update": "gradients that are not finite are never applied; leave it out",
    "dynamic_shape": "all images of a run have one size here; leave it out",
    "parallel_mode": "ranks share the data of an update; use --is_parallel True",
    "enable_modelarts": _CLOUD,
    "ckpt_url": _CLOUD,
    "train_url": _CLOUD,
    "multi_data_url": _CLOUD,
    "pretrain_url": _CLOUD,
    "ckpt_dir": _CLOUD,
}


def drop_idle_sections(tree: DictConfig) -> list[str]:
    """Takes the keys of the whole file that have no effect out of it; a line for each."""
    dropped = [str(key) for key in tree if key in IDLE_SECTIONS]
    for key in dropped:
        del tree[key]
    return [f"{key} has no effect: {IDLE_SECTIONS[key]}" for key in dropped]


def rename_targets(tree: DictConfig) -> None:
    """Gives every target in the tree our name for it."""
    for section, plain in _sections(tree):
        named = [
            (node, TARGETS[str(node["target"])])
            for _, node in _nodes(plain, section)
            if str(node["target"]) in TARGETS
        ]
        for node, ours in named:
            node["target"] = f"sdxl_host.{ours}"
        if named:  # to put a section back takes longer than all the rest of loading a config
            tree[section] = plain


def drop_idle_params(tree: DictConfig) -> list[str]:
    """Takes params that have no effect out of the tree, whose targets are ours; a line for each.

    Raises ConfigError for a target of MindONE's that nobody stands for.
    """
    lines: list[str] = []
    for section, plain in _sections(tree):
        before = len(lines)
        for place, node in _nodes(plain, section):
            name = str(node["target"])
            if name.startswith("gm."):
                raise ConfigError(
                    f"{place}.target: {name}: there is no such target"
                    f"{did_you_mean(name, TARGETS)}; docs/from-mindone.md lists those of MindONE "
                    "that are served"
                )
            idle = IDLE_PARAMS.get(name.removeprefix("sdxl_host."), {})
            if isinstance(node.get("params"), dict):
                for key in _take_out(node["params"], idle):
                    lines.append(f"{place}.params.{key} has no effect: {idle[key]}")
        if len(lines) > before:
            tree[section] = plain
    return lines


def weight_name(name: str) -> str:
    """The name of a tensor in one of its checkpoints without what its classes put into it: a word
    `_backbone`, and, in a file of the U-Net alone, no `model.` before it."""
    words = [word for word in name.split(".") if word != "_backbone"]
    return ".".join(["model", *words] if words[0] == "diffusion_model" else words)


def _sections(tree: DictConfig) -> list[tuple[str, Any]]:
    """The sections that may hold targets, as plain values to change and put back."""
    plain: Any = OmegaConf.to_container(tree, resolve=False)
    return [(name, plain[name]) for name in ("model", "data", "optim") if name in plain]


def _nodes(value: Any, place: str) -> list[tuple[str, dict[Any, Any]]]:
    """(dotted place, node) for every mapping with a `target` in a value."""
    found = []
    if isinstance(value, dict):
        found += [(place, value)] if "target" in value else []
        for key, inner in value.items():
            found += _nodes(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += _nodes(inner, f"{place}[{index}]")
    return found


def _take_out(params: dict[Any, Any], idle: Collection[str], at: str = "") -> list[str]:
    """Removes the idle keys, at any depth, and gives them, dotted."""
    taken = []
    for key in list(params):
        if f"{at}{key}" in idle:
            del params[key]
            taken.append(f"{at}{key}")
        elif isinstance(params[key], dict):
            taken += _take_out(params[key], idle, f"{at}{key}.")
    return taken
