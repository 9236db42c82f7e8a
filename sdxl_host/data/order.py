"""Which samples a step takes: an endless chain of epochs, cut into global batches.

A function of (seed, step) alone, so nothing about the data needs to be saved: no sample is dropped
at the end of an epoch, and a batch may span two. Samples of several groups, which can't share a
batch, have a chain each; how many batches of each come in an epoch follows from their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sdxl_host.randomness import Stream, generator

__all__ = ["Order"]


class Order:
    """groups: of each group the samples of an epoch, as indices; one may stand there several times.
    batch: global batch. shuffle: a new permutation every epoch, of samples and of batches.
    """

    def __init__(self, groups: Sequence[np.ndarray], batch: int, seed: int, shuffle: bool) -> None:
        self._groups = [np.asarray(group, np.int64) for group in groups]
        self._counts = np.array([len(group) for group in self._groups], np.int64)
        self._batch, self._seed, self._shuffle = batch, seed, shuffle
        self._permutation = lru_cache(maxsize=4 * len(self._groups))(self._permuted)
        self._epoch_of_batches = lru_cache(maxsize=4)(self._batches_of)

    def group(self, step: int) -> int:
        """The group whose samples `step` (from 1) takes."""
        return self._batch_of(step)[0]

    def indices(self, step: int) -> list[int]:
        """The global batch of `step` (from 1), `batch` indices."""
        group, number = self._batch_of(step)
        first = number * self._batch
        return [self._sample(group, first + position) for position in range(self._batch)]

    def following(self, step: int, position: int, tries: int) -> int:
        """The sample that stands `tries` places after the one at `position` of the batch of `step`,
        in the chain of its group: what takes its place where that one can't be used."""
        group, number = self._batch_of(step)
        return self._sample(group, number * self._batch + position + tries)

    def _sample(self, group: int, place: int) -> int:
        """The sample at a place of a group's chain."""
        epoch, place = divmod(place, len(self._groups[group]))
        return int(self._permutation(group, epoch)[place])

    def _permuted(self, group: int, epoch: int) -> np.ndarray:
        samples = self._groups[group]
        if not self._shuffle:
            return samples
        return samples[generator(self._seed, Stream.ORDER, epoch, group).permutation(len(samples))]

    def _batch_of(self, step: int) -> tuple[int, int]:
        """A step's group, and the number of its batch among that group's, from 0."""
        if len(self._groups) == 1:
            return 0, step - 1
        epoch = self._epoch(step - 1)
        groups, numbers = self._epoch_of_batches(epoch)
        place = step - 1 - int(self._before(epoch).sum())
        return int(groups[place]), int(numbers[place])

    def _before(self, epoch: int) -> np.ndarray:
        """The batches of each group before an epoch: as many as its samples have filled by then."""
        return epoch * self._counts // self._batch

    def _epoch(self, place: int) -> int:
        """The epoch in which the batch at a place of the run comes."""
        low, high = 0, (place + 1 + len(self._counts)) * self._batch // int(self._counts.sum()) + 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._before(middle).sum() <= place:
                low = middle
            else:
                high = middle - 1
        return low

    def _batches_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Group and number of each batch of an epoch, in order."""
        first, last = self._before(epoch), self._before(epoch + 1)
        groups = np.repeat(np.arange(len(first)), last - first)
        if self._shuffle:
            groups = generator(self._seed, Stream.BATCHES, epoch).permutation(groups)
        numbers = np.empty(len(groups), np.int64)
        for group, (begin, end) in enumerate(zip(first, last, strict=True)):
            numbers[groups == group] = np.arange(begin, end)
        return groups, numbers
