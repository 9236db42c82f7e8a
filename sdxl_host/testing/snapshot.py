"""Whether objects changed: copies of what their attributes hold, to compare later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["attributes", "changed", "class_attributes"]

_DEPTH = 6


class _Object(dict[str, Any]):
    """The attributes of an object; those that come later are no change (cached properties)."""


def attributes(instance: Any) -> dict[str, Any]:
    """What the attributes of `instance` hold now, by name."""
    return {
        name: _copied(value, _DEPTH) for name, value in getattr(instance, "__dict__", {}).items()
    }


def class_attributes(cls: type) -> dict[str, Any]:
    """What the attributes of a class and of those it derives from hold now; no methods."""
    found: dict[str, Any] = {}
    for one in reversed(cls.__mro__[:-1]):
        for name, value in vars(one).items():
            is_data = not (callable(value) or hasattr(value, "__get__") or name.startswith("__"))
            if is_data:
                found[name] = _copied(value, _DEPTH)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, those that are only in one of both included."""
    names = [*before, *(name for name in after if name not in before)]
    missing = object()
    return [n for n in names if _differs(before.get(n, missing), after.get(n, missing))]


def _copied(value: Any, depth: int) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, np.random.Generator):
        return _copied(value.bit_generator.state, depth)
    if depth and isinstance(value, Mapping):
        return {key: _copied(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_copied(item, depth - 1) for item in value]
    if isinstance(value, set | frozenset | bytearray):
        return type(value)(value)
    # MindSpore's own objects are large, and change by being used.
    plain = type(value).__module__.partition(".")[0] != "mindspore"
    if depth and plain and not isinstance(value, type) and hasattr(value, "__dict__"):
        return _Object({n: _copied(item, depth - 1) for n, item in vars(value).items()})
    return value


def _differs(before: Any, after: Any) -> bool:
    if type(before) is not type(after):
        return True
    if isinstance(before, np.ndarray):
        # NaN is a value like others: what was not measured yet, for one.
        nan = before.dtype.kind in "fc"
        return before.dtype != after.dtype or not np.array_equal(before, after, equal_nan=nan)
    if isinstance(before, _Object):
        return any(_differs(value, after.get(name)) for name, value in before.items())
    if isinstance(before, dict):
        return list(before) != list(after) or any(_pairs(before.values(), after.values()))
    if isinstance(before, list):
        return len(before) != len(after) or any(_pairs(before, after))
    return bool(before is not after and before != after)


def _pairs(before: Any, after: Any) -> Iterator[bool]:
    return (_differs(one, other) for one, other in zip(before, after, strict=True))
