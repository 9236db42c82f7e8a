"""What a step takes: noise levels from the hooks, and arrays for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.diffusion.objective import Coefficients, NoiseLevels
from sdxl_host.errors import PluginError
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.training.batches import Batch

__all__ = ["EncodePrompts", "Encoder", "draw_levels"]

EncodePrompts = Callable[[Sequence[str]], PromptEmbedding]


def draw_levels(hooks: Hooks, model: DiffusionModel, batch: Batch) -> NoiseLevels:
    """The noise levels of all G samples, drawn from the distribution that the hooks answer.

    Raises PluginError where a sigma is not finite or not above 0.
    """
    distribution = hooks.sample_timesteps(model, batch.step)
    sigma = distribution.quantile(batch.level_u)
    if not (np.isfinite(sigma).all() and (sigma > 0).all()):
        raise PluginError(
            f"sample_timesteps: {hooks.chain('sample_timesteps')}: drew the noise levels "
            f"{sigma}; every sigma must be finite and above 0"
        )
    return NoiseLevels.at(sigma, model.schedule, distribution)


class Encoder:
    """Makes a batch the arrays that a step takes: latents, context and vector.

    encode_prompts: prompts to their embedding. positions: this rank's samples within the global
    batch. size: samples of a batch, of which an update may take several.
    """

    def __init__(
        self, model: DiffusionModel, encode_prompts: EncodePrompts, positions: range, size: int
    ) -> None:
        self._model = model
        self._encode_prompts = encode_prompts
        self._positions = positions
        self._size = size

    def __call__(self, batch: Batch, six: Coefficients) -> Iterator[tuple[np.ndarray, ...]]:
        """What the step takes of each of this rank's batches in turn, in float32, in the order of
        `TrainStep.construct`. six: the numbers of all G samples."""
        model, first_stage = self._model, self._model.first_stage
        numbers = six.stacked()[:, self._positions]
        for start in range(0, len(batch.captions), self._size):
            part = slice(start, start + self._size)
            embedding = self._encode_prompts(batch.captions[part])
            sizes = {key: values[part] for key, values in batch.sizes.items()}
            vector = model.conditioner.vector(embedding, sizes)
            embedding, vector = model.conditioner.drop(embedding, vector, batch.dropout_u[part])
            posterior = None if batch.posterior is None else batch.posterior[part]
            if batch.pixels is not None:
                moments = first_stage.moments(batch.pixels[part])
            else:
                assert batch.moments is not None  # one of the two is there
                moments = batch.moments[part]
            latents = first_stage.latents(moments, posterior)
            arrays = (
                *(latents, batch.noise[part], numbers[:, part]),
                *(embedding.context, vector, embedding.attended()),
            )
            yield tuple(np.ascontiguousarray(array, np.float32) for array in arrays)
