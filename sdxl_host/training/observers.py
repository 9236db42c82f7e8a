"""What the host itself does at the end of a step: each an observer of `on_step_end`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import numpy as np
from tqdm import tqdm

from sdxl_host.caching.progress import clock
from sdxl_host.checkpoints.layout import checkpoint_folder
from sdxl_host.checkpoints.write import Contents, remove_older, save_checkpoint
from sdxl_host.errors import DataError, HostError
from sdxl_host.files.atomic import open_no_follow, write_file
from sdxl_host.plugins.step_result import StepResult, TrainerView
from sdxl_host.sampling.grid import save_grid
from sdxl_host.sampling.pipeline import ImageSampler
from sdxl_host.sampling.samplers import none_if_auto
from sdxl_host.settings.declarations import TrainSettings
from sdxl_host.training.distributed import Ranks
from sdxl_host.training.signals import Interruption
from sdxl_host.training.state import RunState

__all__ = [
    "Checkpoints",
    "FiniteGuard",
    "Grids",
    "Metrics",
    "Observer",
    "Progress",
    "RunView",
    "SharedStop",
]


# Skipped steps in a row that end a run: as many halvings take the largest loss scale, 2^24, to 1.
_OVERFLOWS = 24


class RunView(TrainerView, Protocol):
    """What the host's observers read of a run, beside what plugins may.

    is_last: whether the run ends after this step. is_interrupted: whether a signal ended it.
    stop_reason: why it is to end early, or None. logged: numbers for this step's line, by name.
    """

    is_interrupted: bool
    stop_reason: str | None
    logged: dict[str, float]

    @property
    def is_last(self) -> bool: ...

    def stop(self, reason: str, is_interruption: bool = False) -> None: ...


class Observer:
    """Watches a run: entered before its first step, left after its last. This one does nothing."""

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes what is open."""

    def on_step_end(self, trainer: RunView, result: StepResult) -> None:
        """Called after each step."""

    def finish(self, trainer: RunView) -> None:
        """Called in place of any step where a run that made its last step was killed before it had
        ended: does what is left to do."""


class SharedStop(Observer):
    """Lets all ranks stop after the same step, whichever of them was asked to.

    After the plugins, and before whatever asks whether this is the last step.
    """

    def __init__(self, ranks: Ranks, interruption: Interruption) -> None:
        self._ranks = ranks
        self._interruption = interruption

    def on_step_end(self, trainer: RunView, result: StepResult) -> None:
        """Stops this rank where one is asked to; after a signal without drawing images."""
        signal = self._interruption
        if not self._ranks.any(trainer.stop_reason is not None or signal.number is not None):
            return
        if self._ranks.any(signal.number is not None):
            name = signal.name or "a signal to another rank"
            trainer.stop(f"interrupted by {name}", is_interruption=True)
        elif trainer.stop_reason is None:
            trainer.stop("as another rank asked")


class FiniteGuard(Observer):
    """Ends a run whose loss or gradients are not finite; such an update was not applied.

    state: where skipped updates are counted. is_scaled: with a loss scale gradients may overflow
    now and then, which halves it; metrics.jsonl shows it, and only many such steps in a row end the
    run.
    """

    def __init__(self, state: RunState, is_scaled: bool) -> None:
        self._state = state
        self._is_scaled = is_scaled

    def on_step_end(self, trainer: RunView, result: StepResult) -> None:
        """Raises HostError naming the step, its noise levels and its images."""
        state = self._state
        state.skipped += result.skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.skipped else 0
        if self._is_scaled:
            trainer.log("loss_scale", result.loss_scale)
            trainer.log("skipped", result.skipped)
        if state.skipped_in_a_row > (_OVERFLOWS if self._is_scaled else 0):
            bad = [
                name
                for name, loss in zip(result.sample_ids, result.per_sample_loss, strict=True)
                if not np.isfinite(loss)
            ]
            sigma = result.noise.sigma
            raise HostError(
                f"step {result.step}: loss or gradients are not finite (sigma {sigma.min():.4g} to "
                f"{sigma.max():.4g}, images {', '.join(bad or result.sample_ids)}); the update was "
                "not applied; lower optim.base_learning_rate, use --clip_grad True, or look at "
                "these images"
            )


class Metrics(Observer):
    """Writes metrics.jsonl: one line every `interval` steps, with what plugins logged.

    The lines hold nothing of the clock, so two equal runs write equal files. A resumed run keeps
    those up to its step that it would have written itself: not the last one of a shorter run. A
    checkpoint, one every `saved_every` steps, comes after its lines are on the disk.
    """

    def __init__(
        self, path: Path, interval: int, saved_every: int, *, resumed_step: int, total: int
    ) -> None:
        self._path = path
        self._interval = interval
        self._saved_every = saved_every
        self._resumed_step = resumed_step
        self._total = total
        self._file: TextIO

    def __enter__(self) -> Observer:
        path, last = self._path, self._resumed_step
        if last % self._interval and last != self._total:
            last -= 1
        kept = []
        try:
            if self._resumed_step and path.is_file():
                lines = path.read_text("utf-8").splitlines()
                kept = [line for line in lines if _step_of(line) in range(1, last + 1)]
            write_file(path, "".join(f"{line}\n" for line in kept).encode("utf-8"))
            self._file = open(path, "a", encoding="utf-8", opener=open_no_follow)
        except OSError as error:
            raise _unwritable(path, error) from error
        return self

    def __exit__(self, *error: object) -> None:
        # What is left in the buffer is a line that could not be written, which was raised then.
        with contextlib.suppress(OSError):
            self._file.close()

    def on_step_end(self, trainer: RunView, result: StepResult) -> None:
        """Adds this step's line, where it is to have one."""
        try:
            if result.step % self._interval == 0 or result.step == self._total:
                self._file.write(_line(result, trainer.logged))
                self._file.flush()
            if result.step % self._saved_every == 0 or trainer.is_last:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from error


def _line(result: StepResult, logged: dict[str, float]) -> str:
    numbers = {
        "step": result.step,
        "loss": result.loss,
        "unweighted_loss": float(np.mean(result.per_sample_loss)),
        "learning_rate": result.learning_rate,
        "gradient_norm": result.gradient_norm,
        "mean_sigma": float(np.mean(result.noise.sigma)),
        "mean_weight": float(np.mean(result.loss_weight)),
        **logged,
    }
    # JSON has no NaN or infinity, which some numbers of a skipped step are.
    finite = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
    return json.dumps(finite) + "\n"


def _unwritable(file: Path | str, error: OSError) -> DataError:
    return DataError(f"{file}: can't be written ({error.strerror}); free some space")


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; 0 for one that a crash cut short."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return 0


class Progress(Observer):
    """A bar on a terminal, about twenty plain lines elsewhere.

    first, total: steps. batch: samples of one. is_compiled: whether the first step compiles.
    call: steps in a call, which are observed at once when it ends.
    """

    def __init__(
        self,
        first: int,
        total: int,
        batch: int,
        is_compiled: bool,
        say: Callable[[str], None],
        call: int = 1,
    ) -> None:
        self._first = first
        self._total = total
        self._batch = batch
        self._is_compiled = is_compiled
        self._say = say
        self._call = call
        self._every = max(1, (total - first + 1) // 20)
        self._started: float | None = None
        self._losses: list[float] = []
        self._bar: Any = None

    def __enter__(self) -> Observer:
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total, initial=self._first - 1, unit="step", dynamic_ncols=True
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_step_end(self, trainer: RunView, result: StepResult) -> None:
        """Shows loss (mean of the steps since the last line), learning rate, speed, time left."""
        now = time.monotonic()
        # The first call compiles; the speed is that of the calls after it, each as a whole.
        self._started = self._started or now
        made = result.step - self._first
        later_calls = made // self._call
        self._losses.append(result.loss)
        speed = later_calls * self._call * self._batch / max(now - self._started, 1e-9)
        if self._bar is not None:
            shown = f"{speed:.1f}" if later_calls else "-"
            self._bar.set_postfix_str(
                f"loss {np.mean(self._losses[-20:]):.4f}, lr {result.learning_rate:.2e}, "
                f"{shown} images/s"
            )
            self._bar.update(1)
            return
        if made % self._every and result.step != self._total:
            return
        left = (self._total - result.step) * self._batch / speed if later_calls else None
        tail = "compiled" if self._is_compiled else "eager"
        if left is not None:
            tail = f"{speed:.1f} images/s, {clock(left)} left"
        self._say(
            f"step {result.step}/{self._total}  loss {np.mean(self._losses):.4f}  "
            f"lr {result.learning_rate:.2e}  {tail}"
        )
        self._losses.clear()


class Grids(Observer):
    """Draws the same prompts every `sample_interval` steps and at the end: samples/step_N.png.

    make_sampler: called when images are first drawn. with_ema: inside, the network computes with
    its EMA, where there is one.
    """

    def __init__(
        self,
        make_sampler: Callable[[], ImageSampler],
        prompts: Sequence[str],
        settings: TrainSettings,
        with_ema: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._sampler = cache(make_sampler)
        self._prompts = prompts
        self._settings = settings
        self._with_ema = with_ema
        self.last: Path | None = None

    def on_step_end(self, trainer: RunView, result: StepResult) -> None:
        """Draws now, if it is time."""
        interval = self._settings.sample_interval
        is_due = interval and result.step % interval == 0
        if (is_due or trainer.is_last) and not trainer.is_interrupted:
            self._draw(_file(trainer))

    def finish(self, trainer: RunView) -> None:
        """Draws the last grid, where it is missing."""
        self.last = _file(trainer)
        if not self.last.is_file():
            self._draw(self.last)

    def _draw(self, file: Path) -> None:
        settings = self._settings
        with self._with_ema():
            pixels = self._sampler().draw(
                self._prompts,
                settings.sample_steps,
                settings.guidance_scale,
                settings.seed,
                negative_prompt=settings.negative_prompt or None,
                sampler=none_if_auto(settings.sampler),
                spacing=none_if_auto(settings.spacing),
            )
        try:
            save_grid(file, pixels, self._prompts)
        except OSError as error:
            raise _unwritable(file, error) from error
        self.last = file


def _file(trainer: RunView) -> Path:
    """The grid of a step."""
    return trainer.save_path / "samples" / f"step_{trainer.step:08d}.png"


class Checkpoints(Observer):
    """Saves every `interval` steps and at the end, into `parent`; keeps the newest `kept` (0: all).

    capture: what a checkpoint holds now.
    """

    def __init__(
        self, capture: Callable[[], Contents], parent: Path, interval: int, kept: int
    ) -> None:
        self._capture = capture
        self._parent = parent
        self._interval = interval
        self._kept = kept
        self.last: Path | None = None

    def on_step_end(self, trainer: RunView, result: StepResult) -> None:
        """Saves now, if it is time."""
        if result.step % self._interval == 0 or trainer.is_last:
            self._rotate(self.save())

    def finish(self, trainer: RunView) -> None:
        """Removes older ones."""
        self._rotate(checkpoint_folder(self._parent, trainer.step))

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder."""
        return save_checkpoint(self._parent, self._capture())

    def _rotate(self, newest: Path) -> None:
        self.last = newest
        if self._kept:
            remove_older(self._parent, self._kept)
