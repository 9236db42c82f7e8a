"""The curves of `sdxl_host.planning.curves` as an image."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdxl_host.planning.curves import Curve

__all__ = ["draw_curves"]

_WIDTH, _PANEL = 900, 210  # pixels of the plotted area, of each panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 30, 30, 44
_HEAD = 56
_BEFORE, _AFTER = (130, 130, 130), (200, 60, 30)
_INK, _GRID = (30, 30, 30), (225, 225, 225)


def draw_curves(before: Curve, after: Curve, title: str) -> Image.Image:
    """p, w and p * w over the timesteps, one panel each, without plugins and with them."""
    panels = (
        ("p(t): probability of a draw", before.p, after.p),
        ("w(t): factor on the network's own squared error", before.w, after.w),
        ("p(t) w(t): share of the loss's weight", before.share, after.share),
    )
    height = _HEAD + len(panels) * (_TOP + _PANEL + _BOTTOM)
    image = Image.new("RGB", (_LEFT + _WIDTH + _RIGHT, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default()
    draw.text((_LEFT, 12), title, fill=_INK, font=font)
    for place, (name, color) in enumerate((("without plugins", _BEFORE), ("with them", _AFTER))):
        x = _LEFT + 160 * place
        draw.line([(x, 40), (x + 24, 40)], fill=color, width=3)
        draw.text((x + 32, 34), name, fill=_INK, font=font)
    for index, (name, first, second) in enumerate(panels):
        top = _HEAD + index * (_TOP + _PANEL + _BOTTOM) + _TOP
        _panel(draw, font, top, name, first, second)
    return image


def _panel(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    top: int,
    name: str,
    before: np.ndarray,
    after: np.ndarray,
) -> None:
    """One pair of curves with its axes; the vertical one begins at 0."""
    count, bottom = len(after), top + _PANEL
    step = _tick(max(float(before.max()), float(after.max())))
    highest = step * max(1, math.ceil(max(before.max(), after.max()) / step - 1e-9))
    draw.text((_LEFT, top - 18), name, fill=_INK, font=font)
    for tick in range(round(highest / step) + 1):
        y = round(bottom - _PANEL * tick * step / highest)
        draw.line([(_LEFT, y), (_LEFT + _WIDTH, y)], fill=_GRID)
        draw.text((_LEFT - 8, y), f"{tick * step:.4g}", fill=_INK, font=font, anchor="rm")
    for tick in range(11):
        timestep = min(round(count * tick / 10), count - 1)
        x = _LEFT + round(_WIDTH * timestep / (count - 1))
        draw.line([(x, bottom), (x, bottom + 4)], fill=_INK)
        draw.text((x, bottom + 14), str(timestep), fill=_INK, font=font, anchor="mm")
    draw.text((_LEFT + _WIDTH // 2, bottom + 30), "timestep t, clean to noisy", fill=_INK,
              font=font, anchor="mm")  # fmt: skip
    draw.line([(_LEFT, top), (_LEFT, bottom), (_LEFT + _WIDTH, bottom)], fill=_INK)
    for values, color, width in ((before, _BEFORE, 3), (after, _AFTER, 2)):
        across = _LEFT + _WIDTH * np.arange(count) / (count - 1)
        down = bottom - _PANEL * values / highest
        draw.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=color, width=width)


def _tick(highest: float) -> float:
    """A distance of marks, 1, 2 or 5 times a power of ten, that puts about four on the axis."""
    if highest <= 0:
        return 1.0
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
