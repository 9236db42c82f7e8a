"""`--task cache`: makes what the cache lacks for a training with the same settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from sdxl_host.caching.keys import (
    CaptionKeys,
    LatentKeys,
    check_cacheable,
    crops,
    parts,
    target_size,
)
from sdxl_host.caching.make import (
    check_room,
    embedding_bytes,
    in_short,
    latent_bytes,
    make_embeddings,
    make_latents,
    missing,
)
from sdxl_host.caching.progress import Progress, size
from sdxl_host.config.load import RunConfig
from sdxl_host.data.cache import Cache, CacheWriter, Key
from sdxl_host.data.dataset import Sample, Text2ImageDataset, make_dataset
from sdxl_host.data.image_digests import ImageDigests
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import ConfigError, DataError
from sdxl_host.models.precision import check_precision, set_precision
from sdxl_host.planning.data import data_rows
from sdxl_host.plugins.hooks import Hooks, make_hooks
from sdxl_host.training.batches import crop_generator
from sdxl_host.training.data_check import check_data
from sdxl_host.training.distributed import Ranks
from sdxl_host.training.signals import Interruption
from sdxl_host.training.summary import Fact, plugin_rows, show_nothing
from sdxl_host.weights.frozen import ENCODERS, FIRST_STAGE, FrozenNetworks, build_frozen
from sdxl_host.weights.networks import check_fit, size_step, weight_rows
from sdxl_host.weights.open import open_weight_setting

__all__ = ["make_cache"]

Say = Callable[[Fact], None]


def make_cache(config: RunConfig, say: Say, ranks: Ranks | None = None) -> int:
    """Makes the entries that are missing or damaged; returns the exit code: 0, or 128 and the
    number of the signal that ended it.

    say: shows the user a fact; called on rank 0 alone. ranks: this process among those that share
    the work. Raises HostError for whatever the user can mend; what was made by then is kept.
    """
    ranks = ranks or Ranks()
    if not ranks.is_main_process:
        say = show_nothing
    settings = config.train
    if settings.continues:
        raise ConfigError(
            "--task cache: entries are made with the weights of --weight, and no run is continued; "
            "leave --resume, --resume_step and --optimizer_weight out"
        )
    check_precision(settings)
    dataset = make_dataset(config.data)
    source = open_weight_setting(settings.weight)
    hooks = make_hooks(config.plugins)
    model = hooks.build_model(config.tree)
    image_size = (dataset.target_size, dataset.target_size)
    check_fit(model, image_size, "data.dataset_config.params.target_size")
    check_data(dataset, config, size_step(model), say)
    check_cacheable(config, hooks, dataset)
    folder = Path(settings.cache_path).expanduser()
    for fact in (*plugin_rows(config, hooks), *data_rows(dataset)):
        say(fact)
    for row in weight_rows(source, model) if source is not None else [("weights", "untrained")]:
        say(row)
    for notice in config.notices:
        say(("note", notice))

    has_latents, has_embeddings = parts(settings)
    wanted = [FIRST_STAGE] * has_latents + [ENCODERS] * has_embeddings
    frozen = build_frozen(model, settings.seed, source, wanted)
    set_precision(model, settings)
    interruption = Interruption(say, "what is made is kept")
    started = time.monotonic()
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(config.data.num_parallel_workers))
        work = _Work(config, dataset, hooks, model, frozen, folder, ranks, threads)
        for fact in work.facts:
            say(fact)
        stack.enter_context(interruption)
        made = work.run(say, lambda: interruption.number is not None)
    said = f"made {made:,} of {work.count:,} entries in {time.monotonic() - started:.0f} s"
    say(("cache", f"{said}, in {folder}"))
    number = interruption.number
    if number is None or made == work.count:
        return 0
    say(("to go on", "run the same command again"))
    return 128 + number if ranks.is_main_process else 0


class _Work:
    """What this rank has to make. facts: what is said before it begins. count: entries to make."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Text2ImageDataset,
        hooks: Hooks,
        model: DiffusionModel,
        frozen: FrozenNetworks,
        folder: Path,
        ranks: Ranks,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._config, self._dataset, self._model = config, dataset, model
        self._folder, self._ranks, self._threads = folder, ranks, threads
        self._in_half = config.train.cache_dtype == "float16"
        self._encode = partial(hooks.encode_prompt, encoders=model.encoders)
        self._chain = hooks.chain("encode_prompt")
        has_latents, has_embeddings = parts(config.train)
        self._latents: list[tuple[Key, tuple[int, int]]] = []
        self._captions: list[tuple[Key, str]] = []
        self.facts: list[Fact] = []

        cache, digests = Cache(folder), ImageDigests(folder)
        notes, needed = [f"{line}; what it held is made anew" for line in cache.damaged], 0
        notes += digests.damaged
        if has_latents:
            mine = range(ranks.rank, len(dataset), ranks.world_size)
            keys = LatentKeys(config, dataset, model, frozen, digests, threads, mine)
            found = list(keys.all(crops(config)))
            self._latents, damaged = missing(cache, found, self._name)
            notes += damaged
            self._say_count("latents", len(found), len(self._latents))
            needed += sum(map(self._latent_bytes, self._latents))
        if has_embeddings:
            every = CaptionKeys(config, dataset, hooks, frozen).all()
            of_rank = every[ranks.rank :: ranks.world_size]
            self._captions, damaged = missing(cache, of_rank, in_short)
            notes += damaged
            self._say_count("embeddings", len(of_rank), len(self._captions))
            if self._captions:
                one = embedding_bytes(self._encode, self._captions[0][1], self._in_half)
                needed += one * len(self._captions)
        # Every rank has about as much to write on the same disk.
        needed *= ranks.world_size
        free = check_room(folder, needed)
        self.facts.append(("room", f"{size(needed)} needed, {size(free)} free at {folder}"))
        self.facts += [("note", note) for note in notes]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"--cache_path {folder}: can't be made ({error.strerror}); give another folder"
            ) from error
        digests.save(ranks.rank)
        self.count = len(self._latents) + len(self._captions)

    def run(self, say: Callable[[str], None], is_stopped: Callable[[], bool]) -> int:
        """Makes the entries until it is told to stop; returns how many it made."""
        made = 0
        with CacheWriter(self._folder, self._ranks.rank) as writer:
            with Progress("latents", len(self._latents), say) as progress:
                too_large = make_latents(
                    self._latents,
                    self._load,
                    self._model.first_stage.moments,
                    writer,
                    self._threads,
                    progress,
                    is_stopped,
                    self._in_half,
                )
            made += progress.made
            with Progress("embeddings", len(self._captions), say) as progress:
                too_large += make_embeddings(
                    self._captions,
                    self._encode,
                    self._chain,
                    writer,
                    progress,
                    is_stopped,
                    self._in_half,
                )
            made += progress.made
        if too_large:
            say(f"{too_large:,} entries hold numbers that float16 can't, and stay float32")
        return made

    def _load(self, item: tuple[int, int]) -> Sample:
        index, variant = item
        name = self._dataset.images[index].name
        drawn = crop_generator(self._config.train.seed, name, variant)
        return self._dataset.sample(index, drawn)

    def _name(self, item: tuple[int, int]) -> str:
        return self._dataset.images[item[0]].name

    def _latent_bytes(self, found: tuple[Key, tuple[int, int]]) -> int:
        first_stage = self._model.first_stage
        height, width = target_size(self._dataset, found[1][0])
        scale = first_stage.downsampling
        channels = first_stage.channels * (2 if first_stage.is_sampled else 1)
        return latent_bytes(channels * (height // scale) * (width // scale), self._in_half)

    def _say_count(self, what: str, all_of_them: int, to_make: int) -> None:
        of_rank = f" of rank 0 of {self._ranks.world_size}" * (self._ranks.world_size > 1)
        there = all_of_them - to_make
        self.facts.append((what, f"{to_make:,} to make{of_rank}, {there:,} are there"))
