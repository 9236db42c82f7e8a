"""Reads a folder of images and their captions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from sdxl_host.data.captioned import Captioned
from sdxl_host.errors import DataError

__all__ = ["read_folder"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def read_folder(folder: Path) -> list[Captioned]:
    """The captioned images of a folder, sorted by name.

    Captions come from `metadata.jsonl` (`file_name`, `text`), else from the folder's one `.csv`
    (`dir`, `text`), else from a `.txt` file beside each image, in subfolders too.
    Raises DataError, naming file and remedy, for a folder without images, a caption without its
    image and an image without its caption.
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
            f"data_path {folder}: holds no captioned image; put images "
            f"({', '.join(IMAGE_SUFFIXES)}) there, each with a .txt beside it, or a "
            "metadata.jsonl or a .csv"
        )
    names = [image.name for image in found]
    for name in names:
        if len(set(names)) < len(names) and names.count(name) > 1:
            raise DataError(f"data_path {folder}: {name} is captioned twice; keep one caption")
    return sorted(found, key=lambda image: image.name)


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


def _from_row(table: Path, number: int, row: object, image: str, caption: str) -> Captioned:
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in (image, caption)):
        raise DataError(f"{table}, line {number}: needs the texts {image} and {caption}")
    file = table.parent / row[image]
    if not file.is_file():
        raise DataError(
            f"{table}, line {number}: names the image {row[image]}, which is not there; add "
            "the image or remove the line"
        )
    return Captioned(row[image], str(file), row[caption])


def _from_sidecars(folder: Path) -> Iterator[Captioned]:
    images = {f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()}
    for text in sorted(folder.rglob("*.txt")):
        if not any(text.with_suffix(suffix) in images for suffix in _spellings(images)):
            raise DataError(
                f"{text}: a caption without its image; add the image or remove the file"
            )
    for image in sorted(images):
        sidecar = image.with_suffix(".txt")
        if not sidecar.is_file():
            raise DataError(f"{image}: has no caption; write one to {sidecar.name} beside it")
        name = image.relative_to(folder).as_posix()
        yield Captioned(name, str(image), _text(sidecar))


def _spellings(images: set[Path]) -> set[str]:
    return {image.suffix for image in images}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't be read as UTF-8 text: {error}") from error
