"""Sampled images as one file to look at."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdxl_host.files.atomic import write_file

__all__ = ["save_grid", "to_bytes", "to_png"]

_SMALLEST = 128  # pixels a side; smaller images are enlarged by a whole factor
_LINE = 12
_MARGIN = 8


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """pixels (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8; what lies outside is clipped."""
    scaled = np.clip(np.round((pixels.transpose(0, 2, 3, 1) + 1.0) * 127.5), 0, 255)
    return scaled.astype(np.uint8)


def save_grid(path: Path, pixels: np.ndarray, captions: Sequence[str]) -> None:
    """Writes images (B, 3, H, W) in [-1, 1] as a PNG, each above its caption. Raises OSError."""
    images = [Image.fromarray(image) for image in to_bytes(pixels)]
    factor = max(1, -(-_SMALLEST // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    columns = min(len(images), 4 if len(images) <= 16 else 8)
    rows = -(-len(images) // columns)
    lines = [textwrap.wrap(caption, max(12, width // 6))[:3] for caption in captions]
    cell = (width + _MARGIN, height + _MARGIN + _LINE * max(len(text) for text in lines))
    grid = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, text) in enumerate(zip(images, lines, strict=True)):
        left = _MARGIN + index % columns * cell[0]
        top = _MARGIN + index // columns * cell[1]
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for row, line in enumerate(text):
            draw.text((left, top + height + row * _LINE), line, fill="black")
    write_file(path, to_png(grid))


def to_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
