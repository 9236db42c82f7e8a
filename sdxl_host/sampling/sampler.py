"""Prompts to pictures with a model's own networks and the hooks it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from sdxl_host.diffusion.objective import denoise
from sdxl_host.hooks import Hooks
from sdxl_host.model import DiffusionModel
from sdxl_host.prompts import PromptEmbedding, unconditional
from sdxl_host.randomness import Stream, normals
from sdxl_host.sampling.samplers import euler, noise_levels

__all__ = ["PictureSampler"]

# Pictures drawn at a time: one shape, so the network is compiled once.
_BATCH = 8


class PictureSampler:
    """Draws pictures; the network is compiled when first used and sees later updates of it.

    size: (height, width) of a picture in pixels. original_size: what the network is told the
    picture's size was before it was resized; what it was trained on serves best.
    """

    def __init__(
        self,
        hooks: Hooks,
        model: DiffusionModel,
        size: tuple[int, int],
        original_size: tuple[int, int],
        eager: bool = False,
    ) -> None:
        self._hooks = hooks
        self._model = model
        self._size = size
        self._original_size = original_size
        self._network = model.network if eager else ms.jit(model.network.construct)

    def draw(
        self, prompts: Sequence[str], steps: int, guidance_scale: float, seed: int
    ) -> np.ndarray:
        """(len(prompts), 3, H, W) float32 pixels, about in [-1, 1].

        Picture i is a function of prompt i, `seed` and i. The noise is of a stream that training
        never draws from.
        """
        pictures = []
        for start in range(0, len(prompts), _BATCH):
            chunk = list(prompts[start : start + _BATCH])
            padded = chunk + [""] * (_BATCH - len(chunk))
            places = range(start, start + _BATCH)
            pictures.append(self._batch(padded, places, steps, guidance_scale, seed)[: len(chunk)])
        return np.concatenate(pictures)

    def _batch(
        self, prompts: list[str], places: Sequence[int], steps: int, scale: float, seed: int
    ) -> np.ndarray:
        model = self._model
        first_stage = model.first_stage
        side = [length // first_stage.downsampling for length in self._size]
        sigmas = noise_levels(model.sampling, model.schedule, steps)
        noise = normals(seed, Stream.SAMPLING, 0, places, (first_stage.channels, *side))
        conditional = self._hooks.encode_prompt(prompts, model.encoders)
        inputs = [self._condition(conditional)]
        if scale != 1.0:
            inputs.append(self._condition(unconditional(conditional)))
        x = euler(self._guided(inputs, scale), noise * np.float32(sigmas[0]), sigmas)
        return first_stage.decode(x)

    def _condition(self, embedding: PromptEmbedding) -> tuple[Tensor, Tensor, Tensor]:
        """Context, vector and mask as the network takes them; the picture is uncropped."""
        one = {
            "original_size_as_tuple": self._original_size,
            "crop_coords_top_left": (0, 0),
            "target_size_as_tuple": self._size,
        }
        sizes = {key: np.tile(pair, (len(embedding.context), 1)) for key, pair in one.items()}
        vector = self._model.conditioner.vector(embedding, sizes)
        mask = embedding.attended().astype(np.float32)
        return Tensor(embedding.context), Tensor(vector), Tensor(mask)

    def _guided(
        self, inputs: list[tuple[Tensor, Tensor, Tensor]], scale: float
    ) -> Callable[[np.ndarray, float], np.ndarray]:
        """D with classifier-free guidance (Ho and Salimans 2022): the unconditional answer plus
        `scale` times the way from it to the conditional one."""
        preconditioning = self._model.preconditioning

        def denoiser(x: np.ndarray, sigma: float) -> np.ndarray:
            s = np.float64(sigma)
            scaled = Tensor((preconditioning.c_in(s) * x).astype(np.float32))
            c_noise = Tensor(np.full(len(x), preconditioning.c_noise(s), np.float32))
            answers = [
                denoise(preconditioning, x, sigma, self._network(scaled, c_noise, *i).asnumpy())
                for i in inputs
            ]
            if len(answers) == 1:
                return answers[0]
            return answers[1] + scale * (answers[0] - answers[1])

        return denoiser
