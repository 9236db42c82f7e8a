"""The image transforms of the original configs, by their names.

A sample is a dict: `image` is (H, W, 3) uint8 at first; sizes are (height, width) pairs. Each
transform takes the sample and the generator that its random choices are drawn from.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from PIL import Image

__all__ = [
    "AddOriginalImageSizeAsTupleAndCropToSquare",
    "Rescaler",
    "Resize",
    "Transform",
    "Transpose",
]

Sample = dict[str, Any]


class Transform(Protocol):
    """One step from a decoded image to the network's input."""

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """The changed sample."""
        ...


class Resize:
    """Scales the image so that its shorter side has `size` pixels.

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
        height, width = sample["image"].shape[:2]
        scale = self.size / min(height, width)
        # The shorter side is exact; the longer one is rounded, never below the shorter.
        size = (max(self.size, round(width * scale)), max(self.size, round(height * scale)))
        resized = Image.fromarray(sample["image"]).resize(size, self.interpolation)
        return {**sample, "image": np.asarray(resized)}


class Rescaler:
    """Bytes 0..255 to floats in [-1, 1]; with `isfloat`, floats 0..1 to [-1, 1]."""

    def __init__(self, isfloat: bool = False) -> None:
        self.isfloat = isfloat

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        image = sample["image"].astype(np.float32)
        scaled = image * 2.0 - 1.0 if self.isfloat else image / 127.5 - 1.0
        return {**sample, "image": scaled}


class AddOriginalImageSizeAsTupleAndCropToSquare:
    """A random square crop; records where it was cut, as `crop_coords_top_left`.

    `original_size_as_tuple` is recorded when the image is read, after its EXIF rotation.
    """

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        height, width = sample["image"].shape[:2]
        side = min(height, width)
        top = int(generator.integers(0, height - side + 1))
        left = int(generator.integers(0, width - side + 1))
        cropped = sample["image"][top : top + side, left : left + side]
        return {**sample, "image": cropped, "crop_coords_top_left": (top, left)}


class Transpose:
    """Reorders axes: `hwc2chw` puts the channels first."""

    def __init__(self, type: str = "hwc2chw") -> None:
        if type != "hwc2chw":
            raise ValueError(f"Transpose: type must be hwc2chw, not {type!r}")

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        return {**sample, "image": np.ascontiguousarray(sample["image"].transpose(2, 0, 1))}
