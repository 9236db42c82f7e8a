"""How far the look at the data is: a line now and then, or a bar."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from sdxl_host.training import data_check
from sdxl_host.training.data_check import LookingProgress


def test_what_is_done_soon_says_nothing_and_what_takes_long_a_line_every_20_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(data_check.time, "monotonic", lambda: now)
    said: list[str] = []
    with LookingProgress(said.append) as progress:
        for done in range(1, 101):
            now = float(done)
            progress(done, 100)
    assert said == [
        "looked at 20 of 100 images, 1:20 left",
        "looked at 40 of 100 images, 1:00 left",
        "looked at 60 of 100 images, 0:40 left",
        "looked at 80 of 100 images, 0:20 left",
    ]


def test_on_a_terminal_there_is_a_bar_which_is_gone_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    bars: list[Any] = []
    original = data_check.tqdm

    def noting(*args: Any, **kwargs: Any) -> Any:
        bars.append(original(*args, **kwargs, file=Terminal()))
        return bars[-1]

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(data_check, "tqdm", noting)
    said: list[str] = []
    with LookingProgress(said.append) as progress:
        progress(16, 50)
        progress(50, 50)
    (bar,) = bars
    assert (bar.n, bar.total, bar.disable) == (50, 50, True)  # closed
    assert not said
