"""Which captioned images a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.images import captioned, image

from sdxl_host.data.captions import Captions
from sdxl_host.data.folder import read_folder
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
    found = read_folder(folder)
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
    (found,) = read_folder(folder)
    assert found.text.split() == ["a", "red", "cat"]


def test_a_quoted_caption_of_a_csv_may_have_two_lines(folder):
    image(folder / "a.png")
    FORMS["csv"](folder, {"a.png": "a red\ncat"})
    assert read_folder(folder)[0].text.split() == ["a", "red", "cat"]


def test_a_sidecar_of_several_lines_is_one_caption(folder):
    (captioned(folder, a="x") / "a.txt").write_text("  a red\n\n cat \n")
    assert Captions().variants(read_folder(folder)[0]) == ["a red cat"]


@pytest.mark.parametrize("form", FORMS)
def test_a_byte_order_mark_is_not_part_of_the_text(folder, form):
    image(folder / "a.png")
    FORMS[form](folder, {"a.png": "cat"})
    (file,) = [f for f in folder.iterdir() if f.suffix != ".png"]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [(p.name, p.text.strip()) for p in read_folder(folder)] == [("a.png", "cat")]


def test_empty_lines_of_a_table_are_skipped(folder):
    image(folder / "a.png")
    (folder / "metadata.jsonl").write_text('\n{"file_name": "a.png", "text": "x"}\n\n')
    assert len(read_folder(folder)) == 1


def test_metadata_comes_before_a_table_comes_before_sidecars(folder):
    captioned(folder, a="from the sidecar")
    assert read_folder(folder)[0].text == "from the sidecar"
    as_csv(folder, {"a.png": "from the table"})
    assert read_folder(folder)[0].text == "from the table"
    as_jsonl(folder, {"a.png": "from metadata"})
    assert read_folder(folder)[0].text == "from metadata"


def test_names_with_dots_and_upper_case_suffixes(folder):
    for name in ("a.b.png", "C.JPG"):
        image(folder / name)
    (folder / "a.b.txt").write_text("one")
    (folder / "C.txt").write_text("two")
    assert [(p.name, p.text) for p in read_folder(folder)] == [
        ("C.JPG", "two"),
        ("a.b.png", "one"),
    ]


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
        (
            "metadata.jsonl",
            '\n{"file_name": "none.png", "text": "x"}',
            r"metadata\.jsonl, line 2: names the image none\.png, which is not there; add",
        ),
        ("metadata.jsonl", "\n", r"^data_path .*holds no captioned image"),
        (
            "t.csv",
            "dir,text\na.png,x\nnone.png,y\n",
            r"t\.csv, line 3: names the image none\.png",
        ),
        (
            "t.csv",
            'dir,text\na.png,"x\ny"\nno.png,y\n',
            r"t\.csv, line 4: names the image no\.png",
        ),
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
        ("b.txt", "lonely", r"b\.txt: a caption without its image; add the image or remove"),
        ("sub/a.txt", "lonely", r"sub/a\.txt: a caption without its image"),
    ],
)
def test_a_table_that_cant_be_used_is_named_with_the_line(folder, file, text, message):
    captioned(folder, a="cat")
    (folder / "sub").mkdir()
    (folder / file).write_text(text)
    refuse(folder, message)


@pytest.mark.parametrize("file", ["metadata.jsonl", "t.csv", "a.txt"])
def test_captions_that_are_not_utf8_are_named(folder, file):
    captioned(folder, a="cat")
    (folder / file).write_bytes(b"\xff\xfe")
    refuse(folder, rf"{file}: can't be read as UTF-8 text")


def test_two_tables_are_refused(folder):
    captioned(folder, a="cat")
    for name in ("one.csv", "two.csv"):
        (folder / name).write_text("dir,text\na.png,x\n")
    refuse(folder, r"^data_path .*holds 2 caption tables \(one\.csv, two\.csv\); leave one")


def test_a_image_without_a_caption_is_named(folder):
    image(captioned(folder, a="cat") / "sub" / "b.png")
    refuse(folder, r"sub/b\.png: has no caption; write one to b\.txt beside it")


def test_an_empty_folder_is_refused_with_what_belongs_there(folder):
    refuse(folder, r"^data_path .*images: holds no captioned image; put .*\.png.*metadata\.jsonl")


def test_a_folder_that_is_not_there_is_refused(folder):
    refuse(folder / "none", r"^data_path .*none: there is no such folder")
    refuse(image(folder / "a.png"), r"^data_path .*a\.png: there is no such folder")
