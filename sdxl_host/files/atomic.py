"""Files and folders that are on the disk, not only in its cache, when a call returns."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["sync", "sync_tree", "write_new"]


def write_new(path: Path, content: bytes) -> None:
    """Writes a file that is not there yet, and syncs it. Raises OSError."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Syncs a folder's entries: the names of what was made, renamed or removed in it. Or a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs a folder and all that is in it, whoever wrote it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
