"""The transforms of the original configs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_host.data.transforms import (
    AddOriginalImageSizeAsTupleAndCropToSquare,
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
