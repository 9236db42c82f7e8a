"""Weights in some file format, under the names of the original single file."""

from __future__ import annotations

from dataclasses import dataclass

from sdxl_host.files.tensors import Tensors
from sdxl_host.weights.architecture import Architecture

__all__ = ["Source"]


@dataclass(frozen=True)
class Source(Tensors):
    """Weights in some file format, under the names of the original single file.

    description: file and format, for messages. architecture: as the file states it, maybe without
    some parts that it has tensors of; None where it states none. notes: which tensors were left
    out, added or replaced, and why; lines for the user.
    """

    description: str = ""
    architecture: Architecture | None = None
    notes: tuple[str, ...] = ()
