"""Digests of images' bytes: a file that has not changed is not read again."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.image_digests import ImageDigests
from sdxl_host.errors import DataError

OLD = 10**18  # a time long ago, in nanoseconds


def make(file: Path, data: bytes, time: int = OLD) -> Captioned:
    file.write_bytes(data)
    os.utime(file, ns=(time, time))
    return Captioned(file.name, str(file), "a caption")


def digests(folder: Path, images: list[Captioned], rank: int = 0) -> list[bytes]:
    known = ImageDigests(folder)
    assert known.damaged == []
    with ThreadPoolExecutor(2) as threads:
        found = known.of(images, threads)
    known.save(rank)
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are read."""
    names: list[str] = []
    real = Captioned.open
    monkeypatch.setattr(Captioned, "open", lambda image: names.append(image.name) or real(image))
    return names


def test_only_files_that_have_changed_are_read_again(
    tmp_path: Path, folder: Path, opened: list[str]
) -> None:
    images = [make(folder / name, name.encode()) for name in ("a", "b", "c", "d")]
    first = digests(tmp_path, images)
    assert len(set(first)) == 4
    assert sorted(opened) == ["a", "b", "c", "d"]
    opened.clear()
    assert digests(tmp_path, images) == first
    assert opened == []
    make(folder / "a", b"A")
    os.utime(folder / "a", ns=(OLD + 1, OLD + 1))
    make(folder / "b", b"longer")
    second = digests(tmp_path, images)
    assert sorted(opened) == ["a", "b"]
    assert [one == other for one, other in zip(first, second, strict=True)] == [
        False, False, True, True
    ]  # fmt: skip


def test_equal_bytes_have_equal_digests_wherever_they_are(tmp_path: Path, folder: Path) -> None:
    archive = make(folder / "all.tar", b"..abc..abc")
    parts = [Captioned("x", archive.file, "", span) for span in ((2, 3), (7, 3), (3, 3))]
    alone = make(folder / "abc", b"abc")
    one, two, three, four = digests(tmp_path, [*parts, alone])
    assert one == two == four != three
    assert digests(tmp_path, [*parts, alone]) == [one, two, three, four]


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, folder: Path, opened: list[str]
) -> None:
    """It may be written again without a change of its time."""
    (folder / "a").write_bytes(b"1")
    image = Captioned("a", str(folder / "a"), "")
    digests(tmp_path, [image])
    digests(tmp_path, [image])
    assert opened == ["a", "a"]


def test_ranks_remember_for_each_other(tmp_path: Path, folder: Path, opened: list[str]) -> None:
    images = [make(folder / name, name.encode()) for name in ("a", "b")]
    for rank in range(2):
        digests(tmp_path, [images[rank]], rank)
    opened.clear()
    digests(tmp_path, images)
    assert opened == []


@pytest.mark.parametrize("text", ['["a", 0, 0, 1', "[1]\n", "{}\n", '["a", 0, 0, 1, 2, "xy"]\n'])
def test_a_damaged_file_is_named_and_images_are_looked_at_anew(
    tmp_path: Path, folder: Path, text: str
) -> None:
    image = make(folder / "a", b"1")
    first = digests(tmp_path, [image])
    (tmp_path / "images-0.jsonl").write_text(text)
    known = ImageDigests(tmp_path)
    (line,) = known.damaged
    assert line.startswith(f"{tmp_path / 'images-0.jsonl'}: can't be used")
    with ThreadPoolExecutor(1) as threads:
        assert known.of([image], threads) == first


def test_an_image_that_can_t_be_read_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"^.*gone\.png: can't be read .*; replace or remove it$"):
        digests(tmp_path, [Captioned("gone.png", str(folder / "gone.png"), "")])
