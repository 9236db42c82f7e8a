"""Weights as tests make them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sdxl_host.files.tensors import DTYPES
from sdxl_host.weights.source import Source

Arrays = dict[str, np.ndarray]

UNET = "model.diffusion_model."
POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"


def cast(arrays: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    """The floats in another precision."""
    return {
        name: array if array.dtype == np.int64 else array.astype(DTYPES[dtype])
        for name, array in arrays.items()
    }


def source_of(arrays: Arrays, dtype: str = "fp32", seen: list[str] | None = None) -> Source:
    """A source that holds the floats in a precision; `seen` gets what is read, in order."""
    held = cast(arrays, dtype)

    def read(name: str) -> np.ndarray:
        if seen is not None:
            seen.append(name)
        return held[name]

    return Source(
        shapes={name: array.shape for name, array in held.items()},
        dtypes={n: "int64" if a.dtype == np.int64 else dtype for n, a in held.items()},
        read=read,
        description="w.safetensors",
    )
