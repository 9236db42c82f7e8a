"""Captions in tables: metadata.jsonl, metadata.csv, and MindONE's csv."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from support.images import captioned, image

from sdxl_host.data.folder import read_folder
from sdxl_host.data.problems import Problem
from sdxl_host.errors import DataError

NFC, NFD = (unicodedata.normalize(form, "Café é") for form in ("NFC", "NFD"))


def jsonl(folder, *rows: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")


def line(name: str, text: Any = "cat", **others: Any) -> dict[str, Any]:
    return {"file_name": name, "text": text, **others}


def refuse(folder, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read_folder(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metadata.csv", "file_name,text\na.png,cat\n"),
        ("metadata.csv", "dir,text\na.png,cat\n"),
        ("any.csv", "file_name,text\na.png,cat\n"),
        ("any.CSV", "text,more,dir\ncat,5,a.png\n"),
        ("any.csv", '"dir","text"\r\n"a.png","cat"\r\n'),
        ("metadata.jsonl", '{"text": "cat", "width": 5, "file_name": "a.png"}\r\n'),
        ("metadata.jsonl", '{"text": "cat", "file_name": "./a.png"}'),
        ("metadata.jsonl", '{"text": "cat",\r"file_name": "a.png"}'),
        ("metadata.jsonl", '{"text": "cat", "file_name": "sub/.././/a.png"}'),
    ],
)
def test_columns_that_name_an_image_and_its_text(folder, file, text):
    """Its id is the path of the file, however a line spells it."""
    image(folder / "a.png")
    (folder / file).write_text(text)
    assert [(image.name, image.text) for image in read_folder(folder).images] == [("a.png", "cat")]


def test_an_image_may_have_any_suffix_and_be_hidden_where_a_line_names_it(folder):
    (folder / ".hidden").mkdir()
    for name in ("a.data", ".b.png", ".hidden/c.png"):
        image(folder / "x.png").rename(folder / name)
    jsonl(folder, line("a.data"), line(".b.png"), line(".hidden/c.png"))
    listing = read_folder(folder)
    assert {image.name for image in listing.images} == {"a.data", ".b.png", ".hidden/c.png"}
    assert listing.problems == []


def test_a_list_of_texts_gives_alternatives(folder):
    for name in "abc":
        image(folder / f"{name}.png")
    jsonl(folder, line("a.png", ["one", "two"]), line("b.png", ["one"]), line("c.png", "one"))
    assert [image.text for image in read_folder(folder).images] == [("one", "two"), ("one",), "one"]


def test_repeats(folder):
    for name in "abcd":
        image(folder / f"{name}.png")
    rows = [line("a.png"), line("b.png", repeats=1), line("c.png", repeats=20)]
    jsonl(folder, *rows, line("d.png", repeats=None))
    assert [image.repeats for image in read_folder(folder).images] == [1, 1, 20, 1]
    (folder / "metadata.jsonl").unlink()
    (folder / "t.csv").write_text("dir,text,repeats\na.png,x,3\nb.png,x,\nc.png,x, 12 \n")
    assert [image.repeats for image in read_folder(folder).images] == [3, 1, 12]


@pytest.mark.parametrize("repeats", [0, -1, 1.5, 2.0, True, "two", [2]])
def test_repeats_that_are_no_count_are_refused(folder, repeats):
    image(folder / "a.png")
    jsonl(folder, line("a.png"), line("a.png", repeats=repeats))
    refuse(folder, r"metadata\.jsonl, line 2: repeats is .*; give a whole number, 1 or more, or")


def test_images_that_no_line_names_are_set_aside(folder):
    for name in ("a.png", "b.png", "sub/c.webp"):
        image(folder / name)
    jsonl(folder, line("a.png"))
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == ["a.png"]
    kind = "an image that no line names"
    assert listing.problems == [Problem(kind, "b.png"), Problem(kind, "sub/c.webp")]


@pytest.mark.parametrize("name", ["no.png", "", "sub", "pipe\0.png", "sub/..", "Ä.png"])
def test_lines_that_name_no_file_are_set_aside(folder, name):
    image(folder / "a.png")
    (folder / "sub").mkdir()
    jsonl(folder, line("a.png"), line(name))
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == ["a.png"]
    assert listing.problems == [
        Problem("a line that names no file", name, "metadata.jsonl, line 2")
    ]


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "sub/../../a.png", "..", "./../a.png"])
def test_a_line_that_names_what_is_outside_is_refused(folder, name):
    image(folder.parent / "a.png")
    image(folder / "a.png")
    jsonl(folder, line("a.png"), line(name))
    refuse(
        folder,
        rf"metadata\.jsonl, line 2: names {name}, which is outside of the folder; move the image",
    )


@pytest.mark.parametrize("name", ["a.png", "./a.png"])
def test_an_image_that_is_captioned_twice_is_refused(folder, name):
    """Whatever its two lines call it."""
    image(folder / "a.png")
    jsonl(folder, line("a.png"), line(name, "dog"))
    refuse(folder, r"^data_path .*: a\.png is captioned twice; keep one caption")


@pytest.mark.parametrize(("of_file", "of_line"), [(NFC, NFD), (NFD, NFC)])
def test_two_spellings_of_an_accent_are_one_name(folder, of_file, of_line):
    image(folder / of_file / f"{of_file}.png")
    jsonl(folder, line(f"{of_line}/{of_line}.png"))
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == [f"{of_file}/{of_file}.png"]
    assert listing.problems == []
    jsonl(folder, line(f"{of_line}/{of_line}.png"), line(f"{of_line}/{of_line}.png"))
    refuse(folder, "is captioned twice")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r'{"file_name": "a.png", "text": []}', "needs the texts file_name and text; text may be"),
        (r'{"file_name": "a.png", "text": ["x", 5]}', "needs the texts file_name and text"),
        (r'{"file_name": ["a.png"], "text": "x"}', "needs the texts file_name and text"),
        (r'{"file_name": "a.png", "text": "\ud83d"}', "holds half of a character"),
        (r'{"file_name": "\ud83d.png", "text": "x"}', "holds half of a character"),
        ("[" * 100_000, "not valid JSON"),
        ('{"file_name": "a.png", "text": "x"} {}', "not valid JSON: Extra data"),
    ],
)
def test_a_line_that_cant_be_understood_is_refused(folder, text, message):
    image(folder / "a.png")
    (folder / "metadata.jsonl").write_text(f"\n{text}\n")
    refuse(folder, rf"metadata\.jsonl, line 2: {message}")


def test_bytes_that_are_no_utf8_are_refused_wherever_they_stand(folder):
    image(folder / "a.png")
    row = json.dumps(line("a.png")).encode() + b"\n"
    (folder / "metadata.jsonl").write_bytes(row * 5000 + b"\xff")
    refuse(folder, r"metadata\.jsonl: can't be read as UTF-8 text")


# ---- metadata in subfolders


def test_a_metadata_file_names_the_images_of_its_own_folder(folder):
    for name in ("a.png", "one/a.png", "one/two/a.png"):
        image(folder / name)
    jsonl(folder, line("a.png", "top"))
    jsonl(folder / "one", line("a.png", "below"), line("two/a.png", "far below"))
    assert {image.name: image.text for image in read_folder(folder).images} == {
        "a.png": "top",
        "one/a.png": "below",
        "one/two/a.png": "far below",
    }


def test_a_line_may_name_an_image_above_its_table(folder):
    image(folder / "images" / "a.png")
    jsonl(folder / "captions", line("../images/a.png"))
    assert [image.name for image in read_folder(folder).images] == ["images/a.png"]


def test_below_train_alone_is_read_where_the_top_has_no_table(folder):
    """Hugging Face's folder of splits: nobody trains on `test`."""
    for split in ("train", "test"):
        image(folder / split / "a.png")
        jsonl(folder / split, line("a.png", split))
    listing = read_folder(folder)
    assert [(image.name, image.text) for image in listing.images] == [("train/a.png", "train")]
    assert listing.problems == []
    assert listing.notes == ["2 files outside of train/ not read."]
    jsonl(folder)
    assert [image.text for image in read_folder(folder).images] == ["test", "train"]


def test_of_one_folder_jsonl_comes_before_csv(folder):
    captioned(folder, a="from the sidecar")
    (folder / "metadata.csv").write_text("file_name,text\na.png,from the csv\n")
    assert [image.text for image in read_folder(folder).images] == ["from the csv"]
    jsonl(folder, line("a.png", "from the jsonl"))
    listing = read_folder(folder)
    assert [image.text for image in listing.images] == ["from the jsonl"]
    assert listing.notes == [
        "2 files not read, such as metadata.csv, because metadata.jsonl comes before."
    ]
