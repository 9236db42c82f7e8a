"""Image files of every kind that people have: good ones and bad ones."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from support.images import image
from support.profiles import DISPLAY_P3_2_2, GREY_LINEAR


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


def good_files(folder: Path) -> dict[str, tuple[int, int]]:
    """(height, width) of each file, as it is seen: of every format and mode, with profiles."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("L", (30, 20), level) for level in (0, 255)]
    options: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "cmyk.jpg": ("CMYK", (0, 255, 255, 0), {}),
        "grey.png": ("L", 128, {"icc_profile": GREY_LINEAR}),
        "grey16.png": ("I;16", 128 * 257, {}),
        "grey16.tif": ("I;16", 128 * 257, {}),
        "p3.png": ("RGB", (200, 30, 30), {"icc_profile": DISPLAY_P3_2_2}),
        "palette.bmp": ("P", 0, {}),
        "rgba.webp": ("RGBA", (1, 2, 3, 0), {}),
        "transparent.png": ("LA", (0, 0), {}),
        "wrong_profile.png": ("RGB", "red", {"icc_profile": b"junk" * 50}),
    }
    for name, (mode, color, saving) in options.items():
        Image.new(mode, (30, 20), color).save(folder / name, **saving)
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (30, 20)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (800, 1), "blue").save(folder / "spacer.png")
    image(folder / "tall.png", 10, 40)
    sizes = dict.fromkeys([*options, "moving.gif"], (20, 30))
    return sizes | {"turned.jpg": (30, 20), "spacer.png": (1, 800), "tall.png": (40, 10)}


def bad_files(folder: Path) -> dict[str, str]:
    """The kind of each of ten bad files."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:3000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "html.jpg").write_bytes(b"<html>not found</html>")
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    (folder / "bomb.png").write_bytes(png(20000, 20000, chunk(b"IDAT", b"")))
    text = b"Comment\0\0" + zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
    (folder / "text.png").write_bytes(png(4, 4, chunk(b"zTXt", text)))
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    Image.new("F", (30, 20), 0.5).save(folder / "float.tif")
    whole = png(8, 8, chunk(b"IDAT", b"\xff" * 40), chunk(b"IEND", b""))
    (folder / "damaged.png").write_bytes(whole)
    return {
        "cut.jpg": "an image file that breaks off",
        "empty.png": "an empty image file",
        "html.jpg": "a file that is no image",
        "eps.png": "a file that is no image",
        "bomb.png": "an image of too many pixels",
        "text.png": "an image with a text chunk too large",
        "pipe.png": "not a file, but a pipe, device or folder",
        "zero.png": "not a file, but a pipe, device or folder",
        "float.tif": "an image whose white is not known",
        "damaged.png": "a damaged image file",
    }
