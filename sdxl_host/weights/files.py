"""Safetensors files in and out: whole, synced, and never pickled."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sdxl_host.errors import DataError

__all__ = ["assign", "read", "write"]

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


def assign(
    parameters: Mapping[str, Parameter], arrays: Mapping[str, np.ndarray], source: str
) -> None:
    """Sets every parameter from the array of its name.

    Strict: a missing or misshapen array is a DataError that names it, and so is one that no
    parameter has. Nothing is changed unless all fit.
    """
    missing = [name for name in parameters if name not in arrays]
    unknown = [name for name in arrays if name not in parameters]
    misshapen = [
        f"{name} {tuple(arrays[name].shape)} instead of {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in arrays and tuple(arrays[name].shape) != tuple(parameter.shape)
    ]
    for problem, names in (
        ("lacks", missing),
        ("holds weights that the model has no place for:", unknown),
        ("holds weights of another shape:", misshapen),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DataError(
                f"{source}: {problem} {', '.join(names[:3])}{more}; use weights of the model that "
                "the config describes"
            )
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(arrays[name].astype(np.float32)))
