"""Which files a tree holds: links followed once, hidden names left out."""

from __future__ import annotations

import os

import pytest
from support.images import captioned, image

from sdxl_host.data.folder import read_folder
from sdxl_host.data.tree import walk


def names(folder):
    return [image.name for image in read_folder(folder).images]


def test_files_are_known_by_folder(folder):
    captioned(folder / "b" / "c", a="cat")
    tree = walk(str(folder))
    assert tree.files == {"": set(), "b/": set(), "b/c/": {"a.png", "a.txt"}}
    assert tree.root == f"{folder}/" == walk(f"{folder}/").root
    assert (tree.problems, tree.notes) == ([], [])


def test_hidden_names_are_left_out_and_said(folder):
    captioned(folder, a="cat")
    for hidden in ("__MACOSX", ".ipynb_checkpoints", "sub/.git"):
        captioned(folder / hidden, b="dog")
    (folder / "._a.png").write_bytes(b"resource fork")
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == ["a.png"]
    assert listing.problems == []
    assert listing.notes == ["4 hidden names left out, such as ._a.png."]


def test_a_linked_folder_is_followed(folder, tmp_path):
    captioned(tmp_path / "elsewhere" / "sub", a="cat")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (found,) = read_folder(folder).images
    assert found.name == "link/sub/a.png"
    with found.open() as file:
        assert file.read() == (tmp_path / "elsewhere" / "sub" / "a.png").read_bytes()


def test_each_real_folder_is_read_once(folder, tmp_path):
    """Under its own name where it has one, else under the first of its links."""
    captioned(folder / "real", a="cat")
    captioned(tmp_path / "elsewhere", b="dog")
    (folder / "a link to real").symlink_to(folder / "real")
    for link in ("y", "x"):
        (folder / link).symlink_to(tmp_path / "elsewhere")
    assert names(folder) == ["real/a.png", "x/b.png"]


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "real"])
def test_a_link_to_what_is_above_it_is_no_endless_loop(folder, target):
    """Nor does it lead out of the folder and through all that is around it."""
    captioned(folder / "real", a="cat")
    (folder / "real" / "link").symlink_to(target, target_is_directory=True)
    if target == "/":
        captioned(folder.parent, outside="dog")
    assert names(folder) == ["real/a.png"]


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    captioned(folder, a="cat")
    (tmp_path / "link").symlink_to(folder)
    assert names(tmp_path / "link") == ["a.png"]


def test_images_that_are_no_files_are_set_aside(folder):
    captioned(folder, a="cat")
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(folder / "nothing")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "pipe").symlink_to(folder / "nothing")  # no image
    listing = read_folder(folder)
    assert [image.name for image in listing.images] == ["a.png"]
    found = {(p.kind, p.name): p.detail for p in listing.problems}
    kind = "an image that is no file"
    assert found.keys() == {(kind, f"{name}.png") for name in ("pipe", "gone", "circle")}
    assert found[kind, "pipe.png"] == "a pipe, a socket or a device"
    assert found[kind, "gone.png"] == "a link to nothing"


def test_a_folder_that_cant_be_read_is_set_aside(folder, monkeypatch):
    captioned(folder, a="cat")
    (folder / "sub").mkdir()
    scan = os.scandir

    def scandir(path):
        if path.endswith("sub/"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (problem,) = read_folder(folder).problems
    assert (problem.kind, problem.name) == ("a folder that can't be read", "sub/")
    assert problem.detail == "Permission denied"


def test_a_name_that_is_not_utf8_is_set_aside_and_can_be_printed(folder):
    captioned(folder, a="cat")
    image(folder / "b.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    (problem,) = read_folder(folder).problems
    assert problem.kind == "a name that is not UTF-8"
    assert problem.name.encode("utf-8") == rb"caf\udce9.png"
