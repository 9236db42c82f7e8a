"""Which pictures a folder holds and what their captions are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdxl_host.errors import DataError

__all__ = ["Captioned", "read_folder"]

PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Captioned:
    """One picture: its name inside the folder, which is its id, its file and its caption."""

    name: str
    file: Path
    caption: str


def read_folder(folder: Path) -> list[Captioned]:
    """The captioned pictures of a folder, sorted by name.

    Captions come from `metadata.jsonl` (`file_name`, `text`), else from the folder's one `.csv`
    (`dir`, `text`), else from a `.txt` file beside each picture, in subfolders too. Whitespace in
    them, line ends included, becomes single spaces.
    Raises DataError, naming file and remedy, for a folder without pictures, a caption without its
    picture and a picture without its caption.
    """
    if not folder.is_dir():
        raise DataError(f"data_path {folder}: there is no such folder")
    tables = sorted(folder.glob("*.csv"))
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        found = list(_from_jsonl(metadata))
    elif len(tables) == 1:
        found = list(_from_csv(tables[0]))
    elif tables:
        raise DataError(
            f"data_path {folder}: holds {len(tables)} caption tables "
            f"({', '.join(table.name for table in tables)}); leave one"
        )
    else:
        found = list(_from_sidecars(folder))
    if not found:
        raise DataError(
            f"data_path {folder}: holds no captioned picture; put pictures "
            f"({', '.join(PICTURE_SUFFIXES)}) there, each with a .txt beside it, or a "
            "metadata.jsonl or a .csv"
        )
    names = [picture.name for picture in found]
    for name in names:
        if len(set(names)) < len(names) and names.count(name) > 1:
            raise DataError(f"data_path {folder}: {name} is captioned twice; keep one caption")
    return sorted(found, key=lambda picture: picture.name)


def _from_jsonl(table: Path) -> Iterator[Captioned]:
    # Only a line feed ends a line: str.splitlines would break texts at U+2028 and its like.
    for number, line in enumerate(_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{table}, line {number}: not valid JSON: {error}") from error
        yield _from_row(table, number, row, "file_name", "text")


def _from_csv(table: Path) -> Iterator[Captioned]:
    # strict: a quotation mark that is never closed would swallow the rows after it.
    rows = csv.DictReader(io.StringIO(_text(table), newline=""), strict=True)
    try:
        if not {"dir", "text"} <= set(rows.fieldnames or ()):
            raise DataError(f"{table}: its first line must name the columns dir and text")
        for row in rows:
            if None in row:
                raise DataError(
                    f"{table}, line {rows.line_num}: has more columns than the first line; put "
                    "quotes around a text that holds a comma"
                )
            yield _from_row(table, rows.line_num, row, "dir", "text")
    except csv.Error as error:
        raise DataError(
            f"{table}, line {rows.reader.line_num}: not valid CSV: {error}; mend the line, or use "
            "a metadata.jsonl"
        ) from error


def _from_row(table: Path, number: int, row: object, picture: str, caption: str) -> Captioned:
    if not isinstance(row, dict) or not all(
        isinstance(row.get(k), str) for k in (picture, caption)
    ):
        raise DataError(f"{table}, line {number}: needs the texts {picture} and {caption}")
    file = table.parent / row[picture]
    if not file.is_file():
        raise DataError(
            f"{table}, line {number}: names the picture {row[picture]}, which is not there; add "
            "the picture or remove the line"
        )
    return Captioned(row[picture], file, _one_line(row[caption]))


def _from_sidecars(folder: Path) -> Iterator[Captioned]:
    pictures = {
        f for f in folder.rglob("*") if f.suffix.lower() in PICTURE_SUFFIXES and f.is_file()
    }
    for text in sorted(folder.rglob("*.txt")):
        if not any(text.with_suffix(suffix) in pictures for suffix in _spellings(pictures)):
            raise DataError(
                f"{text}: a caption without its picture; add the picture or remove the file"
            )
    for picture in sorted(pictures):
        sidecar = picture.with_suffix(".txt")
        if not sidecar.is_file():
            raise DataError(f"{picture}: has no caption; write one to {sidecar.name} beside it")
        name = picture.relative_to(folder).as_posix()
        yield Captioned(name, picture, _one_line(_text(sidecar)))


def _spellings(pictures: set[Path]) -> set[str]:
    return {picture.suffix for picture in pictures}


def _one_line(caption: str) -> str:
    return " ".join(caption.split())


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't be read as UTF-8 text: {error}") from error
