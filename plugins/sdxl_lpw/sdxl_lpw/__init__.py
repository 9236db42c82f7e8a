"""Prompts longer than 77 tokens, and prompt weights.

A prompt is cut into chunks of 75 tokens; each chunk goes through the text encoders on its own, and
the hidden states of all chunks, side by side, are the context. Two conventions for the details
are in use, and weights trained under one read badly under the other, so `convention` names it:

    a1111   AUTOMATIC1111's web UI: all 77 positions of a chunk are kept, empty chunks are masked
    kohya   kohya-ss/sd-scripts: inner begin and end tokens are dropped, all chunks are attended

The context has one length for all prompts, so the training step is compiled once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from sdxl_host import DiffusionModel, PromptEmbedding, TextEncoders, hookimpl, option

from sdxl_lpw.chunks import cut, kept_positions
from sdxl_lpw.weights import Run, parse_weights

__all__ = ["LongPrompts", "Options"]

_log = logging.getLogger(__name__)


class Trainer(Protocol):
    """What is needed here of the host's trainer."""

    step: int
    total_steps: int

    def log(self, name: str, value: float) -> None: ...


@dataclass
class Options:
    """The defaults leave prompts that fit 77 tokens as they are without the plugin."""

    max_embeddings_multiples: int = option(
        3, help="chunks of 75 tokens that a prompt may fill; the rest is cut off", minimum=1
    )
    convention: Literal["a1111", "kohya"] = option(
        "a1111", help="how chunks become a context: a1111 or kohya"
    )
    prompt_weights: bool = option(
        False, help="read (x:1.3), (x), [x] and BREAK in prompts; off, brackets are text"
    )


class LongPrompts:
    """Claims `encode_prompt`, and tells at the end of a step what was cut off in it."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        # Prompts that were cut and tokens that they lost: of this step, and of those before.
        self._step, self._run = np.zeros(2, np.int64), np.zeros(2, np.int64)

    @hookimpl
    def encode_prompt(self, prompts: Sequence[str], encoders: TextEncoders) -> PromptEmbedding:
        """context (B, L, C) with L = 77 n for a1111 and 75 n + 2 for kohya, n the most chunks.

        mask: (B, L) for a1111, True on every position of the chunks a prompt fills; else None.
        pooled: (B, P), of the first chunk, without prompt weights.
        """
        a1111 = self.options.convention == "a1111"
        count = self.options.max_embeddings_multiples
        sections = [self._sections(prompt) for prompt in prompts]
        hidden, pooled = [], []
        filled = lost = np.zeros(len(prompts), np.int64)
        for encoder in encoders:
            chunks = [cut(parts, encoder, count) for parts in sections]
            states, summary = encoder.encode(np.concatenate([chunk.ids for chunk in chunks]))
            states = states.reshape(len(prompts), count * encoder.length, -1)
            weights = np.stack([chunk.weights.ravel() for chunk in chunks])
            used = np.array([chunk.used for chunk in chunks])
            states = _weigh(states, weights, _positions(used, count, encoder.length), a1111)
            hidden.append(states[:, kept_positions(self.options.convention, count, encoder.length)])
            pooled.append(None if summary is None else summary[::count])
            filled = np.maximum(filled, used)
            lost = np.maximum(lost, [chunk.lost for chunk in chunks])
        self._count(lost)
        mask = _positions(filled, count, encoders[0].length) if a1111 else None
        return encoders.join(hidden, pooled, mask)

    @hookimpl
    def on_step_end(self, trainer: Trainer) -> None:
        """Logs how many prompts were cut in this step, by how many tokens; after the last, all."""
        for name, value in zip(("lpw_cut_prompts", "lpw_cut_tokens"), self._step, strict=True):
            trainer.log(name, float(value))
        self._run += self._step
        self._step[:] = 0
        if trainer.step == trainer.total_steps and self._run.any():
            _log.warning("lpw: %d prompts of this run were cut, by %d tokens in all", *self._run)

    def notes(self, model: DiffusionModel) -> list[str]:
        """Whether the options leave everything as the host does it."""
        if self.options.max_embeddings_multiples == 1 and not self.options.prompt_weights:
            return ["does nothing: max_embeddings_multiples is 1 and prompt_weights is off"]
        return []

    def _count(self, lost: np.ndarray) -> None:
        """Adds prompts that lost `lost` (B,) tokens to the counts; says so the first time."""
        cut = lost > 0
        if cut.any() and not (self._step + self._run).any():
            _log.warning(
                "lpw: %d of %d prompts do not fit %d chunks and lose up to %d tokens; shorten them "
                "or raise max_embeddings_multiples (said once)",
                *(cut.sum(), len(lost), self.options.max_embeddings_multiples, lost.max()),
            )
        self._step += (cut.sum(), lost.sum())

    def _sections(self, prompt: str) -> list[list[Run]]:
        return parse_weights(prompt) if self.options.prompt_weights else [[(prompt, 1.0)]]


def _positions(used: np.ndarray, count: int, length: int) -> np.ndarray:
    """(B, count * length) bool: the positions of each sample's first `used` (B,) chunks."""
    return np.arange(count * length) // length < used[:, None]


def _weigh(
    states: np.ndarray, weights: np.ndarray, attended: np.ndarray, keep_mean: bool
) -> np.ndarray:
    """states (B, L, C) times weights (B, L), float32.

    keep_mean: rescale each sample so that its mean over the attended (B, L) positions stays.
    """
    if (weights == 1).all():
        return states
    weighted = states * weights[..., None]
    if not keep_mean:
        return weighted
    where = attended[..., None]
    before = states.mean(axis=(1, 2), where=where, dtype=np.float64)
    after = weighted.mean(axis=(1, 2), where=where, dtype=np.float64)
    scale = np.divide(before, after, out=np.ones_like(before), where=after != 0)
    return weighted * scale[:, None, None].astype(np.float32)
