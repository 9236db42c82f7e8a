"""A plugin's state as JSON with its arrays beside it: nothing is pickled, nothing is guessed."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["pack", "unpack"]

_ARRAY = "__array__"


def pack(state: Any, arrays: dict[str, np.ndarray], where: str = "state") -> Any:
    """`state` as JSON values; its arrays go into `arrays`, each by a name that stands for it.

    Takes str, int, float, bool, None, lists, dicts with str keys and numpy arrays. Raises
    TypeError naming the place of anything else.
    """
    if state is None or type(state) in (str, int, float, bool):
        return state
    if isinstance(state, np.ndarray):
        if state.dtype.hasobject:
            raise TypeError(f"{where} is an array of objects; only numbers can be saved")
        arrays[where] = state
        return {_ARRAY: where}
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
