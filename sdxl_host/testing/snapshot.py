"""Whether objects changed: copies of what their attributes hold, to compare later."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["attributes", "changed", "class_attributes"]

_DEPTH = 6
_BASES = ("builtins", "abc", "typing")  # what a plugin's plain classes may derive from


class _Object(dict[str, Any]):
    """The attributes of an object; those that come later are no change (cached properties)."""


def attributes(instance: Any) -> dict[str, Any]:
    """What the attributes of `instance` hold now, by name.

    It looks into containers, numpy arrays, random generators and objects of classes of the
    instance's own package and of the host; anything else, such as a logger or a tensor, is that
    object and no other, whatever becomes of it.
    """
    copier = _Copier(type(instance))
    return {name: copier.copied(v, _DEPTH) for name, v in getattr(instance, "__dict__", {}).items()}


def class_attributes(cls: type) -> dict[str, Any]:
    """What the attributes of a class and of those it derives from hold now; no methods."""
    copier = _Copier(cls)
    found: dict[str, Any] = {}
    for one in reversed(cls.__mro__[:-1]):
        for name, value in vars(one).items():
            is_data = not (callable(value) or hasattr(value, "__get__") or name.startswith("__"))
            if is_data:
                found[name] = copier.copied(value, _DEPTH)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, those that are only in one of both included."""
    names = [*before, *(name for name in after if name not in before)]
    missing = object()
    return [n for n in names if _differs(before.get(n, missing), after.get(n, missing))]


class _Copier:
    """Copies what can be compared later; cls: whose package is the plugin's own."""

    def __init__(self, cls: type) -> None:
        self._own = {"sdxl_host", _package(cls)}

    def copied(self, value: Any, depth: int) -> Any:
        if isinstance(value, np.ndarray):
            return self.copied(value.tolist(), depth) if value.dtype.hasobject else value.copy()
        if isinstance(value, np.random.Generator):
            return self.copied(value.bit_generator.state, depth)
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, set | frozenset | bytearray):
            return value.copy()
        if depth and isinstance(value, dict):
            return {key: self.copied(item, depth - 1) for key, item in value.items()}
        if depth and isinstance(value, list | tuple | deque):
            return [self.copied(item, depth - 1) for item in value]
        if depth and self._is_own(value) and hasattr(value, "__dict__"):
            return _Object({n: self.copied(item, depth - 1) for n, item in vars(value).items()})
        return value

    def _is_own(self, value: Any) -> bool:
        """Whether no other library has a part in it, whose objects change by being used."""
        if isinstance(value, type):
            return False
        first, *bases = map(_package, type(value).__mro__)
        return first in self._own and all(base in self._own.union(_BASES) for base in bases)


def _package(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


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
    if before is after:
        return False
    # Whether tensors are equal, their library would have to compute.
    is_foreign = any(_package(cls) == "mindspore" for cls in type(before).__mro__)
    return is_foreign or bool(np.any(before != after))


def _pairs(before: Any, after: Any) -> Iterator[bool]:
    return (_differs(one, other) for one, other in zip(before, after, strict=True))
