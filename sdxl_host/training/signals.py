"""Ctrl-C and SIGTERM: what is in hand is finished and saved; a second signal ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside, the first signal is noted and reported; after it signals have their usual effect.

    in_hand: what the report says of the work in hand. number: the signal that came, or None. A
    signal that is ignored stays so: a shell starts jobs in the background without Ctrl-C, which is
    meant for others. Elsewhere than in the main thread, where Python takes no signals, nothing is
    changed.
    """

    def __init__(
        self, say: Callable[[str], None], in_hand: str = "the step in hand is finished and saved"
    ) -> None:
        self._say, self._in_hand = say, in_hand
        self._earlier: dict[int, Any] = {}
        self.number: int | None = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            earlier = {number: signal.getsignal(number) for number in _SIGNALS}
            self._earlier = {n: old for n, old in earlier.items() if old is not signal.SIG_IGN}
            for number in self._earlier:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """What the signal is called: SIGTERM, or SIGINT of Ctrl-C."""
        return "" if self.number is None else signal.Signals(self.number).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in self._earlier:
            signal.signal(each, signal.SIG_DFL)
        line = f"{self.name}: {self._in_hand}; once more ends at once"
        # Python refuses to print while another line is being printed, where a signal may come.
        with contextlib.suppress(RuntimeError):
            self._say(line)
