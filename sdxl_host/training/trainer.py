"""The training run: read it from top to bottom.

batch (data, noise) -> hooks: noise levels, weights -> six numbers a sample -> compiled step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from sdxl_host.checkpoints.layout import CHECKPOINTS
from sdxl_host.checkpoints.write import save_checkpoint
from sdxl_host.config.load import RunConfig
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.data.order import Order
from sdxl_host.models.precision import (
    LOSS_SCALE,
    check_precision,
    halve_parameters,
    is_scaled,
    set_precision,
)
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.plugins.step_result import StepResult
from sdxl_host.sampling.pipeline import Conditions, ImageSampler
from sdxl_host.settings.targets import build
from sdxl_host.training import data_sink, state, summary
from sdxl_host.training.batches import Batches
from sdxl_host.training.distributed import Workers
from sdxl_host.training.inputs import Inputs
from sdxl_host.training.observers import (
    Agreement,
    Checkpoints,
    FiniteGuard,
    Grids,
    Metrics,
    Progress,
)
from sdxl_host.training.optimizer import configured
from sdxl_host.training.resume import find_checkpoint
from sdxl_host.training.run_folder import RunFolder
from sdxl_host.training.signals import Interruption
from sdxl_host.training.step import StepRunner, TrainStep
from sdxl_host.training.update_table import update_table
from sdxl_host.weights.networks import build_networks, check_fit
from sdxl_host.weights.open import open_weight_setting

__all__ = ["Trainer"]


class Trainer:
    """One run. Observers and plugins see it as a `TrainerView`.

    say: where lines for the user go. workers: this process among those that share the run. Raises
    HostError for whatever the user can mend, before anything slow has begun where that is possible.
    """

    def __init__(
        self,
        config: RunConfig,
        say: Callable[[str], None] = print,
        workers: Workers | None = None,
    ) -> None:
        self.config = config
        self.workers = workers or Workers()
        self.is_main_process = self.workers.is_main_process
        self._say = say if self.is_main_process else lambda line: None
        self.total_steps = config.data.total_step
        self.logged: dict[str, float] = {}
        self.is_interrupted = False
        self._interruption = Interruption(self._say)
        self.is_at_rest = True  # the weights are those after `step`; not so within a sink call
        self._stop_reason: str | None = None
        settings = config.train

        # What is cheap to get wrong comes first.
        check_precision(settings)
        self.dataset: Text2ImageDataset = build(
            OmegaConf.to_container(config.tree.data.dataset_config),
            "dataset",
            "data.dataset_config",
        )
        self.batch_size = (
            config.data.per_batch_size * settings.gradient_accumulation_steps * self.workers.count
        )
        checkpoint, changes = find_checkpoint(
            config, summary.samples_of(self.batch_size, self.dataset)
        )
        source = open_weight_setting(settings.weight) if checkpoint is None else None
        with ThreadPoolExecutor(config.data.num_parallel_workers) as threads:
            self.dataset.check(threads)
        own = self.batch_size // self.workers.count
        places = range(self.workers.rank * own, (self.workers.rank + 1) * own)
        optimizer, rates = configured(
            config.optim, self.total_steps, self.batch_size if settings.scale_lr else 1
        )
        self.hooks = make_hooks(config.plugins)
        self.model = self.hooks.build_model(config.tree)
        # Copied before the networks exist, of which a plugin may keep parts.
        asked = self.hooks.copy()
        side = self.dataset.target_size
        check_fit(self.model, (side, side), "data.dataset_config.params.target_size")
        if settings.data_sink:
            data_sink.check(config, self.hooks, self.model, checkpoint.step if checkpoint else 0)
        self.workers.agree(
            summary.digest(config, self.dataset, checkpoint),
            "settings, plugins, captions or checkpoint",
        )
        self.folder = RunFolder(config, checkpoint, self.workers)
        self.save_path = self.folder.path

        # The networks, their weights, and the step that trains them.
        self.parts = build_networks(self.model, settings.seed, source, checkpoint)
        if self.workers.count > 1:
            self.workers.agree(self.parts.digest(), "weights")
        set_precision(self.model, settings)
        self.table = update_table(
            optimizer,
            rates,
            settings.max_grad_norm if settings.clip_grad else None,
            settings.ema_decay,
        )
        self.cell = TrainStep(
            self.parts.cell,
            self.parts.trained,
            loss_scale=LOSS_SCALE if is_scaled(settings) else None,
            batches=settings.gradient_accumulation_steps,
            has_ema=settings.use_ema,
            float32=halve_parameters(self.parts.cell, settings.ms_amp_dtype)
            if settings.param_fp16
            else None,
            ranks=self.workers.count,
            rows=max(1024, settings.sink_size),
        )
        self.guard = FiniteGuard(self.cell.is_scaled)
        # Of plugins, as they were after a step's hooks where those are asked ahead: see sink.
        self.states_ahead: dict[str, Any] = {}
        self.step = 0
        if checkpoint is not None:
            changes += state.give_back(self, checkpoint, is_lenient=settings.allow_changes)
        self._feed = partial(
            data_sink.device_queue,
            queue_size=settings.sink_queue_size,
            jit_level=settings.jit_level,
        )
        self._inputs = Inputs(self.hooks, self.model, places, config.data.per_batch_size)
        self._eager = settings.ms_mode == 1
        self._run_step = StepRunner(self.cell, self.table, self._eager, settings.jit_level)
        self._sampler: ImageSampler | None = None
        self.curve_lines, self.plugin_notes = summary.plugin_lines(
            asked, self.model, config, checkpoint
        )
        for line in summary.start_lines(self, optimizer, checkpoint, changes, source):
            self._say(line)

    # ---- the run

    def run(self) -> int:
        """Trains until the last step, or until an observer or a signal asks to stop.

        Returns the exit code: 0, or 128 and the signal's number.
        """
        first = self.step + 1
        settings, seed = self.config.train, self.config.train.seed
        observers: list[Any] = [Agreement(), self.guard]
        grids = Grids(self.sampler, self._grid_prompts(), settings)
        checkpoints = Checkpoints(settings.max_num_ckpt)
        if self.is_main_process:
            file = self.save_path / "metrics.jsonl"
            metrics = Metrics(file, settings.log_interval, self.step, self.total_steps)
            progress = Progress(first, self.total_steps, self.batch_size, self._say)
            observers += [metrics, progress, checkpoints, grids]
        self.hooks.observe(observers)
        first_stage = self.model.first_stage
        side = self.dataset.target_size // first_stage.downsampling
        batches = Batches(
            self.dataset,
            Order(len(self.dataset), self.batch_size, seed, self.config.data.shuffle),
            self._inputs.places,
            seed,
            (first_stage.channels, side, side),
            self.model.offset_noise_level,
            first_stage.is_sampled,
            self.config.data.num_parallel_workers,
        )
        is_done = self.step == self.total_steps
        if not self._eager and not is_done:
            self._say(summary.compiling(settings.compile_cache))
        started = time.monotonic()
        try:
            make = self._sunk_steps if settings.data_sink else self._steps
            with self._interruption, closing(make(batches)) as results:
                if is_done and self.is_main_process:
                    checkpoints.finish(self)
                    grids.finish(self)
                for result in () if is_done else results:
                    self.step = result.step
                    self.logged.clear()
                    self.hooks.on_step_end(self, result)
                    if self.is_last:
                        break
        finally:
            batches.close()
            for observer in observers:
                observer.close()
            self.folder.release()
        if self._stop_reason is not None:
            self._say(f"stopped after step {self.step}: {self._stop_reason}")
        seconds = time.monotonic() - started
        for line in summary.end_lines(self, seconds, checkpoints.last, grids.last):
            self._say(line)
        # The launcher kills all workers when one ends with an error, rank 0 at its saving too.
        number = self._interruption.number
        is_told = self.is_main_process and self.is_interrupted and number is not None
        return 128 + number if is_told else 0

    def _steps(self, batches: Batches) -> Generator[StepResult, None, None]:
        """Makes one step after the other. The next batch is made while a step runs; the hooks of a
        step are called only after the observers of the one before."""
        first = self.step + 1
        ahead = ThreadPoolExecutor(1, "ahead")
        try:
            following = ahead.submit(batches.batch, first)
            for step in range(first, self.total_steps + 1):
                batch = following.result()
                if step < self.total_steps:
                    following = ahead.submit(batches.batch, step + 1)
                noise, weights = self._inputs.ask_hooks(batch)
                outputs = self._run_step(self._inputs.arrays(batch, noise, weights))
                yield StepResult(step, noise, weights, batch.names, outputs)
        finally:
            ahead.shutdown(wait=True, cancel_futures=True)

    def _sunk_steps(self, batches: Batches) -> Generator[StepResult, None, None]:
        """Makes `sink_size` steps in a call; see `sink`."""
        size, first = self.config.train.sink_size, self.step + 1
        self._inputs.encode = data_sink.FixedCaptions(self.hooks, self.model, self.dataset)

        def prepared() -> Iterator[tuple[Any, Sequence[np.ndarray]]]:
            for batch in map(batches.batch, range(first, self.total_steps + 1)):
                noise, weights = self._inputs.ask_hooks(batch)
                (arrays,) = self._inputs.arrays(batch, noise, weights)
                yield (batch.step, noise, weights, batch.names), arrays

        step = data_sink.SinkStep(self.cell, size, self.batch_size)
        calls = (self.total_steps - self.step) // size
        outputs = data_sink.outputs(
            step, self.table, prepared(), calls, self._feed, self.hooks.state_dict
        )
        observing = self.hooks.observing_plugins()
        for own, given, self.is_at_rest, states in outputs:
            # A plugin that observes is told of this step only now, and answers nothing ahead of it.
            self.states_ahead = {n: state for n, state in states.items() if n not in observing}
            yield StepResult(*own, given)

    # ---- what observers may use

    @property
    def is_last(self) -> bool:
        """Whether no step follows this one."""
        asked = self.step == self.total_steps or self._stop_reason is not None
        return asked and self.is_at_rest

    def log(self, name: str, value: float) -> None:
        """Adds a number to this step's line in metrics.jsonl."""
        self.logged[name] = float(value)

    def stop(self, reason: str) -> None:
        """Ends the run after this step, with a checkpoint."""
        self._stop_reason = reason

    def agree_to_stop(self) -> None:
        """Stops every worker where one is asked to; after a signal without drawing images."""
        signal = self._interruption
        if not self.workers.any(self._stop_reason is not None or signal.number is not None):
            return
        if self.workers.any(signal.number is not None):
            self.is_interrupted = True
            self.stop(f"interrupted by {signal.name or 'a signal to another worker'}")
        elif self._stop_reason is None:
            self.stop("as another worker asked")

    def sampler(self) -> ImageSampler:
        """Draws images from the weights as they are."""
        if self._sampler is None:
            size = (self.dataset.target_size, self.dataset.target_size)
            told = Conditions(
                size, self.dataset.typical_size(), aesthetic_score=self.dataset.aesthetic_score
            )
            self._sampler = ImageSampler(self.hooks, self.model, told, self._eager)
        return self._sampler

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the moving averages, where `use_ema` keeps them."""
        return nullcontext() if self.cell.ema is None else self.cell.ema.swapped_in()

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder."""
        return save_checkpoint(self.save_path / CHECKPOINTS, state.take(self))

    # ---- the beginning

    def _grid_prompts(self) -> list[str]:
        if self.config.train.sample_prompts:
            return list(self.config.train.sample_prompts)
        return [p.caption for p in self.dataset.images[: self.config.train.sample_count]]
