"""Image files to sRGB of 8 bits, upright, transparent parts on white.

A file may be anything: it is opened only where it is a regular file, only the formats of `FORMATS`
are tried, so that no other program is ever started, and whatever Pillow's readers raise becomes a
`BadImage`, which says what is wrong with the file in a line.
"""

from __future__ import annotations

import ctypes
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntFlag
from functools import cache

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.color_profiles import to_srgb
from sdxl_host.errors import DataError

__all__ = ["FORMATS", "BadImage", "Decoded", "Remark", "decode", "scaled_part"]

FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"),
    *(("AVIF",) if features.check("avif") else ()),
)

# How an image is turned that has this EXIF orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXCHANGING = (5, 6, 7, 8)  # the orientations that exchange width and height

# Decoded to no less than this many times the size that is needed, a JPEG is as good as whole.
_REDUCED = 2

_PILLOW = r"PIL\."  # the modules that warn

_SPECIAL = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISCHR, "device"),
)


class BadImage(DataError):
    """An image file that can't be decoded.

    kind: what is wrong, in words that many share. detail: what is wrong with this one. is_lasting:
    whether the file itself is at fault, rather than the disk or the memory.
    """

    def __init__(self, entry: Captioned, kind: str, detail: str, is_lasting: bool = True) -> None:
        super().__init__(
            f"{entry.place}: can't be read as an image ({detail}); replace or remove it"
        )
        self.kind, self.detail, self.is_lasting = kind, detail, is_lasting


class Remark(IntFlag):
    """What a user should know of an image that can be used."""

    NONE = 0
    FRAMES = 1
    PROFILE = 2
    EXIF = 4

    def sentence(self, count: int) -> str:
        """What this one remark says of so many images."""
        one, many = {
            Remark.FRAMES: ("holds several frames,", "hold several frames,"),
            Remark.PROFILE: ("has a colour profile", "have a colour profile"),
            Remark.EXIF: ("has EXIF data", "have EXIF data"),
        }[self]
        rest = {
            Remark.FRAMES: "of which the first is taken",
            Remark.PROFILE: "that can't be used; the colours are taken for sRGB",
            Remark.EXIF: "that can't be read; nothing is rotated",
        }[self]
        return f"1 image {one} {rest}" if count == 1 else f"{count:,} images {many} {rest}"


@dataclass(frozen=True)
class Decoded:
    """image: RGB. size: (height, width) of the whole image after its EXIF rotation, also where
    `image` was decoded to less."""

    image: Image.Image
    size: tuple[int, int]
    remarks: Remark


def decode(entry: Captioned, at_least: tuple[int, int] | None = None) -> Decoded:
    """The image in sRGB, rotated by its EXIF orientation, transparent parts on white.

    at_least: the (height, width) that is needed of it; a JPEG that is much larger is decoded to an
    eighth, a quarter or half of its size, never to less than twice what is needed. Raises BadImage.
    """
    with _opened(entry) as image:
        remarks, orientation = Remark.NONE, 1
        size = image.height, image.width
        if image.format in ("JPEG", "MPO"):
            orientation, remarks = _orientation(image)
            size = size[::-1] if orientation in _EXCHANGING else size
            if at_least is not None:
                needed = at_least[::-1] if orientation in _EXCHANGING else at_least
                image.draft(None, (_REDUCED * needed[1], _REDUCED * needed[0]))
        elif getattr(image, "n_frames", 1) > 1:
            remarks |= Remark.FRAMES
        image.load()
        profile = image.info.get("icc_profile")
        if image.format not in ("JPEG", "MPO"):
            # A TIFF is turned when it is loaded, and then says that it is upright.
            orientation, unreadable = _orientation(image)
            size, remarks = (image.height, image.width), remarks | unreadable
            size = size[::-1] if orientation in _EXCHANGING else size
        flat, is_converted = _flat(_eight_bits(entry, image), profile)
        if not is_converted:
            remarks |= Remark.PROFILE
        if orientation in _TURNS:
            flat = flat.transpose(_TURNS[orientation])
        return Decoded(flat, size, remarks)


def scaled_part(
    image: Image.Image,
    size: tuple[int, int],
    corner: tuple[int, int],
    part: tuple[int, int],
    resampling: Image.Resampling,
) -> Image.Image:
    """What lies at `corner` (top, left) and is `part` (height, width) large, of the image scaled to
    `size` (height, width); the rest is never made, so a spacer of 800 x 1 takes no memory."""
    down, across = image.height / size[0], image.width / size[1]
    (top, left), (height, width) = corner, part
    box = (
        left * across,
        top * down,
        min((left + width) * across, image.width),
        min((top + height) * down, image.height),
    )
    return image.resize((width, height), resampling, box)


# ---- one after the other


@contextmanager
def _opened(entry: Captioned) -> Iterator[Image.Image]:
    """The image of a file. Raises BadImage for whatever goes wrong until the block ends."""
    _ignore_warnings()
    try:
        _check_regular(entry)
        with entry.open() as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except BadImage:
        raise
    except Exception as error:  # a damaged file makes Pillow's readers raise anything
        raise _bad(entry, error) from error


def _check_regular(entry: Captioned) -> None:
    """Raises BadImage for what is no file with bytes in it; a pipe is never opened."""
    status = os.stat(entry.file)
    for is_kind, name in _SPECIAL:
        if is_kind(status.st_mode):
            raise BadImage(entry, "not a file, but a pipe, device or folder", f"a {name}")
    length = status.st_size if entry.span is None else entry.span[1]
    if length == 0:
        raise BadImage(entry, "an empty image file", "it is empty")


def _bad(entry: Captioned, error: Exception) -> BadImage:
    """What is wrong with an image, from what was raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        pixels = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return BadImage(entry, "an image of too many pixels", f"more than {pixels:,} pixels")
    if isinstance(error, UnidentifiedImageError):
        return BadImage(entry, "a file that is no image", _beginning(entry))
    if isinstance(error, MemoryError):
        return BadImage(entry, "an image that memory has no room for", "no memory is left", False)
    if isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror or text
        return BadImage(entry, "an image file that can't be opened", reason, False)
    if "MAX_TEXT_" in text or "Too much memory used in text chunks" in text:
        return BadImage(entry, "an image with a text chunk too large", "a text chunk too large")
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return BadImage(entry, "an image file that breaks off", text)
    return BadImage(entry, "a damaged image file", text)


def _beginning(entry: Captioned) -> str:
    """How a file begins that is none of the formats."""
    try:
        with entry.open() as file:
            first = file.read(16)
    except OSError:
        first = b""
    return f"it begins with {first!r}, as no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} does"


def _ignore_warnings() -> None:
    """Lets Pillow's modules not print what they warn of: metadata that is wrong in a file, and
    images of over 90 million pixels, which photographs have.

    Filters are the process's, not a thread's, so this one stays; it is put in front again where
    somebody has changed the filters since.
    """
    _silence_libtiff()
    first = warnings.filters[0] if warnings.filters else (None,) * 5
    if getattr(first[3], "pattern", None) != _PILLOW:
        warnings.filterwarnings("ignore", module=_PILLOW)


@cache
def _silence_libtiff() -> None:
    """Lets libtiff print nothing of its own about a damaged file; its error is raised all the same.

    A Pillow that hides libtiff inside itself goes on printing.
    """
    with suppress(OSError, AttributeError):
        set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_handler(None)


def _orientation(image: Image.Image) -> tuple[int, Remark]:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1)), Remark.NONE
    except Exception:  # as for the image itself
        return 1, Remark.EXIF


def _eight_bits(entry: Captioned, image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, because Pillow would clip it; other images as they are.

    Raises BadImage for numbers of which no format says what is white.
    """
    is_tiff = image.format == "TIFF"
    if image.mode == "F" or (image.mode == "I" and is_tiff):
        what = "floating-point numbers" if image.mode == "F" else "integers of more than 16 bits"
        raise BadImage(
            entry, "an image whose white is not known", f"{what}; save it with 8 or 16 bits"
        )
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.float64)
    tags = image.tag_v2 if is_tiff else {}  # type: ignore[attr-defined]
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))
    white = 2.0 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
    grey = np.rint(np.clip(levels / white, 0, 1) * 255).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    alpha = np.where(levels == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _flat(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """RGB without transparency, and False where the profile could not be used."""
    alpha = None
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        both = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = both.getchannel("A")
        image = both.convert("RGB" if both.mode == "RGBA" else "L")
    elif image.mode in ("P", "RGBX", "YCbCr"):
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    converted = to_srgb(image, profile)
    flat = image.convert("RGB") if converted is None else converted
    if alpha is not None:
        flat = Image.composite(flat, Image.new("RGB", flat.size, "white"), alpha)
    return flat, converted is not None
