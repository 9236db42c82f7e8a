"""Looks at a run's data before the run, and shows how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from sdxl_host.config.load import RunConfig
from sdxl_host.data.dataset import Text2ImageDataset

__all__ = ["LookingProgress", "check_data", "look"]

_EVERY = 20.0  # seconds between lines where there is no terminal


def check_data(
    dataset: Text2ImageDataset, config: RunConfig, step: int, say: Callable[[str], None]
) -> None:
    """Looks at every image of a run's dataset, and puts them into buckets where the settings ask
    for them; see its `check` and `use_buckets`. Raises DataError.

    step: what the sides of an image must be multiples of.
    """
    from sdxl_host.training.resume import resumed_folder
    from sdxl_host.training.skipped import began_without

    resumed = resumed_folder(config.train)
    look(
        dataset,
        config.data.num_parallel_workers,
        config.data.max_bad_fraction,
        say,
        None if resumed is None else began_without(resumed),
    )
    if config.data.buckets:
        dataset.use_buckets(step)


def look(
    dataset: Text2ImageDataset,
    threads: int,
    max_bad_fraction: float,
    say: Callable[[str], None],
    began_without: Collection[str] | None = None,
) -> None:
    """Looks at every image with so many threads, showing how far it is."""
    with ThreadPoolExecutor(threads, "survey") as pool, LookingProgress(say) as progress:
        dataset.check(pool, max_bad_fraction, progress, began_without)


class LookingProgress:
    """A bar on a terminal, a line now and then elsewhere; nothing for what is done in a second."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._bar: Any = None
        self._started = self._last = time.monotonic()

    def __enter__(self) -> LookingProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` images were looked at."""
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=total, unit="image", desc="looking at images", delay=1, leave=False
                )
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= _EVERY and done < total:
            self._last = now
            left = (now - self._started) * (total - done) / done
            minutes, seconds = divmod(round(left), 60)
            self._say(f"looked at {done:,} of {total:,} images, {minutes}:{seconds:02d} left")
