"""`target` names of a config: which class each means, and what its `params` may hold.

A config can't run arbitrary code: a target is a name in this table, never a path to walk. Installed
packages may add names for datasets and transforms; `config.dataset_targets` registers those that a
config names.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_host.errors import ConfigError, HostError, PluginError, did_you_mean
from sdxl_host.settings.values import coerce, first_infinite

__all__ = ["TARGETS", "Target", "build", "is_known", "look_up", "register"]


@dataclass(frozen=True)
class Target:
    """One class that a config may name.

    name: the config writes `sdxl_host.NAME`; of another package's, all of NAME. slot: what it can
    stand for ("network"). path: "module:Class". provided: constructor arguments that the host fills
    in. package: the name and version of the package it is from, or "" for the host's own.
    """

    name: str
    slot: str
    path: str
    provided: tuple[str, ...] = ()
    package: str = ""


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

# Those of other packages, by slot and name.
_REGISTERED: dict[tuple[str, str], Target] = {}


def register(target: Target) -> None:
    """Makes a class of another package one that can stand in its slot."""
    _REGISTERED[target.slot, target.name] = target


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
    target = _BY_NAME.get(name) or _REGISTERED.get((slot, name))
    if target is None:
        possible = [key for key, known in _BY_NAME.items() if known.slot == slot]
        possible += [key for of, key in _REGISTERED if of == slot]
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
    cls = _class_of(target, where)
    parameters = {key: one for key, one in _parameters(cls).items() if key not in provided}
    fitting: dict[str, Any] = {}
    for key, value in params.items():
        if key not in parameters:
            raise ConfigError(
                f"{where}.params.{key}: {target.name} has no such parameter"
                f"{did_you_mean(str(key), parameters)} "
                f"(parameters: {', '.join(parameters) or 'none'})"
            )
        fitting[key] = coerce(value, parameters[key].annotation, f"{where}.params.{key}")
        wild = first_infinite(value)
        if wild is not None:
            raise ConfigError(
                f"{where}.params.{key}: {wild} is not a finite number; give one that is"
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in fitting:
            raise ConfigError(f"{where}.params.{key}: {target.name} needs it; add it")
    try:
        return cls(**fitting, **provided)
    except HostError:
        raise
    except Exception as error:
        if target.package and not isinstance(error, ValueError):
            raise PluginError(
                f"{where}: {target.name} of {target.package} failed: {type(error).__name__}: "
                f"{error}; mend the package, or name another {slot}"
            ) from error
        if isinstance(error, TypeError | ValueError):
            said_by = f" (says {target.name} of {target.package})" if target.package else ""
            raise ConfigError(f"{where}.params: {error}{said_by}") from error
        raise


def _class_of(target: Target, where: str) -> type:
    """The class that a target names. Raises PluginError for another package's fault."""
    module, _, name = target.path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        if not target.package:
            raise
        raise PluginError(
            f"{where}.target: {target.name} of {target.package} could not be imported: "
            f"{type(error).__name__}: {error}; install the package again, or name another "
            f"{target.slot}"
        ) from error
    if not isinstance(found, type):
        raise PluginError(
            f"{where}.target: {target.name} of {target.package} is no class; what stands for a "
            f"{target.slot} must be one, and the package must name it in its entry point"
        )
    return found


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What a class's constructor takes by name, with types as annotations; one that takes any
    (`**others`) takes those of the class it is derived from. A type that can't be found fits all.
    """
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if base is object or "__init__" not in vars(base):
            continue
        function = vars(base)["__init__"]
        try:
            hints = typing.get_type_hints(function)
        except Exception:  # a name that is imported for type checkers alone, or no type
            hints = {}
        _, *parameters = inspect.signature(function).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        for one in parameters:
            if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                found.setdefault(one.name, one.replace(annotation=hints.get(one.name, Any)))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found
