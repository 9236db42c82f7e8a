"""`target` names of a config: which class each means, and what its `params` may hold.

A config can't run arbitrary code: a target is a name in this table, never a path to walk.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.settings.values import coerce, first_infinite

__all__ = ["TARGETS", "Target", "build", "is_known", "look_up"]


@dataclass(frozen=True)
class Target:
    """One class that a config may name.

    name: the config writes `sdxl_host.NAME`. slot: what it can stand for ("network"). path:
    "module:Class". provided: constructor arguments that the host fills in.
    """

    name: str
    slot: str
    path: str
    provided: tuple[str, ...] = ()


_MODEL = "sdxl_host.config.model_section:"
_ENCODERS = "sdxl_host.models.text_encoders:"
_CONDITIONER = "sdxl_host.models.conditioner:"
_FIRST_STAGE = "sdxl_host.models.first_stage:"
_OPTIMIZER = "sdxl_host.training.optimizer:"
_SCHEDULES = "sdxl_host.training.lr_schedulers:"
_TRANSFORMS = "sdxl_host.data.transforms:"
_CROP = "AddOriginalImageSizeAsTupleAndCropToSquare"
_SCALE = ("scale_factor",)

TARGETS = (
    Target("DiffusionEngine", "model", _MODEL + "DiffusionEngine"),
    Target("UNetModel", "network", "sdxl_host.models.unet:UNetModel"),
    Target("GeneralConditioner", "conditioner", _CONDITIONER + "GeneralConditioner"),
    Target("FrozenCLIPEmbedder", "embedder", _ENCODERS + "FrozenCLIPEmbedder"),
    Target("FrozenOpenCLIPEmbedder2", "embedder", _ENCODERS + "FrozenOpenCLIPEmbedder2"),
    Target("ConcatTimestepEmbedderND", "embedder", _CONDITIONER + "ConcatTimestepEmbedderND"),
    Target("AutoencoderKL", "first_stage", _FIRST_STAGE + "AutoencoderKLInferenceWrapper", _SCALE),
    Target("IdentityFirstStage", "first_stage", _FIRST_STAGE + "IdentityFirstStage", _SCALE),
    Target("DiscreteDenoiser", "denoiser", _MODEL + "DiscreteDenoiser"),
    Target("Denoiser", "denoiser", _MODEL + "Denoiser"),
    Target("EpsScaling", "scaling", _MODEL + "EpsScaling"),
    Target("VScaling", "scaling", _MODEL + "VScaling"),
    Target("EpsWeighting", "weighting", _MODEL + "EpsWeighting"),
    Target("VWeighting", "weighting", _MODEL + "VWeighting"),
    Target("UnitWeighting", "weighting", _MODEL + "UnitWeighting"),
    Target("LegacyDDPMDiscretization", "discretization", _MODEL + "LegacyDDPMDiscretization"),
    Target("DiscreteSampling", "sigma_sampler", _MODEL + "DiscreteSampling"),
    Target("StandardDiffusionLoss", "loss", _MODEL + "StandardDiffusionLoss"),
    Target("AdamW", "optimizer", _OPTIMIZER + "AdamW"),
    Target("AdamWeightDecay", "optimizer", _OPTIMIZER + "AdamWeightDecay"),
    Target("LambdaWarmUpScheduler", "scheduler", _SCHEDULES + "LambdaWarmUpScheduler"),
    Target("LinearScheduler", "scheduler", _SCHEDULES + "LinearScheduler"),
    Target("CosineScheduler", "scheduler", _SCHEDULES + "CosineScheduler"),
    Target("MultiStepScheduler", "scheduler", _SCHEDULES + "MultiStepScheduler"),
    Target("LambdaWarmUpCosineScheduler", "scheduler", _SCHEDULES + "LambdaWarmUpCosineScheduler"),
    Target(
        "LambdaWarmUpCosineScheduler2", "scheduler", _SCHEDULES + "LambdaWarmUpCosineScheduler2"
    ),
    Target("LambdaLinearScheduler", "scheduler", _SCHEDULES + "LambdaLinearScheduler"),
    Target("Text2ImageDataset", "dataset", "sdxl_host.data.dataset:Text2ImageDataset"),
    Target("Resize", "transform", _TRANSFORMS + "Resize"),
    Target("Rescaler", "transform", _TRANSFORMS + "Rescaler"),
    Target(_CROP, "transform", _TRANSFORMS + _CROP),
    Target("RandomCrop", "transform", _TRANSFORMS + "RandomCrop"),
    Target("CenterCrop", "transform", _TRANSFORMS + "CenterCrop"),
    Target("RandomHorizontalFlip", "transform", _TRANSFORMS + "RandomHorizontalFlip"),
    Target("Transpose", "transform", _TRANSFORMS + "Transpose"),
)

_BY_NAME = {f"sdxl_host.{target.name}": target for target in TARGETS}


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
        possible = [key for key, known in _BY_NAME.items() if known.slot == slot]
        raise ConfigError(
            f"{where}.target: {name}: there is no such target{did_you_mean(name, possible)} "
            f"(known: {', '.join(possible)})"
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
    hints = typing.get_type_hints(cls.__init__)
    accepted = {
        key: parameter
        for key, parameter in inspect.signature(cls).parameters.items()
        if key not in provided
    }
    fitting: dict[str, Any] = {}
    for key, value in params.items():
        if key not in accepted:
            raise ConfigError(
                f"{where}.params.{key}: {target.name} has no such parameter"
                f"{did_you_mean(str(key), accepted)} "
                f"(parameters: {', '.join(accepted) or 'none'})"
            )
        fitting[key] = coerce(value, hints.get(key, Any), f"{where}.params.{key}")
        wild = first_infinite(value)
        if wild is not None:
            raise ConfigError(
                f"{where}.params.{key}: {wild} is not a finite number; give one that is"
            )
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in fitting:
            raise ConfigError(f"{where}.params.{key}: {target.name} needs it; add it")
    try:
        return cls(**fitting, **provided)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.params: {error}") from error
