"""What the host itself does at the end of a step: each an observer of `on_step_end`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sdxl_host.checkpoints.layout import CHECKPOINTS, checkpoint_folder
from sdxl_host.checkpoints.write import remove_older
from sdxl_host.errors import DataError, HostError
from sdxl_host.files.atomic import open_no_follow, write_file
from sdxl_host.plugins.step_result import StepResult
from sdxl_host.settings.schema import TrainSettings

if TYPE_CHECKING:
    from sdxl_host.sampling.pipeline import ImageSampler
    from sdxl_host.training.trainer import Trainer

__all__ = ["Agreement", "Checkpoints", "FiniteGuard", "Grids", "Metrics", "Progress"]


# Skipped steps in a row that end a run: as many halvings take the largest loss scale, 2^24, to 1.
_OVERFLOWS = 24


class Agreement:
    """Lets all workers stop after the same step, whichever of them was asked to."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """After the plugins, before whatever asks whether this is the last step."""
        trainer.agree_to_stop()

    def close(self) -> None:
        """Nothing is held."""


class FiniteGuard:
    """Ends a run whose loss or gradients are not finite; such an update was not applied.

    is_scaled: with a loss scale gradients may overflow now and then, which halves it; metrics.jsonl
    says so, and only many such steps in a row end the run.
    """

    def __init__(self, is_scaled: bool) -> None:
        self._is_scaled = is_scaled
        self._in_a_row = 0
        self._skipped = 0

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Raises HostError naming the step, its noise levels and its images."""
        self._in_a_row = self._in_a_row + 1 if result.skipped else 0
        self._skipped += result.skipped
        if self._is_scaled:
            trainer.log("loss_scale", result.loss_scale)
            trainer.log("skipped", result.skipped)
        if self._in_a_row > (_OVERFLOWS if self._is_scaled else 0):
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

    def counts(self) -> dict[str, int]:
        """Updates skipped, in all and just now in a row."""
        return {"skipped": self._skipped, "skipped_in_a_row": self._in_a_row}

    def load_counts(self, counts: Mapping[str, int]) -> None:
        """Takes back what `counts` gave."""
        self._skipped, self._in_a_row = counts["skipped"], counts["skipped_in_a_row"]

    def lines(self) -> list[str]:
        """What the end of a run says of skipped updates."""
        if not self._skipped:
            return []
        return [f"skipped     {self._skipped} updates, whose gradients were not finite"]

    def close(self) -> None:
        """Nothing is held."""


class Metrics:
    """Writes metrics.jsonl: one line every `interval` steps, with what plugins logged.

    The lines hold nothing of the clock, so two equal runs write equal files. A resumed run keeps
    those up to its step that it would have written itself: not the last one of a shorter run. A
    checkpoint's lines are on the disk before it is.
    """

    def __init__(self, path: Path, interval: int, resumed_step: int, total: int) -> None:
        self._interval = interval
        kept = []
        try:
            if resumed_step and path.is_file():
                is_kept = resumed_step % interval == 0 or resumed_step == total
                last = resumed_step if is_kept else resumed_step - 1
                lines = path.read_text("utf-8").splitlines()
                kept = [line for line in lines if _step_of(line) in range(1, last + 1)]
            write_file(path, "".join(f"{line}\n" for line in kept).encode("utf-8"))
            self._file = open(path, "a", encoding="utf-8", opener=open_no_follow)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise _unwritable(path, error) from error

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Adds this step's line, where it is to have one."""
        try:
            if result.step % self._interval == 0 or result.step == trainer.total_steps:
                self._file.write(_line(trainer, result))
                self._file.flush()
            if _is_saved(trainer, result):
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self._file.name, error) from error

    def close(self) -> None:
        """Closes the file."""
        # What is left in the buffer is a line that could not be written, as has been said then.
        with contextlib.suppress(OSError):
            self._file.close()


def _line(trainer: Trainer, result: StepResult) -> str:
    numbers = {
        "step": result.step,
        "loss": result.loss,
        "unweighted_loss": float(np.mean(result.per_sample_loss)),
        "learning_rate": result.learning_rate,
        "gradient_norm": result.gradient_norm,
        "mean_sigma": float(np.mean(result.noise.sigma)),
        "mean_weight": float(np.mean(result.loss_weight)),
        **trainer.logged,
    }
    # Of a skipped step some numbers are not finite, which JSON has no word for.
    told = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
    return json.dumps(told) + "\n"


def _is_saved(trainer: Trainer, result: StepResult) -> bool:
    """Whether a checkpoint of this step is written."""
    return result.step % trainer.config.train.save_ckpt_interval == 0 or trainer.is_last


def _unwritable(file: Path | str, error: OSError) -> DataError:
    return DataError(f"{file}: can't be written ({error.strerror}); free some space")


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; 0 for one that a crash cut short."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return 0


class Progress:
    """A bar on a terminal, about twenty plain lines elsewhere."""

    def __init__(self, first: int, total: int, batch: int, say: Callable[[str], None]) -> None:
        self._batch = batch
        self._say = say
        self._first = first
        self._every = max(1, (total - first + 1) // 20)
        self._started: float | None = None
        self._losses: list[float] = []
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=first - 1, unit="step", dynamic_ncols=True)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Shows loss (mean of the steps since the last line), learning rate, speed, time left."""
        now = time.monotonic()
        # The first step compiles; the speed is that of the steps after it.
        self._started = self._started or now
        made = result.step - self._first
        self._losses.append(result.loss)
        speed = made * self._batch / max(now - self._started, 1e-9)
        if self._bar is not None:
            shown = f"{speed:.1f}" if made else "-"
            self._bar.set_postfix_str(
                f"loss {np.mean(self._losses[-20:]):.4f}, lr {result.learning_rate:.2e}, "
                f"{shown} images/s"
            )
            self._bar.update(1)
            return
        if made % self._every and result.step != trainer.total_steps:
            return
        left = (trainer.total_steps - result.step) * self._batch / speed if made else None
        tail = "compiled" if trainer.config.train.ms_mode == 0 else "eager"
        if left is not None:
            tail = f"{speed:.1f} images/s, {_clock(left)} left"
        self._say(
            f"step {result.step}/{trainer.total_steps}  loss {np.mean(self._losses):.4f}  "
            f"lr {result.learning_rate:.2e}  {tail}"
        )
        self._losses.clear()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d}"
    )


class Grids:
    """Draws the same prompts every `sample_interval` steps and at the end: samples/step_N.png."""

    def __init__(
        self,
        sampler: Callable[[], ImageSampler],
        prompts: Sequence[str],
        settings: TrainSettings,
    ) -> None:
        self._sampler = sampler
        self._prompts = list(prompts)
        self._settings = settings
        self.last: Path | None = None

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Draws now, if it is time."""
        interval = self._settings.sample_interval
        due = interval and result.step % interval == 0
        if (due or trainer.is_last) and not trainer.is_interrupted:
            self._draw(trainer, self._file(trainer))

    def finish(self, trainer: Trainer) -> None:
        """Draws the last grid, if a run that made its last step ended before that."""
        self.last = self._file(trainer)
        if not self.last.is_file():
            self._draw(trainer, self.last)

    def _file(self, trainer: Trainer) -> Path:
        return trainer.save_path / "samples" / f"step_{trainer.step:08d}.png"

    def _draw(self, trainer: Trainer, file: Path) -> None:
        from sdxl_host.sampling.grid import save_grid
        from sdxl_host.sampling.samplers import none_if_auto

        settings = self._settings
        with trainer.averaged():
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

    def close(self) -> None:
        """Nothing is held."""


class Checkpoints:
    """Saves every `save_ckpt_interval` steps and at the end; keeps the newest `kept` (0: all)."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self.last: Path | None = None

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Saves now, if it is time."""
        if _is_saved(trainer, result):
            self._rotate(trainer.save())

    def finish(self, trainer: Trainer) -> None:
        """Removes older ones, if a run that made its last step ended before that."""
        self._rotate(checkpoint_folder(trainer.save_path / CHECKPOINTS, trainer.step))

    def _rotate(self, newest: Path) -> None:
        self.last = newest
        if self._kept:
            remove_older(newest.parent, self._kept)

    def close(self) -> None:
        """Nothing is held."""
