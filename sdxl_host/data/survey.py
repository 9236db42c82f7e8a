"""Looks at every image of a source once, and remembers what it found.

The first look decodes each image whole, because nothing less finds one that breaks off. What was
found is kept in the user's cache folder, so that the next look asks the system for the size and
time of each file and nothing more.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.decode import FORMATS, BadImage, Remark, decode
from sdxl_host.data.problems import Problem
from sdxl_host.files.atomic import write_file

__all__ = ["Survey", "survey"]

# What a remembered verdict depends on beside the file.
_READER = f"1 {PIL.__version__} {' '.join(FORMATS)}"

_TOGETHER = 16  # images that a thread looks at before it says so
_WAITING = 256  # such groups that are given to the threads beforehand

# A file that was changed so shortly before it was looked at may be changed again and keep its time.
_UNSETTLED = 2_000_000_000  # nanoseconds

_UNKNOWN, _GOOD, _BAD = 0, 1, 2

_Verdict = tuple[tuple[int, int], Remark] | BadImage  # (height, width) and remarks, or the fault
_Verdicts = list[_Verdict]


@dataclass
class Survey:
    """What was found of N images, in their order.

    usable: (N,) whether each can be decoded. sizes: (N, 2) height and width after the EXIF
    rotation; of one that can't be decoded as it was when it still could, or zeros. problems: those
    that can't be decoded. notes: what a user should know of the rest, a sentence each. looked_at:
    how many were decoded, because nothing was remembered of them.
    """

    usable: np.ndarray
    sizes: np.ndarray
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    looked_at: int = 0


@dataclass
class _Findings:
    """What is kept of each image: status (2, N) int64, bytes and nanoseconds of its file; verdict
    (N,), sizes (N, 2), remarks (N,); reasons: kind and detail of those that are bad."""

    status: np.ndarray
    verdict: np.ndarray
    sizes: np.ndarray
    remarks: np.ndarray
    reasons: dict[int, tuple[str, str]]

    @classmethod
    def none(cls, count: int) -> _Findings:
        """Of images that nobody has looked at."""
        return cls(
            np.zeros((2, count), np.int64),
            np.zeros(count, np.uint8),
            np.zeros((count, 2), np.int32),
            np.zeros(count, np.uint8),
            {},
        )


def survey(
    images: Sequence[Captioned],
    source: Path,
    threads: Executor,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Looks at the images of `source` that have changed since the last look.

    progress: called with how many of the images to look at are done, and how many there are.
    """
    memory, notes = _memory_file(source), list[str]()
    found = _Findings.none(len(images))
    now = time.time_ns()
    for index, image in enumerate(images):
        found.status[:, index] = _status(image)
    try:
        changed = _recall(memory, images, found)
    except FileNotFoundError:
        changed = np.ones(len(images), bool)
    except Exception as error:  # a damaged archive makes numpy and zipfile raise anything
        changed = np.ones(len(images), bool)
        notes.append(f"{memory}: can't be read ({error}), so every image was looked at again")
    indices = np.flatnonzero(changed)
    passing = np.zeros(len(images), bool)
    try:
        _look(images, indices, found, passing, threads, progress)
    finally:  # what was found until Ctrl-C is remembered too
        if len(indices):
            # What may change unnoticed, or was not the file's fault, is looked at again.
            kept = (found.status[1] < now - _UNSETTLED) & ~passing
            try:
                write_file(memory, _packed(images, found, kept))
            except OSError as error:
                notes.append(
                    f"{memory}: can't be written ({error.strerror}), so the next start looks at "
                    "every image again; set XDG_CACHE_HOME to a folder that can be written"
                )
    problems = [
        Problem(kind, images[index].name, detail)
        for index, (kind, detail) in sorted(found.reasons.items())
    ]
    notes += _remark_notes(images, found.remarks)
    return Survey(found.verdict == _GOOD, found.sizes, problems, notes, len(indices))


def _status(image: Captioned) -> tuple[int, int]:
    """Bytes and nanoseconds of a file, or zeros where there is none."""
    try:
        status = os.stat(image.file)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _look(
    images: Sequence[Captioned],
    indices: np.ndarray,
    found: _Findings,
    passing: np.ndarray,
    threads: Executor,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decodes the images of `indices`. passing: (N,) is set where one is bad for a reason that may
    pass."""
    done = 0

    def look(start: int) -> _Verdicts:
        group = indices[start : start + _TOGETHER]
        return [_verdict(images[index]) for index in group]

    for start, verdicts in _in_order(look, range(0, len(indices), _TOGETHER), threads):
        for index, verdict in zip(
            indices[start : start + _TOGETHER].tolist(), verdicts, strict=True
        ):
            if isinstance(verdict, BadImage):
                found.verdict[index] = _BAD
                found.remarks[index] = 0
                found.reasons[index] = verdict.kind, verdict.detail
                passing[index] = not verdict.is_lasting
            else:
                found.verdict[index] = _GOOD
                found.sizes[index], found.remarks[index] = verdict
        done += len(verdicts)
        if progress is not None:
            progress(done, len(indices))


def _verdict(image: Captioned) -> _Verdict:
    try:
        decoded = decode(image)
    except BadImage as error:
        return error
    return decoded.size, decoded.remarks


def _in_order(
    work: Callable[[int], _Verdicts], starts: Iterable[int], threads: Executor
) -> Iterator[tuple[int, _Verdicts]]:
    """Each start with what `work` makes of it, of which few wait at a time."""
    waiting: deque[tuple[int, Future[_Verdicts]]] = deque()
    try:
        for start in starts:
            waiting.append((start, threads.submit(work, start)))
            if len(waiting) >= _WAITING:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _remark_notes(images: Sequence[Captioned], remarks: np.ndarray) -> Iterator[str]:
    """A sentence for each remark that images have."""
    for remark in Remark:
        having = np.flatnonzero(remarks & remark)
        if remark and len(having):
            first = ", ".join(images[index].name for index in having[:3].tolist())
            more = f" and {len(having) - 3:,} more" if len(having) > 3 else ""
            yield f"{remark.sentence(len(having))} ({first}{more})"


# ---- what is remembered


def _memory_file(source: Path) -> Path:
    """Where the findings of a source are kept."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:24]
    return base / "sdxl-host" / "surveys" / f"{name}.npz"


def _key(image: Captioned) -> str:
    """Where an image's bytes are; without a NUL, which no path has, so that NULs part the keys."""
    return image.file if image.span is None else "{}\n{} {}".format(image.file, *image.span)


def _packed(images: Sequence[Captioned], found: _Findings, kept: np.ndarray) -> bytes:
    """The file of findings; of images that are not `kept` it has the size alone."""
    verdict = np.where(kept, found.verdict, _UNKNOWN).astype(np.uint8)
    keys = "\0".join(map(_key, images)).encode("utf-8", "surrogateescape")
    reasons = json.dumps([[index, *reason] for index, reason in found.reasons.items()])
    file = io.BytesIO()
    np.savez_compressed(
        file,
        reader=np.frombuffer(_READER.encode("ascii"), np.uint8),
        keys=np.frombuffer(keys, np.uint8),
        reasons=np.frombuffer(reasons.encode("ascii"), np.uint8),
        status=found.status,
        verdict=verdict,
        sizes=found.sizes,
        remarks=found.remarks,
    )
    return file.getvalue()


def _recall(memory: Path, images: Sequence[Captioned], found: _Findings) -> np.ndarray:
    """Puts what is remembered into `found`; (N,) which images are to be looked at.

    Raises OSError, and any other error for a file that is damaged.
    """
    with np.load(io.BytesIO(memory.read_bytes()), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    keys = arrays["keys"].tobytes().decode("utf-8", "surrogateescape").split("\0")
    reasons = {
        index: (kind, detail) for index, kind, detail in json.loads(arrays["reasons"].tobytes())
    }
    place = {key: number for number, key in enumerate(keys)}
    before = np.fromiter((place.get(_key(image), -1) for image in images), np.int64, len(images))
    known, old = before >= 0, before[before >= 0]
    if not all(len(arrays[name]) == len(keys) for name in ("verdict", "sizes", "remarks")):
        raise ValueError("it is damaged")
    found.sizes[known] = arrays["sizes"][old]
    same = known.copy()
    same[known] = (arrays["status"][:, old] == found.status[:, known]).all(axis=0)
    same[known] &= arrays["verdict"][old] != _UNKNOWN
    same &= arrays["reader"].tobytes() == _READER.encode("ascii")
    found.verdict[same] = arrays["verdict"][before[same]]
    found.remarks[same] = arrays["remarks"][before[same]]
    for index in np.flatnonzero(found.verdict == _BAD).tolist():
        found.reasons[index] = reasons[int(before[index])]
    return ~same
