"""What is learned of an image's text: one caption, whole or in parts.

Texts are taken as they are written; here lines are chosen, translations left out, whitespace made
single spaces, tags shuffled. What is drawn is a function of the generator alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from sdxl_host.data.captioned import Captioned
from sdxl_host.settings.declarations import CaptionLines

__all__ = ["Captions"]

# A line of another language, as in the description files of Tux Paint: `pt_BR.utf8=Uma maçã.`
_TRANSLATION = re.compile(r"[a-z]{2,3}(_[A-Za-z]{2,4})?(@[A-Za-z]+)?\.utf8=")


class Captions:
    """Makes captions of texts.

    lines: "whole", all lines of a text as one caption; "first_line"; or "one_of_lines", of which
    each step takes one. Several texts of an image are alternatives in any case. prefix, suffix: put
    around each caption as they are. shuffle_tags: puts what stands between commas in a new order in
    every step. keep_tags: how many tags at the beginning keep their place.
    """

    def __init__(
        self,
        lines: CaptionLines = "whole",
        prefix: str = "",
        suffix: str = "",
        shuffle_tags: bool = False,
        keep_tags: int = 0,
    ) -> None:
        self._lines, self._prefix, self._suffix = lines, prefix, suffix
        self._shuffle_tags, self._keep_tags = shuffle_tags, keep_tags

    @property
    def is_fixed(self) -> bool:
        """Whether `variants` are all captions that there are, so that each can be encoded once."""
        return not self._shuffle_tags

    def variants(self, image: Captioned) -> list[str]:
        """Every caption that a step may have of an image, each once, before tags are shuffled."""
        texts = (image.text,) if isinstance(image.text, str) else image.text
        chosen = [part for text in texts for part in self._parts(text)]
        return [self._framed(caption) for caption in dict.fromkeys(chosen)]

    def draw(self, image: Captioned, generator: np.random.Generator) -> str:
        """The caption of one step, drawn from `generator`."""
        variants = self.variants(image)
        caption = variants[int(generator.integers(len(variants)))]
        if not self._shuffle_tags:
            return caption
        inner = caption[len(self._prefix) : len(caption) - len(self._suffix)]
        tags = [tag.strip() for tag in inner.split(",")]
        kept, others = tags[: self._keep_tags], tags[self._keep_tags :]
        shuffled = [others[index] for index in generator.permutation(len(others))]
        return self._framed(", ".join([*kept, *shuffled]))

    def notes(self, images: Iterable[Captioned]) -> list[str]:
        """What a user should know of the texts of a source."""
        translated = alternatives = 0
        for image in images:
            texts = (image.text,) if isinstance(image.text, str) else image.text
            translated += any(_TRANSLATION.match(line) for text in texts for line in _lines(text))
            alternatives += len(self.variants(image)) > 1
        found = [
            (translated, "whose lines in other languages (`xx.utf8=...`) are left out"),
            (alternatives, "that are several, of which each step takes one"),
        ]
        return [f"{count:,} captions {what}" for count, what in found if count]

    def _parts(self, text: str) -> list[str]:
        """The captions of one text, without prefix and suffix; at least one."""
        lines = [line for line in _lines(text) if not _TRANSLATION.match(line)]
        if self._lines == "whole":
            return [" ".join(lines)]
        return (lines[:1] if self._lines == "first_line" else lines) or [""]

    def _framed(self, caption: str) -> str:
        return f"{self._prefix}{caption}{self._suffix}"


def _lines(text: str) -> list[str]:
    """The lines of a text that are not empty, whitespace in each made single spaces."""
    return [joined for line in text.split("\n") if (joined := " ".join(line.split()))]
