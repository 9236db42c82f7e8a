"""The transforms of the original configs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_host.data.transforms import (
    AddOriginalImageSizeAsTupleAndCropToSquare,
    CenterCrop,
    RandomCrop,
    RandomHorizontalFlip,
    Rescaler,
    Resize,
    Transpose,
)
from sdxl_host.randomness import Stream, generator


def draw(position: int = 0) -> np.random.Generator:
    return generator(42, Stream.CROP, 1, position)


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
        (7, 50, (8, 57)),
        (1, 500, (8, 64)),
        (500, 1, (64, 8)),
        (999, 1000, (8, 8)),
    ],
)
def test_resize_makes_the_shorter_side_exact(height, width, result):
    """The longer one keeps the aspect within half a pixel and is never the shorter; of an image
    that is longer than eight times that, a part is taken."""
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


# ---- crops, flips and buckets: what is recorded is where the pixels really come from

PLACES = np.stack(np.meshgrid(np.arange(40), np.arange(60), [0], indexing="ij"), -1)[:, :, 0]
PLACES = PLACES.astype(np.uint8)  # (40, 60, 3): each pixel says its row and column


def sample(**more: Any) -> dict[str, Any]:
    return {"image": PLACES, "crop_coords_top_left": (0, 0), "target_size_as_tuple": (8, 8)} | more


@pytest.mark.parametrize(
    ("transform", "size"),
    [
        (RandomCrop(), (8, 8)),
        (RandomCrop(10), (10, 10)),
        (AddOriginalImageSizeAsTupleAndCropToSquare(), (40, 40)),
    ],
)
def test_a_random_crop_is_recorded_where_it_was_cut(transform, size):
    seen = set()
    for position in range(60):
        found = transform(sample(), draw(position))
        assert found["image"].shape[:2] == size
        assert tuple(found["image"][0, 0, :2]) == found["crop_coords_top_left"]
        seen.add(found["crop_coords_top_left"])
    assert len(seen) > 10


def test_the_middle_is_cut_out():
    found = CenterCrop(10)(sample(), draw())
    assert found["crop_coords_top_left"] == (15, 25)
    assert tuple(found["image"][0, 0, :2]) == (15, 25)


@pytest.mark.parametrize("crop", [RandomCrop(10), CenterCrop(10)])
def test_a_flip_is_recorded_as_if_the_whole_image_had_been_turned_first(crop):
    """Before the crop or after it: column c of the image is column 59 - c of the turned one."""
    flip = RandomHorizontalFlip(1.0)
    for steps in ((flip, crop), (crop, flip)):
        found = sample()
        for step in steps:
            found = step(found, draw())
        top, left = found["crop_coords_top_left"]
        assert tuple(found["image"][0, 0, :2]) == (top, 59 - left)
        assert tuple(found["image"][0, -1, :2]) == (top, 59 - left - 9)


def test_two_crops_add_up_and_flips_undo_each_other():
    found = RandomCrop(10)(RandomCrop(30)(sample(), draw(1)), draw(2))
    assert tuple(found["image"][0, 0, :2]) == found["crop_coords_top_left"]
    flip = RandomHorizontalFlip(1.0)
    twice = flip(flip(found, draw()), draw())
    assert np.array_equal(twice["image"], found["image"])
    assert twice["crop_coords_top_left"] == found["crop_coords_top_left"]


def test_flips_come_with_their_probability():
    for p, most, least in ((0.0, 0, 0), (0.5, 70, 30), (1.0, 100, 100)):
        flipped = [
            RandomHorizontalFlip(p)(sample(), draw(i))["image"][0, 0, 1] == 59 for i in range(100)
        ]
        assert least <= sum(flipped) <= most


def test_in_a_bucket_an_image_covers_its_size_and_is_cropped_to_it():
    for height, width in ((8, 16), (16, 8), (12, 10)):
        bucketed = sample(is_bucketed=True, target_size_as_tuple=(height, width))
        scaled = Resize(1000)(bucketed, draw())
        rows, columns = scaled["image"].shape[:2]
        assert rows >= height and columns >= width
        assert rows == height or columns == width
        for crop in (AddOriginalImageSizeAsTupleAndCropToSquare(), CenterCrop(1000)):
            assert crop(scaled, draw())["image"].shape == (height, width, 3)


def test_what_is_cut_off_a_far_too_long_image_counts_as_cropped():
    image = np.zeros((2, 100, 3), np.uint8)
    image[:, :, 1] = np.arange(100)
    for turned in (False, True):
        given = image.transpose(1, 0, 2)[..., [1, 0, 2]] if turned else image
        seen = set()
        for position in range(40):
            found = Resize(2, 0)(sample(image=np.ascontiguousarray(given)), draw(position))
            assert sorted(found["image"].shape[:2]) == [2, 16]
            assert tuple(found["image"][0, 0, :2]) == found["crop_coords_top_left"]
            flipped = RandomHorizontalFlip(1.0)(found, draw())
            assert flipped["crop_coords_top_left"][1] == (
                0 if turned else 84 - found["crop_coords_top_left"][1]
            )
            seen.add(found["crop_coords_top_left"])
        assert len(seen) > 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(0), "RandomCrop: size"),
        (lambda: CenterCrop(-1), "CenterCrop: size"),
        (lambda: RandomHorizontalFlip(1.5), "RandomHorizontalFlip: p"),
        (lambda: RandomCrop(50)(sample(), draw()), "50x50 can't be cut out of it"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
