"""The files of a folder and of those below it, each real folder read once."""

from __future__ import annotations

import heapq
import os
import unicodedata
from collections import deque
from dataclasses import dataclass, field

from sdxl_host.data.problems import Problem

__all__ = [
    "IMAGE_SUFFIXES",
    "Tree",
    "count",
    "is_hidden",
    "is_image",
    "is_unicode",
    "printable",
    "same_name",
    "walk",
]

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass
class Tree:
    """What a folder holds, without what is hidden.

    root: its path, with a `/` at its end. files: the names of the files in it, by folder: "" for
    the root, else the path inside the root with a `/` at its end. problems, notes: as in `Listing`.
    """

    root: str
    files: dict[str, set[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ending(self, *suffixes: str) -> list[str]:
        """The paths inside the root of all files with one of these endings, sorted."""
        return sorted(
            folder + name
            for folder, names in self.files.items()
            for name in names
            if name.lower().endswith(suffixes)
        )

    def below(self, folder: str) -> Tree:
        """The part of the tree that is in `folder`."""
        files = {path: names for path, names in self.files.items() if path.startswith(folder)}
        return Tree(self.root, files, self.problems, self.notes)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to a program and not to the user."""
    return name.startswith(".") or name == "__MACOSX"


def same_name(name: str) -> str:
    """The form that two spellings of a name share: "e" with an accent is one character or two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: no byte of a file's name, and no half of a character,
    stands in it by itself."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def count(number: int, what: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def walk(root: str) -> Tree:
    """The tree below a folder. Linked folders are followed after those that are really there, so
    that a folder's name is its own where it has one. Raises OSError where `root` can't be read."""
    tree = Tree(os.path.join(root, ""))
    hidden: list[str] = []
    # What is above the root is taken as read, so no link leads out of the folder and around.
    seen = {_identity(above) for above in _ancestors(root)}
    pending, linked = deque([""]), []
    while pending or linked:
        folder = pending.popleft() if pending else heapq.heappop(linked)
        try:
            identity = _identity(os.path.join(root, folder))
            if identity in seen:
                continue
            seen.add(identity)
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            if not folder:
                raise
            _set_aside(tree, "a folder that can't be read", folder, error.strerror or "")
            continue
        files = tree.files[folder] = set()
        for entry in entries:
            name = entry.name
            kind = _kind(entry)
            if is_hidden(name):
                hidden.append(folder + name)
            elif not name.isascii() and not is_unicode(name):
                _set_aside(tree, "a name that is not UTF-8", folder + name)
            elif kind == "file":
                files.add(name)
            elif kind == "folder":
                pending.append(f"{folder}{name}/")
            elif kind == "linked folder":
                heapq.heappush(linked, f"{folder}{name}/")
            elif is_image(name):
                _set_aside(tree, "an image that is no file", folder + name, kind)
    if hidden:
        tree.notes.append(
            f"{count(len(hidden), 'hidden name')} left out, such as {printable(min(hidden))}."
        )
    return tree


def printable(name: str) -> str:
    """A file's name as text; bytes that are no UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry is, in words where it can't be used."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "linked folder" if entry.is_symlink() else "folder"
    except OSError as error:  # a link in a circle, or to where nobody may look
        return error.strerror or str(error)
    return "a link to nothing" if entry.is_symlink() else "a pipe, a socket or a device"


def _set_aside(tree: Tree, kind: str, name: str, detail: str = "") -> None:
    tree.problems.append(Problem(kind, printable(name), detail))


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _ancestors(folder: str) -> list[str]:
    """The folders above a folder, where it really is."""
    found, path = [], os.path.realpath(folder)
    while os.path.dirname(path) != path:
        path = os.path.dirname(path)
        found.append(path)
    return found
