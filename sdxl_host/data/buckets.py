"""Aspect-ratio buckets: the sizes that images of all shapes are scaled and cropped to.

A batch holds images of one bucket, and each bucket is one static shape of the training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["bucket_sizes", "crop_losses", "nearest"]

# Of images of about 1024 x 1024 pixels, the wide ones; Podell et al. 2023 (SDXL), appendix I. The
# tall ones are the same with width and height exchanged.
_WIDE = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
    (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
    (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024),
)  # fmt: skip
_SQUARE = 1024
_MULTIPLE = 64  # of the paper's sizes, kept wherever images are large enough for it
_LARGE = 512


def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """(height, width) of every bucket, from the widest to the tallest.

    resolution: side of the square one, in pixels; the others have about as many pixels. step: what
    autoencoder and network downsample by together, of which sides must be multiples.
    """
    multiple = _MULTIPLE if resolution >= _LARGE and _MULTIPLE % step == 0 else step
    wide = [*_WIDE, (_SQUARE, _SQUARE)]
    tall = [(width, height) for height, width in reversed(_WIDE)]

    def scaled(side: int) -> int:
        return max(1, round(side * resolution / _SQUARE / multiple)) * multiple

    sizes = [(scaled(height), scaled(width)) for height, width in (*wide, *tall)]
    return list(dict.fromkeys(sizes))


def nearest(images: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The index of the size whose aspect ratio is nearest to each image's, (N,) integers.

    images: (N, 2) heights and widths. Ratios are compared as logarithms, so that 2:1 is as far from
    1:1 as 1:2 is; of two that are as near the first counts.
    """
    aspects = _aspects(images)
    found = np.zeros(len(aspects), np.int64)
    least = np.full(len(aspects), np.inf)
    for index, aspect in enumerate(_aspects(np.asarray(sizes))):
        distance = np.abs(aspects - aspect)
        closer = distance < least - 1e-12
        found[closer], least[closer] = index, distance[closer]
    return found


def crop_losses(images: np.ndarray, sizes: tuple[int, int] | np.ndarray) -> np.ndarray:
    """The share of each image's pixels that a crop to the shape of `sizes` takes away, (N,).

    sizes: (height, width), one for all or (N, 2).
    """
    return 1 - np.exp(-np.abs(_aspects(images) - _aspects(np.asarray(sizes))))


def _aspects(sizes: np.ndarray) -> np.ndarray:
    """log(width / height) of (N, 2) heights and widths."""
    heights, widths = np.asarray(sizes, np.float64).reshape(-1, 2).T
    return np.log(widths / heights)
