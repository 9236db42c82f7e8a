"""What a step takes: noise levels and weights from the hooks, and arrays for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.diffusion.objective import NoiseLevels, coefficients
from sdxl_host.errors import PluginError
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.training.batches import Batch

__all__ = ["Inputs"]


class Inputs:
    """Makes the inputs of steps.

    places: this worker's samples within the global batch. size: samples of a batch, of which an
    update may take several. encode: prompts to their embedding, the hooks' unless it is set.
    """

    def __init__(self, hooks: Hooks, model: DiffusionModel, places: range, size: int) -> None:
        self.places = places
        self.encode: Callable[[Sequence[str]], PromptEmbedding] = lambda prompts: (
            hooks.encode_prompt(prompts, model.encoders)
        )
        self._hooks = hooks
        self._model = model
        self._size = size

    def ask_hooks(self, batch: Batch) -> tuple[NoiseLevels, np.ndarray]:
        """The noise levels of all G samples, and their weights (G,)."""
        distribution = self._hooks.sample_timesteps(self._model, batch.step)
        sigma = distribution.quantile(batch.level_u)
        if not (np.isfinite(sigma).all() and (sigma > 0).all()):
            raise PluginError(
                f"sample_timesteps: {self._hooks.chain('sample_timesteps')}: drew the noise levels "
                f"{sigma}; every sigma must be finite and above 0"
            )
        noise = NoiseLevels.at(sigma, self._model.schedule, distribution)
        return noise, self._hooks.weight_loss(self._model, noise, batch.step)

    def arrays(
        self, batch: Batch, noise: NoiseLevels, weights: np.ndarray
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """What the step takes of each of this worker's batches in turn, in float32, in the order
        of `TrainStep.construct`."""
        six = coefficients(self._model.preconditioning, noise.sigma, weights).stacked()
        numbers = six[:, self.places]
        for start in range(0, len(batch.captions), self._size):
            own = slice(start, start + self._size)
            conditioner = self._model.conditioner
            embedding = self.encode(batch.captions[own])
            sizes = {key: values[own] for key, values in batch.sizes.items()}
            vector = conditioner.vector(embedding, sizes)
            embedding, vector = conditioner.drop(embedding, vector, batch.dropout_u[own])
            posterior = None if batch.posterior is None else batch.posterior[own]
            latents = self._model.first_stage.encode(batch.pixels[own], posterior)
            arrays = (
                *(latents, batch.noise[own], numbers[:, own]),
                *(embedding.context, vector, embedding.attended()),
            )
            yield tuple(np.ascontiguousarray(array, np.float32) for array in arrays)
