"""What is learned of an image's text: one caption, whole or in parts."""

from __future__ import annotations

import numpy as np

from sdxl_host.data.captioned import Captioned

__all__ = ["Captions"]


class Captions:
    """Makes captions of texts."""

    def variants(self, image: Captioned) -> list[str]:
        """Every caption that a step may have of an image, each once."""
        texts = (image.text,) if isinstance(image.text, str) else image.text
        return list(dict.fromkeys(_one_line(text) for text in texts))

    def draw(self, image: Captioned, generator: np.random.Generator) -> str:
        """The caption of one step, drawn from `generator`."""
        variants = self.variants(image)
        return variants[int(generator.integers(len(variants)))]


def _one_line(caption: str) -> str:
    return " ".join(caption.split())
