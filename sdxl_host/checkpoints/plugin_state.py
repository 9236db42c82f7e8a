"""A plugin's state as JSON with its arrays beside it: nothing is pickled, nothing is guessed."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["pack", "unpack"]

_ARRAY = "__array__"
_SAVED = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)


def pack(state: Any, arrays: dict[str, np.ndarray], where: str = "state") -> Any:
    """`state` as JSON values; its arrays go into `arrays`, each by a name that stands for it.

    Takes str, int, float, bool, None, lists, dicts with str keys and numpy arrays. Raises
    TypeError naming where anything else stands.
    """
    if state is None or type(state) in (str, int, float, bool):
        return state
    if isinstance(state, np.ndarray):
        if state.dtype.name not in _SAVED:
            raise TypeError(f"{where} is an array of {state.dtype.name}; only numbers can be saved")
        # A number first, because two paths can spell the same: {"a.b": x} and {"a": {"b": x}}.
        name = f"{len(arrays)} {where}"
        arrays[name] = state
        return {_ARRAY: name}
    if isinstance(state, list):
        return [pack(item, arrays, f"{where}[{index}]") for index, item in enumerate(state)]
    if isinstance(state, dict):
        for key in state:
            if not isinstance(key, str) or key == _ARRAY:
                raise TypeError(f"{where} has the key {key!r}; keys must be text")
        return {key: pack(item, arrays, f"{where}.{key}") for key, item in state.items()}
    raise TypeError(
        f"{where} is a {type(state).__name__}; only str, int, float, bool, None, lists, dicts and "
        "numpy arrays can be saved"
    )


def unpack(packed: Any, arrays: dict[str, np.ndarray]) -> Any:
    """What `pack` was given."""
    if isinstance(packed, list):
        return [unpack(item, arrays) for item in packed]
    if isinstance(packed, dict):
        if set(packed) == {_ARRAY}:
            return arrays[packed[_ARRAY]]
        return {key: unpack(item, arrays) for key, item in packed.items()}
    return packed
