"""Images as they are read: upright, in RGB, cropped, with their sizes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import captioned, image

from sdxl_host.data import dataset as dataset_module
from sdxl_host.data.dataset import Text2ImageDataset, make_dataset
from sdxl_host.errors import ConfigError, DataError, HostError
from sdxl_host.randomness import Stream, generator
from sdxl_host.settings.declarations import DataSettings

SIDE = 8
RESIZE = {"target": "sdxl_host.Resize", "params": {"size": SIDE}}
RESCALE = {"target": "sdxl_host.Rescaler"}
CROP = {"target": "sdxl_host.AddOriginalImageSizeAsTupleAndCropToSquare"}
TRANSPOSE = {"target": "sdxl_host.Transpose"}
ALL = [RESIZE, RESCALE, CROP, TRANSPOSE]
NEAREST = [{"target": "sdxl_host.Resize", "params": {"size": SIDE, "interpolation": 0}}, *ALL[1:]]


def draw(position: int = 0) -> np.random.Generator:
    return generator(42, Stream.CROP, 1, position)


def dataset(folder: Path, transforms: Any = ALL, **params: Any) -> Text2ImageDataset:
    return Text2ImageDataset(SIDE, transforms, str(folder), **params)


def check(data: Text2ImageDataset) -> None:
    with ThreadPoolExecutor(2) as threads:
        data.check(threads)


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
def test_an_image_that_cant_be_read_is_named_and_set_aside(folder, how):
    captioned(folder, a="x", b="y", c="z")
    spoil(folder / "b.png", how)
    data = dataset(folder)
    with pytest.raises(
        DataError, match=r"images/b\.png: can't be read as an image \(.*; replace or remove it$"
    ):
        data.sample(1, draw())
    check(data)
    assert [problem.name for problem in data.problems] == ["b.png"]
    assert [image.name for image in data.images] == ["a.png", "c.png"]
    assert data.sample(1, draw()).name == "c.png"


def test_more_bad_images_than_may_be_are_refused_by_name(folder):
    captioned(folder, a="x", b="y", c="z", d="w")
    spoil(folder / "b.png", "empty")
    with ThreadPoolExecutor(2) as threads:
        dataset(folder).check(threads, 0.25)
        with pytest.raises(DataError) as raised:
            dataset(folder).check(threads, 0.24)
    assert str(raised.value) == (
        f"data_path {folder}: 1 of 4 images can't be read as an image, more than "
        f"data.max_bad_fraction 0.24 lets be set aside: {folder}/b.png: it is empty; mend or "
        "remove them, or set data.max_bad_fraction higher"
    )


def test_a_source_of_bad_images_alone_is_refused_whatever_is_allowed(folder):
    captioned(folder, a="x")
    spoil(folder / "a.png", "cut")
    with pytest.raises(DataError, match="1 of 1 images can't be read"):
        check(dataset(folder))


@pytest.mark.parametrize("began_without", [[], ["b.png"]])
def test_an_image_that_broke_after_a_run_began_keeps_its_place(folder, began_without):
    """So that the order of a resumed run is that of one that goes on; one that was set aside when
    it began has none."""
    captioned(folder, a="x", b="y", c="z")
    spoil(folder / "b.png", "cut")
    data = dataset(folder)
    with ThreadPoolExecutor(2) as threads:
        data.check(threads, 0.34 if began_without else 0.0, began_without=began_without)
    kept = ["a.png", "c.png"] if began_without else ["a.png", "b.png", "c.png"]
    assert [image.name for image in data.images] == kept
    assert [problem.name for problem in data.problems] == ["b.png"]
    assert (data.heights_and_widths == (8, 12)).all()  # of one whose size is unknown, the median


def test_a_sample_has_what_a_step_takes(folder):
    image(folder / "a.png", 24, 16)
    (folder / "a.txt").write_text("a cat")
    sample = dataset(folder).sample(0, draw())
    assert sample.name == "a.png"
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
TOP = 0
BOTTOM = SIDE - 1
LEFT = 0
RIGHT = SIDE - 1
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


@pytest.mark.parametrize(("orientation", "size"), [(1, (16, 24)), (6, (24, 16)), (3, (16, 24))])
def test_the_original_size_is_that_after_the_rotation(folder, orientation, size):
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


def test_a_large_jpeg_is_reduced_before_it_is_resized_and_its_size_is_kept(folder, monkeypatch):
    """The pixels are those of the whole one, but for what reducing in two steps rounds."""
    rows = np.linspace(0, 255, 320).astype(np.uint8)
    pixels = np.stack([np.tile(rows, (160, 1))] * 3, -1)
    Image.fromarray(pixels).save(folder / "a.jpg", quality=95)
    (folder / "a.txt").write_text("x")
    asked = []

    def noting(entry, at_least=None):
        asked.append((at_least, original(entry, at_least)))
        return asked[-1][1]

    original = dataset_module.decode
    monkeypatch.setattr(dataset_module, "decode", noting)
    sample = dataset(folder).sample(0, draw())
    ((needed, decoded),) = asked
    assert (needed, decoded.image.size) == ((SIDE, SIDE), (40, 20))
    assert sample.sizes["original_size_as_tuple"] == (160, 320)
    monkeypatch.setattr(dataset_module, "decode", lambda entry, at_least: original(entry))
    whole = dataset(folder).sample(0, draw())
    assert whole.sizes == sample.sizes
    assert np.abs(whole.pixels - sample.pixels).max() < 4 / 127.5
    # What comes before Resize may need all of it.
    asked.clear()
    monkeypatch.setattr(dataset_module, "decode", noting)
    with pytest.raises(HostError):
        dataset(folder, [CROP, RESIZE]).sample(0, draw())
    assert asked[0][0] is None


def test_only_picks_by_name_in_the_order_given(folder):
    data = dataset(captioned(folder, a="1", b="2", c="3"), only=["c.png", "a.png"])
    assert [image.text for image in data.images] == ["3", "1"]
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


def test_a_folder_of_ones_own_is_not_the_demo(folder):
    assert not dataset(captioned(folder, a="x")).is_demo


# ---- buckets, repeats, captions, resolution: what the section `data` adds


def made(folder: Path, **settings: Any) -> Text2ImageDataset:
    node = {
        "target": "sdxl_host.Text2ImageDataset",
        "params": {"data_path": str(folder), "target_size": SIDE, "transforms": ALL},
    }
    data = make_dataset(DataSettings(dataset_config=node, **settings))
    check(data)
    return data


def test_buckets_give_each_image_the_nearest_shape(tmp_path):
    for name, (width, height) in {
        "a": (40, 10),
        "b": (10, 40),
        "c": (30, 30),
        "d": (31, 30),
    }.items():
        image(tmp_path / f"{name}.png", width, height)
        (tmp_path / f"{name}.txt").write_text("x")
    data = made(tmp_path, buckets=True)
    data.use_buckets(2)
    assert [data.sizes[index] for index in data.size_of] == [(4, 16), (16, 4), (8, 8), (8, 8)]
    assert sorted(map(tuple, data.groups())) == [(0,), (1,), (2, 3)]
    rows = {size: (count, loss) for size, count, loss in data.bucket_rows()}
    assert rows[8, 8] == (2, pytest.approx((0 + 1 / 31) / 2))
    assert rows[4, 16] == (1, pytest.approx(0, abs=1e-12))
    for index, size in enumerate([(4, 16), (16, 4), (8, 8), (8, 8)]):
        found = data.sample(index, draw())
        assert found.pixels is not None
        assert found.pixels.shape == (3, *size)
        assert found.sizes.keys() == {
            "original_size_as_tuple",
            "crop_coords_top_left",
            "target_size_as_tuple",
            "aesthetic_score",
        }
        assert found.sizes["target_size_as_tuple"] == size
    assert data.sample(0, draw()).sizes["original_size_as_tuple"] == (10, 40)


def test_a_folder_s_images_come_so_often_in_an_epoch(tmp_path):
    for name in ("a", "few/b", "few/more/c", "few/more/d/e"):
        image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("x")
    data = made(tmp_path, repeats={"few": 2, "few/more": 3})
    assert data.groups()[0].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3]
    with pytest.raises(DataError, match=r"^data\.repeats\.fwe: .*did you mean few"):
        made(tmp_path, repeats={"fwe": 2})
    with pytest.raises(ConfigError, match=r"^data\.repeats\.few: 0"):
        DataSettings(repeats={"few": 0})


def test_one_setting_says_the_resolution(tmp_path):
    image(captioned(tmp_path, a="x") / "a.png", 40, 20)
    data = made(tmp_path, resolution=16)
    assert data.target_size == 16
    found = data.sample(0, draw())
    assert found.pixels is not None
    assert found.pixels.shape == (3, 16, 16)


def test_settings_of_captions_reach_them(tmp_path):
    (captioned(tmp_path, a="") / "a.txt").write_text("x, y, z\nw")
    given: dict[str, Any] = {"captions": "first_line", "caption_prefix": "<", "caption_suffix": ">"}
    data = made(tmp_path, **given)
    assert data.caption(0, draw()) == "<x, y, z>"
    shuffled = made(tmp_path, **given, shuffle_tags=True, keep_tags=1)
    assert {shuffled.caption(0, draw(i)) for i in range(30)} == {"<x, y, z>", "<x, z, y>"}
