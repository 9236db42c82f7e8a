"""Texts to captions: lines, translations, alternatives, tags."""

from __future__ import annotations

import numpy as np
import pytest

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.captions import Captions

STAMP = "An  apple,\nred and round.\npt_BR.utf8=Uma maçã.\nzh_TW.utf8=蘋果\nca@valencia.utf8=Poma\n"


def entry(text: str | tuple[str, ...]) -> Captioned:
    return Captioned("a.png", "a.png", text)


def draws(captions: Captions, text: str | tuple[str, ...], count: int = 60) -> list[str]:
    return [captions.draw(entry(text), np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize(
    ("lines", "text", "expected"),
    [
        ("whole", STAMP, ["An apple, red and round."]),
        ("first_line", STAMP, ["An apple,"]),
        ("one_of_lines", STAMP, ["An apple,", "red and round."]),
        ("whole", " \n ", [""]),
        ("first_line", "", [""]),
        ("one_of_lines", "\n", [""]),
        ("one_of_lines", "a\na\nb", ["a", "b"]),
        ("whole", ("a\nb", "c"), ["a b", "c"]),
        ("first_line", ("a\nb", "c"), ["a", "c"]),
        ("whole", "see en.utf8=x", ["see en.utf8=x"]),
    ],
)
def test_the_captions_of_a_text(lines, text, expected):
    captions = Captions(lines)
    assert captions.variants(entry(text)) == expected
    assert captions.is_fixed
    assert set(draws(captions, text)) == set(expected)


def test_prefix_and_suffix_stand_around_each_as_they_are():
    captions = Captions("one_of_lines", prefix="a photo of ", suffix=", 4k")
    assert captions.variants(entry("x\ny")) == ["a photo of x, 4k", "a photo of y, 4k"]


def test_tags_are_shuffled_but_for_the_first():
    captions = Captions(prefix="sks ", suffix=".", shuffle_tags=True, keep_tags=1)
    assert not captions.is_fixed
    found = draws(captions, "cat , red,round, big")
    assert {caption.partition(", ")[0] for caption in found} == {"sks cat"}
    assert len(set(found)) == 6
    for caption in found:
        inner = caption.removeprefix("sks ").removesuffix(".")
        assert sorted(inner.split(", ")) == ["big", "cat", "red", "round"]
    again = draws(captions, "cat , red,round, big")
    assert again == found


def test_what_is_left_out_or_chosen_is_counted():
    notes = Captions("one_of_lines").notes(map(entry, (STAMP, "a", "", ("b", "c"), "de.utf8=x")))
    assert [note.split()[0] for note in notes] == ["2", "2"]
    assert Captions().notes([entry("a")]) == []
