"""What a prompt becomes: the embedding that conditions the network, and the encoders behind it.

numpy only. The encoders themselves are MindSpore cells; they answer in numpy, because frozen text
enters the training step as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["PromptEmbedding", "TextEncoder", "TextEncoders", "encode_truncated", "unconditional"]


@dataclass(frozen=True)
class PromptEmbedding:
    """The conditioning of B prompts.

    context: (B, L, C) float32, what cross-attention reads; C is the encoders' widths together.
    pooled: (B, P) float32, the part of the vector that stands for the whole prompt.
    mask: (B, L) bool, True where attended, at least one in every row; None attends everywhere.
    """

    context: np.ndarray
    pooled: np.ndarray
    mask: np.ndarray | None = None

    def attended(self) -> np.ndarray:
        """(B, L) bool: the mask, all True where there is none."""
        if self.mask is None:
            return np.ones(self.context.shape[:2], bool)
        return self.mask


class TextEncoder(Protocol):
    """One frozen text encoder.

    begin, end, pad: special token ids. length: tokens that `encode` takes, specials included (77).
    width: channels C of its hidden states. pooled_width: P, or 0 where it has no pooled output.
    """

    begin: int
    end: int
    pad: int
    length: int
    width: int
    pooled_width: int

    def tokenize(self, text: str) -> list[int]:
        """Ids of the text, of any number, without special tokens."""
        ...

    def encode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """ids (N, length) int -> hidden (N, length, C) float32, pooled (N, P) float32 or None."""
        ...


class TextEncoders(Sequence[TextEncoder]):
    """The text encoders of a model, in the order in which the context holds their channels."""

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        self._encoders = tuple(encoders)

    def __len__(self) -> int:
        return len(self._encoders)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._encoders[index]

    def __iter__(self) -> Iterator[TextEncoder]:
        return iter(self._encoders)

    def join(
        self,
        hidden: Sequence[np.ndarray],
        pooled: Sequence[np.ndarray | None],
        mask: np.ndarray | None = None,
    ) -> PromptEmbedding:
        """The embedding of one hidden (B, L, C_i) and one pooled (B, P_i) or None an encoder.

        mask: (B, L), True where attended. Raises ValueError when the numbers do not match.
        """
        if not len(hidden) == len(pooled) == len(self):
            raise ValueError(
                f"join: {len(self)} encoders need as many hidden and pooled outputs, "
                f"not {len(hidden)} and {len(pooled)}"
            )
        given = [part for part in pooled if part is not None]
        if not given:
            raise ValueError("join: no encoder gave a pooled output; the vector needs one")
        return PromptEmbedding(
            np.concatenate(list(hidden), axis=-1), np.concatenate(given, axis=-1), mask
        )


def encode_truncated(prompts: Sequence[str], encoders: TextEncoders) -> PromptEmbedding:
    """The host's own encoding: begin, up to 75 tokens, end, padding; the rest is cut off."""
    hidden, pooled = [], []
    for encoder in encoders:
        rows = []
        for prompt in prompts:
            kept = encoder.tokenize(prompt)[: encoder.length - 2]
            row = [encoder.begin, *kept, encoder.end]
            rows.append(row + [encoder.pad] * (encoder.length - len(row)))
        states, summary = encoder.encode(np.asarray(rows, np.int32))
        hidden.append(states)
        pooled.append(summary)
    return encoders.join(hidden, pooled)


def unconditional(like: PromptEmbedding, length: int = 77) -> PromptEmbedding:
    """The zero embedding that guidance subtracts from, of the same shape as `like`.

    Its mask attends the first `length` positions, so it reads the same whatever the context's
    length is; caption dropout in training uses the same one.
    """
    mask = None
    if like.mask is not None:
        mask = np.zeros_like(like.mask)
        mask[:, :length] = True
    return PromptEmbedding(np.zeros_like(like.context), np.zeros_like(like.pooled), mask)
