"""A long prompt as chunks that a text encoder can take, and what is kept of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdxl_lpw.weights import Run

__all__ = ["Chunks", "cut", "kept_positions"]


class Tokenizer(Protocol):
    """What is needed here of one of the host's text encoders."""

    begin: int
    end: int
    pad: int
    length: int

    def tokenize(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Chunks:
    """One prompt for one encoder.

    ids: (n, length) int32, each row begin, up to length - 2 tokens, end, padding: the layout of
    the host's own encoding. weights: (n, length) float32, 1 for all but tokens. used: how many
    rows the prompt fills, at least 1; the others hold an empty prompt. lost: tokens cut off.
    """

    ids: np.ndarray
    weights: np.ndarray
    used: int
    lost: int


def cut(sections: Sequence[Sequence[Run]], encoder: Tokenizer, count: int) -> Chunks:
    """The first `count` chunks of a prompt; tokens beyond them are cut off.

    Each section starts a chunk; one that is empty fills a chunk unless it is the last.
    """
    room = encoder.length - 2
    pieces: list[list[tuple[int, float]]] = []
    for section in sections:
        tokens = [(token, weight) for text, weight in section for token in encoder.tokenize(text)]
        pieces += [tokens[start : start + room] for start in range(0, max(len(tokens), 1), room)]
    while len(pieces) > 1 and not pieces[-1]:
        pieces.pop()
    used = min(len(pieces), count)
    ids = np.full((count, encoder.length), encoder.pad, np.int32)
    weights = np.ones((count, encoder.length), np.float32)
    ids[:, 0] = encoder.begin
    ids[used:, 1] = encoder.end
    for row, piece in enumerate(pieces[:used]):
        after = 1 + len(piece)
        ids[row, 1:after] = [token for token, _ in piece]
        weights[row, 1:after] = [weight for _, weight in piece]
        ids[row, after] = encoder.end
    return Chunks(ids, weights, used, sum(len(piece) for piece in pieces[used:]))


def kept_positions(convention: str, count: int, length: int) -> np.ndarray:
    """Which of the count * length positions make up the context, int (L,).

    a1111: all of them. kohya: the first begin, each chunk without its first and last position,
    and the last position of all, so L = count * (length - 2) + 2.
    """
    positions = np.arange(count * length)
    if convention == "a1111":
        return positions
    inner = positions.reshape(count, length)[:, 1:-1].ravel()
    return np.concatenate([positions[:1], inner, positions[-1:]])
