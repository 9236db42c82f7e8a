"""Data sink: many steps in one call, fed from a queue on the device.

The host fills the queue's columns step by step, hooks included, and reads what the steps gave from
rings that they leave behind, because `ms.data_sink` answers with the last step's output alone. The
learning rate is no column: the step looks it up in its rows of the update table.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from sdxl_host.config.load import RunConfig
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.device import on_ascend
from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.training.step import TrainStep
from sdxl_host.training.update_table import UpdateRows

__all__ = [
    "COLUMNS",
    "FixedCaptions",
    "SinkStep",
    "check",
    "device_queue",
    "outputs",
    "plain_loop",
]

COLUMNS = ("latents", "noise", "coefficients", "context", "vector", "mask")

# Of SDXL each takes 630 kB: with 77 tokens 77 * 2048 numbers.
_MOST_CAPTIONS = 4096
_CAPTIONS_AT_ONCE = 16

# Columns are made ahead of the steps, so nothing of a step may come back into a later one's.
_FEEDBACK = ("sample_timesteps", "weight_loss")


def check(config: RunConfig, hooks: Hooks, model: DiffusionModel, step: int) -> None:
    """Raises ConfigError where steps can't run from a queue, naming what stands in the way.

    step: the one that the run continues from.
    """
    settings, size = config.train, config.train.sink_size
    if not on_ascend():
        raise ConfigError(
            "--data_sink True: the queue is an Ascend device's, and this run is on the CPU; leave "
            "the flag out"
        )
    if settings.ms_mode == 1:
        raise ConfigError("--data_sink True: needs compiled steps; use --ms_mode 0")
    if settings.gradient_accumulation_steps > 1:
        raise ConfigError(
            "--data_sink True: each step of a queue is an update; use "
            "--gradient_accumulation_steps 1"
        )
    if model.first_stage.cell is not None:
        raise ConfigError(
            "--data_sink True: latents must be there beforehand, and the first stage would have to "
            "encode images on the device meanwhile; leave it out, or use the first stage "
            "sdxl_host.IdentityFirstStage"
        )
    for plugin, answered in hooks.observing(_FEEDBACK):
        raise ConfigError(
            f"--data_sink True: the plugin {plugin} observes on_step_end and answers {answered}, "
            "which is asked for many steps at once before the first of them ends; leave the flag "
            "or the plugin out"
        )
    for key, steps in (
        ("data.total_step", config.data.total_step),
        ("train.save_ckpt_interval", settings.save_ckpt_interval),
        ("train.sample_interval", settings.sample_interval),
        ("--resume", step),
    ):
        at_end = key == "train.save_ckpt_interval" and steps >= config.data.total_step
        if steps % size and not at_end:
            raise ConfigError(
                f"{key}: {steps} steps are no multiple of sink_size {size}, and weights are seen "
                "only between calls of so many; change one of them"
            )


class SinkStep(nn.Cell):
    """A training step that leaves what it gives in rings of `size` rows.

    numbers (size, 5): loss, gradient norm, whether it was applied, learning rate, loss scale.
    losses (size, G).
    """

    def __init__(self, step: TrainStep, size: int, samples: int) -> None:
        super().__init__(auto_prefix=False)
        self.step = step
        self.rows = Tensor(np.arange(size, dtype=np.int32)[:, None])
        self.size = size
        self.numbers = _ring("sink_numbers", (size, 5))
        self.losses = _ring("sink_losses", (size, samples))
        self.place = Parameter(Tensor(0, ms.int32), name="sink_place", requires_grad=False)

    def construct(self, latents, noise, coefficients, context, vector, mask):
        """One update, from the columns in the order of `COLUMNS`; returns its loss."""
        loss, losses, norm, finite, rate, scale = self.step.construct(
            latents, noise, coefficients, context, vector, mask
        )
        is_row = ops.equal(self.rows, self.place)
        row = ops.stack((loss, norm, finite.astype(ms.float32), rate, scale)).reshape(1, -1)
        kept = ops.assign(self.numbers, ops.select(is_row, row, self.numbers))
        kept_losses = ops.assign(
            self.losses, ops.select(is_row, losses.reshape(1, -1), self.losses)
        )
        following = ops.select(
            self.place + 1 < self.size, self.place + 1, ops.zeros_like(self.place)
        )
        moved = ops.assign(self.place, ops.depend(following, (kept, kept_losses)))
        return ops.depend(loss, moved)

    def outputs(self) -> list[tuple[Tensor, ...]]:
        """What the last `size` steps gave, as `TrainStep.construct` returns it, in order."""
        numbers, losses = self.numbers.asnumpy().copy(), self.losses.asnumpy().copy()
        return [
            (
                *(Tensor(row[0]), Tensor(own), Tensor(row[1]), Tensor(row[2] > 0)),
                *(Tensor(row[3]), Tensor(row[4])),
            )
            for row, own in zip(numbers, losses, strict=True)
        ]


class FixedCaptions:
    """The embeddings of a dataset's captions, all made beforehand: prompts to `PromptEmbedding`.

    Raises ConfigError for more captions than there is room for, and PluginError where their
    contexts are of several lengths: the queue's columns have one.
    """

    def __init__(self, hooks: Hooks, model: DiffusionModel, dataset: Text2ImageDataset) -> None:
        captions = list(dict.fromkeys(image.caption for image in dataset.images))
        if len(captions) > _MOST_CAPTIONS:
            raise ConfigError(
                f"--data_sink True: embeddings must be there beforehand, and of {len(captions):,} "
                f"captions there are too many to hold (at most {_MOST_CAPTIONS:,}); leave it out"
            )
        self._rows: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._is_masked = False
        lengths: set[int] = set()
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            some = captions[start : start + _CAPTIONS_AT_ONCE]
            encoded = hooks.encode_prompt(some, model.encoders)
            rows = zip(encoded.context, encoded.pooled, encoded.attended(), strict=True)
            self._rows.update(zip(some, rows, strict=True))
            self._is_masked |= encoded.mask is not None
            lengths.add(encoded.context.shape[1])
        if len(lengths) > 1:
            raise PluginError(
                f"encode_prompt: {hooks.chain('encode_prompt')}: gives contexts of "
                f"{', '.join(map(str, sorted(lengths)))} tokens, and with --data_sink True all "
                "must be of one length; give all prompts the longest with a mask, or leave the "
                "flag out"
            )

    def __call__(self, captions: Sequence[str]) -> PromptEmbedding:
        rows = [self._rows[caption] for caption in captions]
        context, pooled, attended = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        return PromptEmbedding(context, pooled, attended if self._is_masked else None)


def outputs(
    step: SinkStep,
    table: np.ndarray,
    prepared: Iterator[tuple[Any, Sequence[np.ndarray]]],
    calls: int,
    feed: Callable[[SinkStep, Iterator[Sequence[np.ndarray]], int], Callable[[], None]],
    state: Callable[[], dict[str, Any]],
) -> Iterator[tuple[Any, tuple[Tensor, ...], bool, dict[str, Any]]]:
    """Each step's own, its outputs, whether it ends a call, and the plugins' state after its hooks.

    table: as for `StepRunner`. prepared: what belongs to a step and its columns, step by step.
    calls: of `step.size` steps each. feed: `device_queue` or `plain_loop`. state: the plugins'
    state now; columns are made ahead, so what a checkpoint needs is the state as it was after a
    step's own.
    """
    made: list[tuple[Any, dict[str, Any]]] = []

    def columns() -> Iterator[Sequence[np.ndarray]]:
        for own, arrays in prepared:
            made.append((own, copy.deepcopy(state())))
            yield arrays

    call = feed(step, columns(), calls)
    rows = UpdateRows(step.step, table)
    for _ in range(calls):
        rows.provide(step.size)
        call()
        for index, outputs in enumerate(step.outputs()):
            own, after = made.pop(0)
            yield own, outputs, index == step.size - 1, after


def device_queue(
    step: SinkStep,
    columns: Iterator[Sequence[np.ndarray]],
    calls: int,
    queue_size: int = -1,
    jit_level: str = "O0",
) -> Callable[[], None]:
    """A function that runs `step.size` steps from Ascend's queue, which `columns` fill; the first
    row is made at once.

    queue_size: steps that the queue holds; -1 leaves it to MindSpore.
    """
    import mindspore.dataset as ds

    first = next(columns)
    is_running = False

    def rows() -> Iterator[Sequence[np.ndarray]]:
        # MindSpore runs a generator to learn its size and shapes; the real one must wait for that.
        if is_running:
            yield from itertools.chain([first], columns)
        else:
            yield from itertools.repeat([np.zeros_like(array) for array in first], total)

    total = calls * step.size
    if queue_size > 0:
        os.environ["MS_DATASET_SINK_QUEUE"] = str(queue_size)
    # In the main process and one by one, because hooks are called in between.
    dataset = ds.GeneratorDataset(
        rows,
        list(COLUMNS),
        num_parallel_workers=1,
        python_multiprocessing=False,
        shuffle=False,
        num_samples=total,
    )
    # Asked for now, these are kept.
    dataset.get_dataset_size()
    dataset.output_shapes()
    dataset.output_types()
    is_running = True
    sunk = ms.data_sink(step, dataset, sink_size=step.size, jit_config=ms.JitConfig(jit_level))

    def call() -> None:
        sunk()

    return call


def plain_loop(
    step: SinkStep, columns: Iterator[Sequence[np.ndarray]], calls: int
) -> Callable[[], None]:
    """The same by a loop on any device: what the queue must be equal to."""

    def call() -> None:
        for _ in range(step.size):
            step(*(Tensor(array) for array in next(columns)))

    return call


def _ring(name: str, shape: tuple[int, int]) -> Parameter:
    return Parameter(Tensor(np.zeros(shape, np.float32)), name=name, requires_grad=False)
