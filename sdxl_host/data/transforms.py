"""The image transforms of the original configs, by their names.

A sample is a dict: `image` is (H, W, 3) uint8 at first; sizes are (height, width) pairs, and
`target_size_as_tuple` is what the network gets in the end. Where the dataset has buckets,
`is_bucketed` is True, and an image is scaled to cover that size and cropped to it, whatever
transform does so. Each transform takes the sample and the generator that its random choices are
drawn from, and gives a changed sample.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from PIL import Image

__all__ = [
    "AddOriginalImageSizeAsTupleAndCropToSquare",
    "CenterCrop",
    "RandomCrop",
    "RandomHorizontalFlip",
    "Rescaler",
    "Resize",
    "Transform",
    "Transpose",
]

Sample = dict[str, Any]

# An image that is longer than this many times its shorter side is cut to that before it is scaled:
# one of 800 x 1 pixels would else become one of 819,200 x 1,024.
_LONGEST = 8


class Transform(Protocol):
    """One step from a decoded image to the network's input."""

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """The changed sample."""
        ...


class Resize:
    """Scales the image so that its shorter side has `size` pixels; in a bucket, so that it covers
    the bucket's size.

    interpolation: as in Pillow and torchvision; 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic.
    """

    def __init__(self, size: int, interpolation: int = 3) -> None:
        if size < 1:
            raise ValueError(f"Resize: size must be at least 1, not {size}")
        if interpolation not in (0, 1, 2, 3):
            raise ValueError(f"Resize: interpolation must be 0, 1, 2 or 3, not {interpolation}")
        self.size = size
        self.interpolation = Image.Resampling(interpolation)

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        image = sample["image"]
        covered = self.size, self.size
        if sample.get("is_bucketed"):
            covered = sample["target_size_as_tuple"]
        image, top, left, right = _shortened(image, generator)
        height, width = image.shape[:2]
        scale = max(covered[0] / height, covered[1] / width)
        # The side that decides is exact; the other is rounded, never below what it must cover.
        size = (max(covered[1], round(width * scale)), max(covered[0], round(height * scale)))
        resized = Image.fromarray(image).resize(size, self.interpolation)
        if top or left or right:
            corner = (round(top * scale), round(left * scale))
            sample = {**sample, "crop_coords_top_left": corner, "crop_right": round(right * scale)}
        return {**sample, "image": np.asarray(resized)}


class Rescaler:
    """Bytes 0..255 to floats in [-1, 1]; with `isfloat`, floats 0..1 to [-1, 1]."""

    def __init__(self, isfloat: bool = False) -> None:
        self.isfloat = isfloat

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        image = sample["image"].astype(np.float32)  # a copy, changed in place: half the time
        if self.isfloat:
            image *= 2.0
        else:
            image /= 127.5
        image -= 1.0
        return {**sample, "image": image}


class RandomCrop:
    """A random part of the image; records where it was cut, as `crop_coords_top_left`.

    size: side of the square that is cut out; none given, the size that the network gets.
    """

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"{type(self).__name__}: size must be at least 1, not {size}")
        self.size = size

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        height, width = self.cut(sample)
        down, across = sample["image"].shape[0] - height, sample["image"].shape[1] - width
        if min(down, across) < 0:
            raise ValueError(f"{height}x{width} can't be cut out of it; put Resize before")
        top, left = self.corner(down, across, generator)
        y, x = sample.get("crop_coords_top_left", (0, 0))
        cropped = sample["image"][top : top + height, left : left + width]
        # What a flip after the crop needs: where the crop begins, seen from the other side.
        right = sample.get("crop_right", 0) + across - left
        corner = (y + top, x + left)
        return {**sample, "image": cropped, "crop_coords_top_left": corner, "crop_right": right}

    def cut(self, sample: Sample) -> tuple[int, int]:
        """(height, width) of what is cut out."""
        if self.size is None or sample.get("is_bucketed"):
            return sample["target_size_as_tuple"]
        return self.size, self.size

    def corner(self, down: int, right: int, generator: np.random.Generator) -> tuple[int, int]:
        """(top, left) of the part, where there are so many places to move it down and right."""
        return int(generator.integers(0, down + 1)), int(generator.integers(0, right + 1))


class CenterCrop(RandomCrop):
    """The middle of the image; records where it was cut, as `crop_coords_top_left`."""

    def corner(self, down: int, right: int, generator: np.random.Generator) -> tuple[int, int]:
        return down // 2, right // 2


class AddOriginalImageSizeAsTupleAndCropToSquare(RandomCrop):
    """A random crop to the largest square, in a bucket to the bucket's size; records where it was
    cut, as `crop_coords_top_left`.

    `original_size_as_tuple` is recorded when the image is read, after its EXIF rotation.
    """

    def __init__(self) -> None:
        super().__init__()

    def cut(self, sample: Sample) -> tuple[int, int]:
        if sample.get("is_bucketed"):
            return sample["target_size_as_tuple"]
        side = min(sample["image"].shape[:2])
        return side, side


class RandomHorizontalFlip:
    """Turns left and right with probability `p`. Where a crop was cut is recorded as if the whole
    image had been turned before."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"RandomHorizontalFlip: p must be from 0 to 1, not {p}")
        self.p = p

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        if generator.random() >= self.p:
            return sample
        top, left = sample.get("crop_coords_top_left", (0, 0))
        right = sample.get("crop_right", 0)
        return {
            **sample,
            "image": np.ascontiguousarray(sample["image"][:, ::-1]),
            "crop_coords_top_left": (top, right),
            "crop_right": left,
        }


class Transpose:
    """Reorders axes: `hwc2chw` puts the channels first."""

    def __init__(self, type: str = "hwc2chw") -> None:
        if type != "hwc2chw":
            raise ValueError(f"Transpose: type must be hwc2chw, not {type!r}")

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        return {**sample, "image": np.ascontiguousarray(sample["image"].transpose(2, 0, 1))}


def _shortened(
    image: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, int, int, int]:
    """A random part of an image that is far too long, and how much is cut off above it, left and
    right of it; others as they are."""
    height, width = image.shape[:2]
    most = _LONGEST * min(height, width)
    top = int(generator.integers(0, height - most + 1)) if height > most else 0
    left = int(generator.integers(0, width - most + 1)) if width > most else 0
    right = max(0, width - most - left)
    return image[top : top + most, left : left + most], top, left, right
