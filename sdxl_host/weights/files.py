"""Safetensors files in and out: whole, synced, and never pickled."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Parameter, Tensor
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sdxl_host.errors import DataError
from sdxl_host.weights.check import compare_shapes

if TYPE_CHECKING:
    from sdxl_host.weights.tensors import Source

__all__ = ["load", "read", "write"]

_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name. Raises DataError when it can't be read."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.suffix in _PICKLED:
        raise DataError(
            f"{path}: {path.suffix} files may hold code that runs when they are read, so they "
            "never are; convert it to .safetensors where it came from"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError, TypeError) as error:
        raise DataError(f"{path}: can't be read as safetensors ({error}); get it again") from error


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays to a new file and syncs it to the disk."""
    # Not np.ascontiguousarray, which makes a vector of a single number.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata))
    except SafetensorError as error:
        # What the library makes of a full disk; callers handle what the system says.
        raise OSError(errno.EIO, str(error), str(path)) from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def load(parameters: Mapping[str, Parameter], source: Source, parts: Sequence[str] = ("",)) -> None:
    """Sets every parameter from the source's tensor of its name, one tensor at a time.

    parts: what of the source to take, as beginnings of names such as `model.diffusion_model.`;
    the rest is none of these parameters' business, nor is CLIP-L's constant `position_ids`. Strict:
    every missing, unexpected or misshapen one is named in one DataError; nothing is changed unless
    all fit.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {
        name: shape
        for name, shape in source.shapes.items()
        if name.startswith(tuple(parts)) and not name.endswith(".position_ids")
    }
    compare_shapes(shapes, found, source.description)
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(source.read(name).astype(np.float32)))
