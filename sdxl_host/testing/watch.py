"""What a plugin's hooks answered and how long they took, while a run or a check calls them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from sdxl_host.hookspecs import HOOKS
from sdxl_host.plugins.hooks import Hooks

__all__ = ["Call", "Watch"]


class Call(NamedTuple):
    """One call of a hook: the seconds spent in the plugin, and what it returned."""

    seconds: float
    result: Any


class Watch:
    """Records the calls of one plugin's hooks from now on, in `calls` by hook.

    Time that an adapter waits for the answer it adapts is not the plugin's.
    """

    def __init__(self, hooks: Hooks, name: str) -> None:
        self.calls: dict[str, list[Call]] = {}
        for hook in HOOKS:
            for link in hooks.links(hook):
                if link.name == name:
                    seen = self.calls.setdefault(hook, [])
                    watched = _adapter if link.implementation.wrapper else _plain
                    link.implementation.function = watched(link.implementation.function, seen)

    def microseconds(self) -> dict[str, float]:
        """The median time of a call, by hook."""
        return {
            hook: 1e6 * statistics.median(call.seconds for call in calls)
            for hook, calls in self.calls.items()
            if calls
        }


def _plain(function: Callable[..., Any], seen: list[Call]) -> Callable[..., Any]:
    def watched(**arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(**arguments)
        seen.append(Call(time.perf_counter() - started, result))
        return result

    return watched


def _adapter(function: Callable[..., Any], seen: list[Call]) -> Callable[..., Any]:
    def watched(**arguments: Any) -> Any:
        return _Adapter(function(**arguments), seen)

    return watched


class _Adapter:
    """A wrapper's generator with a clock."""

    def __init__(self, inner: Generator[Any, Any, Any], seen: list[Call]) -> None:
        self._inner = inner
        self._seen = seen
        self._seconds = 0.0

    def __next__(self) -> Any:
        return self._timed(lambda: next(self._inner))

    def send(self, value: Any) -> Any:
        return self._timed(lambda: self._inner.send(value))

    def throw(self, error: BaseException) -> Any:
        return self._timed(lambda: self._inner.throw(error))

    def _timed(self, ask: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return ask()
        except StopIteration as stop:
            self._seconds += time.perf_counter() - started
            self._seen.append(Call(self._seconds, stop.value))
            raise
        finally:
            self._seconds += time.perf_counter() - started
