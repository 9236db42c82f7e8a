"""Image files to RGB of 8 bits, upright, transparent parts on white."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sdxl_host.data.captioned import Captioned
from sdxl_host.errors import DataError

__all__ = ["decode", "decoded_size", "header_size"]

# EXIF orientations that exchange width and height.
_TURNED = (5, 6, 7, 8)


def decode(entry: Captioned) -> Image.Image:
    """The image in RGB, rotated by its EXIF orientation, transparent parts on white.

    Raises DataError where it can't be read.
    """
    with _opened(entry) as image:
        upright = _eight_bits(ImageOps.exif_transpose(image))
        if "A" in upright.getbands() or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return upright.convert("RGB")


def decoded_size(entry: Captioned) -> tuple[int, int]:
    """(height, width) of the whole image, read to its end."""
    image = decode(entry)
    return image.height, image.width


def header_size(entry: Captioned) -> tuple[int, int]:
    """(height, width) after the EXIF rotation, from the file's header alone."""
    with _opened(entry) as image:
        # Not image.getexif(), which for a PNG would decode all of it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        width, height = image.size
    return (width, height) if orientation in _TURNED else (height, width)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, because Pillow would clip it; other images as they are."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    grey = np.rint(levels / 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[levels == transparent] = 255
    return Image.fromarray(grey)


@contextmanager
def _opened(entry: Captioned) -> Iterator[Image.Image]:
    try:
        with entry.open() as file, Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{entry.place}: can't be read as an image ({error}); replace or remove it"
        ) from error
