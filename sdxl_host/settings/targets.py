"""`target` names of a config: which class each means, and what its `params` may hold.

A config can't run arbitrary code: a target is a name in this table, never a path to walk. The old
trainer's `gm.*` names stand beside ours, so existing YAML files work.
"""

from __future__ import annotations

import importlib
import inspect
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.settings.options import fits, type_name

__all__ = ["Target", "build", "idle_params", "is_known", "look_up"]


@dataclass(frozen=True)
class Target:
    """One class that a config may name.

    slot: what it can stand for ("network"). path: "module:Class". old: its names in old configs.
    provided: constructor arguments that the host fills in. idle: params of old configs that have
    no effect here ("ddconfig.resolution": a key within one), with the reason; they are accepted
    and named at the start of a run.
    """

    name: str
    slot: str
    path: str
    old: tuple[str, ...] = ()
    provided: tuple[str, ...] = ()
    idle: Mapping[str, str] = field(default_factory=dict)


_NUM_IDX = "the discretization's num_timesteps says it"
_FLIP = "timesteps always ascend with the noise here"
_APPEND_ZERO = "training never uses the added zero"
_RATES_ARE_TOLD = "metrics.jsonl holds every learning rate"
_DIFFUSION = "gm.modules.diffusionmodules."
_EMBEDDERS = "gm.modules.embedders.modules."
_SCHEDULES = "sdxl_host.training.lr_schedulers:"

_TARGETS = (
    Target(
        "DiffusionEngine",
        "model",
        "sdxl_host.config.model_section:DiffusionEngine",
        ("gm.models.diffusion.DiffusionEngine",),
        idle={
            "use_ema": "moving averages are train.use_ema",
            "ema_decay_rate": "moving averages are train.use_ema",
            "input_key": "datasets here give images one name",
            "log_keys": "nothing here reads it",
            "load_first_stage_model": "parts are built when they are first used",
            "load_conditioner": "parts are built when they are first used",
        },
    ),
    Target(
        "UNetModel",
        "network",
        "sdxl_host.models.unet:UNetModel",
        (_DIFFUSION + "openaimodel.UNetModel",),
    ),
    Target(
        "GeneralConditioner",
        "conditioner",
        "sdxl_host.models.conditioner:GeneralConditioner",
        ("gm.modules.GeneralConditioner",),
    ),
    Target(
        "FrozenCLIPEmbedder",
        "embedder",
        "sdxl_host.models.text_encoders:FrozenCLIPEmbedder",
        (_EMBEDDERS + "FrozenCLIPEmbedder",),
    ),
    Target(
        "FrozenOpenCLIPEmbedder2",
        "embedder",
        "sdxl_host.models.text_encoders:FrozenOpenCLIPEmbedder2",
        (_EMBEDDERS + "FrozenOpenCLIPEmbedder2",),
    ),
    Target(
        "ConcatTimestepEmbedderND",
        "embedder",
        "sdxl_host.models.conditioner:ConcatTimestepEmbedderND",
        (_EMBEDDERS + "ConcatTimestepEmbedderND",),
    ),
    Target(
        "AutoencoderKL",
        "first_stage",
        "sdxl_host.models.first_stage:AutoencoderKLInferenceWrapper",
        (
            "gm.models.autoencoder.AutoencoderKLInferenceWrapper",
            "gm.models.autoencoder.AutoencoderKL",
        ),
        idle={
            "monitor": "the autoencoder is not trained",
            "lossconfig": "the autoencoder is not trained",
            "ddconfig.resolution": "the autoencoder takes images of any size",
            "ddconfig.decoder_attn_dtype": "the autoencoder computes in float32",
        },
    ),
    Target("IdentityFirstStage", "first_stage", "sdxl_host.models.first_stage:IdentityFirstStage"),
    Target(
        "DiscreteDenoiser",
        "denoiser",
        "sdxl_host.config.model_section:DiscreteDenoiser",
        (_DIFFUSION + "denoiser.DiscreteDenoiser",),
        idle={
            "num_idx": _NUM_IDX,
            "do_append_zero": _APPEND_ZERO,
            "quantize_c_noise": "the noise condition stays a float; on drawn timesteps it is whole",
            "flip": _FLIP,
        },
    ),
    Target(
        "Denoiser",
        "denoiser",
        "sdxl_host.config.model_section:Denoiser",
        (_DIFFUSION + "denoiser.Denoiser",),
    ),
    Target(
        "EpsScaling",
        "scaling",
        "sdxl_host.config.model_section:EpsScaling",
        (_DIFFUSION + "denoiser_scaling.EpsScaling",),
    ),
    Target(
        "VScaling",
        "scaling",
        "sdxl_host.config.model_section:VScaling",
        (_DIFFUSION + "denoiser_scaling.VScaling",),
    ),
    Target(
        "EpsWeighting",
        "weighting",
        "sdxl_host.config.model_section:EpsWeighting",
        (_DIFFUSION + "denoiser_weighting.EpsWeighting",),
    ),
    Target(
        "VWeighting",
        "weighting",
        "sdxl_host.config.model_section:VWeighting",
        (_DIFFUSION + "denoiser_weighting.VWeighting",),
    ),
    Target(
        "UnitWeighting",
        "weighting",
        "sdxl_host.config.model_section:UnitWeighting",
        (_DIFFUSION + "denoiser_weighting.UnitWeighting",),
    ),
    Target(
        "LegacyDDPMDiscretization",
        "discretization",
        "sdxl_host.config.model_section:LegacyDDPMDiscretization",
        (_DIFFUSION + "discretizer.LegacyDDPMDiscretization",),
    ),
    Target(
        "DiscreteSampling",
        "sigma_sampler",
        "sdxl_host.config.model_section:DiscreteSampling",
        (_DIFFUSION + "sigma_sampling.DiscreteSampling",),
        idle={"num_idx": _NUM_IDX, "do_append_zero": _APPEND_ZERO, "flip": _FLIP},
    ),
    Target(
        "StandardDiffusionLoss",
        "loss",
        "sdxl_host.config.model_section:StandardDiffusionLoss",
        (_DIFFUSION + "loss.StandardDiffusionLoss",),
        idle={"keep_loss_fp32": "the loss is always computed in float32"},
    ),
    Target("AdamW", "optimizer", "sdxl_host.training.optimizer:AdamW"),
    Target(
        "AdamWeightDecay",
        "optimizer",
        "sdxl_host.training.optimizer:AdamWeightDecay",
        ("mindspore.nn.AdamWeightDecay",),
    ),
    Target(
        "LambdaWarmUpScheduler",
        "scheduler",
        _SCHEDULES + "LambdaWarmUpScheduler",
        ("gm.lr_scheduler.LambdaWarmUpScheduler",),
    ),
    Target("LinearScheduler", "scheduler", _SCHEDULES + "LinearScheduler"),
    Target("CosineScheduler", "scheduler", _SCHEDULES + "CosineScheduler"),
    Target(
        "MultiStepScheduler",
        "scheduler",
        _SCHEDULES + "MultiStepScheduler",
        ("gm.lr_scheduler.MultiStepLR",),
        idle={"verbose": _RATES_ARE_TOLD},
    ),
    Target(
        "LambdaWarmUpCosineScheduler",
        "scheduler",
        _SCHEDULES + "LambdaWarmUpCosineScheduler",
        ("gm.lr_scheduler.LambdaWarmUpCosineScheduler",),
        idle={"verbosity_interval": _RATES_ARE_TOLD},
    ),
    Target(
        "LambdaWarmUpCosineScheduler2",
        "scheduler",
        _SCHEDULES + "LambdaWarmUpCosineScheduler2",
        ("gm.lr_scheduler.LambdaWarmUpCosineScheduler2",),
        idle={"verbosity_interval": _RATES_ARE_TOLD},
    ),
    Target(
        "LambdaLinearScheduler",
        "scheduler",
        _SCHEDULES + "LambdaLinearScheduler",
        ("gm.lr_scheduler.LambdaLinearScheduler",),
        idle={"verbosity_interval": _RATES_ARE_TOLD},
    ),
    Target(
        "Text2ImageDataset",
        "dataset",
        "sdxl_host.data.dataset:Text2ImageDataset",
        ("gm.data.dataset.Text2ImageDataset",),
    ),
    Target("Resize", "transform", "sdxl_host.data.transforms:Resize", ("gm.data.mappers.Resize",)),
    Target(
        "Rescaler", "transform", "sdxl_host.data.transforms:Rescaler", ("gm.data.mappers.Rescaler",)
    ),
    Target(
        "AddOriginalImageSizeAsTupleAndCropToSquare",
        "transform",
        "sdxl_host.data.transforms:AddOriginalImageSizeAsTupleAndCropToSquare",
        ("gm.data.mappers.AddOriginalImageSizeAsTupleAndCropToSquare",),
    ),
    Target(
        "Transpose",
        "transform",
        "sdxl_host.data.transforms:Transpose",
        ("gm.data.mappers.Transpose",),
    ),
)

_BY_NAME = {
    name: target for target in _TARGETS for name in (f"sdxl_host.{target.name}", *target.old)
}


def is_known(name: str) -> bool:
    """Whether the host itself has a target of this name."""
    return name in _BY_NAME


def look_up(node: Any, slot: str, where: str) -> tuple[Target, dict[str, Any]]:
    """The target and params that a config node names, for what stands in `slot`.

    where: the node's place in the config, which begins every message. Raises ConfigError for an
    unknown target or one that can't stand here.
    """
    if not isinstance(node, Mapping) or "target" not in node:
        raise ConfigError(f"{where}: needs a `target` and may have `params`, not {node!r}")
    extra = [key for key in node if key not in ("target", "params")]
    if extra:
        raise ConfigError(
            f"{where}.{extra[0]}: only `target` and `params` stand here"
            f"{did_you_mean(str(extra[0]), ('target', 'params'))}"
        )
    name = str(node["target"])
    target = _BY_NAME.get(name)
    if target is None:
        fits = [key for key, known in _BY_NAME.items() if known.slot == slot]
        raise ConfigError(
            f"{where}.target: {name}: there is no such target{did_you_mean(name, fits)} "
            f"(known: {', '.join(fits)})"
        )
    if target.slot != slot:
        raise ConfigError(f"{where}.target: {name} is a {target.slot}; a {slot} must stand here")
    params = node.get("params")
    if params is not None and not isinstance(params, Mapping):
        raise ConfigError(
            f"{where}.params: must be a mapping, not {params!r}; write `name: value` lines below it"
        )
    return target, dict(params or {})


def build(node: Any, slot: str, where: str, **provided: Any) -> Any:
    """The object that a config node describes; `provided` are arguments the host fills in.

    Params are checked against the class's own signature: unknown, missing or of a wrong type, each
    is a ConfigError that names its place. So is a value the class itself refuses.
    """
    target, params = look_up(node, slot, where)
    module, _, name = target.path.partition(":")
    cls = getattr(importlib.import_module(module), name)
    kept = _without_idle(params, target.idle)
    hints = typing.get_type_hints(cls.__init__)
    accepted = {
        key: parameter
        for key, parameter in inspect.signature(cls).parameters.items()
        if key not in provided
    }
    for key, value in kept.items():
        if key not in accepted:
            raise ConfigError(
                f"{where}.params.{key}: {target.name} has no such parameter"
                f"{did_you_mean(str(key), accepted)} "
                f"(parameters: {', '.join([*accepted, *target.idle]) or 'none'})"
            )
        hint = hints.get(key, Any)
        if not fits(value, hint):
            raise ConfigError(
                f"{where}.params.{key}: {value!r} does not fit its type, {type_name(hint)}"
            )
        wild = _first_infinite(value)
        if wild is not None:
            raise ConfigError(
                f"{where}.params.{key}: {wild} is not a finite number; give one that is"
            )
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in kept:
            raise ConfigError(f"{where}.params.{key}: {target.name} needs it; add it")
    try:
        return cls(**kept, **provided)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.params: {error}") from error


def idle_params(node: Any, where: str = "model") -> list[str]:
    """A line for each param below `node` that is accepted from old configs but has no effect."""
    lines = []
    if isinstance(node, Mapping):
        target = _BY_NAME.get(str(node.get("target")))
        params = node.get("params")
        if target and isinstance(params, Mapping):
            for key in _idle_keys(params, target.idle):
                lines.append(f"{where}.params.{key} has no effect: {target.idle[key]}")
        for key, value in node.items():
            lines += idle_params(value, f"{where}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            lines += idle_params(value, f"{where}[{index}]")
    return lines


def _idle_keys(params: Mapping[str, Any], idle: Collection[str], at: str = "") -> Iterator[str]:
    """The idle keys that are there, at any depth, dotted."""
    for key, value in params.items():
        if f"{at}{key}" in idle:
            yield f"{at}{key}"
        elif isinstance(value, Mapping):
            yield from _idle_keys(value, idle, f"{at}{key}.")


def _without_idle(params: Mapping[str, Any], idle: Collection[str], at: str = "") -> dict[str, Any]:
    """A copy without the idle keys."""
    return {
        key: _without_idle(value, idle, f"{at}{key}.") if isinstance(value, Mapping) else value
        for key, value in params.items()
        if f"{at}{key}" not in idle
    }


def _first_infinite(value: Any) -> float | None:
    """The first number in a value, or in a list of them, that is not finite."""
    if isinstance(value, list | tuple):
        return next((n for n in map(_first_infinite, value) if n is not None), None)
    return value if isinstance(value, float) and not math.isfinite(value) else None
