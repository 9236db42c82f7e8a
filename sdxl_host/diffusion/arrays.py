"""The one array type of this package: numpy float64."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FloatArray", "floats"]

FloatArray: TypeAlias = npt.NDArray[np.float64]


def floats(values: npt.ArrayLike) -> FloatArray:
    """`values` as a float64 array; no copy is made where none is needed."""
    return np.asarray(values, dtype=np.float64)
