"""What a step takes from the cache in place of what networks would compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_host.caching.keys import CaptionKeys, LatentKeys, crops
from sdxl_host.caching.make import SIZES, in_short
from sdxl_host.config.load import RunConfig
from sdxl_host.data.cache import Cache, Key
from sdxl_host.data.dataset import Sample, Text2ImageDataset
from sdxl_host.data.image_digests import ImageDigests
from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.training.batches import Load, variant
from sdxl_host.training.inputs import EncodePrompts
from sdxl_host.weights.frozen import ENCODERS, FIRST_STAGE, FrozenNetworks

__all__ = ["Cached", "left_in_file", "open_cache"]

_NAMED = 3  # of what is missing


@dataclass(frozen=True)
class Cached:
    """What a run takes from its cache; None where it computes that itself. row: what is said of it
    at the start. notes: what a user should know of it."""

    load: Load | None = None
    encode_prompts: EncodePrompts | None = None
    row: str = ""
    notes: tuple[str, ...] = ()


def left_in_file(config: RunConfig) -> list[str]:
    """The frozen networks that no step of the run needs."""
    settings = config.train
    return [FIRST_STAGE] * settings.cache_latent + [ENCODERS] * settings.cache_text_embedding


def open_cache(
    config: RunConfig,
    dataset: Text2ImageDataset,
    hooks: Hooks,
    model: DiffusionModel,
    frozen: FrozenNetworks,
) -> Cached:
    """What the settings ask to take from the cache. Raises ConfigError where entries are missing,
    and PluginError where contexts are of several lengths."""
    settings = config.train
    if not (settings.cache_latent or settings.cache_text_embedding):
        return Cached()
    cache = Cache(Path(settings.cache_path).expanduser())
    load: Load | None = None
    encode: EncodePrompts | None = None
    taken: list[str] = []
    notes: list[str] = []
    missing: list[str] = []
    if settings.cache_latent:
        latents = _latent_keys(config, dataset, model, frozen, cache, notes)
        missing += _missing(
            "latents",
            cache,
            ((key, dataset.images[index].name) for key, (index, _) in latents.all(crops(config))),
        )
        load = _CachedLatents(cache, latents, dataset, settings.seed, crops(config))
        taken.append(f"latents of {crops(config)} crop{'s' * (crops(config) > 1)} an image")
        if not config.data.crops_per_image:
            notes.append(
                "cache_latent: each image has one fixed crop, where without the cache every step "
                "draws one; --crops_per_image N keeps N of them"
            )
    if settings.cache_text_embedding:
        captions = CaptionKeys(config, dataset, hooks, frozen)
        every = captions.all()
        missing += _missing("embeddings", cache, ((key, in_short(each)) for key, each in every))
        there = [key for key, _ in every if key in cache]
        _check_lengths({cache.shape(key, "context") for key in there}, hooks)
        has_mask = any(cache.shape(key, "mask") for key in there)
        encode = _CachedEmbeddings(cache, captions, has_mask)
        taken.append(f"embeddings of {len(every):,} captions")
    if missing:
        raise ConfigError(
            f"--cache_path {cache.folder}: {'; '.join([*missing, *cache.damaged])}; sdxl-host "
            "cache with the same arguments makes what is missing, and nothing else"
        )
    row = f"{' and '.join(taken)} from {cache.folder}, in {settings.cache_dtype}"
    return Cached(load, encode, row, (*cache.damaged, *notes))


class _CachedLatents:
    """Samples with moments in the place of pixels: a `Load`."""

    def __init__(
        self, cache: Cache, keys: LatentKeys, dataset: Text2ImageDataset, seed: int, count: int
    ) -> None:
        self._cache, self._keys, self._dataset = cache, keys, dataset
        self._seed, self._count = seed, count

    def __call__(self, index: int, step: int, position: int) -> Sample:
        name = self._dataset.images[index].name
        key = self._keys.key(index, variant(self._seed, self._count, step, position))
        arrays = self._cache.read(key, name)
        sizes = {
            key.removeprefix(SIZES): tuple(array.tolist())
            for key, array in arrays.items()
            if key.startswith(SIZES)
        }
        return Sample(name, None, sizes, arrays["moments"].astype(np.float32, copy=False))


class _CachedEmbeddings:
    """Captions to their embedding, as `encode_prompt` gave it."""

    def __init__(self, cache: Cache, keys: CaptionKeys, has_mask: bool) -> None:
        self._cache, self._keys, self._has_mask = cache, keys, has_mask

    def __call__(self, captions: Sequence[str]) -> PromptEmbedding:
        rows = [self._cache.read(self._keys.key(each), in_short(each)) for each in captions]
        context, pooled = (
            np.stack([row[name].astype(np.float32, copy=False) for row in rows])
            for name in ("context", "pooled")
        )
        if not self._has_mask:
            return PromptEmbedding(context, pooled)
        length = context.shape[1]
        masks = [row["mask"] > 0 if "mask" in row else np.ones(length, bool) for row in rows]
        return PromptEmbedding(context, pooled, np.stack(masks))


def _latent_keys(
    config: RunConfig,
    dataset: Text2ImageDataset,
    model: DiffusionModel,
    frozen: FrozenNetworks,
    cache: Cache,
    notes: list[str],
) -> LatentKeys:
    digests = ImageDigests(cache.folder)
    with ThreadPoolExecutor(config.data.num_parallel_workers) as threads:
        keys = LatentKeys(config, dataset, model, frozen, digests, threads)
    notes += digests.damaged
    return keys


def _check_lengths(shapes: set[tuple[int, ...] | None], hooks: Hooks) -> None:
    lengths = sorted(shape[0] for shape in shapes if shape is not None)
    if len(lengths) > 1:
        raise PluginError(
            f"encode_prompt: {hooks.chain('encode_prompt')}: gives contexts of "
            f"{', '.join(map(str, lengths))} tokens, and with --cache_text_embedding True all must "
            "be of one length; give all prompts the longest with a mask, or leave the flag out"
        )


def _missing(what: str, cache: Cache, entries: Iterable[tuple[Key, str]]) -> list[str]:
    """How many of the entries are not there and the first of their names, in one line or none."""
    count, names, total = 0, dict[str, None](), 0
    for key, name in entries:
        total += 1
        if key not in cache:
            count += 1
            if len(names) <= _NAMED:
                names[name] = None
    if not count:
        return []
    more = ", ..." if len(names) > _NAMED else ""
    return [f"{count:,} of {total:,} {what} are missing ({', '.join([*names][:_NAMED])}{more})"]
