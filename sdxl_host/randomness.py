"""Counter-based randomness: every draw is a function of (seed, stream, step, position).

Nothing is carried from draw to draw, so a run is the same however its batch is split and wherever
it was interrupted. Philox (Salmon et al. 2011) with key (seed, stream) and a counter whose high
words are (position, step); the low words count the draws of one generator.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

__all__ = ["Stream", "generator", "named", "normals", "uniforms"]


class Stream(IntEnum):
    """One stream a use, so that no two uses ever share a number."""

    NOISE_LEVEL = 1
    NOISE = 2
    OFFSET = 3
    POSTERIOR = 4
    DROPOUT = 5
    CROP = 6
    ORDER = 7
    INITIAL_WEIGHTS = 8
    SAMPLING = 9
    CAPTION = 10
    VARIANT = 11
    VARIANT_CROP = 12
    BATCHES = 13


def generator(seed: int, stream: Stream, step: int, position: int = 0) -> np.random.Generator:
    """The generator of one sample: step is the update, position the place in the global batch."""
    return np.random.Generator(_philox(seed, stream, step, position))


def uniforms(seed: int, stream: Stream, step: int, positions: Sequence[int]) -> np.ndarray:
    """One uniform (k + 0.5) / 2^53 a position, float64 (len(positions),), never 0 or 1."""
    raw = [_philox(seed, stream, step, position).random_raw() for position in positions]
    u = ((np.asarray(raw, np.uint64) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return np.minimum(u, 1 - 2.0**-53)  # the largest k + 0.5 is rounded to 2^53


def normals(
    seed: int, stream: Stream, step: int, positions: Sequence[int], shape: tuple[int, ...]
) -> np.ndarray:
    """Standard normals, float32 (len(positions), *shape), each row of its own position."""
    rows = np.empty((len(positions), *shape), np.float32)
    for row, position in zip(rows, positions, strict=True):
        generator(seed, stream, step, position).standard_normal(out=row, dtype=np.float32)
    return rows


def named(seed: int, name: str) -> np.random.Generator:
    """The generator of the initial weights called `name`."""
    return generator(seed, Stream.INITIAL_WEIGHTS, 0, zlib.crc32(name.encode()))


def _philox(seed: int, stream: Stream, step: int, position: int) -> np.random.Philox:
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, position, step], np.uint64))
