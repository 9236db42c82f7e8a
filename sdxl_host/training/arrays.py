"""Arrays that stay where they are, on a device or in a file, until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

__all__ = ["FetchedArrays"]


class FetchedArrays(Mapping[str, np.ndarray]):
    """Arrays by name, each fetched when it is asked for and kept by whoever asked.

    At full size all that a checkpoint holds would not fit into memory beside what it is taken from.
    """

    def __init__(self, names: Iterable[str], fetch: Callable[[str], np.ndarray]) -> None:
        self._names = dict.fromkeys(names)
        self._fetch = fetch

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._fetch(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
