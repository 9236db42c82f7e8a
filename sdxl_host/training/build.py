"""From settings to a trainer that is ready to run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from sdxl_host.caching.keys import check_cacheable
from sdxl_host.checkpoints.layout import CHECKPOINTS
from sdxl_host.config.load import RunConfig
from sdxl_host.data.dataset import Text2ImageDataset, make_dataset
from sdxl_host.data.order import Order
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.models.precision import (
    LOSS_SCALE,
    check_precision,
    halve_parameters,
    is_scaled,
    set_precision,
)
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.sampling.pipeline import Conditions, ImageSampler
from sdxl_host.training import data_sink, summary
from sdxl_host.training.batches import Batches, fixed_crops
from sdxl_host.training.cached import Cached, left_in_file, open_cache
from sdxl_host.training.compile_cache import CompileCache
from sdxl_host.training.data_check import check_data
from sdxl_host.training.distributed import Ranks
from sdxl_host.training.inputs import EncodePrompts, Encoder
from sdxl_host.training.observers import (
    Checkpoints,
    FiniteGuard,
    Grids,
    Metrics,
    Observer,
    Progress,
    SharedStop,
)
from sdxl_host.training.optimizer import configured
from sdxl_host.training.resume import find_checkpoint
from sdxl_host.training.run_folder import RunFolder
from sdxl_host.training.signals import Interruption
from sdxl_host.training.skipped import SkippedImages
from sdxl_host.training.state import RunRecord, RunState
from sdxl_host.training.step import StepRunner, TrainStep
from sdxl_host.training.trainer import OneByOne, RunStep, Trainer
from sdxl_host.training.update_table import update_table
from sdxl_host.weights.networks import build_networks, check_fit, size_step
from sdxl_host.weights.open import open_weight_setting

__all__ = ["make_trainer"]


def make_trainer(
    config: RunConfig, say: Callable[[summary.Fact], None], ranks: Ranks | None = None
) -> Trainer:
    """The trainer of a run: new, or resumed where the settings name a checkpoint.

    say: shows the user a fact; called on rank 0 alone. ranks: this process among those that share
    the run. Raises HostError for whatever the user can mend, before anything slow has begun where
    that is possible.
    """
    ranks = ranks or Ranks()
    if not ranks.is_main_process:
        say = summary.show_nothing
    settings, total = config.train, config.data.total_step

    # What is cheap to get wrong comes first.
    check_precision(settings)
    dataset = make_dataset(config.data)
    rank_size = config.data.per_batch_size * settings.gradient_accumulation_steps
    batch_size = rank_size * ranks.world_size
    source = None if settings.continues else open_weight_setting(settings.weight)
    optimizer, rates = configured(config.optim, total, batch_size if settings.scale_lr else 1)
    hooks = make_hooks(config.plugins)
    model = hooks.build_model(config.tree)
    # Copied before the networks exist, of which a plugin may keep parts.
    asked = hooks.copy()
    size = (dataset.target_size, dataset.target_size)
    check_fit(model, size, "data.dataset_config.params.target_size")
    check_data(dataset, config, size_step(model), say)
    checkpoint, changes = find_checkpoint(
        config, summary.samples_of(batch_size, dataset), batch_size
    )
    check_cacheable(config, hooks, dataset)
    if settings.data_sink:
        data_sink.check(config, hooks, model, checkpoint.step if checkpoint else 0)
    ranks.check_equal(
        summary.digest(config, dataset, checkpoint), "settings, plugins, captions or checkpoint"
    )
    folder = RunFolder(config, checkpoint, ranks)

    # The networks, their weights, and the step that trains them.
    networks = build_networks(model, settings.seed, source, checkpoint, left=left_in_file(config))
    if ranks.world_size > 1:
        ranks.check_equal(networks.digest(), "weights")
    set_precision(model, settings)
    table = update_table(
        optimizer, rates, settings.max_grad_norm if settings.clip_grad else None, settings.ema_decay
    )
    cell = TrainStep(
        networks.cell,
        networks.trained,
        loss_scale=LOSS_SCALE if is_scaled(settings) else None,
        batches=settings.gradient_accumulation_steps,
        has_ema=settings.use_ema,
        float32=halve_parameters(networks.cell, settings.ms_amp_dtype)
        if settings.param_fp16
        else None,
        ranks=ranks.world_size,
        rows=max(1024, settings.sink_size),
    )
    state = RunState(networks, cell, hooks)
    if checkpoint is not None:
        changes += state.restore(checkpoint, is_lenient=settings.allow_changes)

    # What a step takes, and what is done with what it gives.
    positions = range(ranks.rank * rank_size, (ranks.rank + 1) * rank_size)
    cached = open_cache(config, dataset, hooks, model, networks.rest)
    batches = _make_batches(config, dataset, model, batch_size, positions, ranks, cached)
    graphs = CompileCache(
        Path(settings.compile_cache).expanduser().resolve() if settings.compile_cache else None,
        ranks.rank,
        ranks.world_size,
        say,
    )
    encode_prompts, run_step = _make_step(
        config, dataset, model, state, table, batch_size, graphs, cached
    )
    quarters, notes = summary.ask_plugins(asked, model, config, checkpoint)
    notes += [*summary.caption_notes(asked, model, dataset), *optimizer.notes(), *cached.notes]
    record = RunRecord(
        settings=folder.settings,
        plugins=summary.plugin_list(config),
        learned=summary.record(model, hooks, dataset, batch_size, quarters),
        with_optimizer=settings.save_optimizer,
        exports=[change.export for change in model.changes if change.export is not None],
    )
    interruption = Interruption(say)
    observers: list[Observer] = [
        SharedStop(ranks, interruption),
        FiniteGuard(state, cell.is_scaled),
    ]
    checkpoints = Checkpoints(
        partial(state.capture, record),
        folder.path / CHECKPOINTS,
        settings.save_ckpt_interval,
        settings.max_num_ckpt,
    )
    grids = _make_grids(config, dataset, state, model, graphs)
    skipped = None
    if ranks.is_main_process:
        skipped = SkippedImages(folder.path, dataset.problems, state.step, say)
        metrics = folder.path / "metrics.jsonl"
        intervals = settings.log_interval, settings.save_ckpt_interval
        observers += [
            Metrics(metrics, *intervals, resumed_step=state.step, total=total),
            Progress(
                state.step + 1,
                total,
                batch_size,
                settings.ms_mode == 0,
                say,
                settings.sink_size if settings.data_sink else 1,
            ),
            checkpoints,
            grids,
        ]
    trainer = Trainer(
        config=config,
        ranks=ranks,
        dataset=dataset,
        batch_size=batch_size,
        hooks=hooks,
        model=model,
        batches=batches,
        encode=Encoder(model, encode_prompts, positions, config.data.per_batch_size),
        run_step=run_step,
        state=state,
        folder=folder,
        interruption=interruption,
        observers=observers,
        checkpoints=checkpoints,
        grids=grids,
        skipped=skipped,
        say=say,
    )
    for fact in summary.start_facts(
        trainer, quarters, notes, checkpoint, changes, source, cached.row
    ):
        say(fact)
    return trainer


def _make_batches(
    config: RunConfig,
    dataset: Text2ImageDataset,
    model: DiffusionModel,
    batch_size: int,
    positions: range,
    ranks: Ranks,
    cached: Cached,
) -> Batches:
    """What each step takes from the data and from chance, on this rank."""
    settings, first_stage, crops = config.train, model.first_stage, config.data.crops_per_image
    scale = first_stage.downsampling
    return Batches(
        dataset,
        Order(dataset.groups(), batch_size, settings.seed, config.data.shuffle),
        positions,
        settings.seed,
        [(first_stage.channels, h // scale, w // scale) for h, w in dataset.sizes],
        model.offset_noise_level,
        first_stage.is_sampled,
        threads=config.data.num_parallel_workers,
        total=config.data.total_step,
        ahead=settings.sink_size if settings.data_sink else 1,
        load=cached.load or (fixed_crops(dataset, settings.seed, crops) if crops else None),
        ranks=ranks,
    )


def _make_step(
    config: RunConfig,
    dataset: Text2ImageDataset,
    model: DiffusionModel,
    state: RunState,
    table: np.ndarray,
    batch_size: int,
    graphs: CompileCache,
    cached: Cached,
) -> tuple[EncodePrompts, RunStep]:
    """What makes embeddings of prompts, and what makes a step of its inputs."""
    settings, hooks = config.train, state.hooks
    if settings.data_sink:
        sink = data_sink.SinkRunner(
            data_sink.SinkStep(state.cell, settings.sink_size, batch_size),
            table,
            config.data.total_step - state.step,
            settings.sink_queue_size,
            settings.jit_level,
        )
        return cached.encode_prompts or data_sink.FixedCaptions(hooks, model, dataset), sink
    compiled = partial(graphs.compiled, jit_level=settings.jit_level)
    run = StepRunner(state.cell, table, compiled if settings.ms_mode == 0 else None)
    encode = cached.encode_prompts or partial(hooks.encode_prompt, encoders=model.encoders)
    return encode, OneByOne(run)


def _make_grids(
    config: RunConfig,
    dataset: Text2ImageDataset,
    state: RunState,
    model: DiffusionModel,
    graphs: CompileCache,
) -> Grids:
    """What draws the images that show how far a run has come."""
    settings = config.train
    conditions = Conditions(
        (dataset.target_size, dataset.target_size),
        dataset.typical_size(),
        aesthetic_score=dataset.aesthetic_score,
    )
    first = [variants[0] for _, variants in islice(dataset.all_captions(), settings.sample_count)]
    ema = state.cell.ema

    def make_sampler() -> ImageSampler:
        state.networks.rest.load()  # a run from the cache has not needed them before
        is_eager = settings.ms_mode == 1
        return ImageSampler(state.hooks, model, conditions, is_eager, graphs.compiled)

    return Grids(
        make_sampler,
        list(settings.sample_prompts) or first,
        settings,
        nullcontext if ema is None else ema.swapped_in,
    )
