"""MindSpore's `.ckpt`: a protobuf message, walked without loading it.

The layout, from MindSpore's checkpoint.proto: a file is repeated field 1, `Value`, which holds a
tag (field 1) and a tensor (field 2) of dims (1), tensor_type (2) and tensor_content (3). A large
tensor is split over several values of one tag. `crc_num` and ten bytes may follow the last one.
"""

from __future__ import annotations

import math
import mmap
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdxl_host.config.mindone import weight_name
from sdxl_host.errors import DataError
from sdxl_host.files.tensors import DTYPES, Tensors, read_pieces
from sdxl_host.weights.formats.single_file import without_extras
from sdxl_host.weights.source import Source

__all__ = ["open_mindspore"]

_PRECISIONS = {
    "Float16": "fp16",
    "BFloat16": "bf16",
    "Float32": "fp32",
    "Float64": "fp64",
    "Int32": "int32",
    "Int64": "int64",
}
# Numbers that MindSpore's callbacks append to a checkpoint.
_COUNTERS = ("epoch_num", "step_num")

_CRC_MARK = b"crc_num"
_CRC_LENGTH = len(_CRC_MARK) + 10
_VARINT, _BYTES = 0, 2

# The last word of a norm's or an embedding's parameter: MindSpore's and the single file's.
_LAST_WORDS = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}


class _Malformed(Exception):
    """The bytes are not a checkpoint of MindSpore; the text says at which byte."""


@dataclass
class _Stored:
    """Where a tensor's bytes are in the file: (start, length) of each piece."""

    dims: tuple[int, ...]
    kind: str
    pieces: list[tuple[int, int]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.dims == (0,) else self.dims  # how MindSpore writes a single number


def open_mindspore(path: Path) -> Source:
    """The tensors of a checkpoint that MindSpore or MindONE wrote, under the single file's names.

    A file of the U-Net alone is read too. Only the framing is read now. Raises DataError.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            stored = _walk(view)
    except (OSError, ValueError, IndexError, _Malformed) as error:
        raise DataError(
            f"{path}: can't be read as a checkpoint of MindSpore ({error}); get it again, or as "
            ".safetensors"
        ) from error
    left_out = sorted(t for t, entry in stored.items() if entry.kind == "str" or t in _COUNTERS)
    found: dict[str, _Stored] = {}
    for tag, entry in stored.items():
        if tag in left_out:
            continue
        name = _single_file_name(tag)
        if entry.kind not in _PRECISIONS:
            raise DataError(
                f"{path}: {tag} is stored as {entry.kind}, and only {', '.join(_PRECISIONS)} are "
                "read; save it as one of them"
            )
        size = math.prod(entry.shape) * DTYPES[_PRECISIONS[entry.kind]].itemsize
        held = sum(length for _, length in entry.pieces)
        if held != size:
            raise DataError(
                f"{path}: {tag} has {held:,} bytes instead of {size:,} for its shape "
                f"{entry.shape}; get it again"
            )
        if name in found:
            raise DataError(f"{path}: holds {name} twice, once as {tag}; remove one of them")
        found[name] = entry
    dtypes = {name: _PRECISIONS[entry.kind] for name, entry in found.items()}
    notes = [f"{', '.join(left_out)} left out: not weights"] if left_out else []
    tensors = Tensors(
        shapes={name: entry.shape for name, entry in found.items()},
        dtypes=dtypes,
        read=lambda name: read_pieces(
            path, name, found[name].pieces, DTYPES[dtypes[name]], found[name].shape
        ),
    )
    source = without_extras(tensors, f"{path} (MindSpore checkpoint)")
    return replace(source, notes=(*notes, *source.notes))


def _single_file_name(tag: str) -> str:
    """The single file's name: there a norm's `gamma` and `beta` and an embedding's table are called
    as in torch."""
    head, dot, last = weight_name(tag).rpartition(".")
    return f"{head}{dot}{_LAST_WORDS.get(last, last)}"


def _walk(view: mmap.mmap) -> dict[str, _Stored]:
    """Where each tensor is in the file, by its tag."""
    end = len(view)
    if view[max(0, end - _CRC_LENGTH) :].startswith(_CRC_MARK):
        end -= _CRC_LENGTH
        _check_crc(view, end)
    stored: dict[str, _Stored] = {}
    for number, kind, start, length in _fields(view, 0, end):
        if (number, kind) != (1, _BYTES):
            raise _Malformed(f"byte {start} does not begin a tensor")
        tag, entry = _value(view, start, start + length)
        before = stored.setdefault(tag, _Stored(entry.dims, entry.kind))
        if (before.dims, before.kind) != (entry.dims, entry.kind):
            raise _Malformed(f"the pieces of {tag} differ in shape or precision")
        before.pieces += entry.pieces
    return stored


def _value(view: mmap.mmap, start: int, end: int) -> tuple[str, _Stored]:
    tag, kind, dims, pieces = "", "", [], []
    for number, _, at, length in _fields(view, start, end):
        if number == 1:
            tag = view[at : at + length].decode("utf-8")
        elif number == 2:
            for inner, wire, position, size in _fields(view, at, at + length):
                if inner == 1 and wire == _VARINT:
                    dims.append(_varint(view, position)[0])
                elif inner == 1:
                    dims += _packed(view, position, position + size)
                elif inner == 2:
                    kind = view[position : position + size].decode("utf-8")
                elif inner == 3:
                    pieces.append((position, size))
        elif number == 3:
            raise _Malformed(f"{tag} is a map, not a tensor")
    if not tag or not kind:
        raise _Malformed(f"the value at byte {start} has no name or no precision")
    return tag, _Stored(tuple(dims), kind, pieces)


def _fields(view: mmap.mmap, start: int, end: int):
    """(field number, wire type, start, length) of each field of the message in [start, end)."""
    at = start
    while at < end:
        key, at = _varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            length = _varint(view, at)[1] - at
        elif kind == _BYTES:
            length, at = _varint(view, at)
        else:
            raise _Malformed(f"byte {at} is not of such a file")
        if at + length > end:
            raise _Malformed(f"it ends within the field at byte {at}")
        yield number, kind, at, length
        at += length


def _varint(view: mmap.mmap, at: int) -> tuple[int, int]:
    """The number at `at`, stored seven bits a byte, the lowest first; and the position after it."""
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise _Malformed(f"byte {at} is not of such a file")


def _packed(view: mmap.mmap, at: int, end: int) -> list[int]:
    numbers = []
    while at < end:
        number, at = _varint(view, at)
        numbers.append(number)
    return numbers


def _check_crc(view: mmap.mmap, end: int) -> None:
    expected = int.from_bytes(view[end + len(_CRC_MARK) : end + _CRC_LENGTH], "big")
    found = 0
    for start in range(0, end, 1 << 24):
        found = zlib.crc32(view[start : min(end, start + (1 << 24))], found)
    if found != expected:
        raise _Malformed("its check sum does not fit")
