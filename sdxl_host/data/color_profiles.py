"""Embedded colour profiles: pixels in the colours of a profile to those of sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

__all__ = ["to_srgb"]

_BLACK_ON_BLACK = 0x2000  # lcms2.h: cmsFLAGS_BLACKPOINTCOMPENSATION

# Levels by which a transform may miss the identity and still be left out: that of sRGB itself.
_ROUNDING = 1


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """An image of mode RGB, L, CMYK or LAB in RGB, in the colours of sRGB; None where the profile
    is broken or does not fit the image. Without a profile the colours are taken as they are."""
    if not profile and image.mode != "LAB":
        return image.convert("RGB")
    try:
        transform = _transform(profile or b"", image.mode)
        if transform is None:
            return image.convert("RGB")
        return transform.apply(image)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB's, relative to white, with black on black; None where they
    are the same. Raises what ImageCms raises, for a profile of other colours than the mode's too;
    other threads may use it at once."""
    if not profile:
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    else:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.ImageCmsTransform(
        source,
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=_BLACK_ON_BLACK,
    )
    if mode == "RGB":
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        changed = np.asarray(transform.apply(Image.fromarray(colors)))
        if np.abs(changed.astype(int) - colors).max() <= _ROUNDING:
            return None
    return transform
