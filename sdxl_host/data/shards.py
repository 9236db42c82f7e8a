"""WebDataset shards: tar files in which a sample is the members of one stem.

A member is read where it lies in the shard, so samples can be read in any order. Where each lies is
found by reading the shard's headers once; this index is kept, and serves until the shard changes.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.problems import Listing, Problem
from sdxl_host.data.sidecars import WITHOUT_CAPTION, WITHOUT_IMAGE
from sdxl_host.data.tree import count, is_hidden, is_image, printable
from sdxl_host.errors import DataError, one_line
from sdxl_host.files.atomic import write_file

__all__ = ["COMPRESSED", "from_shards"]

# Endings of archives that samples can't be read out of in any order.
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")

# Of several captions of one sample the first of these counts.
_CAPTIONS = ("txt", "caption", "json")

# What is counted over all shards, as (a thing, what becomes of it).
_NOTES = {
    "hidden": ("hidden member", "of the shards left out"),
    "special": ("member", "of the shards left out: links, devices and sparse files"),
    "twice": ("member", "of the shards replaced by a later one of the same name"),
    "shared": ("image", "of the shards sharing a caption with another of the same sample"),
}

# Raised when what `_Index` holds, or how it is found, changes.
_FORMAT = 1


@dataclass
class _Index:
    """What a shard holds. images: (member, offset, length, text). problems: (kind, member, detail).
    counts: how often a key of `_NOTES` was met."""

    images: list[tuple[str, int, int, str | list[str]]] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def from_shards(root: str, shards: Sequence[str]) -> Listing:
    """The captioned images in tar files, named `shard/member`.

    root: the folder, with a `/` at its end. shards: their paths inside it. Raises DataError for a
    compressed one.
    """
    listing = Listing([])
    met: Counter[str] = Counter()
    unkept = ""
    for shard in shards:
        index, trouble = _index(root + shard)
        unkept = unkept or trouble
        met.update(index.counts)
        for member, offset, length, text in index.images:
            texts = text if isinstance(text, str) else tuple(text)
            name = f"{shard}/{member}"
            listing.images.append(Captioned(name, root + shard, texts, (offset, length)))
        for kind, member, detail in index.problems:
            name = f"{shard}/{member}" if member else shard
            listing.problems.append(Problem(kind, name, detail))
    for key, (what, fate) in _NOTES.items():
        if met[key]:
            listing.notes.append(f"{count(met[key], what)} {fate}.")
    if unkept:
        listing.notes.append(f"The shards are searched again at the next start: {unkept}.")
    return listing


# ---- the kept index


def _index(shard: str) -> tuple[_Index, str]:
    """(what a shard holds, why that can't be kept or "")."""
    try:
        found = os.stat(shard)
    except OSError as error:
        return _unreadable(error), ""
    stamp = [_FORMAT, os.path.abspath(shard), found.st_size, found.st_mtime_ns]
    file = _index_file(stamp[1])
    if file is not None:
        kept = _kept(file, stamp)
        if kept is not None:
            return kept, ""
    index = _search(shard)
    if file is None:
        return index, "there is no home folder to keep their index in; set XDG_CACHE_HOME"
    content = {"shard": stamp, **vars(index)}
    try:
        write_file(file, json.dumps(content).encode())
    except OSError as error:
        # Another rank that writes the same index may have been faster.
        if _kept(file, stamp) is None:
            return index, f"their index can't be kept in {file.parent} ({error.strerror or error})"
    return index, ""


def _index_file(shard: str) -> Path | None:
    """Where the index of a shard is kept. Each has a folder of its own, which stays small."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(caches):
        return None
    name = sha256(os.fsencode(shard)).hexdigest()[:32]
    return Path(caches) / "sdxl-host" / "indexes" / name / "index.json"


def _kept(file: Path, stamp: list[Any]) -> _Index | None:
    """The index in a file, or None where it is another shard's, of an earlier state, or damaged."""
    try:
        content = json.loads(file.read_bytes())
        if content.pop("shard") != stamp:
            return None
        index = _Index(**content)
        for member, offset, length, text in index.images:
            texts = [text] if isinstance(text, str) else text
            if not all(isinstance(t, str) for t in (member, *texts)) or offset + length > stamp[2]:
                return None
        return index
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


# ---- searching a shard


@dataclass
class _Sample:
    """The members of one stem. captions: by their ending."""

    images: list[tarfile.TarInfo] = field(default_factory=list)
    captions: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def _search(shard: str) -> _Index:
    """What a shard holds, from its headers and its captions."""
    index = _Index()
    samples: dict[str, _Sample] = {}
    try:
        with open(shard, "rb") as file:
            _refuse_compressed(shard, file.read(8))
            file.seek(0)
            for member in _members(file, index):
                _sort_in(member, samples)
            for key in sorted(samples):
                _add(samples[key], file, index)
    except OSError as error:
        return _unreadable(error)
    index.images.sort()
    return index


def _members(file: BinaryIO, index: _Index) -> Iterator[tarfile.TarInfo]:
    """The plain files of a shard up to where it can be read, each name once."""
    found: dict[str, tarfile.TarInfo] = {}
    met: Counter[str] = Counter()
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                # Otherwise the archive keeps every member that it has read.
                archive.members = []
                if member.isdir():
                    continue
                if any(is_hidden(part) for part in member.name.split("/") if part != "."):
                    met["hidden"] += 1
                elif not member.isreg() or member.issparse():
                    met["special"] += 1
                elif member.offset_data + member.size <= size:
                    member.name = printable(member.name.removeprefix("./"))
                    met["twice"] += member.name in found
                    found[member.name] = member
            # A header that can't be read ends an archive as one of zeros does, without an error.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no member begins at byte {archive.offset:,}")
    except tarfile.TarError as error:
        index.problems.append(("a shard that can't be read to its end", "", str(error)))
    index.counts.update(met)
    yield from found.values()


def _sort_in(member: tarfile.TarInfo, samples: dict[str, _Sample]) -> None:
    """Adds an image or a caption to its sample: what shares its path up to the first dot."""
    folder, slash, base = member.name.rpartition("/")
    stem, _, ending = base.partition(".")
    kind = ending.rpartition(".")[2].lower()
    if not is_image(base) and kind not in _CAPTIONS:
        return
    sample = samples.setdefault(folder + slash + stem, _Sample())
    if is_image(base):
        sample.images.append(member)
    else:
        sample.captions.setdefault(kind, member)


def _add(sample: _Sample, file: BinaryIO, index: _Index) -> None:
    """Adds a sample's images with their text to the index, or to what is set aside."""
    text: str | list[str] | None = None
    for kind in _CAPTIONS:
        caption = sample.captions.get(kind)
        if caption is not None and text is None:
            try:
                text = _text(caption, kind, file)
            except (ValueError, RecursionError) as error:
                unread = ("a caption that can't be read", caption.name, one_line(error))
                index.problems.append(unread)
    if text is None:
        index.problems.extend((WITHOUT_CAPTION, image.name, "") for image in sample.images)
        return
    if not sample.images:
        first = next(sample.captions[kind] for kind in _CAPTIONS if kind in sample.captions)
        # The json of a sample holds much besides its caption.
        index.problems.append((WITHOUT_IMAGE, first.name, ""))
    if len(sample.images) > 1:
        index.counts["shared"] = index.counts.get("shared", 0) + len(sample.images) - 1
    for image in sample.images:
        index.images.append((image.name, image.offset_data, image.size, text))


def _text(caption: tarfile.TarInfo, kind: str, file: BinaryIO) -> str | list[str] | None:
    """What a caption says; None where a json has no text. Raises ValueError."""
    file.seek(caption.offset_data)
    text = file.read(caption.size).decode("utf-8-sig")
    if kind != "json":
        return text
    row = json.loads(text)
    said = (row.get("text") or row.get("caption")) if isinstance(row, dict) else None
    if said is None or said == []:
        return None
    texts = said if isinstance(said, list) else [said]
    if not all(isinstance(one, str) for one in texts):
        raise ValueError("its text is neither a text nor a list of texts")
    "".join(texts).encode("utf-8")  # raises for half of a character
    return said


def _refuse_compressed(shard: str, beginning: bytes) -> None:
    if beginning.startswith(_MAGIC):
        raise DataError(
            f"{shard}: is compressed, and samples are read in any order; unpack it to a plain .tar"
        )


def _unreadable(error: OSError) -> _Index:
    return _Index(problems=[("a shard that can't be read", "", error.strerror or str(error))])
