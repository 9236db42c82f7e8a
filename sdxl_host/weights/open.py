"""Weights in whatever format they come, under the names of the original single file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np

from sdxl_host.errors import DataError
from sdxl_host.weights.architecture import (
    AUTOENCODER_PREFIX,
    INITIAL_LOGIT_SCALE,
    NETWORK_PREFIX,
    Architecture,
    merge,
)
from sdxl_host.weights.formats.checkpoint import open_checkpoint_weights
from sdxl_host.weights.formats.diffusers_folder import open_diffusers
from sdxl_host.weights.formats.mindspore_file import open_mindspore
from sdxl_host.weights.formats.single_file import open_single_file
from sdxl_host.weights.metadata import NETWORK_KEYS, SCALE_FACTOR, recorded_objective
from sdxl_host.weights.source import Source

__all__ = ["open_all", "open_weight_setting", "open_weights"]

# The first bytes of files that torch writes: a zip archive, or a pickle of protocol 2 to 5.
_ZIP = b"PK\x03\x04"
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_TORCH = (".bin", ".pt", ".pth")

_READABLE = (
    "a .safetensors file, a diffusers folder, a .ckpt of MindSpore or MindONE, or a checkpoint "
    "folder of this program"
)


def open_weights(path: Path) -> Source:
    """The weights in a file or folder; only its headers are read now.

    Reads a single file in safetensors, a diffusers folder or one component of it, a MindSpore
    checkpoint, and a checkpoint folder of this program. Raises DataError for anything else, and
    for whatever is damaged. A torch file is refused: it may hold code.
    """
    return _with_constants(_open(path))


def open_weight_setting(weight: str) -> Source | None:
    """The weights of the setting `--weight`, or None where it is empty. Raises DataError.

    weight: a path that `open_weights` reads, or several with commas between them as in `open_all`.
    """
    if not weight:
        return None
    paths = [Path(path.strip()).expanduser() for path in weight.split(",") if path.strip()]
    if not paths:
        raise DataError(f"--weight {weight!r}: names no file; give one, or leave it out")
    return open_all(paths)


def open_all(paths: Sequence[Path], use_ema: bool = True) -> Source:
    """Several files or folders as one; a later one's tensors replace those of an earlier one.

    The metadata of the U-Net (its objective and training) are those of the last file with a U-Net.
    use_ema: as in `open_checkpoint_weights`. Raises DataError.
    """
    opened = [_open(path, use_ema) for path in paths]
    metadata, notes = _merge_metadata(opened)
    merged = reduce(_merge, opened)
    return _with_constants(replace(merged, metadata=metadata, notes=(*merged.notes, *notes)))


def _open(path: Path, use_ema: bool = True) -> Source:
    if path.is_dir():
        if (path / "state.json").is_file():
            return open_checkpoint_weights(path, use_ema)
        if (path / "model_index.json").is_file() or (path / "config.json").is_file():
            return open_diffusers(path)
        raise DataError(
            f"{path}: has no model_index.json, config.json or state.json; give {_READABLE}"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder; give {_READABLE}")
    with open(path, "rb") as file:
        start = file.read(9)
    is_safetensors = path.suffix == ".safetensors"
    is_torch = start.startswith(_ZIP) or start.startswith(_PICKLES) or path.suffix in _TORCH
    if is_torch and not is_safetensors:
        raise DataError(
            f"{path}: is a file of torch, which may hold code that runs when it is read, so it "
            "never is; convert it to .safetensors where it came from"
        )
    if is_safetensors:
        return open_single_file(path)
    if path.suffix == ".ckpt":
        return open_mindspore(path)
    raise DataError(f"{path}: is of no kind that is read; give {_READABLE}")


def _merge(first: Source, later: Source) -> Source:
    """The tensors of both, without metadata; the later one's replace those of the same name."""
    notes = [*first.notes, *later.notes]
    replaced = sum(name in first.shapes for name in later.shapes)
    if replaced:
        notes.append(f"{replaced:,} tensors of {later.description} replace earlier ones")
    return Source(
        shapes={**first.shapes, **later.shapes},
        dtypes={**first.dtypes, **later.dtypes},
        read=lambda name: (later if name in later.shapes else first).read(name),
        description=f"{first.description}, {later.description}",
        architecture=_merge_architectures(first, later),
        notes=tuple(notes),
    )


def _merge_architectures(first: Source, later: Source) -> Architecture | None:
    """The parts that either states. Raises DataError where both state a part and it differs."""
    if first.architecture is None or later.architecture is None:
        return later.architecture or first.architecture
    names = (first.description, later.description)
    return merge(first.architecture, later.architecture, names)


def _merge_metadata(sources: Sequence[Source]) -> tuple[dict[str, str], list[str]]:
    """The metadata that hold for the merged tensors, and notes for the user.

    The latents' scale is that of the last source with an autoencoder. `NETWORK_KEYS` describe the
    U-Net and are taken from one source as a whole: the last one with a U-Net that states an
    objective. Of all other keys the last value is taken.
    """
    latest = {key: value for source in sources for key, value in source.metadata.items()}
    others = {key: value for key, value in latest.items() if key not in NETWORK_KEYS}
    for source in sources:
        if SCALE_FACTOR in source.metadata and _holds(source, AUTOENCODER_PREFIX):
            others[SCALE_FACTOR] = source.metadata[SCALE_FACTOR]
    network: dict[str, str] = {}
    stating = holding = None
    for source in sources:
        if _holds(source, NETWORK_PREFIX):
            holding = source
        elif holding is not None:
            continue
        stated = {key: value for key, value in source.metadata.items() if key in NETWORK_KEYS}
        if recorded_objective(stated) is None:
            network |= stated
        else:
            network, stating = stated, source
    notes = []
    if holding is not None and stating is not None and holding is not stating:
        notes.append(
            f"{holding.description} states no objective; that of {stating.description}, "
            f"{recorded_objective(network)}, is taken"
        )
    return {**others, **network}, notes


def _holds(source: Source, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in source.shapes)


# ---- tensors that files may lack


def _with_constants(source: Source) -> Source:
    """The source with the two tensors that SDXL does not need trained, added where they are absent.

    CLIP-L's `position_ids` are always 0, 1, ...; some programs store them in float16, or damage
    them when they merge files. `logit_scale` scales similarities, which SDXL never computes; it is
    set to the value from which CLIP's training starts.
    """
    made: dict[str, np.ndarray] = {}
    notes = list(source.notes)
    for name, shape in source.shapes.items():
        if name.endswith(".embeddings.position_embedding.weight"):
            ids = name.replace("position_embedding.weight", "position_ids")
            made[ids] = np.arange(shape[0], dtype=np.int64)[None]
            if ids not in source.shapes:
                notes.append(f"{ids} added: 0 to {shape[0] - 1}, as it always is")
            elif source.dtypes[ids] != "int64" or not np.array_equal(source.read(ids), made[ids]):
                notes.append(f"{ids} replaced: it is not 0 to {shape[0] - 1} in int64")
        if name.endswith(".model.text_projection"):
            scale = name.replace("text_projection", "logit_scale")
            if scale not in source.shapes:
                made[scale] = np.array(INITIAL_LOGIT_SCALE, np.float32)
                notes.append(f"{scale} added: log(1/0.07); it has no effect on images")
    dtypes = {name: "int64" if array.ndim else "fp32" for name, array in made.items()}
    return replace(
        source,
        shapes={**source.shapes, **{name: array.shape for name, array in made.items()}},
        dtypes={**source.dtypes, **dtypes},
        read=lambda name: made[name].copy() if name in made else source.read(name),
        notes=tuple(notes),
    )
