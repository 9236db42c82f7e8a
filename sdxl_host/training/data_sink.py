"""Data sink: many steps in one call, fed from a queue on the device.

The loop gives `SinkRunner` the inputs of one step after the other; with the last one of a call it
runs them all, and returns the outputs of all. They come from rings in which each step leaves
them, because `ms.data_sink` returns the last step's output alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
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
from sdxl_host.training.step import TrainStep, UpdateRows

__all__ = [
    "COLUMNS",
    "FixedCaptions",
    "SinkRunner",
    "SinkStep",
    "check",
    "device_queue",
]

COLUMNS = ("latents", "noise", "coefficients", "context", "vector", "mask")

# Of SDXL each takes 630 kB: with 77 tokens 77 * 2048 numbers.
_MOST_CAPTIONS = 4096
_CAPTIONS_AT_ONCE = 16

# The inputs of a call's steps are all made before it, so no step's may depend on an earlier result.
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
    if settings.compile_cache:
        raise ConfigError(
            "--data_sink True: the graph of a queue's steps can't be kept; leave --compile_cache "
            "out"
        )
    if settings.gradient_accumulation_steps > 1:
        raise ConfigError(
            "--data_sink True: each step of a queue is an update; use "
            "--gradient_accumulation_steps 1"
        )
    if model.first_stage.cell is not None and not settings.cache_latent:
        raise ConfigError(
            "--data_sink True: latents must be there beforehand, and the first stage would have to "
            "encode images on the device meanwhile; make them with sdxl-host cache and read them "
            "with --cache_latent True, or leave the flag out"
        )
    if config.data.buckets:
        raise ConfigError(
            "--data_sink True: all steps of a queue have one shape, and buckets have several; "
            "leave --buckets out"
        )
    if config.data.shuffle_tags:
        raise ConfigError(
            "--data_sink True: captions must be known beforehand, and --shuffle_tags draws them in "
            "every step; leave one of them out"
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
        self.step: Any = step  # MindSpore says that calling a cell may give None
        self.rows = Tensor(np.arange(size, dtype=np.int32)[:, None])
        self.size = size
        self.numbers = _ring("sink_numbers", (size, 5))
        self.losses = _ring("sink_losses", (size, samples))
        self.position = Parameter(Tensor(0, ms.int32), name="sink_position", requires_grad=False)

    def construct(self, latents, noise, coefficients, context, vector, mask):
        """One update, from the columns in the order of `COLUMNS`; returns its loss."""
        loss, losses, norm, finite, rate, scale = self.step.construct(
            latents, noise, coefficients, context, vector, mask
        )
        is_row = ops.equal(self.rows, self.position)
        row = ops.stack((loss, norm, finite.astype(ms.float32), rate, scale)).reshape(1, -1)
        kept = ops.assign(self.numbers, ops.select(is_row, row, self.numbers))
        kept_losses = ops.assign(
            self.losses, ops.select(is_row, losses.reshape(1, -1), self.losses)
        )
        following = ops.select(
            self.position + 1 < self.size, self.position + 1, ops.zeros_like(self.position)
        )
        moved = ops.assign(self.position, ops.depend(following, (kept, kept_losses)))
        return ops.depend(loss, moved)

    def outputs(self) -> list[tuple[Tensor, ...]]:
        """What the last `size` steps gave, as `TrainStep.construct` returns it, in order."""
        numbers, losses = self.numbers.asnumpy().copy(), self.losses.asnumpy().copy()
        return [
            (
                *(Tensor(row[0]), Tensor(samples), Tensor(row[1]), Tensor(row[2] > 0)),
                *(Tensor(row[3]), Tensor(row[4])),
            )
            for row, samples in zip(numbers, losses, strict=True)
        ]


class FixedCaptions:
    """The embeddings of a dataset's captions, all made beforehand: captions to `PromptEmbedding`.

    Raises ConfigError for more captions than memory has room for, and PluginError where their
    contexts are of several lengths: the queue's columns have one.
    """

    def __init__(self, hooks: Hooks, model: DiffusionModel, dataset: Text2ImageDataset) -> None:
        captions = list(
            dict.fromkeys(c for _, variants in dataset.all_captions() for c in variants)
        )
        if len(captions) > _MOST_CAPTIONS:
            raise ConfigError(
                f"--data_sink True: embeddings must be there beforehand, and of {len(captions):,} "
                f"captions there are too many to hold (at most {_MOST_CAPTIONS:,}); make them with "
                "sdxl-host cache and read them with --cache_text_embedding True, or leave it out"
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


class SinkRunner:
    """Runs `step.size` steps in a call, when it has the inputs of them all.

    table: as for `StepRunner`. total: steps that the run has left. queue_size: steps that the queue
    holds; -1 leaves it to MindSpore.
    """

    def __init__(
        self,
        step: SinkStep,
        table: np.ndarray,
        total: int,
        queue_size: int = -1,
        jit_level: str = "O0",
    ) -> None:
        self._step = step
        self._update_rows = UpdateRows(step.step, table)
        self._total = total
        self._options = queue_size, jit_level
        self._rows: SimpleQueue[Sequence[np.ndarray] | None] = SimpleQueue()
        self._waiting = 0
        self._call: Callable[[], None] | None = None

    def __call__(self, batches: Iterable[Sequence[np.ndarray]], /) -> list[tuple[Tensor, ...]]:
        """Takes the inputs of one step, which is one batch. Returns nothing until a call is full,
        and then the outputs of its steps, in order, as `TrainStep.construct` returns them."""
        (arrays,) = batches
        self._rows.put(arrays)
        self._waiting += 1
        if self._waiting < self._step.size:
            return []
        self._waiting = 0
        if self._call is None:
            self._call = device_queue(self._step, self._taken(), self._total, *self._options)
        self._update_rows.provide(self._step.size)
        self._call()
        return self._step.outputs()

    def close(self) -> None:
        """Lets the thread end that waits for rows, where a run ends before its last step."""
        self._rows.put(None)

    def _taken(self) -> Iterator[Sequence[np.ndarray]]:
        """The rows, as steps give them. After `close` the last one again and again, because
        MindSpore's thread counts on as many as there are steps."""
        row: Sequence[np.ndarray] = ()
        for taken in range(self._total):
            following = self._rows.get()
            if following is None:
                yield from itertools.repeat(row, self._total - taken)
                return
            row = following
            yield row


def device_queue(
    step: SinkStep,
    rows: Iterator[Sequence[np.ndarray]],
    total: int,
    queue_size: int,
    jit_level: str,
) -> Callable[[], None]:
    """A function that runs `step.size` steps from Ascend's queue, which a thread of MindSpore fills
    with `rows`. The first row must be there at once; the thread waits for the others.

    total: how many rows there are. queue_size: as for `SinkRunner`.
    """
    import mindspore.dataset as ds

    first = next(rows)
    is_running = False

    def generate() -> Iterator[Sequence[np.ndarray]]:
        # MindSpore runs a generator to learn its size and shapes; the real one must wait for that.
        if is_running:
            yield from itertools.chain([first], rows)
        else:
            yield from itertools.repeat([np.zeros_like(array) for array in first], total)

    if queue_size > 0:
        os.environ["MS_DATASET_SINK_QUEUE"] = str(queue_size)
    dataset = ds.GeneratorDataset(
        generate,
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
    run = ms.data_sink(step, dataset, sink_size=step.size, jit_config=ms.JitConfig(jit_level))

    def call() -> None:
        run()

    return call


def _ring(name: str, shape: tuple[int, int]) -> Parameter:
    return Parameter(Tensor(np.zeros(shape, np.float32)), name=name, requires_grad=False)
