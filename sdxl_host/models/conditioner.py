"""The conditioning of the network besides the noise level: text, sizes, and caption dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from sdxl_host.diffusion.conditioning import PromptEmbedding, TextEncoders, unconditional
from sdxl_host.models.layers import sinusoids
from sdxl_host.models.text_encoders import BEGIN_OF_TEXT, CONTEXT_LENGTH, END_OF_TEXT
from sdxl_host.models.tokenizer import tokenize
from sdxl_host.settings.targets import build

__all__ = ["ConcatTimestepEmbedderND", "GeneralConditioner"]

# Of embeddings kept by each text encoder: about 800 prompts at SDXL's size.
_REMEMBERED_BYTES = 256 << 20

# Numbers of each input that becomes part of the vector: (height, width) or (top, left), and the
# refiner's score.
NUMBERS = {
    "original_size_as_tuple": 2,
    "crop_coords_top_left": 2,
    "target_size_as_tuple": 2,
    "aesthetic_score": 1,
}
_TEXT_KEY = "txt"


class ConcatTimestepEmbedderND:
    """Numbers, each as `outdim` sinusoids, one after another (256 in SDXL)."""

    def __init__(self, outdim: int) -> None:
        if outdim < 2 or outdim % 2:
            raise ValueError(f"ConcatTimestepEmbedderND: outdim must be even, not {outdim}")
        self.outdim = outdim

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(B, N) -> (B, N * outdim) float32."""
        return sinusoids(values, self.outdim).reshape(len(values), -1)


class FrozenEncoder:
    """A text encoder cell behind the numpy interface of `diffusion.conditioning.TextEncoder`.

    Rows are encoded one at a time, so a prompt's embedding is the same bit for bit whatever batch
    it is in, and one that was encoded before is remembered.
    """

    begin = BEGIN_OF_TEXT
    end = END_OF_TEXT
    length = CONTEXT_LENGTH

    def __init__(self, cell: Any) -> None:
        self.cell = cell.set_train(False)
        self.pad: int = cell.pad
        self.width: int = cell.width
        self.pooled_width: int = cell.pooled_width
        row_bytes = 4 * (self.length * self.width + self.pooled_width)
        self._encode_row = lru_cache(maxsize=max(16, _REMEMBERED_BYTES // row_bytes))(
            self._encode_new_row
        )

    def tokenize(self, text: str) -> list[int]:
        """Ids without special tokens."""
        return tokenize(text)

    def encode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """ids (N, 77) -> hidden (N, 77, width), pooled (N, pooled_width) or None; float32."""
        rows = [self._encode_row(tuple(row)) for row in np.asarray(ids).tolist()]
        hidden = np.concatenate([row for row, _ in rows])
        if not self.pooled_width:
            return hidden, None
        return hidden, np.concatenate([pooled for _, pooled in rows])

    def _encode_new_row(self, ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
        hidden, pooled = self.cell(Tensor([ids], ms.int32))
        return hidden.asnumpy(), None if pooled is None else pooled.asnumpy()


class GeneralConditioner:
    """The list of embedders of the original config.

    emb_models: one node an embedder: `target`, `params`, `input_key` ("txt", one of the three
    sizes, or "aesthetic_score"), `is_trainable` (False) and `ucg_rate`, the share of samples whose
    output of this embedder is replaced by zeros in training. SDXL's base has two text embedders and
    the sizes; its refiner has bigG, original size, crop and score.
    """

    def __init__(self, emb_models: Sequence[Mapping[str, Any]]) -> None:
        self._sizes: list[tuple[str, ConcatTimestepEmbedderND, float]] = []
        encoders: list[FrozenEncoder] = []
        self._rates: list[float] = []
        for index, node in enumerate(emb_models):
            where = f"model.params.conditioner_config.params.emb_models[{index}]"
            settings = dict(node)
            key = settings.pop("input_key", None)
            rate = float(settings.pop("ucg_rate", 0.0))
            if settings.pop("is_trainable", False):
                raise ValueError(
                    f"{where}.is_trainable: True is not supported, the embedders are frozen; set "
                    "it to False"
                )
            if settings.pop("legacy_ucg_value", None) is not None:
                raise ValueError(
                    f"{where}.legacy_ucg_value is not supported: dropout uses the zero embedding; "
                    "remove it"
                )
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"{where}.ucg_rate: {rate} is out of range; it must lie in [0, 1]")
            embedder = build(settings, "embedder", where)
            if isinstance(embedder, nn.Cell) and key == _TEXT_KEY:
                if self._sizes:
                    raise ValueError(f"{where}: text embedders come before the sizes, as in SDXL")
                _name_parameters(embedder, len(encoders))
                encoders.append(FrozenEncoder(embedder))
                self._rates.append(rate)
            elif isinstance(embedder, ConcatTimestepEmbedderND) and key in NUMBERS:
                self._sizes.append((key, embedder, rate))
            else:
                raise ValueError(
                    f"{where}.input_key: {key!r} does not fit {settings['target']}; text "
                    f"embedders take {_TEXT_KEY}, ConcatTimestepEmbedderND one of "
                    f"{', '.join(NUMBERS)}"
                )
        if not encoders:
            raise ValueError("emb_models: at least one text embedder is needed (input_key: txt)")
        self.encoders = TextEncoders(encoders)
        self.context_width = sum(encoder.width for encoder in encoders)
        self.vector_width = sum(encoder.pooled_width for encoder in encoders) + sum(
            NUMBERS[key] * embedder.outdim for key, embedder, _ in self._sizes
        )

    @property
    def size_keys(self) -> tuple[str, ...]:
        """The inputs besides text that `vector` reads."""
        return tuple(key for key, _, _ in self._sizes)

    def vector(self, embedding: PromptEmbedding, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        """(B, V) float32: the pooled text, then each size's sinusoids.

        sizes: for each size key, (B, 2) as (height, width) or (top, left); the score as (B, 1).
        """
        parts = [embedding.pooled]
        parts += [embedder(sizes[key]) for key, embedder, _ in self._sizes]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def drop(
        self, embedding: PromptEmbedding, vector: np.ndarray, u: np.ndarray
    ) -> tuple[PromptEmbedding, np.ndarray]:
        """Caption dropout: where u (B,) is below an embedder's rate, its output is zeros.

        One uniform a sample, so equal rates drop together to the unconditional embedding.
        """
        context, pooled, vector = embedding.context.copy(), embedding.pooled.copy(), vector.copy()
        channel = start = 0
        for encoder, rate in zip(self.encoders, self._rates, strict=True):
            dropped = u < rate
            context[dropped, :, channel : channel + encoder.width] = 0
            pooled[dropped, start : start + encoder.pooled_width] = 0
            channel, start = channel + encoder.width, start + encoder.pooled_width
        vector[:, :start] = pooled
        for key, embedder, rate in self._sizes:
            width = NUMBERS[key] * embedder.outdim
            vector[u < rate, start : start + width] = 0
            start += width
        mask = embedding.mask
        if mask is not None:
            none_left = u < min(self._rates)
            mask = np.where(none_left[:, None], unconditional(embedding).attended(), mask)
        return PromptEmbedding(context, pooled, mask), vector


def _name_parameters(cell: nn.Cell, index: int) -> None:
    """Names as in the single file, `conditioner.embedders.0.transformer...`, unique in a graph."""
    cell.update_parameters_name(f"conditioner.embedders.{index}.")
