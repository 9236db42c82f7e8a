"""What `on_step_end` is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.diffusion.objective import NoiseLevels

__all__ = ["StepResult", "TrainerView"]


class TrainerView(Protocol):
    """The part of the trainer that observers may use.

    step: the update just made, from 1. save_path: the run's folder. is_main_process: whether this
    rank, the one with number 0, writes files.
    """

    step: int
    total_steps: int
    save_path: Path
    is_main_process: bool
    model: DiffusionModel

    def log(self, name: str, value: float) -> None:
        """Adds a number to this step's line in metrics.jsonl."""
        ...

    def stop(self, reason: str) -> None:
        """Ends the run after this step, with a checkpoint, saying why."""
        ...


class StepResult:
    """One step's outcome; values on the device are fetched when first read.

    step: the update, from 1. noise: the noise levels, fields (G,). loss_weight: (G,) float64,
    lambda on |D - z|^2. sample_ids: names of the G images.
    """

    def __init__(
        self,
        step: int,
        noise: NoiseLevels,
        loss_weight: np.ndarray,
        sample_ids: Sequence[str],
        outputs: tuple[Any, ...],
    ) -> None:
        self.step = step
        self.noise = noise
        self.loss_weight = loss_weight
        self.sample_ids = tuple(sample_ids)
        self._outputs = outputs

    @property
    def loss(self) -> float:
        """The weighted loss that was minimised."""
        return float(self._outputs[0].asnumpy())

    @property
    def per_sample_loss(self) -> np.ndarray:
        """(G,) float32: each sample's squared error against the network's target, unweighted."""
        return self._outputs[1].asnumpy()

    @property
    def gradient_norm(self) -> float:
        """Global norm of the gradients before clipping."""
        return float(self._outputs[2].asnumpy())

    @property
    def skipped(self) -> bool:
        """Whether the update was left out, because loss or gradients were not finite."""
        return not self._outputs[3].asnumpy()

    @property
    def learning_rate(self) -> float:
        """The learning rate of this update."""
        return float(self._outputs[4].asnumpy())

    @property
    def loss_scale(self) -> float:
        """What the loss was multiplied by against vanishing gradients; 1 in full precision."""
        return float(self._outputs[5].asnumpy())
