"""How many tokens of a caption reach no text encoder, whichever plugin encodes it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.captions import Captions
from sdxl_host.diffusion.conditioning import TextEncoders
from sdxl_host.planning.captions import (
    CaptionLength,
    Recorder,
    caption_lengths,
    cut_note,
    some_captions,
)


class Words:
    """A text encoder whose tokens are words: their lengths."""

    begin, end, pad, length, width, pooled_width = 901, 902, 0, 77, 4, 3

    def __init__(self, pad: int = 0, pooled_width: int = 3) -> None:
        self.pad, self.pooled_width = pad, pooled_width

    def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def encode(self, ids: np.ndarray) -> Any:
        raise AssertionError("plan encodes nothing")


class OneHook:
    """Hooks of which only encode_prompt is there."""

    def __init__(self, encode: Any) -> None:
        self.encode_prompt = encode


def lengths(encode: Any, *captions: str, encoders: Sequence[Any] = ()) -> list[tuple[int, int]]:
    """(tokens, lost) of each caption when `encode` answers encode_prompt."""
    shown = [(f"{i}.png", [caption]) for i, caption in enumerate(captions)]
    encoders = TextEncoders(list(encoders) or [Words(902, 0), Words()])
    found = caption_lengths(OneHook(encode), encoders, shown)
    assert [each.name for each in found] == [name for name, _ in shown]
    return [(each.tokens, each.lost) for each in found]


def row(encoder: Any, ids: list[int]) -> list[int]:
    padded = [encoder.begin, *ids, encoder.end]
    return padded + [encoder.pad] * (encoder.length - len(padded))


def plain(prompts: list[str], encoders: Any) -> None:
    for encoder in encoders:
        encoder.encode(np.array([row(encoder, encoder.tokenize(prompts[0])[:75])]))


def test_what_the_host_cuts_off() -> None:
    assert lengths(plain, "a cat", "x " * 75, "x " * 76, "x y " * 100, "") == [
        (2, 0), (75, 0), (76, 1), (200, 125), (0, 0)
    ]  # fmt: skip


def test_an_encoder_that_loses_more_counts() -> None:
    def second_is_short(prompts: list[str], encoders: Any) -> None:
        for encoder, kept in zip(encoders, (75, 10), strict=True):
            encoder.encode(np.array([row(encoder, encoder.tokenize(prompts[0])[:kept])]))

    assert lengths(second_is_short, "x " * 30) == [(30, 20)]


def test_a_plugin_may_look_at_a_length_first_and_read_by_pieces() -> None:
    def pieces(prompts: list[str], encoders: Any) -> None:
        for encoder in encoders:
            encoder.tokenize(prompts[0])
            ids = [i for word in prompts[0].split() for i in encoder.tokenize(word)]
            encoder.encode(np.array([row(encoder, ids[:75])]))

    assert lengths(pieces, "one two one two", "one two " * 50) == [(4, 0), (100, 25)]


def test_a_plugin_may_read_changed_text_or_once_for_all_encoders_or_not_at_all() -> None:
    def once(prompts: list[str], encoders: Any) -> None:
        ids = encoders[0].tokenize(f"{prompts[0].upper()} AND MORE")
        for encoder, kept in zip(encoders, (75, 70), strict=True):
            encoder.encode(np.array([row(encoder, ids[:kept])]))

    def never(prompts: list[str], encoders: Any) -> None:
        for encoder in encoders:
            encoder.encode(np.array([row(encoder, [3] * 75)]))

    assert lengths(once, "x " * 80) == [(82, 12)]
    assert lengths(never, "owl " * 80) == [(80, 5)]


def test_added_tokens_and_chunks_that_overlap_lose_nothing() -> None:
    def overlapping(prompts: list[str], encoders: Any) -> None:
        for encoder in encoders:
            ids = encoder.tokenize(prompts[0])
            encoder.encode(np.array([row(encoder, [9, *ids[:70]]), row(encoder, ids[50:])]))

    assert lengths(overlapping, "x yy " * 50) == [(100, 0)]


def test_padding_that_is_also_a_word_is_not_taken_for_one() -> None:
    """bigG pads with 0, which is "!" as well."""

    class Bangs(Words):
        def tokenize(self, text: str) -> list[int]:
            return [0] * text.count("!")

    def ten(prompts: list[str], encoders: Any) -> None:
        for encoder in encoders:
            encoder.encode(np.array([row(encoder, encoder.tokenize(prompts[0])[:10])]))

    assert lengths(plain, "!" * 80, "!" * 70, encoders=[Bangs()]) == [(80, 5), (70, 0)]
    assert lengths(ten, "!" * 30, encoders=[Bangs()]) == [(30, 20)]


def test_a_caption_that_stands_twice_is_encoded_once() -> None:
    seen: list[str] = []

    def watch(prompts: list[str], encoders: Any) -> None:
        seen.extend(prompts)
        plain(prompts, encoders)

    assert lengths(watch, "a b", "c", "a b") == [(2, 0), (1, 0), (2, 0)]
    assert seen == ["a b", "c"]


def test_a_recorder_answers_zeros_of_the_encoders_shapes() -> None:
    for encoder in (Words(902, 0), Words()):
        recorder = Recorder(encoder)
        hidden, pooled = recorder.encode(np.zeros((3, 77), np.int32))
        assert hidden.shape == (3, 77, 4)
        assert hidden.dtype == np.float32
        assert not hidden.any()
        assert pooled is None if not encoder.pooled_width else pooled.shape == (3, 3)
        assert (recorder.begin, recorder.end, recorder.pad) == (901, 902, encoder.pad)


def test_what_is_cut_is_one_sentence_with_the_remedy() -> None:
    none, some, most = (CaptionLength(*one) for one in (("a", 9, 0), ("b", 80, 5), ("c", 99, 24)))
    assert cut_note([none], "captions", "host") == []
    assert cut_note([none, some, most], "captions", "host", "--lpw True keeps them") == [
        "2 of the 3 captions are longer than host encodes; 29 of their 188 tokens are lost, most "
        "in c (24 of 99); --lpw True keeps them"
    ]
    (note,) = cut_note([most], "captions", "host", of=1000)
    assert note.startswith("1 of the 1 captions looked at, of 1,000 are longer than host encodes")
    assert note.endswith("(24 of 99)")


@pytest.mark.parametrize(("count", "looked_at"), [(10, 10), (11, 6), (95, 10)])
def test_of_many_captions_some_are_looked_at_at_equal_distances(count: int, looked_at: int) -> None:

    class Data(SimpleNamespace):
        def __len__(self) -> int:
            return count

    images = [Captioned(str(n), "", f"text {n}") for n in range(count)]
    found = some_captions(Data(images=images, captions=Captions()), 10)
    assert len(found) == looked_at
    steps = {int(b) - int(a) for (a, _), (b, _) in pairwise(found)}
    assert len(steps) == 1
    assert found[1] == (found[1][0], [f"text {found[1][0]}"])
