"""Weights put into cells: every parameter from the tensor of its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Parameter, Tensor

from sdxl_host.weights.compare import compare_shapes

if TYPE_CHECKING:
    from sdxl_host.files.tensors import Source

__all__ = ["load"]


def load(parameters: Mapping[str, Parameter], source: Source, parts: Sequence[str] = ("",)) -> None:
    """Sets every parameter from the source's tensor of its name, one tensor at a time.

    parts: what of the source to take, as beginnings of names such as `model.diffusion_model.`;
    the rest is none of these parameters' business, nor is CLIP-L's constant `position_ids`. Strict:
    every missing, unexpected or misshapen one is named in one DataError; nothing is changed unless
    all fit.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {
        name: shape
        for name, shape in source.shapes.items()
        if name.startswith(tuple(parts)) and not name.endswith(".position_ids")
    }
    compare_shapes(shapes, found, source.description)
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(source.read(name).astype(np.float32)))
