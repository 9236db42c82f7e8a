"""Weights and inputs that are pure functions of a tensor's name and shape (numpy only).

A golden file holds inputs and outputs but no weights: the reference that wrote it and the network
under test each derive the same weights from the names of the original single-file checkpoint,
such as ``model.diffusion_model.input_blocks.0.0.weight``.
"""

import math
import zlib

import numpy as np

EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight", "positional_embedding")


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float64 of `shape`, drawn from Philox keyed by the CRC-32 of `name`."""
    key = zlib.crc32(name.encode("utf-8"))
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)


def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Input or probe: N(0, 1) of `shape`, float32."""
    return normal(name, shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weight `name` of `shape`, both as the single file has them, float32.

    Matrices and kernels (out, in, ...) are N(0, 1/fan_in), which keeps activations near unit size
    in a network of any depth; embeddings are N(0, 0.5^2); norm weights lie around 1 and biases
    around 0, far enough from both that leaving one out shows.
    """
    values = normal(name, shape)
    if name.endswith(EMBEDDINGS):
        values = 0.5 * values
    elif len(shape) >= 2:
        values = values / math.sqrt(math.prod(shape[1:]))
    elif name.endswith(".weight"):
        values = 1.0 + 0.1 * values
    else:
        values = 0.1 * values
    return np.asarray(values, dtype=np.float32)
