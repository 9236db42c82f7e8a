"""Prompts to images, with a model's networks and the hooks it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from sdxl_host.diffusion.conditioning import PromptEmbedding, unconditional
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.diffusion.objective import denoise
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.randomness import Stream, normals
from sdxl_host.sampling.samplers import noise_levels, sample

__all__ = ["KEYS", "Conditions", "ImageSampler"]

# Images drawn at a time, and their latents' pixels together. All batches of a call have one
# shape, so the network is compiled once.
_BATCH = 8
_BATCH_PIXELS = 8 * 64 * 64


# The conditioner's input for each condition that a model may lack.
KEYS = {
    "original_size": "original_size_as_tuple",
    "crop_top_left": "crop_coords_top_left",
    "target_size": "target_size_as_tuple",
    "aesthetic_score": "aesthetic_score",
    "negative_aesthetic_score": "aesthetic_score",
}


@dataclass(frozen=True)
class Conditions:
    """The conditions of an image besides its prompt.

    size: (height, width) of the image in pixels. original_size: what its size was before it was
    resized; what the model was trained on serves best. crop_top_left: (top, left) of the crop.
    target_size: None for `size`. aesthetic_score, negative_aesthetic_score: for a model with that
    condition, of the prompt and of what guidance leads away from; defaults as the refiner is used.
    """

    size: tuple[int, int]
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5


class ImageSampler:
    """Draws images; the network is compiled when first used and sees later updates of it.

    eager: it is not compiled. compiled: what makes a compiled function of a cell's method.
    """

    def __init__(
        self,
        hooks: Hooks,
        model: DiffusionModel,
        conditions: Conditions,
        eager: bool = False,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = ms.jit,
    ) -> None:
        self._hooks = hooks
        self.model = model
        self._conditions = conditions
        self._latent = [length // model.first_stage.downsampling for length in conditions.size]
        self._most = min(_BATCH, max(1, _BATCH_PIXELS // (self._latent[0] * self._latent[1])))
        self._network = model.network if eager else compiled(model.network.construct)

    def draw(
        self,
        prompts: Sequence[str],
        steps: int,
        guidance_scale: float,
        seed: int,
        *,
        negative_prompt: str | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
    ) -> np.ndarray:
        """(len(prompts), 3, H, W) float32 pixels, about in [-1, 1].

        Image i is a function of prompt i, `seed` and i, but for float32 rounding, which may
        depend on how many are drawn together. The noise is of streams that training
        never draws from. negative_prompt: what guidance leads away from; None for the zero
        embedding. sampler, spacing: names in `samplers`; None for the model's default.
        """
        sampler = sampler or self.model.sampling.sampler
        sigmas = noise_levels(self.model.sampling, self.model.schedule, steps, spacing)
        size = min(self._most, len(prompts))
        images = []
        for start in range(0, len(prompts), size):
            chunk = list(prompts[start : start + size])
            positions = range(start, start + size)
            filled = chunk + [""] * (size - len(chunk))
            inputs = self._inputs(filled, guidance_scale, negative_prompt)

            def noise(index: int, positions: Sequence[int] = positions) -> np.ndarray:
                shape = (self.model.first_stage.channels, *self._latent)
                return normals(seed, Stream.SAMPLING, index, positions, shape)

            x = noise(0) * np.float32(sigmas[0])
            denoiser = self._guided(inputs, guidance_scale)
            # Step i of an ancestral sampler draws the numbers after those of its start.
            x = sample(sampler, denoiser, x, sigmas, lambda index, noise=noise: noise(index + 1))
            images.append(self.model.first_stage.decode(x[: len(chunk)]))
        return np.concatenate(images)

    def _inputs(
        self, prompts: list[str], scale: float, negative_prompt: str | None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The network's inputs for the prompts, and without them where guidance needs that."""
        conditional = self._hooks.encode_prompt(prompts, self.model.encoders)
        inputs = [self._condition(conditional, self._conditions.aesthetic_score)]
        if scale != 1.0:
            negative = unconditional(conditional)
            if negative_prompt is not None:
                negative = self._hooks.encode_prompt(
                    [negative_prompt] * len(prompts), self.model.encoders
                )
            inputs.append(self._condition(negative, self._conditions.negative_aesthetic_score))
        return inputs

    def _condition(self, embedding: PromptEmbedding, score: float) -> tuple[Tensor, Tensor, Tensor]:
        """Context, vector and mask, the network's inputs."""
        conditions = self._conditions
        one = {
            "original_size_as_tuple": conditions.original_size,
            "crop_coords_top_left": conditions.crop_top_left,
            "target_size_as_tuple": conditions.target_size or conditions.size,
            "aesthetic_score": (score,),
        }
        sizes = {key: np.tile(values, (len(embedding.context), 1)) for key, values in one.items()}
        vector = self.model.conditioner.vector(embedding, sizes)
        mask = embedding.attended().astype(np.float32)
        return Tensor(embedding.context), Tensor(vector), Tensor(mask)

    def _output(self, *inputs: Tensor) -> np.ndarray:
        """The network's output in float32, whatever it computes in."""
        output = self._network(*inputs)
        return output.asnumpy().astype(np.float32)  # pyright: ignore[reportOptionalMemberAccess]

    def _guided(
        self, inputs: list[tuple[Tensor, Tensor, Tensor]], scale: float
    ) -> Callable[[np.ndarray, float], np.ndarray]:
        """D with classifier-free guidance (Ho and Salimans 2022): the unconditional output plus
        `scale` times the difference of the conditional one from it."""
        preconditioning = self.model.preconditioning

        def denoiser(x: np.ndarray, sigma: float) -> np.ndarray:
            s = np.float64(sigma)
            scaled = Tensor((preconditioning.c_in(s) * x).astype(np.float32))
            c_noise = Tensor(np.full(len(x), preconditioning.c_noise(s), np.float32))
            outputs = [
                denoise(preconditioning, x, sigma, self._output(scaled, c_noise, *given))
                for given in inputs
            ]
            if len(outputs) == 1:
                return outputs[0]
            return outputs[1] + scale * (outputs[0] - outputs[1])

        return denoiser
