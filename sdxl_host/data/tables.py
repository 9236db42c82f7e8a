"""Captions in tables: `metadata.jsonl`, `metadata.csv`, or another csv."""

from __future__ import annotations

import csv
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.problems import Listing, Problem
from sdxl_host.data.tree import Tree, is_image, is_unicode, same_name
from sdxl_host.errors import DataError

__all__ = ["NAMELESS", "from_tables"]

NAMELESS = "an image that no line names"
_MISSING = "a line that names no file"

# The column that names the image: Hugging Face's word, or MindONE's.
_COLUMNS = ("file_name", "dir")

Row = tuple[int, Mapping[str, Any], str]


def from_tables(tree: Tree, tables: Sequence[str]) -> Listing:
    """The images that the lines of these tables name. Each table names those of its own folder.

    Raises DataError, naming the table and the line, for a line that can't be understood, or that
    names what is outside of the tree.
    """
    listing = Listing([])
    found = _Files(tree)
    for table in tables:
        file = tree.root + table
        base = table[: table.rfind("/") + 1]
        rows = _jsonl(file) if table.endswith(".jsonl") else _csv(file)
        for number, row, column in rows:
            where = f"{file}, line {number}"
            written, text, repeats = _fields(where, row, column)
            name = found.claim(_inside(where, base, written))
            if name is None:
                listing.problems.append(Problem(_MISSING, written, f"{table}, line {number}"))
            else:
                listing.images.append(Captioned(name, tree.root + name, text, None, repeats))
    listing.problems.extend(Problem(NAMELESS, name) for name in found.unclaimed_images())
    return listing


class _Files:
    """The files of a tree that no line has named yet."""

    def __init__(self, tree: Tree) -> None:
        self._root = tree.root
        self._left = {folder: set(names) for folder, names in tree.files.items()}
        self._spelt: dict[str, str] | None = None

    def claim(self, path: str) -> str | None:
        """The path of the file that a line means, or None where there is no such file."""
        folder = path[: path.rfind("/") + 1]
        name = path[len(folder) :]
        left = self._left.get(folder, ())
        if name in left:
            left.remove(name)
            return path
        # Named before, hidden, or below a link to a folder that goes by another name.
        if os.path.isfile(self._root + path):
            return path
        if path.isascii():
            return None
        if self._spelt is None:
            self._spelt = {
                same_name(folder + name): folder + name
                for folder, names in self._left.items()
                for name in names
                if not (folder + name).isascii()
            }
        other = self._spelt.get(same_name(path))
        if other is not None:
            folder = other[: other.rfind("/") + 1]
            self._left[folder].discard(other[len(folder) :])
        return other

    def unclaimed_images(self) -> list[str]:
        """The paths of the images that are left, sorted."""
        return sorted(
            folder + name for folder, left in self._left.items() for name in left if is_image(name)
        )


def _jsonl(table: str) -> Iterator[Row]:
    try:
        # Only a line feed ends a line: universal newlines, and str.splitlines, would break others.
        with open(table, encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{table}, line {number}: not valid JSON: {error}") from error
                yield number, row if isinstance(row, dict) else {}, _COLUMNS[0]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: can't be read as UTF-8 text: {error}") from error


def _csv(table: str) -> Iterator[Row]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as lines:
            # strict: a quotation mark that is never closed would swallow the rows after it.
            rows = csv.DictReader(lines, strict=True)
            named = rows.fieldnames or ()
            column = next((name for name in _COLUMNS if name in named), "")
            if not column or "text" not in named:
                raise DataError(
                    f"{table}: its first line must name the columns dir and text, or file_name and "
                    "text"
                )
            try:
                for row in rows:
                    if None in row:
                        raise DataError(
                            f"{table}, line {rows.line_num}: has more columns than the first line; "
                            "put quotes around a text that holds a comma"
                        )
                    yield rows.line_num, row, column
            except csv.Error as error:
                raise DataError(
                    f"{table}, line {rows.reader.line_num}: not valid CSV: {error}; mend the line, "
                    "or use a metadata.jsonl"
                ) from error
    except csv.Error as error:
        raise DataError(f"{table}, line 1: not valid CSV: {error}; mend the line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: can't be read as UTF-8 text: {error}") from error


def _fields(
    where: str, row: Mapping[str, Any], column: str
) -> tuple[str, str | tuple[str, ...], int]:
    """The image's name, its text or texts, and its repeats, of one line."""
    name, text = row.get(column), row.get("text")
    if isinstance(text, list) and text and all(isinstance(one, str) for one in text):
        text = tuple(text)
    if not isinstance(name, str) or not isinstance(text, str | tuple):
        raise DataError(
            f"{where}: needs the texts {column} and text; text may be a list of several"
        )
    whole = name + (text if isinstance(text, str) else "".join(text))
    if not whole.isascii() and not is_unicode(whole):
        raise DataError(
            f"{where}: holds half of a character, a surrogate without its other; mend the line"
        )
    return name, text, _repeats(where, row)


def _repeats(where: str, row: Mapping[str, Any]) -> int:
    written = row.get("repeats")
    if written is None or written == "":
        return 1
    number = written
    if isinstance(written, str) and written.strip().isdecimal() and len(written) < 10:
        number = int(written)
    if type(number) is not int or number < 1:
        raise DataError(
            f"{where}: repeats is {written!r}; give a whole number, 1 or more, or leave it out"
        )
    return number


def _inside(where: str, base: str, written: str) -> str:
    """The path inside the tree of what a line in the folder `base` names. Raises DataError."""
    path = base + written
    if written.startswith("/"):
        path = ".."
    elif "./" in path or "//" in path:
        path = posixpath.normpath(path)
    if path == ".." or path.startswith("../"):
        raise DataError(
            f"{where}: names {written}, which is outside of the folder; move the image into the "
            "folder, and name it by its path there"
        )
    return path
