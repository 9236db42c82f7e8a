"""How far making entries has come: a bar on a terminal, about twenty plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "clock", "size"]


class Progress:
    """Shows how many of `total` entries are made, how fast, their size, and the time left.

    what: what they are, such as "latents". say: shows a line.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None]) -> None:
        self._what, self._total, self._say = what, total, say
        self._every = max(1, total // 20)
        self._shown = self.made = self.bytes = 0
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._total and sys.stderr.isatty():
            self._bar = tqdm(total=self._total, desc=self._what, unit="", dynamic_ncols=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int, bytes: int) -> None:
        """So many more entries are made, of so many bytes."""
        self.made += count
        self.bytes += bytes
        if self._bar is not None:
            self._bar.set_postfix_str(size(self.bytes))
            self._bar.update(count)
        elif self.made - self._shown >= self._every or self.made == self._total:
            self._shown = self.made
            speed = self.made / max(time.monotonic() - self._started, 1e-9)
            left = clock((self._total - self.made) / speed)
            self._say(
                f"{self._what} {self.made:,}/{self._total:,}  {size(self.bytes)}  {speed:.1f}/s, "
                f"{left} left"
            )


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    return f"{hours}:{minutes_of_hour:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Bytes as 1.2 GB, 3.4 MB or 5.6 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"
