"""Captions beside their images."""

from __future__ import annotations

import unicodedata

import pytest
from support.images import captioned, image

from sdxl_host.data.captions import Captions
from sdxl_host.data.folder import read_folder
from sdxl_host.data.problems import Problem
from sdxl_host.errors import DataError

NFC, NFD = (unicodedata.normalize(form, "Café é") for form in ("NFC", "NFD"))


def texts(folder):
    return {image.name: image.text for image in read_folder(folder).images}


def test_a_text_is_kept_as_it_is_written(folder):
    """What of it is learned is for the captions to say."""
    (captioned(folder, a="x") / "a.txt").write_bytes(b"\xef\xbb\xbf  a red\r\n\n cat \n")
    (found,) = read_folder(folder).images
    assert found.text == "  a red\r\n\n cat \n"
    assert Captions().variants(found) == ["a red cat"]


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".Txt", ".caption", ".CAPTION"])
@pytest.mark.parametrize("kind", ["png", "PNG", "jpg", "JPEG", "webp", "bmp", "gif", "tif", "TIFF"])
def test_suffixes_in_any_case_of_letters(folder, kind, suffix):
    image(folder / f"a.{kind}")
    (folder / f"a{suffix}").write_text("cat")
    assert texts(folder) == {f"a.{kind}": "cat"}


def test_avif_is_an_image(folder):
    (folder / "a.avif").write_bytes(b"")
    (folder / "a.txt").write_text("cat")
    assert texts(folder) == {"a.avif": "cat"}


def test_names_with_dots(folder):
    """The stem is all but the last suffix."""
    for name in ("a.b.png", "a.c.png"):
        image(folder / name)
        (folder / name).with_suffix(".txt").write_text(name)
    assert texts(folder) == {"a.b.png": "a.b.png", "a.c.png": "a.c.png"}


@pytest.mark.parametrize(("of_image", "of_text"), [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_two_spellings_of_an_accent_are_one_name(folder, of_image, of_text):
    """A Mac writes NFD, and what is unpacked elsewhere may be NFC. The id is the file's own."""
    image(folder / f"{of_image}.png")
    (folder / f"{of_text}.txt").write_text("cat")
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == [f"{of_image}.png"]
    assert listing.problems == listing.notes == []


def test_what_stands_alone_is_set_aside(folder):
    captioned(folder, a="cat")
    captioned(folder / "sub", a="cat")
    image(folder / "sub" / "b.png")
    (folder / "sub" / "c.txt").write_text("lonely")
    (folder / "b.txt").write_text("in another folder than b.png")
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == ["a.png", "sub/a.png"]
    assert listing.problems == [
        Problem("a caption without an image", "b.txt"),
        Problem("an image without a caption", "sub/b.png"),
        Problem("a caption without an image", "sub/c.txt"),
    ]


def test_images_of_one_stem_share_their_caption(folder):
    captioned(folder, a="cat", b="dog")
    for name in ("a.jpg", "a.webp"):
        image(folder / name)
    listing = read_folder(folder)
    assert [(image.name, image.text) for image in listing.images] == [
        ("a.jpg", "cat"),
        ("a.png", "cat"),
        ("a.webp", "cat"),
        ("b.png", "dog"),
    ]
    assert listing.notes == [
        "2 images share their caption with another of the same stem, such as a.png; each is taken."
    ]


def test_txt_comes_before_caption_and_small_letters_first(folder):
    captioned(folder, a="txt", b="x", c="small")
    (folder / "a.caption").write_text("caption")
    (folder / "b.txt").rename(folder / "b.TXT")
    (folder / "b.caption").write_text("caption")
    (folder / "c.TXT").write_text("large")
    listing = read_folder(folder)
    assert [image.text for image in listing.images] == ["txt", "x", "small"]
    assert listing.notes == [
        "3 images with several captions beside them, such as a.png; .txt comes before .caption, "
        "and the others are not read."
    ]
    assert listing.problems == []


def test_empty_captions_are_counted(folder):
    captioned(folder, a="cat", b="", c=" \n")
    assert read_folder(folder).notes == ["2 images with an empty caption, such as b.png."]


def test_a_caption_that_cant_be_read_is_set_aside_with_its_image(folder):
    captioned(folder, a="cat", b="x")
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == ["a.png"]
    (problem,) = listing.problems
    assert (problem.kind, problem.name) == ("a caption that can't be read", "b.txt")
    assert problem.detail.startswith("not UTF-8 text: 'utf-8' codec can't decode byte 0xff")


def test_more_captions_than_one_thread_reads_stay_with_their_images(folder, monkeypatch):
    monkeypatch.setattr("sdxl_host.data.sidecars._FILES_A_TASK", 3)
    for index in range(20):
        (folder / f"{index:02d}.png").touch()
        (folder / f"{index:02d}.txt").write_text(f"number {index}")
    assert texts(folder) == {f"{index:02d}.png": f"number {index}" for index in range(20)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: image(f / "a.png"), r"but 1 x an image without a caption \(a\.png\); put"),
        (lambda f: (f / "a.txt").touch(), r"but 1 x a caption without an image \(a\.txt\); put"),
        (lambda f: None, r"holds no captioned image; put images \(\.avif, .*each with a \.txt"),
    ],
)
def test_a_source_without_one_captioned_image_is_refused(folder, make, message):
    make(folder)
    with pytest.raises(DataError, match=rf"^data_path {folder}: .*{message}"):
        read_folder(folder)
