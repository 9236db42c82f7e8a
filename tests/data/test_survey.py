"""A source is looked at once, in order, and what changed is looked at again."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import image

from sdxl_host.data import survey as survey_module
from sdxl_host.data.captioned import Captioned
from sdxl_host.data.problems import Problem
from sdxl_host.data.survey import Survey, survey

LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sdxl-host" / "surveys"


def settle(file: Path, seconds: int = LONG_AGO) -> Path:
    """As if the file had been written then."""
    os.utime(file, (seconds, seconds))
    return file


def listed(folder: Path) -> list[Captioned]:
    return [Captioned(f.name, str(f), "x") for f in sorted(folder.iterdir())]


def look(folder: Path, images: list[Captioned] | None = None, **options: Any) -> Survey:
    with ThreadPoolExecutor(2) as threads:
        return survey(images or listed(folder), folder, threads, **options)


def five(folder: Path) -> Path:
    """Images a to d of sizes (height, width) 8x12, 8x13, 8x14, 8x15, of which b is empty."""
    for number, name in enumerate("abcd"):
        settle(image(folder / f"{name}.png", 12 + number, 8))
    (folder / "b.png").write_bytes(b"")
    settle(folder / "b.png")
    return folder


EMPTY = Problem("an empty image file", "b.png", "it is empty")


def test_sizes_and_problems_are_found_and_the_next_look_is_instant(folder: Path) -> None:
    first = look(five(folder))
    assert first.usable.tolist() == [True, False, True, True]
    assert first.sizes.tolist() == [[8, 12], [0, 0], [8, 14], [8, 15]]
    assert first.problems == [EMPTY]
    assert (first.notes, first.looked_at) == ([], 4)
    second = look(folder)
    assert second.looked_at == 0
    assert (second.usable == first.usable).all()
    assert (second.sizes == first.sizes).all()
    assert (second.problems, second.notes) == (first.problems, first.notes)


def test_what_changed_is_looked_at_again_and_nothing_else(folder: Path) -> None:
    look(five(folder))
    settle(image(folder / "b.png", 3, 4))
    (folder / "c.png").write_bytes(b"no image")
    settle(folder / "c.png")
    settle(image(folder / "e.png", 5, 6))
    (folder / "a.png").unlink()
    found = look(folder)
    assert found.looked_at == 3
    assert found.usable.tolist() == [True, False, True, True]
    # Of c, which broke, the size that it had.
    assert found.sizes.tolist() == [[4, 3], [8, 14], [8, 15], [6, 5]]
    assert [problem.name for problem in found.problems] == ["c.png"]
    assert look(folder).looked_at == 0


def test_another_time_is_a_change(folder: Path) -> None:
    look(five(folder))
    settle(folder / "a.png", LONG_AGO + 1)
    assert look(folder).looked_at == 1


def test_a_file_that_was_just_written_is_looked_at_again(folder: Path) -> None:
    """It may be written once more in the same tick of the file system's clock."""
    look(five(folder))
    now = os.stat(image(folder / "a.png")).st_mtime
    assert look(folder).looked_at == 1
    assert look(folder).looked_at == 1
    settle(folder / "a.png", int(now) - 100)
    assert look(folder).looked_at == 1
    assert look(folder).looked_at == 0


def test_what_the_disk_is_at_fault_for_is_not_remembered(folder: Path) -> None:
    images = [*listed(five(folder)), Captioned("gone.png", str(folder / "gone.png"), "x")]
    assert [problem.name for problem in look(folder, images).problems] == ["b.png", "gone.png"]
    again = look(folder, images)
    assert again.looked_at == 1
    assert [problem.name for problem in again.problems] == ["b.png", "gone.png"]


def test_another_reader_looks_at_everything(folder: Path, monkeypatch: Any) -> None:
    look(five(folder))
    monkeypatch.setattr(survey_module, "_READER", "another Pillow")
    assert look(folder).looked_at == 4
    assert look(folder).looked_at == 0


def test_a_part_of_an_archive_is_known_by_its_place(folder: Path) -> None:
    whole = (
        image(folder / "a.png", 20, 10).read_bytes() + image(folder / "b.png", 30, 9).read_bytes()
    )
    length = os.stat(folder / "a.png").st_size
    archive = folder / "all.tar"
    archive.write_bytes(whole)
    settle(archive)
    spans = [(0, length), (length, len(whole) - length), (length, 0)]
    images = [Captioned(str(n), str(archive), "x", span) for n, span in enumerate(spans)]
    for looked_at in (3, 0):
        found = look(folder, images)
        assert found.looked_at == looked_at
        assert found.sizes.tolist() == [[10, 20], [9, 30], [0, 0]]
        assert [problem.kind for problem in found.problems] == ["an empty image file"]


def test_any_name_is_remembered(folder: Path) -> None:
    """Also of two lines, and of bytes that are no text."""
    for name in ("a\nb.png", "ä.png", os.fsdecode(b"\xff.png"), "a b\t.png"):
        settle(image(folder / "new.png", 4, 4))
        (folder / "new.png").rename(folder / name)
    assert look(folder).looked_at == 4
    assert look(folder).looked_at == 0


def test_remarks_are_one_note_each_with_a_count(folder: Path) -> None:
    for number in range(5):
        frames = [Image.new("L", (4, 4), one) for one in (0, 255)]
        frames[0].save(folder / f"{number}.gif", save_all=True, append_images=frames[1:])
        settle(folder / f"{number}.gif")
    Image.new("RGB", (4, 4)).save(folder / "p.png", icc_profile=b"junk" * 50)
    settle(folder / "p.png")
    for _ in range(2):
        assert look(folder).notes == [
            "5 images hold several frames, of which the first is taken "
            "(0.gif, 1.gif, 2.gif and 2 more)",
            "1 image has a colour profile that can't be used; the colours are taken for sRGB "
            "(p.png)",
        ]


def test_progress_comes_to_the_end_and_only_for_what_is_looked_at(folder: Path) -> None:
    for number in range(40):
        settle(image(folder / f"{number}.png", 4, 4))
    seen: list[tuple[int, int]] = []
    look(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 40), (32, 40), (40, 40)]
    settle(image(folder / "7.png", 5, 5))
    look(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[3:] == [(1, 1)]


def test_few_images_wait_at_a_time(folder: Path, monkeypatch: Any) -> None:
    """However many there are: a million waiting at once would take gigabytes."""
    monkeypatch.setattr(survey_module, "_TOGETHER", 1)
    monkeypatch.setattr(survey_module, "_WAITING", 3)
    for number in range(12):
        image(folder / f"{number}.png", 4, 4)
    waiting, most = 0, 0

    class Noting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            return super().submit(*args, **kwargs)

    def done(count: int, total: int) -> None:
        nonlocal waiting
        waiting -= 1

    with Noting(2) as threads:
        found = survey(listed(folder), folder, threads, done)
    assert found.usable.all()
    assert most == 3


def test_what_was_found_until_ctrl_c_is_remembered(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(survey_module, "_TOGETHER", 1)

    def interrupted(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    five(folder)
    with pytest.raises(KeyboardInterrupt):
        look(folder, progress=interrupted)
    assert look(folder).looked_at == 1


def test_a_memory_that_cant_be_written_is_a_note(folder: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    five(folder)
    for _ in range(2):
        found = look(folder)
        assert found.looked_at == 4
        written = [note for note in found.notes if "can't be written" in note]
        assert len(written) == 1
        assert written[0].endswith("set XDG_CACHE_HOME to a folder that can be written")


@pytest.mark.parametrize("how", ["cut", "text", "pickle", "short"])
def test_a_damaged_memory_is_a_note_and_is_made_anew(folder: Path, cache: Path, how: str) -> None:
    look(five(folder))
    (file,) = cache.glob("*.npz")
    if how == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif how == "text":
        file.write_text("hello")
    elif how == "pickle":
        np.savez(file, keys=np.array([{}], object))
    else:
        arrays = dict(np.load(file))
        arrays["sizes"] = arrays["sizes"][:2]
        np.savez(file, **arrays)
    found = look(folder)
    assert found.looked_at == 4
    (note,) = found.notes
    assert note.startswith(f"{file}: can't be read (")
    assert note.endswith("so every image was looked at again")
    assert look(folder).looked_at == 0


def test_each_source_has_a_memory_and_a_link_to_it_the_same(tmp_path: Path, cache: Path) -> None:
    one, other = five(tmp_path / "one"), five(tmp_path / "other")
    (tmp_path / "link").symlink_to(one)
    look(one)
    look(other)
    assert len(list(cache.glob("*.npz"))) == 2
    assert look(tmp_path / "link", listed(one)).looked_at == 0
