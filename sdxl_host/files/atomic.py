"""Files and folders that appear under their name whole or not at all, and are then on the disk.

What is written goes to a new file or folder beside its target, which is renamed when it is whole.
The new one's name can't be guessed, so nobody can put a link there beforehand; a link that stands
at the target is replaced, and what it points to is not touched.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "check_writable",
    "new_folder",
    "open_no_follow",
    "sync",
    "sync_tree",
    "write_file",
    "write_new",
]

Content = bytes | Callable[[BinaryIO], object]

_RANDOM_BYTES = 8


def write_file(path: Path, content: Content) -> None:
    """Writes a file in place of what has its name; its folder is made where it is missing.

    content: the bytes, or a function that writes them to an open file. An earlier file stays as it
    was until the new one is whole. Permissions are those of any new file (the umask). Raises
    OSError, and then nothing is left of the new file.
    """
    with _replacement(path) as temporary:
        write_new(temporary, content)
        os.replace(temporary, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends without an error.

    Raises OSError where `path` is there and is not an empty folder. After any error nothing is left
    of the new folder.
    """
    with _replacement(path) as temporary:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        os.rename(temporary, path)


def check_writable(path: Path) -> None:
    """Raises OSError where `write_file` could not write to `path`; its folder is made."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _replacement(path) as temporary:
        write_new(temporary, b"")


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """An unused name beside `path`; what still has it at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that is killed leaves its file behind, and the next writer of `path` removes it.
    pattern = f".{glob.escape(path.name)}.{'[0-9a-f]' * 2 * _RANDOM_BYTES}.partial"
    for leftover in path.parent.glob(pattern):
        _remove(leftover)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM_BYTES)}.partial")
    try:
        yield temporary
        sync(path.parent)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_new(path: Path, content: Content) -> None:
    """Writes a file that is not there yet, and syncs it; content as in `write_file`.

    For files in a folder that is not in use yet. Raises OSError; then a part of it may be left.
    """
    with open(path, "xb") as file:  # O_EXCL: fails for anything that is there, a link included
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())


def open_no_follow(path: str, flags: int) -> int:
    """An `opener` for `open` that raises OSError where `path` is a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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
