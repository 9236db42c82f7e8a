"""`sdxl-host data`: a folder of everything that people have, and what is said of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import captioned, image
from support.mixed_folder import bad_files, good_files
from support.profiles import DISPLAY_P3_2_2

from sdxl_host.cli import main
from sdxl_host.data.captioned import Captioned
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.data.problems import Listing


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["data", *words]) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


def test_a_folder_of_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the shapes by hand: of 20x30, 1 - 20/30 is cropped off; of the spacer 1 - 1/800, and of
    40x10 1 - 10/40."""
    folder = tmp_path / "all"
    folder.mkdir()
    sizes, kinds = good_files(folder), bad_files(folder)
    listed = [Captioned(f.name, str(f), f"a {f.stem}") for f in sorted(folder.iterdir())]
    monkeypatch.setattr(Text2ImageDataset, "list_images", lambda self, source: Listing(listed))

    made: list[Text2ImageDataset] = []
    original = Text2ImageDataset.check

    def check(self: Text2ImageDataset, *given: Any) -> None:
        original(self, *given)
        made.append(self)

    monkeypatch.setattr(Text2ImageDataset, "check", check)
    lines = said(capsys, str(folder), "--resolution", "16").splitlines()

    (dataset,) = made
    found = dataset.heights_and_widths.tolist()
    assert {i.name: tuple(s) for i, s in zip(dataset.images, found, strict=True)} == sizes
    assert {problem.name: problem.kind for problem in dataset.problems} == kinds
    assert lines[0] == f"data        {len(sizes)} captioned images"
    assert lines[1] == "set aside   10"
    assert lines[2].startswith(
        "            2 x a file that is no image (eps.png: it begins with b'%!PS"
    )
    assert "            1 x an empty image file (empty.png: it is empty)" in lines
    special = "2 x not a file, but a pipe, device or folder (pipe.png: a pipe; zero.png: a device)"
    assert f"            {special}" in lines
    assert [line for line in lines if line.startswith("note")] == [
        "note        1 image holds several frames, of which the first is taken (moving.gif)",
        "note        1 image has a colour profile that can't be used; the colours are taken for "
        "sRGB (wrong_profile.png)",
    ]
    lost = 11 * (1 - 20 / 30) + (1 - 1 / 800) + (1 - 10 / 40)
    place = lines.index("sizes       median 20x30, height x width")
    assert lines[place + 1 : place + 5] == [
        "            smallest 40x10 (tall.png)",
        "            largest 1x800 (spacer.png)",
        f"square crop loses {100 * lost / 13:.1f} % of an image's pixels on average",
        "            and 99.9 % of spacer.png, the most",
    ]
    table = [line.split() for line in lines[place + 7 : place + 11]]
    assert table == [
        ["below", "1:2", "1", "##"],
        ["2:3", "to", "4:5", "1", "##"],
        ["3:2", "to", "2:1", "10", "##################"],
        ["from", "2:1", "1", "##"],
    ]
    assert lines[-1] == "drawn       data.png"
    with Image.open("data.png") as sheet:
        assert sheet.size[0] > 4 * 128


def test_the_sheet_shows_what_the_network_gets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cropped, on white, in sRGB."""
    folder = tmp_path / "two"
    folder.mkdir()
    Image.new("RGB", (60, 40), (200, 30, 30)).save(folder / "a.png", icc_profile=DISPLAY_P3_2_2)
    Image.new("RGBA", (40, 60), (0, 0, 0, 51)).save(folder / "b.png")
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    said(capsys, str(folder), "--resolution", "128", "--out", "sheet.png")
    with Image.open("sheet.png") as sheet:
        first, second = sheet.getpixel((72, 72)), sheet.getpixel((72 + 136, 72))
    assert np.abs(np.subtract(first, (220, 0, 0))).max() <= 2
    assert second == (204, 204, 204)


def test_with_buckets_it_counts_them_and_shows_their_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shapes"
    for name, size in {"a": (80, 40), "b": (40, 40), "c": (60, 30)}.items():
        image(folder / f"{name}.png", *size)
        (folder / f"{name}.txt").write_text(name)
    text = said(capsys, str(folder), "--resolution", "64", "--buckets", "True", "--out", "b.png")
    assert "buckets     2, each a shape of its own that is compiled once" in text
    assert "96x64: 2 images, of which cropping takes 25.0%" in text
    assert "64x64: 1 images, of which cropping takes 0.0%" in text


def test_captions_are_counted_in_tokens(tmp_path: Path, capsys: Any) -> None:
    folder = captioned(tmp_path / "three", a="a cat", b=" ".join(["cat"] * 200), c="a cat")
    lines = said(capsys, str(folder), "--resolution", "8").splitlines()
    assert lines[-5:-1] == [
        "captions    2 different ones, median 101 tokens",
        "            longest 200 tokens (b.png)",
        "            1 are cut at 77 tokens, of which 75 are theirs",
        "            125 of all 202 tokens are lost; --lpw True keeps them",
    ]


def test_what_cant_be_done_is_refused_before_an_image_is_opened(
    tmp_path: Path, capsys: Any
) -> None:
    folder = captioned(tmp_path / "one", a="a cat")
    assert "--out x.jpg: must end with .png" in said(capsys, str(folder), "--out=x.jpg", code=2)
    assert "DIR: is missing" in said(capsys, code=2)
    assert "DIR: is empty" in said(capsys, "", code=2)
    assert "none: there is no such folder" in said(capsys, str(tmp_path / "none"), code=2)
    (tmp_path / "dir.png").mkdir()
    assert "--out dir.png: can't be written" in said(
        capsys, str(folder), "--out", "dir.png", code=2
    )


def test_a_second_look_opens_nothing(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host.data import survey

    folder = captioned(tmp_path / "one", a="a cat")
    os.utime(folder / "a.png", (1_600_000_000, 1_600_000_000))
    first = said(capsys, str(folder), "--resolution", "8")

    def refuse(*given: Any) -> None:
        raise AssertionError(given)

    monkeypatch.setattr(survey, "decode", refuse)
    with pytest.raises(AssertionError):
        said(capsys, str(captioned(tmp_path / "two", a="a cat")), "--resolution", "8")
    assert said(capsys, str(folder), "--resolution", "8") == first
