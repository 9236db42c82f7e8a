"""WebDataset shards, read at the places that an index gives."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_host.data import shards
from sdxl_host.data.decode import decode
from sdxl_host.data.folder import read_folder
from sdxl_host.data.problems import Problem
from sdxl_host.errors import DataError


def png(color: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), color).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, *members: tuple[str, Any], form: int = tarfile.PAX_FORMAT) -> Path:
    """A shard with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            if isinstance(content, dict | list):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def texts(source: Path):
    return {image.name: image.text for image in read_folder(source).images}


@pytest.fixture
def searched(monkeypatch) -> list[str]:
    """The shards whose headers are read."""
    found: list[str] = []
    search = shards._search

    def spy(shard: str):
        found.append(os.path.basename(shard))
        return search(shard)

    monkeypatch.setattr(shards, "_search", spy)
    return found


# ---- what a shard holds


def test_members_of_one_stem_are_a_sample(folder):
    tar(folder / "1.tar", ("a.png", png("blue")), ("a.txt", "a fox"), ("a.cls", "5"))
    tar(
        folder / "0.tar",
        ("b/0001.seg.png", png()),
        ("b/0001.txt", "\ufeffan owl\n"),
        ("c.d/0001.JPG", png("lime")),
        ("c.d/0001.Caption", "a cat"),
    )
    listing = read_folder(folder)
    assert [(image.name, image.text) for image in listing.images] == [
        ("0.tar/b/0001.seg.png", "an owl\n"),
        ("0.tar/c.d/0001.JPG", "a cat"),
        ("1.tar/a.png", "a fox"),
    ]
    assert (listing.problems, listing.notes) == ([], [])
    colors = [decode(image).image.getpixel((0, 0)) for image in listing.images]
    assert colors == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_one_shard_is_a_source_of_the_same_names(folder):
    shard = tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    assert texts(shard) == texts(folder) == {"0.tar/a.png": "cat"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(folder, form):
    """Which each format writes into headers of its own."""
    name = "ordner/" + "y" * 90 if form == tarfile.USTAR_FORMAT else "ä" * 200
    tar(folder / "0.tar", (f"{name}.png", png("blue")), (f"{name}.txt", "猫"), form=form)
    (found,) = read_folder(folder).images
    assert (found.name, found.text) == (f"0.tar/{name}.png", "猫")
    assert decode(found).image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "cat"}, "cat"),
        ({"caption": "cat", "url": "x"}, "cat"),
        ({"text": "cat", "caption": "dog"}, "cat"),
        ({"text": ["cat", "dog"]}, ("cat", "dog")),
    ],
)
def test_captions_in_json(folder, row, text):
    tar(folder / "0.tar", ("a.png", png()), ("a.json", row))
    assert texts(folder) == {"0.tar/a.png": text}
    assert texts(folder) == {"0.tar/a.png": text}  # from the kept index


def test_txt_comes_before_caption_comes_before_json(folder):
    members = [("a.json", {"text": "json"}), ("a.caption", "caption"), ("a.txt", "txt")]
    tar(folder / "0.tar", ("a.png", png()), *members)
    assert texts(folder) == {"0.tar/a.png": "txt"}
    tar(folder / "0.tar", ("a.png", png()), *members[:2])
    assert texts(folder) == {"0.tar/a.png": "caption"}


@pytest.mark.parametrize("row", [{}, {"caption": None}, {"text": []}, [1]])
def test_an_image_without_a_caption_is_set_aside(folder, row):
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"), ("b.png", png()), ("b.json", row))
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == ["0.tar/a.png"]
    assert listing.problems == [Problem("an image without a caption", "0.tar/b.png")]


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("b.txt", b"\xff", "UnicodeDecodeError: "),
        ("b.json", "{", "JSONDecodeError: "),
        ("b.json", {"text": 5}, "ValueError: its text is neither a text nor a list"),
        ("b.json", {"text": ["x", None]}, "ValueError: its text is neither"),
        ("b.json", {"text": "\ud83d"}, "UnicodeEncodeError: "),
    ],
)
def test_a_caption_that_cant_be_read_is_set_aside(folder, name, content, detail):
    members = [("a.png", png()), ("a.txt", "cat"), ("b.png", png()), (name, content)]
    tar(folder / "0.tar", *members)
    unread, alone = read_folder(folder).problems
    assert (unread.kind, unread.name) == ("a caption that can't be read", f"0.tar/{name}")
    assert unread.detail.startswith(detail)
    assert alone == Problem("an image without a caption", "0.tar/b.png")


def test_a_caption_without_an_image_is_set_aside(folder):
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"), ("b.txt", "dog"))
    assert read_folder(folder).problems == [Problem("a caption without an image", "0.tar/b.txt")]


def test_what_is_counted_and_said(folder):
    """Links and devices are no members to read, and lead nowhere."""
    shard = tar(
        folder / "0.tar",
        ("a.png", png()),
        ("a.txt", "cat"),
        ("a.jpg", png()),
        ("._a.png", b"x"),
        ("__MACOSX/a.png", b"x"),
        ("a.txt", "the later one"),
    )
    with tarfile.open(shard, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"b{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    for _ in range(2):  # the second time from the kept index
        listing = read_folder(folder)
        assert {image.text for image in listing.images} == {"the later one"}
        assert len(listing.images) == 2
        assert listing.notes == [
            "2 hidden members of the shards left out.",
            "3 members of the shards left out: links, devices and sparse files.",
            "1 member of the shards replaced by a later one of the same name.",
            "1 image of the shards sharing a caption with another of the same sample.",
        ]


def test_shards_below_train_alone_are_read(folder):
    for split in ("train", "test"):
        tar(folder / split / "0.tar", ("a.png", png()), ("a.txt", split))
    listing = read_folder(folder)
    assert [(image.name, image.text) for image in listing.images] == [
        ("train/0.tar/a.png", "train")
    ]
    assert listing.notes == ["1 shard outside of train/ not read."]


# ---- damage


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".TAR.XZ", ".tar.zst"])
def test_compressed_shards_are_refused(folder, suffix):
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    shard = folder / f"1{suffix}"
    shard.write_bytes(b"")
    for source in (folder, shard):
        with pytest.raises(DataError, match=r"1\..*: compressed, and .*; unpack to plain \.tar"):
            read_folder(source)


def test_a_compressed_file_that_is_called_tar_is_refused(folder):
    shard = tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match=r"0\.tar: is compressed, .*; unpack it to a plain \.tar"):
        read_folder(folder)


def broken(folder, change) -> list[Problem]:
    """What is set aside of a whole shard of one sample, and one of two samples that is changed."""
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    first = [("a.png", png()), ("a.txt", "cat")]
    shard = tar(folder / "1.tar", *first, ("b.png", os.urandom(3000)), ("b.txt", "dog"))
    content = bytearray(shard.read_bytes())
    shard.write_bytes(change(content))
    listing = read_folder(folder)
    assert listing.images[0].name == "0.tar/a.png"
    for image in listing.images:
        decode(image)
    return listing.problems


def test_of_a_shard_that_ends_too_early_what_is_whole_is_taken(folder):
    (problem,) = broken(folder, lambda content: content[:4000])
    assert (problem.kind, problem.name) == ("a shard that can't be read to its end", "1.tar")
    assert problem.detail == "unexpected end of data"
    assert len(read_folder(folder).images) == 2


def test_a_header_that_is_damaged_ends_no_shard_in_silence(folder):
    """tarfile takes it for the end of the archive."""

    def change(content: bytearray) -> bytearray:
        content[2048 + 5] ^= 255  # in the name of the third member, which has a checksum
        return content

    (problem,) = broken(folder, change)
    assert (problem.kind, problem.name) == ("a shard that can't be read to its end", "1.tar")
    assert problem.detail == "no member begins at byte 2,048"


@pytest.mark.parametrize("content", [b"", b"no archive" * 100])
def test_what_is_no_archive_is_set_aside(folder, content):
    (problem,) = broken(folder, lambda _: content)
    assert (problem.kind, problem.name) == ("a shard that can't be read to its end", "1.tar")


def test_a_folder_of_broken_shards_is_refused(folder):
    (folder / "0.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=r"but 1 x a shard that can't be read to its end \(0\.tar"):
        read_folder(folder)


# ---- the kept index


def test_a_shard_is_searched_once(folder, searched, caches):
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"), ("b.png", png()))
    first = read_folder(folder)
    assert read_folder(folder) == first
    assert searched == ["0.tar"]
    assert len(list((caches / "sdxl-host" / "indexes").glob("*/index.json"))) == 1


def test_what_changed_is_searched_again(folder, searched):
    shard = tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    tar(folder / "1.tar", ("a.png", png()), ("a.txt", "cat"))
    read_folder(folder)
    found = shard.stat()
    tar(shard, ("a.png", png()), ("a.txt", "dog"))  # of the same size
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert shard.stat().st_size == found.st_size
    assert texts(folder)["0.tar/a.png"] == "dog"
    tar(shard, ("a.png", png()), ("a.txt", "x" * 20_000))
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert texts(folder)["0.tar/a.png"] == "x" * 20_000
    assert searched == ["0.tar", "1.tar", "0.tar", "0.tar"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"shard": []}',
        b"\xff",
        lambda kept: kept[:-20],
        lambda kept: kept.replace(b'"images": [[', b'"images": [[5, '),
        lambda kept: kept.replace(b'"cat"', b"7"),
        lambda kept: kept.replace(b'"cat"', b"[7]"),
        lambda kept: kept.replace(b'"counts"', b'"other"'),
    ],
)
def test_a_damaged_index_is_made_anew(folder, searched, caches, content):
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    first = read_folder(folder)
    (kept,) = caches.rglob("index.json")
    whole = kept.read_bytes()
    kept.write_bytes(content(whole) if callable(content) else content)
    assert read_folder(folder) == first
    assert searched == ["0.tar", "0.tar"]
    assert kept.read_bytes() == whole


def test_an_index_of_another_format_is_made_anew(folder, searched, monkeypatch):
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    read_folder(folder)
    monkeypatch.setattr(shards, "_FORMAT", shards._FORMAT + 1)
    read_folder(folder)
    assert searched == ["0.tar", "0.tar"]


def test_where_nothing_can_be_kept_this_is_said(folder, searched, caches):
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    caches.write_text("a file where a folder should be")
    for _ in range(2):
        listing = read_folder(folder)
        (note,) = listing.notes
        assert note.startswith("The shards are searched again at the next start: their index can't")
        assert note.endswith("(Not a directory).")
    assert searched == ["0.tar", "0.tar"]


def test_without_a_home_folder_this_is_said(folder, monkeypatch):
    tar(folder / "0.tar", ("a.png", png()), ("a.txt", "cat"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert read_folder(folder).notes == [
        "The shards are searched again at the next start: there is no home folder to keep their "
        "index in; set XDG_CACHE_HOME."
    ]


def test_samples_are_read_in_any_order(folder):
    """Each from where it lies; nothing before it is read."""
    colors = [(index, 2 * index, 0) for index in range(100)]
    members = []
    for index, color in enumerate(colors):
        stream = io.BytesIO()
        Image.new("RGB", (3, 3), color).save(stream, "PNG")
        members += [(f"{index:03d}.png", stream.getvalue()), (f"{index:03d}.txt", f"{index}")]
    tar(folder / "0.tar", *members)
    images = read_folder(folder).images
    for index in np.random.default_rng(0).permutation(100):
        assert decode(images[index]).image.getpixel((1, 1)) == colors[index]
        assert images[index].text == str(index)
