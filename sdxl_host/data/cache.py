"""The store of a cache: arrays that are found by a digest of everything that makes them.

A folder of shards. Each is a safetensors file that is written whole or not at all and never changed
afterwards. Its header is its index: where each entry's arrays are, and a checksum of each entry. So
processes that write beside each other share nothing, and an entry of other images, settings or
weights has another key and is never found.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sdxl_host.errors import DataError
from sdxl_host.files.atomic import write_file
from sdxl_host.files.tensors import DTYPES, SAFETENSORS_NAMES

__all__ = ["Arrays", "Cache", "CacheWriter", "Key", "Recipe", "in_16_bits"]

Key = bytes
Arrays = dict[str, np.ndarray]

# A part of every key, so that entries whose content is decided otherwise by a later version of this
# program are not found by it.
_FORMAT = 1
_KEY_BYTES = 20
_CHECKSUM_BYTES = 16

# What waits in memory to be written, at most. A process that is killed loses that.
_SHARD_BYTES = 256 << 20
_SHARD_SECONDS = 300.0

# The header's part for other things than tensors, and in it the digest of the header itself.
_METADATA, _INDEX = "__metadata__", "index"
_NO_DIGEST = "0" * 2 * _CHECKSUM_BYTES

_SUFFIX = ".cache.safetensors"
_DTYPES = {SAFETENSORS_NAMES[name]: dtype for name, dtype in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# The name, type and shape of each array of an entry, in their order in the file.
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]


class Recipe:
    """What all entries of a kind are made of; with what an entry has of its own, it gives its key.

    facts: plain values, which JSON can hold.
    """

    def __init__(self, kind: str, facts: Mapping[str, Any]) -> None:
        self._hash = hashlib.blake2b(
            _canonical([_FORMAT, kind, dict(facts)]), digest_size=_KEY_BYTES
        )

    def key(self, *own: Any) -> Key:
        """The key of an entry that these plain values tell from others of its kind."""
        found = self._hash.copy()
        found.update(_canonical(own))
        return found.digest()


class _Place(NamedTuple):
    """Where an entry is: its shard by number, its bytes there, what they are, their checksum."""

    shard: int
    start: int
    length: int
    layout: Layout
    checksum: bytes


class Cache:
    """The entries of a folder, as its shards list them now.

    damaged: a sentence for each shard whose index can't be used; its entries are not there. Of two
    entries of one key the one that was written later counts: it was made because the other one is
    damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        self._shards: list[Path] = []
        self._places: dict[Key, _Place] = {}
        self._verified: set[Key] = set()
        self._layouts: dict[Layout, Layout] = {}
        # The names begin with the time of writing.
        for shard in sorted(folder.glob(f"*{_SUFFIX}")):
            try:
                found = list(self._entries(shard))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.damaged.append(f"{shard}: its index can't be used ({error})")
                continue
            self._shards.append(shard)
            self._places.update(found)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def length(self, key: Key) -> int:
        """Bytes of an entry."""
        return self._places[key].length

    def shape(self, key: Key, name: str) -> tuple[int, ...] | None:
        """The shape of one array of an entry; None where it has none of that name."""
        found = [shape for name_, _, shape in self._places[key].layout if name_ == name]
        return found[0] if found else None

    def read(self, key: Key, what: str) -> Arrays:
        """The arrays of an entry; what: what it is of, for the message.

        When an entry is first read, its bytes are compared with its checksum. Raises DataError
        where they are not those that were written.
        """
        place = self._places[key]
        shard = self._shards[place.shard]
        try:
            with open(shard, "rb") as file:
                file.seek(place.start)
                data = file.read(place.length)
        except OSError as error:
            raise DataError(f"{shard}: {what} can't be read ({error.strerror})") from error
        if key not in self._verified:
            if _checksum(data) != place.checksum:
                raise DataError(
                    f"{shard}: {what} is damaged, its bytes from {place.start} to "
                    f"{place.start + place.length} are not those that were written; sdxl-host "
                    "cache with the same arguments makes it anew"
                )
            self._verified.add(key)
        arrays, start = {}, 0
        for name, dtype, shape in place.layout:
            count = math.prod(shape)
            array = np.frombuffer(data, _DTYPES[dtype], count, start)
            arrays[name] = array.reshape(shape)
            start += array.nbytes
        return arrays

    def fault(self, key: Key, what: str) -> str | None:
        """What is wrong with an entry, or None where it is as it was written."""
        try:
            self.read(key, what)
        except DataError as error:
            return str(error)
        return None

    def _entries(self, shard: Path) -> Iterator[tuple[Key, _Place]]:
        """What the header of a shard lists. Raises ValueError, KeyError or TypeError for another
        header than was written, and where bytes are missing behind it."""
        with open(shard, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("it is cut short")
            header = file.read(length)
        tensors: dict[str, Any] = json.loads(header)
        checksums: dict[str, str] = tensors.pop(_METADATA)
        if checksums.pop(_INDEX) != _index_digest(header):
            raise ValueError("its checksum is another one")
        start, base, number = 0, 8 + length, len(self._shards)
        # As it was written: entry after entry, and the arrays of each side by side.
        named = ((*name.split(".", 1), tensor) for name, tensor in tensors.items())
        for key, arrays in groupby(named, key=lambda each: each[0]):
            parts = [(name, tensor["dtype"], tuple(tensor["shape"])) for _, name, tensor in arrays]
            layout = self._layouts.setdefault(tuple(parts), tuple(parts))
            nbytes = sum(_DTYPES[dtype].itemsize * math.prod(shape) for _, dtype, shape in layout)
            if base + start + nbytes > size:
                raise ValueError("the file is cut short")
            checksum = bytes.fromhex(checksums[key])
            yield bytes.fromhex(key), _Place(number, base + start, nbytes, layout, checksum)
            start += nbytes


class CacheWriter:
    """Adds entries to a folder, a shard at a time. Used as a context, it writes the rest when it is
    left, after an error too.

    rank: of this process among those that write beside each other.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder = folder
        self._rank = rank
        self._waiting: dict[Key, Arrays] = {}
        self._bytes = 0
        self._since = time.monotonic()
        self.is_full = False

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if not self.is_full:
            self.flush()

    def add(self, key: Key, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds an entry. It is on the disk after `flush`, or when a shard is full. Raises
        DataError where the disk refuses."""
        kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._waiting[key] = kept
        self._bytes += sum(array.nbytes for array in kept.values())
        if self._bytes >= _SHARD_BYTES or time.monotonic() - self._since >= _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits. Raises DataError where the disk refuses; earlier shards stay."""
        if self._waiting:
            name = f"{time.time_ns():020d}-{self._rank}-{secrets.token_hex(4)}{_SUFFIX}"
            try:
                write_file(self._folder / name, lambda file: _write(file, self._waiting))
            except OSError as error:
                self.is_full = True
                raise DataError(
                    f"--cache_path {self._folder}: can't be written ({error.strerror or error}); "
                    "what was written before is whole and is used again; free some space, or give "
                    "another folder, and run the same command again"
                ) from error
        self._waiting, self._bytes, self._since = {}, 0, time.monotonic()


def in_16_bits(array: np.ndarray) -> np.ndarray:
    """The array in float16; unchanged where one of its numbers is too large for that."""
    with np.errstate(over="ignore"):
        low = array.astype(np.float16)
    return low if np.isfinite(low).all() else array


def _write(file: BinaryIO, entries: Mapping[Key, Arrays]) -> None:
    """Writes a shard: a safetensors file in which each entry's arrays stand side by side."""
    tensors: dict[str, Any] = {}
    checksums, position = {}, 0
    for key, arrays in entries.items():
        data = [array.tobytes() for array in arrays.values()]
        checksums[key.hex()] = _checksum(*data).hex()
        for (name, array), part in zip(arrays.items(), data, strict=True):
            tensors[f"{key.hex()}.{name}"] = {
                "dtype": _NAMES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [position, position + len(part)],
            }
            position += len(part)
    metadata = {_INDEX: _NO_DIGEST, **checksums}
    header = json.dumps({_METADATA: metadata, **tensors}).encode("ascii")
    header += b" " * (-len(header) % 8)
    header = header.replace(_NO_DIGEST.encode(), _index_digest(header).encode(), 1)
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for arrays in entries.values():
        for array in arrays.values():
            file.write(array.tobytes())


def _index_digest(header: bytes) -> str:
    """Of a header with its own digest left out."""
    before, quote, rest = header.partition(f'"{_INDEX}": "'.encode())
    return _checksum(before, quote, rest[len(_NO_DIGEST) :]).hex()


def _checksum(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for part in parts:
        found.update(part)
    return found.digest()


def _canonical(value: Sequence[Any] | Mapping[str, Any]) -> bytes:
    """A plain value as bytes, the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
