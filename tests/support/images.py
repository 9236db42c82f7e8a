"""Folders of images as tests make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def image(file: Path, width: int = 12, height: int = 8, color: Any = "red") -> Path:
    """A file of one colour, in whatever format its name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(file)
    return file


def captioned(folder: Path, **captions: str) -> Path:
    """A folder with an image and a .txt for each name."""
    for name, caption in captions.items():
        image(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, "utf-8")
    return folder
