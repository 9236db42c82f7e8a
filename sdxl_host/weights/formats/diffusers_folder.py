"""A diffusers folder, or one component of it, as weights under the single file's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_host.errors import DataError
from sdxl_host.files.tensors import DTYPES, Tensors, open_safetensors
from sdxl_host.weights.architecture import Architecture
from sdxl_host.weights.compare import compare_shapes
from sdxl_host.weights.formats.diffusers_configs import from_diffusers
from sdxl_host.weights.formats.diffusers_names import (
    DiffusersTensor,
    diffusers_tensors,
    join,
    match,
    split_shapes,
)
from sdxl_host.weights.metadata import LOGIT_SCALE, OBJECTIVE, SCALE_FACTOR, SCHEDULER
from sdxl_host.weights.shapes import expected_shapes
from sdxl_host.weights.source import Source

__all__ = ["open_diffusers"]

_CONFIG = "config.json"
_INDEX = "model_index.json"
_SCHEDULER = Path("scheduler") / "scheduler_config.json"

# What a component's config.json calls it, where it lies alone.
_COMPONENTS = {
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
_OBJECTIVES = {"epsilon": "eps", "v_prediction": "v"}
_VARIANT = "fp16"
_PICKLED = (".bin", ".fp16.bin")


def open_diffusers(folder: Path) -> Source:
    """The weights in a folder that diffusers wrote: a pipeline's, or that of one of its parts.

    Only headers are read now. The tensors are compared with those that the config.json files
    describe; an error names a missing, unexpected or misshapen one as the folder does. Raises
    DataError.
    """
    folders = _component_folders(folder)
    configs = {name: _read_json(where / _CONFIG) for name, where in folders.items()}
    notes: list[str] = []
    files = {name: _open_component(where, name, notes) for name, where in folders.items()}
    architecture = from_diffusers(configs)
    found = {
        DiffusersTensor(name, tensor): shape
        for name, tensors in files.items()
        for tensor, shape in tensors.shapes.items()
    }
    names = _matched(folder, found, architecture, notes)
    shapes = expected_shapes(architecture)
    dtypes: dict[str, str] = {}
    for name, parts in names.items():
        precisions = {files[part.component].dtypes[part.name] for part in parts}
        if len(precisions) > 1:
            raise DataError(
                f"{folder}: {', '.join(map(str, parts))} make one tensor, but are stored as "
                f"{', '.join(sorted(precisions))}; save the folder in one precision"
            )
        dtypes[name] = precisions.pop()
    scale = _logit_scale(files, architecture)

    def read(name: str) -> np.ndarray:
        if name in scale:
            return scale[name][1]
        arrays = [files[part.component].read(part.name) for part in names[name]]
        return join(name, arrays)

    return Source(
        shapes={name: shapes[name] for name in names} | dict.fromkeys(scale, ()),
        dtypes=dtypes | {name: dtype for name, (dtype, _) in scale.items()},
        read=read,
        metadata=_metadata(folder, files, configs),
        description=f"{folder} (diffusers folder)",
        architecture=architecture,
        notes=tuple(notes),
    )


def _component_folders(folder: Path) -> dict[str, Path]:
    """The folder of each component: those that model_index.json names, or the only one."""
    if not (folder / _INDEX).is_file():
        config = _read_json(folder / _CONFIG)
        kinds = [config.get("_class_name"), *(config.get("architectures") or [])]
        known = [_COMPONENTS[kind] for kind in kinds if kind in _COMPONENTS]
        if not known:
            raise DataError(
                f"{folder / _CONFIG}: describes {kinds[-1]}, which is no part of SDXL; give a "
                f"diffusers folder of SDXL or of its {', '.join(_COMPONENTS)}"
            )
        if known[0] == "text_encoder_2":
            raise DataError(
                f"{folder}: is text_encoder_2 alone, which is the base's second encoder or the "
                "refiner's first; give the whole folder"
            )
        return {known[0]: folder}
    index = _read_json(folder / _INDEX)
    found = {}
    for name in _COMPONENTS.values():
        entry = index.get(name)
        if entry and entry[-1]:
            if not (folder / name / _CONFIG).is_file():
                raise DataError(
                    f"{folder / name / _CONFIG}: is missing, and {_INDEX} names {name}; get the "
                    "folder again"
                )
            found[name] = folder / name
    if not found:
        raise DataError(
            f"{folder / _INDEX}: names none of {', '.join(_COMPONENTS.values())}; give a folder "
            "of SDXL"
        )
    return found


def _open_component(folder: Path, component: str, notes: list[str]) -> Tensors:
    """A component's tensors: of one file or of shards; of its fp16 variant where the plain one is
    absent."""
    stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
    plain = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    variant = (
        f"{stem}.{_VARIANT}.safetensors",
        f"{stem}.safetensors.index.{_VARIANT}.json",
        f"{stem}.{_VARIANT}.safetensors.index.json",
    )
    present = [name for name in (*plain, *variant) if (folder / name).is_file()]
    if not present:
        pickled = [name for end in _PICKLED if (folder / (name := stem + end)).is_file()]
        if pickled:
            raise DataError(
                f"{folder / pickled[0]}: may hold code that runs when it is read, so it never is; "
                "save the folder with safe_serialization=True where it came from"
            )
        raise DataError(f"{folder}: has no {plain[0]}; get the folder again")
    chosen = present[0]
    if chosen in variant:
        notes.append(f"{component}: {chosen} is read, as {plain[0]} is not there")
    file = folder / chosen
    return open_safetensors(file) if file.suffix == ".safetensors" else _open_shards(file)


def _open_shards(index: Path) -> Tensors:
    """The tensors of all shards that an index names."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise DataError(f"{index}: has no weight_map; get the folder again")
    shards: dict[str, Tensors] = {}
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise DataError(f"{index.parent / name}: is missing; get the folder again")
        shards[name] = open_safetensors(index.parent / name)
    homes = {tensor: shard for shard, tensors in shards.items() for tensor in tensors.shapes}
    for tensor in [*weight_map, *homes]:
        if weight_map.get(tensor) != homes.get(tensor):
            raise DataError(
                f"{index}: has {tensor} in {weight_map.get(tensor, 'no file')}, but it is in "
                f"{homes.get(tensor, 'none of them')}; get the folder again"
            )
    return Tensors(
        shapes={name: shards[shard].shapes[name] for name, shard in homes.items()},
        dtypes={name: shards[shard].dtypes[name] for name, shard in homes.items()},
        read=lambda name: shards[homes[name]].read(name),
        metadata=next(iter(shards.values())).metadata,
    )


def _matched(
    folder: Path,
    found: Mapping[DiffusersTensor, tuple[int, ...]],
    architecture: Architecture,
    notes: list[str],
) -> dict[str, tuple[DiffusersTensor, ...]]:
    """The folder's tensors for each single-file tensor. Raises DataError unless all fit."""
    matched = match(found, architecture)
    if matched.constants:
        notes.append(f"{', '.join(map(str, matched.constants))} left out: positions, not weights")
    wanted = {**diffusers_tensors(architecture), **matched.tensors}
    expected = {
        str(tensor): shape
        for name, shape in expected_shapes(architecture).items()
        for tensor, shape in zip(wanted[name], split_shapes(name, shape), strict=True)
    }
    held = {str(p): shape for p, shape in found.items() if p not in matched.constants}
    for parts in matched.tensors.values():
        for tensor in parts:
            # Old files hold the autoencoder's attention as 1x1 kernels.
            if held[str(tensor)] == (*expected[str(tensor)], 1, 1):
                held[str(tensor)] = expected[str(tensor)]
    compare_shapes(
        expected, held, str(folder), "get the folder again, or the config.json that belongs to it"
    )
    return matched.tensors


def _logit_scale(
    files: Mapping[str, Tensors], architecture: Architecture
) -> dict[str, tuple[str, np.ndarray]]:
    """`logit_scale`, for which diffusers has no tensor, from the header where `export` put it."""
    text = files.get("text_encoder_2")
    if text is None or LOGIT_SCALE not in text.metadata:
        return {}
    stored = json.loads(text.metadata[LOGIT_SCALE])
    name = next(name for name in diffusers_tensors(architecture) if name.endswith(".logit_scale"))
    return {name: (stored["dtype"], np.array(stored["value"], DTYPES[stored["dtype"]]))}


def _metadata(
    folder: Path, files: Mapping[str, Tensors], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """The metadata of the U-Net's file, with latents' scale and objective from the configs."""
    metadata = dict(files["unet"].metadata) if "unet" in files else {}
    if "scaling_factor" in configs.get("vae", {}):
        metadata[SCALE_FACTOR] = str(configs["vae"]["scaling_factor"])
    if not (folder / _SCHEDULER).is_file():
        return metadata
    scheduler = _read_json(folder / _SCHEDULER)
    kind = scheduler.get("prediction_type", "epsilon")
    if str(scheduler.get("_class_name")).startswith("EDM"):
        metadata[OBJECTIVE] = "edm"
        metadata[SCHEDULER] = json.dumps(scheduler)
    elif kind in _OBJECTIVES:
        metadata[OBJECTIVE] = _OBJECTIVES[kind]
    else:
        raise DataError(
            f"{folder / _SCHEDULER}: prediction_type {kind!r} is not known; it must be "
            f"{' or '.join(_OBJECTIVES)}"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        metadata["ztsnr"] = "true"
    return metadata


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read as JSON ({error}); get the folder again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is no JSON object; get the folder again")
    return content
