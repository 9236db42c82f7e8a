"""What a run needs and cuts off, found without training it: captions, parameters, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdxl_host.data.captions import Captioned
from sdxl_host.hooks import Hooks
from sdxl_host.model import DiffusionModel
from sdxl_host.prompts import Encoders, TextEncoder
from sdxl_host.weights.architecture import AUTOENCODER_PREFIX, NETWORK_PREFIX, embedder_prefix

if TYPE_CHECKING:
    from mindspore import Parameter, nn

__all__ = [
    "CaptionLength",
    "Part",
    "Recorder",
    "caption_lengths",
    "memory",
    "model_parts",
]


# ---- captions


class Recorder:
    """A text encoder that encodes nothing: it tells lengths and specials as `encoder` does, keeps
    what it is asked for, and answers zeros.

    readings: (text, ids) of each call of `tokenize`. rows: the ids (77,) that reached `encode`.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self.begin, self.end, self.pad = encoder.begin, encoder.end, encoder.pad
        self.length, self.width = encoder.length, encoder.width
        self.pooled_width = encoder.pooled_width
        self.clear()

    def clear(self) -> None:
        """Forgets what it kept."""
        self.readings: list[tuple[str, list[int]]] = []
        self.rows: list[list[int]] = []

    def tokenize(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""
        ids = list(self._encoder.tokenize(text))
        self.readings.append((text, ids))
        return ids

    def encode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """ids (N, 77) -> zeros (N, 77, width), and (N, pooled_width) or None."""
        rows = np.asarray(ids)
        self.rows += rows.tolist()
        hidden = np.zeros((len(rows), self.length, self.width), np.float32)
        if not self.pooled_width:
            return hidden, None
        return hidden, np.zeros((len(rows), self.pooled_width), np.float32)

    def reached(self) -> Counter[int]:
        """The ids that reached `encode`, without begin, end and padding."""
        found: Counter[int] = Counter()
        for row in self.rows:
            kept = list(row)
            # Only what stands at the ends: an id may be a special one and a word's as well.
            while kept and kept[-1] == self.pad:
                kept.pop()
            if kept and kept[-1] == self.end:
                kept.pop()
            found.update(kept[1:] if kept[:1] == [self.begin] else kept)
        return found


@dataclass(frozen=True)
class CaptionLength:
    """A picture's caption: how many tokens it has, and how many of them no encoder gets."""

    name: str
    tokens: int
    lost: int


def caption_lengths(
    hooks: Hooks, encoders: Encoders, pictures: Iterable[Captioned]
) -> list[CaptionLength]:
    """Tokens of each caption and those that are cut off, whichever plugin encodes prompts.

    `encode_prompt` is called with encoders that only keep the ids they are given. Lost is what was
    tokenized and reached no `encode`; of several encoders the one that loses most counts.
    """
    recorders = [Recorder(encoder) for encoder in encoders]
    recording = Encoders(recorders)
    known: dict[str, tuple[int, int]] = {}
    lengths = []
    for picture in pictures:
        if picture.caption not in known:
            for recorder in recorders:
                recorder.clear()
            hooks.encode_prompt([picture.caption], recording)
            known[picture.caption] = _length(picture.caption, recorders)
        lengths.append(CaptionLength(picture.name, *known[picture.caption]))
    return lengths


def _length(caption: str, recorders: Sequence[Recorder]) -> tuple[int, int]:
    """(tokens, lost) of a caption that the recorders have just seen."""
    counts = []
    all_readings = [reading for recorder in recorders for reading in recorder.readings]
    for recorder in recorders:
        # Whoever tokenizes once for all encoders, or not at all, is measured all the same.
        readings = recorder.readings or all_readings or [(caption, recorder.tokenize(caption))]
        tokens = Counter(_tokens(caption, readings))
        counts.append((tokens.total(), (tokens - recorder.reached()).total()))
    return max(counts, key=lambda count: (count[1], count[0]))


def _tokens(caption: str, readings: Iterable[tuple[str, list[int]]]) -> list[int]:
    """The ids of all texts that were tokenized; a text that was read before counts once.

    Texts are pieces of the caption in its order; one that only stands before the place reached was
    read a second time, for instance to look how long it is.
    """
    ids: list[int] = []
    place = 0
    for text, own in readings:
        start = caption.find(text, place)
        if start < 0 and text in caption:
            continue
        ids += own
        place = max(place, start + len(text))
    return ids


# ---- parameters


@dataclass(frozen=True)
class Part:
    """A part of the model: its parameters, those of them that are trained, and both in bytes.

    shapes: those of its parameters, by their names in the single file, before plugins changed it.
    """

    name: str
    count: int
    trained: int
    bytes: int
    trained_bytes: int
    shapes: dict[str, tuple[int, ...]]


def model_parts(model: DiffusionModel) -> list[Part]:
    """The network, the text encoders and the first stage, in this order; no weight is made.

    Plugins' network changes are made, as before a run but without loaded weights.
    """
    from mindspore.nn.utils import no_init_parameters

    from sdxl_host.assembly import change_network

    with no_init_parameters():
        cell = model.network
        encoders = [encoder.cell for encoder in model.encoders]
        first_stage = model.first_stage.cell
        before = _shapes(cell, NETWORK_PREFIX)
        network, trained = change_network(model, _parameters(cell, NETWORK_PREFIX))
    parts = [_part("network", network.values(), trained, before)]
    for index, encoder in enumerate(encoders):
        shapes = _shapes(encoder, embedder_prefix(index))
        parts.append(_part(f"text encoder {index + 1}", _parameters(encoder).values(), [], shapes))
    if first_stage is not None:
        shapes = _shapes(first_stage, AUTOENCODER_PREFIX)
        parts.append(_part("first stage", _parameters(first_stage).values(), [], shapes))
    return parts


def _part(
    name: str,
    parameters: Iterable[Parameter],
    trained: Iterable[Parameter],
    shapes: dict[str, tuple[int, ...]],
) -> Part:
    every, learning = list(parameters), list(trained)
    return Part(
        name,
        sum(p.size for p in every),
        sum(p.size for p in learning),
        sum(_bytes(p) for p in every),
        sum(_bytes(p) for p in learning),
        shapes,
    )


def _bytes(parameter: Parameter) -> int:
    from mindspore.common.dtype import dtype_to_nptype

    return parameter.size * np.dtype(dtype_to_nptype(parameter.dtype)).itemsize


def _parameters(cell: nn.Cell, prefix: str = "") -> dict[str, Parameter]:
    """By their names in the single file."""
    from sdxl_host.weights.names import single_file_parameters

    return single_file_parameters(cell, prefix)


def _shapes(cell: nn.Cell, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in _parameters(cell, prefix).items()}


def memory(parts: Sequence[Part]) -> list[tuple[str, str, int]]:
    """What stays in a device's memory during training: (what, formula, bytes) of each kind.

    Activations are not part of it: they depend on the batch, the picture's size and the compiler.
    """
    network, frozen = parts[0], parts[1:]
    moments = 2 * 4 * network.trained  # AdamW keeps both in float32, whatever the weights are
    frozen_count, frozen_bytes = sum(p.count for p in frozen), sum(p.bytes for p in frozen)
    return [
        ("network", _formula(network.count, network.bytes), network.bytes),
        ("gradients", _formula(network.trained, network.trained_bytes), network.trained_bytes),
        ("optimizer", f"2 moments x 4 bytes x {network.trained:,} trained", moments),
        ("frozen", _formula(frozen_count, frozen_bytes), frozen_bytes),
    ]


def _formula(count: int, size: int) -> str:
    """4 for float32; the mean where types differ."""
    return f"{size / max(count, 1):.3g} bytes x {count:,} weights"
