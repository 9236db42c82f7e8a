"""The metadata in the header of a weights file, for other programs and for this one.

Keys beginning with `modelspec.` are those of Stability's model metadata specification 1.0.0; ours
begin with `sdxl_host.`. Values are text, as safetensors has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sdxl_host.errors import DataError
from sdxl_host.version import __version__
from sdxl_host.weights.architecture import Architecture, Encoder

__all__ = [
    "ARCHITECTURE",
    "LOGIT_SCALE",
    "MARKERS",
    "NETWORK_KEYS",
    "OBJECTIVE",
    "PLUGINS",
    "PROMPTS",
    "RESOLUTION",
    "SCALE_FACTOR",
    "SCHEDULER",
    "SDXL_SCALE_FACTOR",
    "described",
    "markers",
    "objective",
    "read_architecture",
    "recorded_objective",
    "scale_factor",
    "scheduler_config",
]

ARCHITECTURE = "sdxl_host.architecture"
LOGIT_SCALE = "sdxl_host.logit_scale"
OBJECTIVE = "sdxl_host.objective"
PLUGINS = "sdxl_host.plugins"
PROMPTS = "sdxl_host.prompts"
RESOLUTION = "modelspec.resolution"
SCALE_FACTOR = "sdxl_host.scale_factor"
SCHEDULER = "sdxl_host.scheduler"
SDXL_SCALE_FACTOR = 0.13025
_PREDICTION = "modelspec.prediction_type"
_VERSION = "sdxl_host.version"

# Empty tensors by which ComfyUI knows a v-prediction model, and one trained to a terminal SNR of 0.
MARKERS = ("v_pred", "ztsnr")

# The keys that describe the U-Net and no other part.
NETWORK_KEYS = (OBJECTIVE, _PREDICTION, *MARKERS, PLUGINS, PROMPTS, SCHEDULER)

_PREDICTION_TYPES = {"eps": "epsilon", "v": "v"}

# Keys that do not hold for a file made from the one that has them.
_OUTDATED = ("format", "modelspec.hash_sha256", _PREDICTION, *MARKERS)


def recorded_objective(metadata: Mapping[str, str]) -> str | None:
    """The objective that the network was trained with; None where the metadata lack it."""
    if OBJECTIVE in metadata:
        return metadata[OBJECTIVE]
    if "v_pred" in metadata or metadata.get(_PREDICTION) in ("v", "v_prediction"):
        return "v"
    return "eps" if metadata.get(_PREDICTION) == "epsilon" else None


def objective(metadata: Mapping[str, str]) -> str:
    """The same; "eps" where the metadata lack it."""
    return recorded_objective(metadata) or "eps"


def scale_factor(metadata: Mapping[str, str]) -> float:
    """The factor that latents are multiplied by; SDXL's where the metadata lack it."""
    return float(metadata.get(SCALE_FACTOR, SDXL_SCALE_FACTOR))


def scheduler_config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The diffusers scheduler that samples the network, where its trainer recorded one."""
    return json.loads(metadata[SCHEDULER]) if SCHEDULER in metadata else None


def markers(metadata: Mapping[str, str]) -> list[str]:
    """The markers that a single file of such a model needs."""
    found = ["v_pred"] if objective(metadata) == "v" else []
    return [*found, "ztsnr"] if "ztsnr" in metadata else found


def described(
    metadata: Mapping[str, str], architecture: Architecture, title: str, date: str
) -> dict[str, str]:
    """The metadata of a file that is made from a source with `metadata`.

    title: used where the source has none. date: ISO 8601. Other keys of the source are kept.
    """
    kind = "base" if len(architecture.encoders) > 1 else "refiner"
    target = objective(metadata)
    found = {
        "modelspec.title": title,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        RESOLUTION: "1024x1024",
    }
    found |= {key: value for key, value in metadata.items() if key not in _OUTDATED}
    found |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-xl-v1-{kind}",
        "modelspec.date": date,
        _VERSION: __version__,
        OBJECTIVE: target,
        SCALE_FACTOR: str(scale_factor(metadata)),
        ARCHITECTURE: json.dumps(asdict(architecture)),
    }
    if target in _PREDICTION_TYPES:
        found[_PREDICTION] = _PREDICTION_TYPES[target]
    return found


def read_architecture(metadata: Mapping[str, str], source: str) -> Architecture | None:
    """The architecture in the metadata that this program wrote. Raises DataError if damaged."""
    if ARCHITECTURE not in metadata:
        return None
    try:
        stored: dict[str, Any] = json.loads(metadata[ARCHITECTURE])
        found = Architecture(**stored)
        return replace(found, encoders=tuple(Encoder(**each) for each in stored["encoders"]))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{source}: its metadata {ARCHITECTURE} is damaged ({error}); get the file again"
        ) from error
