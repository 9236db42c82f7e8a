"""Makes entries of a cache on the device, a batch at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sdxl_host.caching.progress import Progress, size
from sdxl_host.data.cache import Arrays, Cache, CacheWriter, Key, in_16_bits
from sdxl_host.data.dataset import Sample
from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.errors import DataError, PluginError

__all__ = [
    "SIZES",
    "check_room",
    "embedding_bytes",
    "in_short",
    "latent_bytes",
    "make_embeddings",
    "make_latents",
    "missing",
]

# Entries made at once; after each batch a signal is heeded.
_IMAGES, _CAPTIONS = 8, 16

# What the names of an image's sizes begin with in its entry.
SIZES = "sizes."

# What an entry takes besides its arrays, in the index of its shard: a generous estimate.
_INDEX_BYTES = 1000

Item = TypeVar("Item")
Encode = Callable[[Sequence[str]], PromptEmbedding]


def missing(
    cache: Cache, items: Iterable[tuple[Key, Item]], name: Callable[[Item], str]
) -> tuple[list[tuple[Key, Item]], list[str]]:
    """The items whose entries must be made, each key once, and a sentence for each of them whose
    entry is there and damaged. All bytes of the entries that are there are read.

    name: what an item is called.
    """
    needed, damaged, seen = [], [], set()
    for key, item in items:
        if key in seen:
            continue
        seen.add(key)
        fault = cache.fault(key, name(item)) if key in cache else None
        if fault is not None:
            damaged.append(fault)
        if fault is not None or key not in cache:
            needed.append((key, item))
    return needed, damaged


def check_room(folder: Path, needed: int) -> int:
    """The bytes that are free where `folder` is or will be. Raises DataError where fewer than
    `needed` are."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DataError(
            f"--cache_path {folder}: {size(needed)} are needed and {size(free)} are free; free "
            "some space, give a folder on another disk, or use --cache_dtype float16"
        )
    return free


def make_latents(
    items: Sequence[tuple[Key, Any]],
    load: Callable[[Any], Sample],
    moments: Callable[[np.ndarray], np.ndarray],
    writer: CacheWriter,
    threads: Executor,
    progress: Progress,
    is_stopped: Callable[[], bool],
    in_half: bool,
) -> int:
    """Makes an entry of each item's image: its moments and its sizes. Returns how many have a
    number that 16 bits can't hold.

    load: the sample of an item. moments: pixels (B, 3, H, W) to what the first stage makes of them.
    in_half: keep moments in 16 bits. Images of a batch may have several sizes.
    """
    too_large = 0
    for batch, loaded in _ahead(list(_batches(items, _IMAGES)), load, threads):
        if is_stopped():
            break
        samples = [future.result() for future in loaded]
        made: dict[int, np.ndarray] = {}
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, sample in enumerate(samples):
            assert sample.pixels is not None  # it has just been read from its file
            by_shape.setdefault(sample.pixels.shape, []).append(index)
        for indices in by_shape.values():
            pixels = np.stack([samples[index].pixels for index in indices])  # type: ignore[misc]
            made.update(zip(indices, moments(pixels), strict=True))
        for index, (key, _) in enumerate(batch):
            array, is_too_large = _kept(made[index], in_half)
            too_large += is_too_large
            writer.add(key, {"moments": array, **_size_arrays(samples[index].sizes)})
        progress.add(len(batch), sum(array.nbytes for array in made.values()))
    return too_large


def make_embeddings(
    items: Sequence[tuple[Key, str]],
    encode: Encode,
    chain: str,
    writer: CacheWriter,
    progress: Progress,
    is_stopped: Callable[[], bool],
    in_half: bool,
) -> int:
    """Makes an entry of each caption: context, pooled, and the mask where there is one. Returns how
    many have a number that 16 bits can't hold.

    chain: who encodes. Raises PluginError where the first captions, encoded twice, differ.
    """
    too_large = 0
    for number, batch in enumerate(_batches(items, _CAPTIONS)):
        if is_stopped():
            break
        captions = [caption for _, caption in batch]
        encoded = encode(captions)
        if number == 0 and not _equal(encoded, encode(captions)):
            raise PluginError(
                f"encode_prompt: {chain}: answers otherwise when it is asked again, and what is "
                "kept can't do that; leave --cache_text_embedding or the plugin out"
            )
        for index, (key, _) in enumerate(batch):
            context, context_too_large = _kept(encoded.context[index], in_half)
            pooled, pooled_too_large = _kept(encoded.pooled[index], in_half)
            too_large += context_too_large or pooled_too_large
            arrays = {"context": context, "pooled": pooled}
            if encoded.mask is not None:
                arrays["mask"] = encoded.mask[index].astype(np.int32)
            writer.add(key, arrays)
        progress.add(len(batch), encoded.context.nbytes + encoded.pooled.nbytes)
    return too_large


def embedding_bytes(encode: Encode, caption: str, in_half: bool) -> int:
    """About how much the entry of a caption takes."""
    encoded = encode([caption])
    numbers = encoded.context.size + encoded.pooled.size
    mask = 0 if encoded.mask is None else 4 * encoded.mask.size
    return numbers * (2 if in_half else 4) + mask + _INDEX_BYTES


def in_short(caption: str) -> str:
    """A caption as messages quote it."""
    return repr(caption if len(caption) <= 60 else f"{caption[:57]}...")


def latent_bytes(numbers: int, in_half: bool) -> int:
    """About how much the entry of an image takes whose moments are so many numbers."""
    return numbers * (2 if in_half else 4) + _INDEX_BYTES


def _batches(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _ahead(
    batches: Sequence[Sequence[tuple[Key, Any]]],
    load: Callable[[Any], Sample],
    threads: Executor,
) -> Iterator[tuple[Sequence[tuple[Key, Any]], list[Future[Sample]]]]:
    """Each batch with its samples, which threads load while the device makes the one before."""
    following: list[Future[Sample]] = []
    for number, batch in enumerate(batches):
        loaded = following or [threads.submit(load, item) for _, item in batch]
        after = batches[number + 1] if number + 1 < len(batches) else ()
        following = [threads.submit(load, item) for _, item in after]
        yield batch, loaded


def _kept(array: np.ndarray, in_half: bool) -> tuple[np.ndarray, bool]:
    """The array as it is kept, and whether 16 bits were asked for and can't hold it."""
    kept = in_16_bits(array) if in_half else array
    return kept, in_half and kept is array


def _size_arrays(sizes: Mapping[str, Sequence[float]]) -> Arrays:
    """Sizes as arrays of whole numbers, or of float64 where one of them is none."""
    arrays = {}
    for name, values in sizes.items():
        array = np.asarray(values)
        dtype = np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64
        arrays[SIZES + name] = array.astype(dtype)
    return arrays


def _equal(one: PromptEmbedding, other: PromptEmbedding) -> bool:
    return (
        np.array_equal(one.context, other.context)
        and np.array_equal(one.pooled, other.pooled)
        and np.array_equal(one.attended(), other.attended())
    )
