"""What a step takes from the data and from chance, made ready beside the running step.

Nothing here depends on a hook, so the next step's batch is prepared in a thread meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from sdxl_host.data.dataset import Sample, Text2ImageDataset
from sdxl_host.data.decode import BadImage
from sdxl_host.data.order import Order
from sdxl_host.data.problems import Problem
from sdxl_host.errors import DataError
from sdxl_host.randomness import Stream, generator, normals, uniforms
from sdxl_host.training.distributed import Ranks

__all__ = [
    "Batch",
    "Batches",
    "Load",
    "crop_generator",
    "fixed_crops",
    "fresh_crops",
    "variant",
]


@dataclass(frozen=True)
class Batch:
    """What a rank needs of one step: its S of the G samples, and what hooks see of all G.

    Of all G samples: ids, the images' names; level_u (G,), uniforms for the noise levels. Of this
    rank's S, in their order: captions; pixels (S, 3, H, W) float32, or moments (S, ...), what the
    first stage's `moments` gave of them before; sizes, (S, 2) for each size key; noise
    (S, C, h, w) float32, unit noise with its offset; posterior, unit noise of that shape for a
    first stage that samples its latents, else None; dropout_u (S,), uniforms for caption dropout.
    set_aside: images that could not be read, on any rank; the next in order took their places.
    tries: how many of these were passed over at a position, of this rank's.
    """

    step: int
    ids: list[str]
    level_u: np.ndarray
    captions: list[str]
    pixels: np.ndarray | None
    moments: np.ndarray | None
    sizes: dict[str, np.ndarray]
    noise: np.ndarray
    posterior: np.ndarray | None
    dropout_u: np.ndarray
    set_aside: list[Problem] = field(default_factory=list)
    tries: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Loaded:
    """The sample of a position, its index, and what was passed over before it."""

    index: int
    sample: Sample
    passed_over: list[Problem]


# So many images in a row can't be read where something else than an image is at fault.
_MOST_IN_A_ROW = 16

# The sample of an image: its index, the step, and its position in the global batch.
Load = Callable[[int, int, int], Sample]


def fresh_crops(dataset: Text2ImageDataset, seed: int) -> Load:
    """Samples whose random crop is drawn in every step anew."""
    return lambda index, step, position: dataset.sample(
        index, generator(seed, Stream.CROP, step, position)
    )


def fixed_crops(dataset: Text2ImageDataset, seed: int, count: int) -> Load:
    """Samples that have one of `count` random crops an image, as latents that are kept have."""

    def load(index: int, step: int, position: int) -> Sample:
        chosen = variant(seed, count, step, position)
        return dataset.sample(index, crop_generator(seed, dataset.images[index].name, chosen))

    return load


def variant(seed: int, count: int, step: int, position: int) -> int:
    """Which of an image's `count` fixed crops a step has."""
    return int(generator(seed, Stream.VARIANT, step, position).integers(count))


def crop_generator(seed: int, name: str, variant: int) -> np.random.Generator:
    """What the fixed crop `variant` of the image `name` is drawn from."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return generator(seed, Stream.VARIANT_CROP, variant, int.from_bytes(digest, "big"))


class Batches:
    """The batch of any step, a function of (seed, step).

    positions: this rank's samples within the global batch. latent_shapes: (C, h, w) of the noise,
    of each group of `order`.
    offset_noise_level: standard deviation of the constant added to each channel's noise.
    is_sampled: whether the first stage takes noise. threads: how many load images. total: the last
    step. ahead: how many batches after the one in use are prepared beside it. load: gives the
    sample of an image in a step, by default with a crop of its own. ranks: tell each other where
    another image was taken than the order says.
    """

    def __init__(
        self,
        dataset: Text2ImageDataset,
        order: Order,
        positions: range,
        seed: int,
        latent_shapes: Sequence[tuple[int, int, int]],
        offset_noise_level: float,
        is_sampled: bool,
        *,
        threads: int,
        total: int,
        ahead: int = 1,
        load: Load | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._positions = positions
        self._seed = seed
        self._latent_shapes = latent_shapes
        self._offset = np.float32(offset_noise_level)
        self._is_sampled = is_sampled
        self._total = total
        self._ahead = ahead
        self._load = load or fresh_crops(dataset, seed)
        self._ranks = ranks or Ranks()
        self._loaders = ThreadPoolExecutor(threads, "images")
        # Two, where batches are made far ahead: one loads while the other puts images together.
        self._preparer = ThreadPoolExecutor(min(ahead, 2), "batches")
        self._prepared: dict[int, Future[Batch]] = {}

    def get(self, step: int) -> Batch:
        """The batch of `step`, and begins to prepare those after it; asked for in order of steps.

        An image that can't be read is named in `set_aside`, and the next in order is taken in its
        place. Raises DataError where 16 in a row can't be read.
        """
        batch = self._prepare(step).result()
        del self._prepared[step]
        for following in range(step + 1, min(step + self._ahead, self._total) + 1):
            self._prepare(following)
        return self._shared(batch)

    def _shared(self, batch: Batch) -> Batch:
        """The batch with what other ranks took in place of images that they could not read."""
        if self._ranks.world_size == 1 or not self._ranks.any(bool(batch.set_aside)):
            return batch
        ids, set_aside = list(batch.ids), list(batch.set_aside)
        for rank, text in enumerate(self._ranks.texts(json.dumps(batch.tries))):
            if rank == self._ranks.rank:
                continue
            for position, tries in json.loads(text).items():
                *bad, taken = [
                    self._dataset.images[self._order.following(batch.step, int(position), n)].name
                    for n in range(tries + 1)
                ]
                ids[int(position)] = taken
                kind, detail = "an image that can't be read", f"on rank {rank}"
                set_aside += [Problem(kind, name, detail) for name in bad]
        return replace(batch, ids=ids, set_aside=set_aside)

    def _prepare(self, step: int) -> Future[Batch]:
        if step not in self._prepared:
            self._prepared[step] = self._preparer.submit(self.make, step)
        return self._prepared[step]

    def make(self, step: int) -> Batch:
        """The batch of `step`, from 1, as this rank knows it; see `get`."""
        indices, positions = self._order.indices(step), self._positions
        loaded = list(self._loaders.map(lambda position: self._loaded(step, position), positions))
        samples = [each.sample for each in loaded]
        for position, each in zip(positions, loaded, strict=True):
            indices[position] = each.index
        captions = [
            self._dataset.caption(
                indices[position], generator(self._seed, Stream.CAPTION, step, position)
            )
            for position in positions
        ]
        shape = self._latent_shapes[self._order.group(step)]
        noise = normals(self._seed, Stream.NOISE, step, positions, shape)
        if self._offset:
            # Part of the noise itself, in the network's input and in its target alike.
            channels = (shape[0], 1, 1)
            noise += self._offset * normals(self._seed, Stream.OFFSET, step, positions, channels)
        posterior = None
        if self._is_sampled:
            posterior = normals(self._seed, Stream.POSTERIOR, step, positions, shape)
        return Batch(
            step=step,
            ids=[self._dataset.images[index].name for index in indices],
            level_u=uniforms(self._seed, Stream.NOISE_LEVEL, step, range(len(indices))),
            captions=captions,
            pixels=_stacked([sample.pixels for sample in samples]),
            moments=_stacked([sample.moments for sample in samples]),
            sizes={
                key: np.asarray([sample.sizes[key] for sample in samples])
                for key in samples[0].sizes
            },
            noise=noise,
            posterior=posterior,
            dropout_u=uniforms(self._seed, Stream.DROPOUT, step, positions),
            set_aside=[problem for each in loaded for problem in each.passed_over],
            tries={
                position: len(each.passed_over)
                for position, each in zip(positions, loaded, strict=True)
                if each.passed_over
            },
        )

    def _loaded(self, step: int, position: int) -> _Loaded:
        """The first image that can be read, from that of `position` on in the order."""
        passed_over: list[Problem] = []
        while True:
            index = self._order.following(step, position, len(passed_over))
            try:
                return _Loaded(index, self._load(index, step, position), passed_over)
            except BadImage as error:
                name = self._dataset.images[index].name
                passed_over.append(Problem(error.kind, name, error.detail))
                if len(passed_over) == _MOST_IN_A_ROW:
                    raise DataError(
                        f"step {step}: {_MOST_IN_A_ROW} images in a row can't be read; see whether "
                        f"the disk is there; the last is {error}"
                    ) from error

    def close(self) -> None:
        """Ends the threads."""
        self._preparer.shutdown(wait=True, cancel_futures=True)
        self._loaders.shutdown(wait=True, cancel_futures=True)


def _stacked(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Arrays of one shape as one, or None where there are none."""
    found = [array for array in arrays if array is not None]
    return np.stack(found) if found else None
