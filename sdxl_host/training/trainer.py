"""The training run: read it from top to bottom.

batch (data, noise) -> hooks: noise levels, weights -> six numbers a sample -> compiled step
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from mindspore import Tensor
from omegaconf import OmegaConf

from sdxl_host.assembly import check_fit, make_hooks, make_parts, open_weight
from sdxl_host.config import RunConfig
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.data.order import Order
from sdxl_host.diffusion.objective import Noise, coefficients
from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.sampling.sampler import Conditions, PictureSampler
from sdxl_host.targets import build
from sdxl_host.training.batches import Batch, Batches
from sdxl_host.training.checkpoint import Checkpoint, save_checkpoint
from sdxl_host.training.observers import Checkpoints, FiniteGuard, Grids, Metrics, Progress
from sdxl_host.training.optimizer import configured
from sdxl_host.training.precision import LOSS_SCALE, apply_precision, is_half
from sdxl_host.training.report import plugin_lines, plugin_list, record, start_lines
from sdxl_host.training.result import StepResult
from sdxl_host.training.resume import find_checkpoint, make_folder, settings_text
from sdxl_host.training.step import TrainStep, compiled

__all__ = ["Trainer"]


class Trainer:
    """One run. Observers and plugins see `step`, `total_steps`, `save_path`, `is_main`, `model`,
    `log` and `stop`.

    say: where lines for the user go. Raises HostError for whatever the user can mend, before
    anything slow has begun where that is possible.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None] = print) -> None:
        self.config = config
        self._say = say
        self.total_steps = config.data.total_step
        self.is_main = True
        self.logged: dict[str, float] = {}
        self._stop_reason: str | None = None

        # What is cheap to get wrong comes first.
        checkpoint = find_checkpoint(config)
        source = open_weight(config.train.weight)
        self.dataset: Text2ImageDataset = build(
            OmegaConf.to_container(config.tree.data.dataset_config),
            "dataset",
            "data.dataset_config",
        )
        with ThreadPoolExecutor(config.data.num_parallel_workers) as threads:
            self.dataset.check(threads)
        optimizer, rates = configured(config.optim, self.total_steps)
        self.hooks = make_hooks(config)
        self.model = self.hooks.build_model(config.tree)
        side = self.dataset.target_size
        check_fit(self.model, (side, side), "data.dataset_config.params.target_size")
        self.save_path = make_folder(config, checkpoint)

        # The networks, their weights, and the step that trains them.
        self.parts = make_parts(self.model, config.train.seed, source)
        limit = config.train.max_grad_norm if config.train.clip_grad else None
        apply_precision(self.parts.cell, config.train.ms_amp_level)
        scale = LOSS_SCALE if is_half(config.train.ms_amp_level) else None
        self._cell = TrainStep(
            self.parts.cell, self.parts.trained, optimizer, optimizer.table(rates), limit, scale
        )
        self.step = 0
        if checkpoint is not None:
            self._restore(checkpoint)
        self._eager = config.train.ms_mode == 1
        self._run_step = compiled(self._cell, self._eager)
        self._sampler: PictureSampler | None = None
        self.curve_lines, self.plugin_notes = plugin_lines(config, checkpoint)
        for line in start_lines(self, optimizer, checkpoint, source):
            say(line)

    # ---- the run

    def run(self) -> None:
        """Trains until the last step, or until an observer asks to stop."""
        first = self.step + 1
        if first > self.total_steps:
            raise ConfigError(
                f"data.total_step: {self.total_steps} steps are already made; set it higher to "
                "go on"
            )
        settings, seed = self.config.train, self.config.train.seed
        batch_size = self.config.data.per_batch_size
        metrics = Metrics(self.save_path / "metrics.jsonl", settings.log_interval, self.step)
        progress = Progress(first, self.total_steps, batch_size, self._say)
        grids = Grids(self.sampler, self._grid_prompts(), settings)
        checkpoints = Checkpoints(settings.save_ckpt_interval)
        self.hooks.observe(
            [FiniteGuard(self._cell.is_scaled), metrics, progress, checkpoints, grids]
        )
        batches = Batches(
            self.dataset,
            Order(len(self.dataset), batch_size, seed, self.config.data.shuffle),
            seed,
            self._latent_shape(),
            self.model.offset_noise_level,
            self.model.first_stage.is_sampled,
            self.config.data.num_parallel_workers,
        )
        if not self._eager:
            self._say("compiling the training step; this takes up to a minute, once")
        started = time.monotonic()
        ahead = ThreadPoolExecutor(1, "ahead")
        try:
            # The next batch is made while this step runs; the hooks of a step are called only
            # after the observers of the one before.
            following = ahead.submit(batches.batch, first)
            for step in range(first, self.total_steps + 1):
                batch = following.result()
                if step < self.total_steps:
                    following = ahead.submit(batches.batch, step + 1)

                noise = self._draw_noise_levels(step, batch)
                weights = self.hooks.weight_loss(self.model, noise, step)
                numbers = coefficients(self.model.preconditioning, noise.sigma, weights)
                outputs = self._run_step(*self._device_inputs(batch, numbers.stacked()))

                self.step = step
                self.logged.clear()
                names = [sample.name for sample in batch.samples]
                result = StepResult(step, noise, weights, names, outputs)
                self.hooks.on_step_end(self, result)
                if self._stop_reason is not None:
                    break
        finally:
            ahead.shutdown(wait=True, cancel_futures=True)
            batches.close()
            progress.close()
            metrics.close()
        if self._stop_reason is not None:
            self._say(f"stopped after step {self.step}: {self._stop_reason}")
        self._say(f"trained to step {self.step} in {time.monotonic() - started:.0f} s")
        self._say(f"metrics     {self.save_path / 'metrics.jsonl'}")
        self._say(f"settings    {self.save_path / 'config.yaml'}")
        self._say(f"checkpoint  {checkpoints.last}")
        self._say(f"pictures    {grids.last}")

    def _draw_noise_levels(self, step: int, batch: Batch) -> Noise:
        """The step's G noise levels, from the distribution that the hooks give."""
        distribution = self.hooks.sample_timesteps(self.model, step)
        sigma = distribution.quantile(batch.level_u)
        if not (np.isfinite(sigma).all() and (sigma > 0).all()):
            raise PluginError(
                f"sample_timesteps: {self.hooks.chain('sample_timesteps')}: drew the noise levels "
                f"{sigma}; every sigma must be finite and above 0"
            )
        return Noise.at(sigma, self.model.schedule, distribution)

    def _device_inputs(self, batch: Batch, numbers: np.ndarray) -> list[Tensor]:
        """What the compiled step takes, as float32 tensors."""
        conditioner = self.model.conditioner
        captions = [sample.caption for sample in batch.samples]
        embedding = self.hooks.encode_prompt(captions, self.model.encoders)
        vector = conditioner.vector(embedding, batch.sizes)
        embedding, vector = conditioner.drop(embedding, vector, batch.dropout_u)
        latents = self.model.first_stage.encode(batch.pixels, batch.posterior)
        mask = embedding.attended()
        arrays = (latents, batch.noise, numbers, embedding.context, vector, mask)
        return [Tensor(np.ascontiguousarray(array, np.float32)) for array in arrays]

    # ---- what observers may use

    @property
    def is_last(self) -> bool:
        """Whether no step follows this one."""
        return self.step == self.total_steps or self._stop_reason is not None

    def log(self, name: str, value: float) -> None:
        """Adds a number to this step's line in metrics.jsonl."""
        self.logged[name] = float(value)

    def stop(self, reason: str) -> None:
        """Ends the run after this step, with a checkpoint."""
        self._stop_reason = reason

    def sampler(self) -> PictureSampler:
        """Draws pictures from the weights as they are."""
        if self._sampler is None:
            size = (self.dataset.target_size, self.dataset.target_size)
            told = Conditions(
                size, self.dataset.typical_size(), aesthetic_score=self.dataset.aesthetic_score
            )
            self._sampler = PictureSampler(self.hooks, self.model, told, self._eager)
        return self._sampler

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder."""
        parameters = {name: p.asnumpy() for name, p in self.parts.network.items()}

        def export(folder: Path) -> None:
            for change in self.model.changes:
                if change.export is not None:
                    change.export(parameters, folder)

        return save_checkpoint(
            self.save_path / "checkpoints",
            self.step,
            settings_text(self.config),
            parameters,
            {name: p.asnumpy() for name, p in self.parts.frozen.items()},
            self._cell.state(),
            self.hooks.state_dict(),
            plugin_list(self.config),
            record(self),
            export,
        )

    # ---- the beginning

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.parts.load(checkpoint.folder)
        self._cell.load_state(checkpoint.optimizer_state())
        self.hooks.load_state_dict(checkpoint.plugin_states())
        self.step = checkpoint.step

    def _latent_shape(self) -> tuple[int, int, int]:
        first_stage = self.model.first_stage
        side = self.dataset.target_size // first_stage.downsampling
        return first_stage.channels, side, side

    def _grid_prompts(self) -> list[str]:
        if self.config.train.sample_prompts:
            return list(self.config.train.sample_prompts)
        return [p.caption for p in self.dataset.pictures[: self.config.train.sample_count]]
