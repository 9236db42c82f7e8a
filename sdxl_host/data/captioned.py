"""One captioned image of a source: what it is called, where its bytes are, what is said of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["Captioned"]


@dataclass(frozen=True, slots=True)
class Captioned:
    """An image as a source lists it; a run of millions holds as many of these, so they are small.

    name: its id, the path inside the source with `/` between folders. file: the path of the file
    with its bytes. text: what is said of it, as it is written; several texts are alternatives.
    span: where its bytes are in `file`, as (offset, length), where that is an archive; None for all
    of the file. repeats: how often an epoch holds it.
    """

    name: str
    file: str
    text: str | tuple[str, ...]
    span: tuple[int, int] | None = None
    repeats: int = 1

    def open(self) -> BinaryIO:
        """Its bytes. Raises OSError where they can't be read."""
        if self.span is None:
            return open(self.file, "rb")
        offset, length = self.span
        with open(self.file, "rb") as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(length))

    @property
    def place(self) -> str:
        """Where a user finds it: its file, and its name inside an archive."""
        return self.file if self.span is None else f"{self.file} ({self.name})"
