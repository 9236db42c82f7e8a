"""Tensors that stay in their files until they are read, one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sdxl_host.errors import DataError

__all__ = [
    "DTYPES",
    "SAFETENSORS_NAMES",
    "Tensors",
    "open_safetensors",
    "over",
    "read_pieces",
]

# Precision as files and flags call it, and what numpy holds it in.
DTYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}

# The same in the header of a safetensors file.
SAFETENSORS_NAMES = {
    "fp16": "F16",
    "bf16": "BF16",
    "fp32": "F32",
    "fp64": "F64",
    "int32": "I32",
    "int64": "I64",
}
_BY_SAFETENSORS_NAME = {theirs: ours for ours, theirs in SAFETENSORS_NAMES.items()}


@dataclass(frozen=True)
class Tensors:
    """Names, shapes and precisions of tensors, and how one of them is read.

    dtypes: keys of `DTYPES`. metadata: of a safetensors header, else empty. read: gives the tensor
    in the precision it is stored in; it raises DataError.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read: Callable[[str], np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)


T = TypeVar("T", bound=Tensors)


def over(first: T, later: Tensors) -> T:
    """`first` with the tensors of both; the later one's replace those of the same name."""
    return replace(
        first,
        shapes={**first.shapes, **later.shapes},
        dtypes={**first.dtypes, **later.dtypes},
        read=lambda name: (later if name in later.shapes else first).read(name),
    )


def open_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file; only its header is read now. Raises DataError.

    The library checks the header against the file. Tensors are then read from the file, because the
    pages of the library's memory map would count as memory of this process.
    """
    try:
        with safe_open(path, "np"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: can't be read as safetensors ({error}); get it again") from error
    metadata = header.pop("__metadata__", {})
    for name, entry in header.items():
        if entry["dtype"] not in _BY_SAFETENSORS_NAME:
            raise DataError(
                f"{path}: {name} is stored as {entry['dtype']}, and only "
                f"{', '.join(SAFETENSORS_NAMES.values())} are read; get the weights in fp16, bf16 "
                "or fp32"
            )
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    dtypes = {name: _BY_SAFETENSORS_NAME[entry["dtype"]] for name, entry in header.items()}
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read(name: str) -> np.ndarray:
        pieces = [(starts[name], math.prod(shapes[name]) * DTYPES[dtypes[name]].itemsize)]
        return read_pieces(path, name, pieces, DTYPES[dtypes[name]], shapes[name])

    return Tensors(shapes, dtypes, read, metadata)


def read_pieces(
    path: Path,
    name: str,
    pieces: list[tuple[int, int]],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> np.ndarray:
    """A tensor whose bytes lie in the file in pieces of (start, length), joined in their order."""
    array = np.empty(shape, dtype)
    view = memoryview(array.reshape(-1).view(np.uint8))
    filled = 0
    try:
        with open(path, "rb") as file:
            for start, length in pieces:
                file.seek(start)
                filled += file.readinto(view[filled : filled + length])
    except OSError as error:
        raise DataError(f"{path}: {name} can't be read ({error.strerror}); get it again") from error
    if filled != array.nbytes:
        raise DataError(f"{path}: ends within {name}; get it again")
    return array
