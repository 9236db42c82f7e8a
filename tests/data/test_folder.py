"""Which captioned images a folder holds."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from support.images import captioned, image

from sdxl_host.data.captions import Captions
from sdxl_host.data.folder import read_folder
from sdxl_host.data.problems import Problem
from sdxl_host.errors import DataError


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read_folder(folder)
    assert "\n" not in str(refused.value)


def as_jsonl(folder: Path, captions: dict[str, str]) -> None:
    lines = [
        json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in captions.items()
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def as_csv(folder: Path, captions: dict[str, str]) -> None:
    rows = [f'"{name}","{text}"' for name, text in captions.items()]
    (folder / "table.csv").write_text("\n".join(["dir,text", *rows]) + "\n", "utf-8")


def as_sidecars(folder: Path, captions: dict[str, str]) -> None:
    for name, text in captions.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n", "utf-8")


FORMS = {"jsonl": as_jsonl, "csv": as_csv, "sidecars": as_sidecars}


@pytest.mark.parametrize("form", FORMS)
def test_the_three_forms_give_the_same(folder, form):
    """Sorted by name, which is the id; captions stripped; subfolders too; any script."""
    captions = {
        "z.png": "a cat",
        "b/c.jpg": " 猫, ein „Kater“ ",
        "a.webp": "a dog, running",
        "B.PNG": "",
    }
    for name in captions:
        image(folder / name)
    FORMS[form](folder, captions)
    found = read_folder(folder).images
    assert [(p.name, Captions().variants(p)) for p in found] == sorted(
        (n, [t.strip()]) for n, t in captions.items()
    )
    assert all(p.file == str(folder / p.name) for p in found)


@pytest.mark.parametrize(
    ("form", "mark"),
    [
        *(("jsonl", mark) for mark in "\u2028\u2029\x85"),
        *(("csv", mark) for mark in "\u2028\u2029\x85\x0b\x0c\x1c"),
    ],
)
def test_only_a_line_feed_ends_a_line_of_a_table(folder, form, mark):
    """JSON may hold these characters as they are, and texts from the web do."""
    image(folder / "a.png")
    FORMS[form](folder, {"a.png": f"a red{mark}cat"})
    (found,) = read_folder(folder).images
    assert found.text.split() == ["a", "red", "cat"]


def test_a_quoted_caption_of_a_csv_may_have_two_lines(folder):
    image(folder / "a.png")
    FORMS["csv"](folder, {"a.png": "a red\ncat"})
    assert read_folder(folder).images[0].text.split() == ["a", "red", "cat"]


@pytest.mark.parametrize("form", FORMS)
def test_a_byte_order_mark_is_not_part_of_the_text(folder, form):
    image(folder / "a.png")
    FORMS[form](folder, {"a.png": "cat"})
    (file,) = [f for f in folder.iterdir() if f.suffix != ".png"]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [(p.name, p.text.strip()) for p in read_folder(folder).images] == [("a.png", "cat")]


def test_empty_lines_of_a_table_are_skipped(folder):
    image(folder / "a.png")
    (folder / "metadata.jsonl").write_text('\n{"file_name": "a.png", "text": "x"}\n\n')
    assert len(read_folder(folder).images) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n{"file',
            r"jsonl, line 2: not valid JSON",
        ),
        ("metadata.jsonl", "[1]", r"metadata\.jsonl, line 1: needs the texts file_name and text"),
        ("metadata.jsonl", '{"file_name": "a.png"}', r"jsonl, line 1: needs the texts"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', r"jsonl, line 1: needs the texts"),
        ("metadata.jsonl", "\n", r"^data_path .*holds no captioned image"),
        (
            "t.csv",
            "file,text\na.png,x\n",
            r"t\.csv: its first line must name the columns dir and text",
        ),
        ("t.csv", "dir\na.png\n", r"t\.csv: its first line must name the columns dir and text"),
        ("t.csv", "", r"t\.csv: its first line must name the columns"),
        ("t.csv", "dir,text\na.png\n", r"t\.csv, line 2: needs the texts dir and text"),
        (
            "t.csv",
            "dir,text\na.png,x\na.png,y\n",
            r"^data_path .*: a\.png is captioned twice; keep one",
        ),
        (
            "t.csv",
            'dir,text\na.png,"x"y\n',
            r"t\.csv, line 2: not valid CSV: ',' expected",
        ),
        (
            "t.csv",
            'dir,text\na.png,"x\nb.png,y\n',
            r"t\.csv, line 3: not valid CSV: unexpected end of data; mend",
        ),
        (
            "t.csv",
            "dir,text\na.png,a dog, running\n",
            r"t\.csv, line 2: has more columns than the first line; put quotes around",
        ),
    ],
)
def test_a_table_that_cant_be_used_is_named_with_the_line(folder, file, text, message):
    captioned(folder, a="cat")
    (folder / file).write_text(text)
    refuse(folder, message)


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv", "t.csv"])
def test_captions_that_are_not_utf8_are_named(folder, file):
    captioned(folder, a="cat")
    (folder / file).write_bytes(b"\xff\xfe")
    refuse(folder, rf"{file}: can't be read as UTF-8 text")


def test_several_tables_are_refused(folder):
    captioned(folder, a="cat")
    for name in ("one.csv", "two.CSV"):
        (folder / name).write_text("dir,text\na.png,x\n")
    refuse(folder, r"^data_path .*holds 2 caption tables \(one\.csv, two\.CSV\); leave one")
    for index in range(1000):
        (folder / f"{index}.csv").touch()
    refuse(folder, r"holds 1002 caption tables \(0\.csv, 1\.csv, 10\.csv, \.\.\.\); leave one")


# ---- which form is taken


def write_shard(folder: Path, text: str) -> None:
    with tarfile.open(folder / "0.tar", "w") as shard:
        for name, content in {"a.png": b"", "a.txt": text.encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def test_the_order_of_precedence(folder):
    """Each form is taken in the presence of all that come after it, which are named."""
    found, notes = [], []

    def read() -> None:
        listing = read_folder(folder)
        found.extend((image.name, image.text) for image in listing.images)
        notes.extend(listing.notes)

    write_shard(folder, "from a shard")
    read()
    captioned(folder, a="from a sidecar")
    read()
    as_csv(folder, {"a.png": "from a table"})
    read()
    as_jsonl(folder, {"a.png": "from metadata"})
    read()
    assert found == [
        ("0.tar/a.png", "from a shard"),
        ("a.png", "from a sidecar"),
        ("a.png", "from a table"),
        ("a.png", "from metadata"),
    ]
    assert notes == [
        "1 file not read, such as 0.tar, because captions beside images come before.",
        "2 files not read, such as 0.tar, because table.csv comes before.",
        "3 files not read, such as table.csv, because metadata.jsonl comes before.",
    ]


def test_shards_are_read_beside_images_that_have_no_caption(folder):
    write_shard(folder, "from a shard")
    image(folder / "preview.png")
    listing = read_folder(folder)
    assert [image.text for image in listing.images] == ["from a shard"]
    assert listing.problems == [Problem("an image without a caption", "preview.png")]


def test_files_in_formats_that_are_not_read_are_counted(folder):
    captioned(folder, a="cat")
    for name in ("b.heic", "c.SVG", "d.ogg"):
        (folder / name).touch()
    assert read_folder(folder).notes == ["2 files in formats that are not read, such as b.heic."]


@pytest.mark.parametrize("form", FORMS)
def test_empty_captions_are_counted(folder, form):
    texts = {"a.png": "cat", "b.png": "", "c.png": "  "}
    for name in texts:
        image(folder / name)
    FORMS[form](folder, texts)
    assert read_folder(folder).notes == ["2 images with an empty caption, such as b.png."]


# ---- what is no source


def test_an_empty_folder_is_refused_with_what_belongs_there(folder):
    refuse(
        folder,
        r"^data_path .*images: holds no captioned image; put .*\.png.*metadata\.jsonl, a \.csv or",
    )


def test_what_is_no_folder_is_refused(folder):
    refuse(folder / "none", r"^data_path .*none: there is no such folder, nor a \.tar file")
    refuse(folder / "none.tar", r"^data_path .*none\.tar: there is no such folder, nor a \.tar")
    refuse(image(folder / "a.png"), r"^data_path .*a\.png: there is no such folder, nor a \.tar")


def test_a_folder_that_cant_be_read_is_refused(folder, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    refuse(folder, r"^data_path .*images: can't be read \(Permission denied\); make it readable")
