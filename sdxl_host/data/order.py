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
        return [self.following(step, position, 0) for position in range(self._batch)]

    def following(self, step: int, position: int, tries: int) -> int:
        """The index that comes `tries` places after `position` of the batch of `step`: what is
        taken where those before it can't be read."""
        place = (step - 1) * self._batch + position + tries
        return int(self._permutation(place // self._count)[place % self._count])
