"""Arrays in safetensors files, read and written whole; and arrays that are fetched when used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sdxl_host.errors import DataError

__all__ = ["FetchedArrays", "read_arrays", "write_arrays"]


_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


class FetchedArrays(Mapping[str, np.ndarray]):
    """Arrays by name, each fetched anew whenever it is asked for.

    At full size, all arrays of a checkpoint at once would not fit into memory beside the model.
    """

    def __init__(self, names: Iterable[str], fetch: Callable[[str], np.ndarray]) -> None:
        self._names = dict.fromkeys(names)
        self._fetch = fetch

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._fetch(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
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


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays to a new file and syncs it to the disk."""
    # Not np.ascontiguousarray, which turns a single number into a vector.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata))
    except SafetensorError as error:
        # The library raises this on a full disk too; callers handle OSError.
        raise OSError(errno.EIO, str(error), str(path)) from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
