"""Digests of images' bytes, remembered in a cache's folder, so that the next start only asks the
system whether the files have changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import BinaryIO

from sdxl_host.data.captioned import Captioned
from sdxl_host.errors import DataError
from sdxl_host.files.atomic import write_file

__all__ = ["ImageDigests"]

_DIGEST_BYTES = 16
_NAME = "images-{}.jsonl"

# A file that has just been written can be written again without a change of its time.
_SETTLED_NANOSECONDS = 2_000_000_000

# The path of a file, and the offset and length of an image in an archive, else 0 and 0.
_Where = tuple[str, int, int]


class ImageDigests:
    """Digests of images' bytes. damaged: a sentence for each file of them that can't be used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[_Where, tuple[int, int, bytes]] = {}
        self._is_changed = False
        self.damaged: list[str] = []
        for file in sorted(folder.glob(_NAME.format("*"))):
            try:
                with open(file, encoding="ascii") as lines:
                    self._known.update(_parsed(line) for line in lines)
            except (OSError, TypeError, ValueError) as error:
                self.damaged.append(f"{file}: can't be used ({error}); images are looked at anew")

    def of(self, images: Iterable[Captioned], threads: Executor) -> list[bytes]:
        """The digest of each image, in order. Raises DataError naming one that can't be read."""
        return list(threads.map(self._digest, images))

    def save(self, rank: int) -> None:
        """Writes what is known, if any of it is new. Raises DataError where the disk refuses."""
        if not self._is_changed:
            return
        file = self._folder / _NAME.format(rank)
        try:
            write_file(file, self._write)
        except OSError as error:
            raise DataError(
                f"{file}: can't be written ({error.strerror or error}); free some space"
            ) from error
        self._is_changed = False

    def _write(self, file: BinaryIO) -> None:
        for where, (size, changed, digest) in self._known.items():
            file.write(json.dumps([*where, size, changed, digest.hex()]).encode("ascii") + b"\n")

    def _digest(self, image: Captioned) -> bytes:
        try:
            path = os.path.abspath(image.file)
            where = (path, *(image.span or (0, 0)))
            state = os.stat(path)
            known = self._known.get(where)
            if known is not None and known[:2] == (state.st_size, state.st_mtime_ns):
                return known[2]
            found = hashlib.blake2b(digest_size=_DIGEST_BYTES)
            with image.open() as file:
                while part := file.read(1 << 20):
                    found.update(part)
        except OSError as error:
            raise DataError(
                f"{image.place}: can't be read ({error.strerror or error}); replace or remove it"
            ) from error
        digest = found.digest()
        if time.time_ns() - state.st_mtime_ns > _SETTLED_NANOSECONDS:
            self._known[where] = (state.st_size, state.st_mtime_ns, digest)
            self._is_changed = True
        return digest


def _parsed(line: str) -> tuple[_Where, tuple[int, int, bytes]]:
    path, offset, length, size, changed, digest = json.loads(line)
    return (path, offset, length), (size, changed, bytes.fromhex(digest))
