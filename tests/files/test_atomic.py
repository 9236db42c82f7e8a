"""Files and folders are whole under their names or not there, whatever happens meanwhile."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdxl_host.files.atomic import (
    check_writable,
    new_folder,
    open_no_follow,
    write_file,
    write_new,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(kind: str, path: Path, content: bytes = b"new") -> None:
    """A file, or a folder with two files in it."""
    if kind == "file":
        write_file(path, content)
        return
    with new_folder(path) as folder:
        (folder / "inner").mkdir()
        write_new(folder / "inner" / "a", content)
        (folder / "b").write_bytes(content)


KINDS = pytest.mark.parametrize("kind", ["file", "folder"])


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Each sync, by the path that was synced, and each rename; no file is synced while empty."""
    seen: list[str] = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert os.fstat(descriptor).st_size
        fsync(descriptor)

    def recorded(rename):
        def call(old, new) -> None:
            seen.append("rename")
            rename(old, new)

        return call

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    return seen


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what a full disk looks like to who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- what is there afterwards


def test_a_file_takes_the_place_of_an_earlier_one(tmp_path):
    """Its folder is made, and nothing else is left beside it."""
    path = tmp_path / "new" / "a.txt"
    for content in (b"first, and longer", b"second"):
        write_file(path, content)
        assert path.read_bytes() == content
    write_file(path, lambda file: [file.write(piece) for piece in (b"in ", b"pieces")])
    assert path.read_bytes() == b"in pieces"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_file(tmp_path / "file", b"")
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


@KINDS
def test_contents_are_on_the_disk_before_the_name_is(tmp_path, events, kind):
    """Each file and folder is synced, then comes the rename, then the folder it is in."""
    target = tmp_path / "out"
    write(kind, target)
    place = events.index("rename")
    assert events[place + 1 :] == [str(tmp_path)]
    temporary = tmp_path / Path(events[0]).relative_to(tmp_path).parts[0]
    written = {Path(path).relative_to(temporary) for path in events[:place]}
    assert written == {path.relative_to(target) for path in [target, *target.rglob("*")]}


# ---- links


@pytest.mark.parametrize("is_dangling", [True, False])
def test_a_link_is_replaced_and_its_target_is_not_touched(tmp_path, is_dangling):
    other, link = tmp_path / "other", tmp_path / "link"
    if not is_dangling:
        other.write_bytes(b"theirs")
    link.symlink_to(other)
    check_writable(link)
    assert link.is_symlink()
    write_file(link, b"ours")
    assert not link.is_symlink() and link.read_bytes() == b"ours"
    assert not other.exists() if is_dangling else other.read_bytes() == b"theirs"


def test_nothing_that_is_there_is_written_through(tmp_path, monkeypatch):
    """Not even a link that has the name of the temporary file."""
    other = tmp_path / "other"
    other.write_bytes(b"theirs")
    monkeypatch.setattr("secrets.token_hex", lambda count: "known")
    (tmp_path / ".out.known.partial").symlink_to(other)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "out", b"ours")
    assert other.read_bytes() == b"theirs"
    assert not (tmp_path / "out").exists()


def test_open_no_follow(tmp_path):
    """A file is opened or made, and a link is refused."""
    for content in ("a", "b"):
        with open(tmp_path / "log", "a", opener=open_no_follow) as file:
            file.write(content)
    assert (tmp_path / "log").read_text() == "ab"
    (tmp_path / "other").touch()
    assert (tmp_path / "log").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "link").symlink_to(tmp_path / "log")
    with pytest.raises(OSError, match="symbolic link"):
        open_no_follow(str(tmp_path / "link"), os.O_WRONLY)


# ---- what goes wrong


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"earlier")
    with full_disk(100), pytest.raises(OSError, match="too large"):
        write_file(path, b"x" * 1000)
    assert path.read_bytes() == b"earlier"
    with full_disk(100), pytest.raises(OSError, match="too large"):
        write("folder", tmp_path / "folder", b"x" * 1000)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_nothing(tmp_path, error):
    def fail(file) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_file(tmp_path / "a", fail)
    with pytest.raises(error), new_folder(tmp_path / "b") as folder:
        write_new(folder / "file", fail)
    assert names(tmp_path) == []


@KINDS
def test_a_folder_that_is_in_use_is_not_replaced(tmp_path, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").touch()
    with pytest.raises(OSError, match="out"):
        write(kind, tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


@KINDS
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, kind):
    """Of the same name only: others may be at work."""
    left, others = ".out*.0123456789abcdef.partial", ".out*.b.0123456789abcdef.partial"
    for leftover in (left, others):
        (tmp_path / leftover / "inner").mkdir(parents=True)
    (tmp_path / left.replace("abcdef", "aaaaaa")).write_bytes(b"half")
    write(kind, tmp_path / "out*")
    assert names(tmp_path) == [others, "out*"]


def test_check_writable(tmp_path, monkeypatch):
    """It makes the folder and leaves the file as it is; what can't be written is an error."""
    path = tmp_path / "new" / "a"
    check_writable(path)
    assert names(path.parent) == []
    path.write_bytes(b"earlier")
    check_writable(path)
    assert path.read_bytes() == b"earlier"
    (tmp_path / "link").symlink_to(path.parent)
    check_writable(tmp_path / "link")
    with pytest.raises(IsADirectoryError):
        check_writable(path.parent)
    with pytest.raises(OSError, match="a/b"):
        check_writable(path / "b" / "c")

    def refuse(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        check_writable(path)
    assert names(path.parent) == ["a"]
