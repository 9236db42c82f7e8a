"""How long captions are, and what of them is cut off, whichever plugin encodes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.diffusion.conditioning import TextEncoder, TextEncoders
from sdxl_host.plugins.hooks import Hooks

__all__ = ["CaptionLength", "Recorder", "caption_lengths", "cut_note", "some_captions"]

# Images whose captions are looked at; of more, every second, third and so on. They take about two
# seconds.
_MOST_IMAGES = 2000


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
    """An image's caption: how many tokens it has, and how many of them no encoder gets."""

    name: str
    tokens: int
    lost: int


def caption_lengths(
    hooks: Hooks, encoders: TextEncoders, captions: Iterable[tuple[str, Sequence[str]]]
) -> list[CaptionLength]:
    """Tokens of each caption and those that are cut off, whichever plugin encodes prompts.

    captions: of each image its name and the captions that it may have, of which the one that loses
    most counts.
    `encode_prompt` is called with encoders that only keep the ids they are given. Lost is what was
    tokenized and reached no `encode`; of several encoders the one that loses most counts.
    """
    recorders = [Recorder(encoder) for encoder in encoders]
    recording = TextEncoders(recorders)
    known: dict[str, tuple[int, int]] = {}
    lengths = []
    for name, variants in captions:
        for caption in variants:
            if caption not in known:
                for recorder in recorders:
                    recorder.clear()
                hooks.encode_prompt([caption], recording)
                known[caption] = _length(caption, recorders)
        worst = max((known[caption] for caption in variants), key=lambda each: each[::-1])
        lengths.append(CaptionLength(name, *worst))
    return lengths


def some_captions(
    dataset: Text2ImageDataset, most: int = _MOST_IMAGES
) -> list[tuple[str, list[str]]]:
    """The names and captions of at most so many images, at equal distances in their order."""
    every = -(-len(dataset) // most)
    return [
        (image.name, dataset.captions.variants(image)) for image in dataset.images[:: max(1, every)]
    ]


def cut_note(
    lengths: Sequence[CaptionLength], what: str, encoder: str, remedy: str = "", of: int = 0
) -> list[str]:
    """A sentence on what is cut off, or none where nothing is.

    what: "captions" or "prompts". encoder: who encodes them. remedy: what keeps the tokens. of: how
    many there are, where not all were looked at.
    """
    cut = [each for each in lengths if each.lost]
    if not cut:
        return []
    worst = max(cut, key=lambda each: each.lost)
    all_tokens, lost = sum(each.tokens for each in lengths), sum(each.lost for each in cut)
    looked_at = f" looked at, of {of:,}" if of > len(lengths) else ""
    return [
        f"{len(cut):,} of the {len(lengths):,} {what}{looked_at} are longer than {encoder} "
        "encodes; "
        f"{lost:,} of their {all_tokens:,} tokens are lost, most in {worst.name} "
        f"({worst.lost:,} of {worst.tokens:,})" + (f"; {remedy}" if remedy else "")
    ]


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
