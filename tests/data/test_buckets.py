"""Sizes for images of all shapes."""

from __future__ import annotations

import numpy as np
import pytest

from sdxl_host.data.buckets import bucket_sizes, crop_losses, nearest


def test_at_1024_they_are_those_of_the_paper():
    sizes = bucket_sizes(1024, 32)
    assert len(sizes) == 41
    assert sizes[0] == (512, 2048)
    assert (832, 1216) in sizes
    assert (1024, 1024) in sizes
    assert sizes == [(w, h) for h, w in reversed(sizes)]
    assert all(h % 64 == w % 64 == 0 and 0.85 < h * w / 2**20 <= 1.01 for h, w in sizes)
    aspects = [w / h for h, w in sizes]
    assert aspects == sorted(aspects, reverse=True)


@pytest.mark.parametrize(("resolution", "step"), [(512, 32), (768, 32), (64, 8), (16, 2), (8, 8)])
def test_at_other_sizes_sides_are_multiples_and_none_stands_twice(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    assert all(h % step == w % step == 0 and min(h, w) > 0 for h, w in sizes)


def test_the_nearest_aspect_is_taken_on_a_scale_where_2_to_1_is_as_far_as_1_to_2():
    sizes = [(10, 40), (10, 10), (40, 10)]
    images = np.array(
        [(100, 199), (100, 201), (199, 100), (201, 100), (5, 5), (1, 800), (100, 200)]
    )
    assert nearest(images, sizes).tolist() == [1, 0, 1, 2, 1, 0, 0]


def test_what_a_crop_takes():
    """Of 100 x 200 pixels half, where the crop is square; nothing where the shape is the same."""
    images = np.array([(100, 200), (200, 100), (50, 50), (300, 300)])
    np.testing.assert_allclose(crop_losses(images, (32, 32)), [0.5, 0.5, 0, 0], atol=1e-12)
    np.testing.assert_allclose(crop_losses(images[:1], (10, 40)), [0.5])
