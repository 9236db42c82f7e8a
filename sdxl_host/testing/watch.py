"""What a plugin's hooks answered and how long they took, while a run or a check calls them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

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
        manager = hooks._manager
        for caller in manager.get_hookcallers(manager.get_plugin(name)) or []:
            for implementation in caller.get_hookimpls():
                if implementation.plugin_name == name:
                    seen = self.calls.setdefault(caller.name, [])
                    watched = _adapter if implementation.wrapper else _plain
                    implementation.function = watched(implementation.function, seen)

    def microseconds(self) -> dict[str, float]:
        """The median time of a call, by hook."""
        return {
            hook: 1e6 * statistics.median(call.seconds for call in calls)
            for hook, calls in self.calls.items()
            if calls
        }


def _plain(function: Callable[..., Any], seen: list[Call]) -> Callable[..., Any]:
    def watched(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **named)
        seen.append(Call(time.perf_counter() - started, result))
        return result

    return watched


def _adapter(function: Callable[..., Any], seen: list[Call]) -> Callable[..., Any]:
    def watched(*arguments: Any) -> Any:
        return _Adapter(function(*arguments), seen)

    return watched


class _Adapter:
    """A generator with a clock: what pluggy asks of a wrapper goes on to it."""

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

    def close(self) -> None:
        self._inner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

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
