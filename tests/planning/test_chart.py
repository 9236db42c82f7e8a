"""The image of the curves shows them where their values are."""

from __future__ import annotations

import numpy as np
import pytest

from sdxl_host.planning.chart import draw_curves
from sdxl_host.planning.curves import Curve


def test_the_curves_are_drawn_where_their_values_are() -> None:
    """Before is grey and after red, each at its height; and axes and legend are there."""
    count = 1000
    sigma = np.linspace(0.1, 10, count)
    half = np.where(np.arange(count) < 500, 1.0, 0.0)
    before = Curve(sigma, np.full(count, 1e-3), np.ones(count))
    after = Curve(sigma, half / half.sum(), np.full(count, 0.5))
    pixels = np.asarray(draw_curves(before, after, "plugins: none")).astype(int)

    def rows_of(column: int, color: tuple[int, int, int]) -> np.ndarray:
        return np.flatnonzero((pixels[:, column] == color).all(axis=1))

    red, grey, dark = (200, 60, 30), (130, 130, 130), (30, 30, 30)
    left, right = rows_of(300, red), rows_of(800, red)
    # p: twice the uniform density in the left half, 0 in the right one.
    top_panel = (rows_of(300, grey)[rows_of(300, grey) < 320]).mean()
    floor = right[right < 320].mean()
    assert floor - top_panel > 20
    assert floor - left[left < 320].mean() == pytest.approx(2 * (floor - top_panel), abs=4)
    # w: half of before's everywhere.
    middle = [rows[(rows > 320) & (rows < 600)].mean() for rows in (rows_of(300, grey), left)]
    assert middle[0] < middle[1]
    axis = (pixels[:, 80] == dark).all(axis=1)
    assert axis.sum() > 3 * 190
    assert (pixels[:60, :] == grey).all(axis=2).any()
    assert (pixels[:60, :] == red).all(axis=2).any()
