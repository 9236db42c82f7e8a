"""Loads weights into cells: every parameter from the tensor of its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Parameter, Tensor

from sdxl_host.weights.compare import compare_shapes

if TYPE_CHECKING:
    from sdxl_host.weights.source import Source

__all__ = ["load"]


def load(
    parameters: Mapping[str, Parameter],
    source: Source,
    parts: Sequence[str] = ("",),
    left: Collection[str] = (),
) -> None:
    """Sets every parameter from the source's tensor of its name, one tensor at a time.

    parts: beginnings of the names to load, such as `model.diffusion_model.`; other tensors of the
    source are ignored, and so are CLIP-L's constant `position_ids`. left: names of parameters that
    are compared and not set. Raises one DataError that names
    every missing, unexpected and misshapen tensor; then no parameter has been changed.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {
        name: shape
        for name, shape in source.shapes.items()
        if name.startswith(tuple(parts)) and not name.endswith(".position_ids")
    }
    compare_shapes(shapes, found, source.description)
    for name, parameter in parameters.items():
        if name not in left:
            parameter.set_data(Tensor(source.read(name).astype(np.float32)))
