"""Which samples a step takes: an endless chain of epochs, cut into global batches.

A function of (seed, step) alone, so nothing about the data needs to be saved: no sample is dropped
at the end of an epoch, and a batch may span two.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sdxl_host.randomness import Stream, generator

__all__ = ["Order"]


class Order:
    """count: samples in an epoch. batch: global batch. shuffle: a new permutation every epoch."""

    def __init__(self, count: int, batch: int, seed: int, shuffle: bool) -> None:
        self._count = count
        self._batch = batch
        self._permutation = lru_cache(maxsize=4)(
            lambda epoch: (
                generator(seed, Stream.ORDER, epoch).permutation(count)
                if shuffle
                else np.arange(count)
            )
        )

    def indices(self, step: int) -> list[int]:
        """The global batch of `step` (from 1), `batch` indices."""
        positions = range((step - 1) * self._batch, step * self._batch)
        return [int(self._permutation(p // self._count)[p % self._count]) for p in positions]
