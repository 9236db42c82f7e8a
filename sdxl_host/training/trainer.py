"""THE LOOP: how a run is trained. `build` makes what it needs.

batch (data, noise) -> hooks: noise levels, weights -> six numbers a sample -> compiled step
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdxl_host.config.load import RunConfig
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.diffusion.objective import coefficients
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.plugins.step_result import StepResult
from sdxl_host.training import summary
from sdxl_host.training.batches import Batches
from sdxl_host.training.distributed import Ranks
from sdxl_host.training.inputs import Encoder, draw_levels
from sdxl_host.training.observers import Checkpoints, Grids, Observer
from sdxl_host.training.run_folder import RunFolder
from sdxl_host.training.signals import Interruption
from sdxl_host.training.skipped import SkippedImages
from sdxl_host.training.state import RunState
from sdxl_host.training.step import StepRunner

__all__ = ["OneByOne", "RunStep", "Trainer"]

Outputs = tuple[Any, ...]  # of a step, as `TrainStep.construct` returns them


class RunStep(Protocol):
    """Makes a step."""

    def __call__(self, batches: Iterable[Sequence[np.ndarray]], /) -> Sequence[Outputs]:
        """Takes the inputs of one step, batch by batch. Returns the outputs of the steps that are
        finished by now: of this step, or with the data sink of none or of many."""
        ...

    def close(self) -> None:
        """Called after the last step."""
        ...


class OneByOne:
    """Makes each step when its inputs are there."""

    def __init__(self, run: StepRunner) -> None:
        self._run = run

    def __call__(self, batches: Iterable[Sequence[np.ndarray]], /) -> Sequence[Outputs]:
        return [self._run(batches)]

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class Trainer:
    """One run. Plugins see it as a `TrainerView`, the host's observers as a `RunView`.

    batch_size: G, the samples of an update on all ranks. observers: called after the plugins at the
    end of each step, in this order; checkpoints and grids are among them on rank 0 alone.
    skipped: what is set aside of the data, on rank 0 alone. say: shows the user a fact.
    """

    config: RunConfig
    ranks: Ranks
    dataset: Text2ImageDataset
    batch_size: int
    hooks: Hooks
    model: DiffusionModel
    batches: Batches
    encode: Encoder
    run_step: RunStep
    state: RunState
    folder: RunFolder
    interruption: Interruption
    observers: list[Observer]
    checkpoints: Checkpoints
    grids: Grids
    skipped: SkippedImages | None
    say: Callable[[summary.Fact], None]
    is_interrupted: bool = False
    stop_reason: str | None = None
    logged: dict[str, float] = field(default_factory=dict)
    _unobserved: deque[tuple[Any, ...]] = field(default_factory=deque, init=False)

    def run(self) -> int:
        """Trains until the last step, or until an observer or a signal asks to stop.

        Returns the exit code: 0, or 128 and the signal's number.
        """
        started, settings = time.monotonic(), self.config.train
        self.hooks.observe(self.observers)
        with ExitStack() as stack:
            stack.enter_context(closing(self.folder))
            for observer in self.observers:
                stack.enter_context(observer)
            stack.enter_context(closing(self.batches))
            stack.enter_context(closing(self.run_step))
            stack.enter_context(self.interruption)
            if self.step == self.total_steps:
                for observer in self.observers:
                    observer.finish(self)
            else:
                if settings.ms_mode == 0:
                    self.say(summary.compiling(settings.compile_cache))
                self.train()
        if self.stop_reason is not None:
            self.say(f"stopped after step {self.step}: {self.stop_reason}")
        seconds = time.monotonic() - started
        for fact in summary.end_facts(self, seconds, self.checkpoints.last, self.grids.last):
            self.say(fact)
        # msrun kills every rank when one exits non-zero, even rank 0 while it saves; so only rank 0
        # returns the signal's code.
        number = self.interruption.number
        is_signalled = self.is_interrupted and number is not None
        return 128 + number if is_signalled and self.is_main_process else 0

    def train(self) -> None:
        """Makes one step after the other, each as it stands here."""
        for step in range(self.state.step + 1, self.total_steps + 1):
            batch = self.batches.get(step)  # images, noise, uniforms; the next is made beside it
            if batch.set_aside and self.skipped is not None:
                self.skipped.add(step, batch.set_aside)
            levels = draw_levels(self.hooks, self.model, batch)  # sample_timesteps
            weight = self.hooks.weight_loss(self.model, levels, step)  # lambda on |D - z|^2
            six = coefficients(self.model.preconditioning, levels.sigma, weight)
            self._unobserved.append((step, levels, weight, batch.ids))
            # Compiled: loss, gradients, update, EMA. The data sink gives many steps' outputs at
            # once, so they wait here until then; otherwise there is one.
            for outputs in self.run_step(self.encode(batch, six)):
                result = StepResult(*self._unobserved.popleft(), outputs)
                self.state.step = result.step
                self.logged.clear()
                self.hooks.on_step_end(self, result)
            if self.is_last:
                break

    # ---- what observers may use

    @property
    def step(self) -> int:
        """The update just made, from 1; 0 before the first."""
        return self.state.step

    @property
    def total_steps(self) -> int:
        """The number of the last step."""
        return self.config.data.total_step

    @property
    def save_path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def is_main_process(self) -> bool:
        """Whether this rank writes files."""
        return self.ranks.is_main_process

    @property
    def is_last(self) -> bool:
        """Whether the run ends after this step. Not before the weights are those of this step:
        with the data sink, steps wait to be observed that are in the weights already."""
        is_asked = self.step == self.total_steps or self.stop_reason is not None
        return is_asked and not self._unobserved

    def log(self, name: str, value: float) -> None:
        """Adds a number to this step's line in metrics.jsonl."""
        self.logged[name] = float(value)

    def stop(self, reason: str, is_interruption: bool = False) -> None:
        """Ends the run after this step, with a checkpoint; after a signal without images."""
        self.stop_reason = reason
        self.is_interrupted = self.is_interrupted or is_interruption
