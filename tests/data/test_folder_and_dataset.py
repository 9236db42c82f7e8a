"""Captioned images: which there are, how they are read, changed and ordered."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from sdxl_host.config.yaml_files import packaged_configs
from sdxl_host.data import dataset as dataset_module
from sdxl_host.data.dataset import DEMO_IMAGES, Text2ImageDataset
from sdxl_host.data.folder import read_folder
from sdxl_host.data.order import Order
from sdxl_host.data.transforms import (
    AddOriginalImageSizeAsTupleAndCropToSquare,
    Rescaler,
    Resize,
    Transpose,
)
from sdxl_host.errors import DataError, HostError
from sdxl_host.randomness import Stream, generator

SIDE = 8
RESIZE = {"target": "sdxl_host.Resize", "params": {"size": SIDE}}
RESCALE = {"target": "sdxl_host.Rescaler"}
CROP = {"target": "sdxl_host.AddOriginalImageSizeAsTupleAndCropToSquare"}
TRANSPOSE = {"target": "sdxl_host.Transpose"}
ALL = [RESIZE, RESCALE, CROP, TRANSPOSE]
NEAREST = [{"target": "sdxl_host.Resize", "params": {"size": SIDE, "interpolation": 0}}, *ALL[1:]]


def draw(position: int = 0) -> np.random.Generator:
    return generator(42, Stream.CROP, 1, position)


def image(file: Path, width: int = 12, height: int = 8, color: Any = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(file)
    return file


@pytest.fixture
def folder(tmp_path):
    """An empty folder for images."""
    found = tmp_path / "images"
    found.mkdir()
    return found


def captioned(folder: Path, **captions: str) -> Path:
    """A folder with an image and a .txt for each name."""
    for name, caption in captions.items():
        image(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, "utf-8")
    return folder


def dataset(folder: Path, transforms: Any = ALL, **params: Any) -> Text2ImageDataset:
    return Text2ImageDataset(SIDE, transforms, str(folder), **params)


def check(data: Text2ImageDataset) -> None:
    with ThreadPoolExecutor(2) as threads:
        data.check(threads)


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read_folder(folder)
    assert "\n" not in str(refused.value)


# ---- captions


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
    assert [(p.name, p.caption) for p in found] == sorted(
        (n, t.strip()) for n, t in captions.items()
    )
    assert all(p.file == folder / p.name for p in found)


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
    assert found.caption.split() == ["a", "red", "cat"]


def test_a_quoted_caption_of_a_csv_may_have_two_lines(folder):
    image(folder / "a.png")
    FORMS["csv"](folder, {"a.png": "a red\ncat"})
    assert read_folder(folder)[0].caption.split() == ["a", "red", "cat"]


def test_a_sidecar_of_several_lines_is_one_caption(folder):
    (captioned(folder, a="x") / "a.txt").write_text("  a red\n\n cat \n")
    assert read_folder(folder)[0].caption == "a red cat"


@pytest.mark.parametrize("form", FORMS)
def test_a_byte_order_mark_is_not_part_of_the_text(folder, form):
    image(folder / "a.png")
    FORMS[form](folder, {"a.png": "cat"})
    (file,) = [f for f in folder.iterdir() if f.suffix != ".png"]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [(p.name, p.caption) for p in read_folder(folder)] == [("a.png", "cat")]


def test_empty_lines_of_a_table_are_skipped(folder):
    image(folder / "a.png")
    (folder / "metadata.jsonl").write_text('\n{"file_name": "a.png", "text": "x"}\n\n')
    assert len(read_folder(folder)) == 1


def test_metadata_comes_before_a_table_comes_before_sidecars(folder):
    captioned(folder, a="from the sidecar")
    assert read_folder(folder)[0].caption == "from the sidecar"
    as_csv(folder, {"a.png": "from the table"})
    assert read_folder(folder)[0].caption == "from the table"
    as_jsonl(folder, {"a.png": "from metadata"})
    assert read_folder(folder)[0].caption == "from metadata"


def test_names_with_dots_and_upper_case_suffixes(folder):
    for name in ("a.b.png", "C.JPG"):
        image(folder / name)
    (folder / "a.b.txt").write_text("one")
    (folder / "C.txt").write_text("two")
    assert [(p.name, p.caption) for p in read_folder(folder)] == [
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


# ---- images


def spoil(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "empty":
        content = bytearray()
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "text":
        content = bytearray(b"<html>not found</html>")
    else:
        content[20] ^= 0x55
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "cut", "text", "flipped"])
def test_a_image_that_cant_be_read_is_named(folder, how):
    captioned(folder, a="x", b="y", c="z")
    spoil(folder / "b.png", how)
    data = dataset(folder)
    message = r"images/b\.png: can't be read as an image \(.*; replace or remove it$"
    with pytest.raises(DataError, match=message):
        check(data)
    with pytest.raises(DataError, match=message):
        data.sample(1, draw())
    data.sample(0, draw())


def test_a_sample_has_what_a_step_takes(folder):
    image(folder / "a.png", 24, 16)
    (folder / "a.txt").write_text("a cat")
    sample = dataset(folder).sample(0, draw())
    assert (sample.name, sample.caption) == ("a.png", "a cat")
    assert sample.pixels.shape == (3, SIDE, SIDE)
    assert sample.pixels.dtype == np.float32
    assert sample.pixels.flags.c_contiguous
    assert set(sample.sizes) == {
        "original_size_as_tuple",
        "crop_coords_top_left",
        "target_size_as_tuple",
        "aesthetic_score",
    }
    assert sample.sizes["original_size_as_tuple"] == (16, 24)  # height first
    assert sample.sizes["target_size_as_tuple"] == (SIDE, SIDE)


def corners(folder: Path, name: str) -> np.ndarray:
    """The RGB bytes of a square image as the network gets it."""
    (folder / "one.txt").write_text("x")
    pixels = dataset(folder, NEAREST).sample(0, draw()).pixels
    assert (folder / name).exists()
    return np.rint((pixels.transpose(1, 2, 0) + 1) * 127.5).astype(int)


# Where the red corner of a stored image is seen, for each EXIF orientation.
TOP, BOTTOM, LEFT, RIGHT = 0, SIDE - 1, 0, SIDE - 1
ORIENTATIONS = {
    1: (TOP, LEFT),
    2: (TOP, RIGHT),
    3: (BOTTOM, RIGHT),
    4: (BOTTOM, LEFT),
    5: (TOP, LEFT),
    6: (TOP, RIGHT),
    7: (BOTTOM, RIGHT),
    8: (BOTTOM, LEFT),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_image_is_turned_as_its_exif_says(folder, orientation):
    image = Image.new("RGB", (SIDE, SIDE), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / "one.png", exif=exif)
    found = corners(folder, "one.png")
    assert [tuple(place) for place in np.argwhere(found[..., 0] > 200)] == [
        ORIENTATIONS[orientation]
    ]


@pytest.mark.parametrize("decoded_at_start", [1000, 0])
@pytest.mark.parametrize(("orientation", "size"), [(1, (16, 24)), (6, (24, 16)), (3, (16, 24))])
def test_the_original_size_is_that_after_the_rotation(
    folder, monkeypatch, orientation, size, decoded_at_start
):
    """Also where there are so many images that only their headers are read at the start."""
    monkeypatch.setattr(dataset_module, "_DECODED_AT_START", decoded_at_start)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (24, 16)).save(folder / "one.jpg", exif=exif)
    (folder / "one.txt").write_text("x")
    data = dataset(folder)
    assert data.sample(0, draw()).sizes["original_size_as_tuple"] == size
    check(data)
    assert data.typical_size() == size


GREY = (100, 100, 100)


@pytest.mark.parametrize(
    ("mode", "color", "seen"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 100, GREY),
        ("1", 1, (255, 255, 255)),
        ("I;16", 100 * 257, GREY),
        ("LA", (100, 255), GREY),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ],
)
def test_every_mode_becomes_rgb_with_transparency_on_white(folder, mode, color, seen):
    Image.new(mode, (SIDE, SIDE), color).save(folder / "one.png")
    assert (corners(folder, "one.png") == seen).all()


def test_the_transparent_level_of_grey_of_16_bits_is_white(folder):
    image = Image.new("I;16", (SIDE, SIDE), 100 * 257)
    image.putpixel((0, 0), 300)
    image.save(folder / "one.png", transparency=300)
    found = corners(folder, "one.png")
    assert tuple(found[0, 0]) == (255, 255, 255)
    assert tuple(found[1, 1]) == GREY


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_becomes_its_colors_and_its_transparent_entry_white(folder, transparent):
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    image.save(folder / "one.png", **({"transparency": 0} if transparent else {}))
    found = corners(folder, "one.png")
    assert tuple(found[1, 1]) == (10, 20, 30)
    assert tuple(found[0, 0]) == ((255, 255, 255) if transparent else (0, 0, 0))


# ---- transforms


def shape(transform: Any, height: int, width: int) -> tuple[int, ...]:
    image = np.zeros((height, width, 3), np.uint8)
    return transform({"image": image}, draw())["image"].shape


@pytest.mark.parametrize(
    ("height", "width", "result"),
    [
        (16, 24, (8, 12)),
        (24, 16, (12, 8)),
        (16, 16, (8, 8)),
        (8, 8, (8, 8)),
        (4, 4, (8, 8)),
        (3, 5, (8, 13)),
        (7, 1000, (8, 1143)),
        (1, 500, (8, 4000)),
        (500, 1, (4000, 8)),
        (999, 1000, (8, 8)),
    ],
)
def test_resize_makes_the_shorter_side_exact(height, width, result):
    """The longer one keeps the aspect within half a pixel and is never the shorter."""
    assert shape(Resize(8), height, width)[:2] == result


def test_resize_interpolates_as_pillow_numbers_it():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    for number in range(4):
        expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling(number)))
        assert np.array_equal(Resize(8, number)({"image": image}, draw())["image"], expected)
    assert Resize(8).interpolation == Image.Resampling.BICUBIC


def test_rescaler_maps_bytes_to_minus_one_to_one():
    image = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3)
    found = Rescaler()({"image": image}, draw())["image"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.ravel(), [-1.0, -0.6, 1.0], rtol=1e-6)


def test_rescaler_maps_floats_of_zero_to_one():
    image = np.array([0.0, 0.25, 1.0]).reshape(1, 1, 3)
    found = Rescaler(isfloat=True)({"image": image}, draw())["image"]
    assert found.dtype == np.float32
    assert found.ravel().tolist() == [-1.0, -0.5, 1.0]


@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8), (8, 8)])
def test_the_crop_is_recorded_and_covers_every_place(height, width):
    """crop_coords_top_left is where it was cut; each place comes up, none outside."""
    crop = AddOriginalImageSizeAsTupleAndCropToSquare()
    image = np.arange(height * width * 3).reshape(height, width, 3)
    seen = Counter()
    for position in range(200):
        sample = crop({"image": image, "kept": 1}, draw(position))
        top, left = sample["crop_coords_top_left"]
        assert np.array_equal(sample["image"], image[top : top + 8, left : left + 8])
        assert sample["kept"] == 1
        seen[top, left] += 1
    expected = [(t, le) for t in range(height - 7) for le in range(width - 7)]
    assert sorted(seen) == expected
    assert min(seen.values()) > 200 / len(expected) / 2


def test_the_crop_is_a_function_of_seed_step_and_position(folder):
    image(folder / "a.png", 64, 8)
    (folder / "a.txt").write_text("x")
    data = dataset(folder)

    def crops(seed: int, step: int) -> list[tuple[int, int]]:
        draws = [generator(seed, Stream.CROP, step, position) for position in range(20)]
        return [data.sample(0, one).sizes["crop_coords_top_left"] for one in draws]

    assert crops(42, 1) == crops(42, 1)
    assert len({tuple(crops(*key)) for key in ((42, 1), (42, 2), (43, 1))}) == 3
    assert len(set(crops(42, 1))) > 5


def test_transpose_puts_channels_first():
    image = np.arange(24).reshape(2, 4, 3)
    found = Transpose()({"image": image}, draw())["image"]
    assert found.shape == (3, 2, 4)
    assert np.array_equal(found[1], image[:, :, 1])
    assert found.flags.c_contiguous


@pytest.mark.parametrize(
    "transform", [Resize(8), Rescaler(), AddOriginalImageSizeAsTupleAndCropToSquare(), Transpose()]
)
def test_a_transform_leaves_its_input_as_it_was(transform):
    image = np.full((16, 24, 3), 7, np.uint8)
    sample = {"image": image}
    transform(sample, draw())
    assert list(sample) == ["image"]
    assert sample["image"] is image
    assert (image == 7).all()


@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [RESIZE, CROP, TRANSPOSE],
        [RESIZE, RESCALE, CROP],
        [RESIZE, RESCALE, TRANSPOSE],
        [RESCALE, CROP, TRANSPOSE],
        [RESIZE, RESCALE, TRANSPOSE, CROP],
        [*ALL, TRANSPOSE],
        [RESCALE, RESIZE, CROP, TRANSPOSE],
        [TRANSPOSE, RESIZE, RESCALE, CROP],
    ],
)
def test_transforms_that_do_not_end_in_the_networks_input_are_named(folder, transforms):
    image(captioned(folder, a="x") / "a.png", 40, 20)
    with pytest.raises(HostError, match=r"^data\.dataset_config\.params\.transforms\b"):
        dataset(folder, transforms).sample(0, draw())


# ---- the dataset


def test_only_picks_by_name_in_the_order_given(folder):
    data = dataset(captioned(folder, a="1", b="2", c="3"), only=["c.png", "a.png"])
    assert [image.caption for image in data.images] == ["3", "1"]
    assert len(data) == 2


def test_only_names_images_that_are_there(folder):
    captioned(folder, cat="1", dog="2")
    with pytest.raises(DataError, match=r"params\.only: there is no image cats\.png .*cat\.png\?"):
        dataset(folder, only=["dog.png", "cats.png"])


def test_only_with_no_name_is_refused(folder):
    """None at all can't be trained on; leaving `only` out takes every image."""
    with pytest.raises((HostError, ValueError), match="only"):
        dataset(captioned(folder, a="1"), only=[])


def test_typical_size_is_the_median_height_and_width(folder):
    for name, (width, height) in {"a": (10, 8), "b": (20, 9), "c": (300, 200)}.items():
        image(folder / f"{name}.png", width, height)
        (folder / f"{name}.txt").write_text("x")
    data = dataset(folder)
    check(data)
    assert data.typical_size() == (9, 20)


def test_target_size_must_be_at_least_1(folder):
    with pytest.raises(ValueError, match=r"target_size must be at least 1, not 0"):
        Text2ImageDataset(0, ALL, str(folder))


# ---- order


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_every_epoch_is_a_permutation_and_nothing_is_dropped(count, batch):
    """Batches are cut from an endless chain of epochs, so one may span two or more."""
    order = Order(count, batch, 42, shuffle=True)
    steps = -(-6 * count // batch)
    batches = [order.indices(step) for step in range(1, steps + 1)]
    assert all(len(one) == batch for one in batches)
    chain = list(itertools.chain.from_iterable(batches))
    for epoch in range(6):
        assert sorted(chain[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_chain_does_not_depend_on_the_batch():
    """So a run is the same however its batch is split."""
    chains = []
    for batch in (1, 2, 3, 6, 12):
        order = Order(7, batch, 42, shuffle=True)
        chains.append(
            list(
                itertools.chain.from_iterable(
                    order.indices(step) for step in range(1, 84 // batch + 1)
                )
            )
        )
    assert all(chain == chains[0] for chain in chains)


def test_the_order_is_a_function_of_seed_and_epoch():
    order = Order(10, 4, 42, shuffle=True)
    later = order.indices(1000)
    assert Order(10, 4, 42, shuffle=True).indices(1000) == later  # nothing before it is needed
    epochs = [tuple(Order(10, 10, 42, True).indices(epoch)) for epoch in range(1, 6)]
    assert len(set(epochs)) == 5
    assert Order(10, 10, 43, True).indices(1) != list(epochs[0])


def test_without_shuffle_the_order_is_that_of_the_names():
    order = Order(3, 2, 42, shuffle=False)
    assert [order.indices(step) for step in (1, 2, 3, 4)] == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_indices_are_plain_integers():
    for shuffle in (True, False):
        assert {type(i) for i in Order(3, 4, 1, shuffle).indices(1)} == {int}


# ---- the images that the package carries


@pytest.fixture(scope="module")
def demo() -> Text2ImageDataset:
    node = yaml.safe_load((packaged_configs() / "default.yaml").read_text("utf-8"))
    return Text2ImageDataset(**node["data"]["dataset_config"]["params"])


def test_the_carried_images_are_64_with_captions_of_their_own(demo):
    assert demo.is_demo
    assert len(demo) == 64
    assert len({image.caption for image in demo.images}) == 64
    lines = (DEMO_IMAGES / "metadata.jsonl").read_text("utf-8").splitlines()
    captions = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    assert {image.name: image.caption for image in demo.images} == captions
    assert captions["red_apple.png"].endswith("a red apple")
    assert {f.name for f in DEMO_IMAGES.glob("*.png")} == {p.name for p in demo.images}


def test_the_carried_images_load_and_are_small(demo):
    check(demo)
    assert demo.typical_size() == (64, 64)
    pixels = np.stack([demo.sample(index, draw()).pixels for index in range(64)])
    assert pixels.shape == (64, 3, 32, 32)
    assert -1.0 <= pixels.min() < -0.5
    assert pixels.max() == 1.0  # they lie on white
    assert len({array.tobytes() for array in pixels}) == 64
    assert sum(file.stat().st_size for file in DEMO_IMAGES.iterdir()) < 1 << 20


def test_the_carried_images_name_their_source_and_licence():
    notice = (DEMO_IMAGES / "NOTICE.md").read_text("utf-8")
    for word in ("Fluent Emoji", "Microsoft", "MIT License", "Permission is hereby granted"):
        assert word in notice


def test_a_folder_of_ones_own_is_not_the_demo(folder):
    assert not dataset(captioned(folder, a="x")).is_demo


def test_the_demo_configs_names_are_carried():
    node = yaml.safe_load((packaged_configs() / "learn_demo.yaml").read_text("utf-8"))
    data = Text2ImageDataset(**node["data"]["dataset_config"]["params"])
    assert len(data) == len({image.name for image in data.images}) == 16


def test_the_learning_run_takes_the_images_that_differ_most():
    """demo16.txt, which the script that makes the images writes, and the config agree."""
    root = Path(__file__).parents[2]
    config = OmegaConf.load(root / "configs" / "learn_demo.yaml")
    chosen = (root / "sdxl_host" / "data" / "demo16.txt").read_text().split()
    assert list(config.data.dataset_config.params.only) == chosen
