"""What a step takes: levels that a graph can bear, and of all G samples those of this rank."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.diffusion.objective import Coefficients
from sdxl_host.errors import PluginError
from sdxl_host.training.batches import Batch
from sdxl_host.training.inputs import Encoder, draw_levels


def batch(count: int = 4) -> Batch:
    """Of a rank with `count` samples, whose numbers are 0, 1, ..."""
    numbers = np.arange(float(count))
    images = np.tile(numbers[:, None, None, None], (1, 3, 2, 2)).astype(np.float32)
    return Batch(
        step=3,
        ids=[],
        level_u=np.array([0.25, 0.75]),
        captions=[str(index) for index in range(count)],
        pixels=images,
        moments=None,
        sizes={"size": numbers[:, None]},
        noise=10 * images,
        posterior=100 * images,
        dropout_u=numbers,
    )


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.inf, np.nan])
def test_levels_that_are_no_noise_are_refused_by_the_chain_s_name(sigma: float) -> None:
    asked: list[int] = []

    def sample_timesteps(model: Any, step: int) -> Any:
        asked.append(step)
        return SimpleNamespace(quantile=lambda u: np.where(u > 0.5, sigma, 1.0))

    hooks: Any = SimpleNamespace(
        sample_timesteps=sample_timesteps, chain=lambda hook: "edm -> bias"
    )
    with pytest.raises(PluginError, match=r"^sample_timesteps: edm -> bias: .* finite and above 0"):
        draw_levels(hooks, SimpleNamespace(), batch())  # type: ignore[arg-type]
    assert asked == [3]


def moments_in_place(found: Batch) -> Batch:
    assert found.pixels is not None
    return replace(found, pixels=None, moments=-found.pixels)


@pytest.mark.parametrize("given", [lambda found: found, moments_in_place])
def test_each_sample_has_its_numbers_on_every_rank_and_in_every_batch(given: Any) -> None:
    """Rank 1 of two takes the second four of eight samples, in two batches; from pixels, or from
    the moments that were made of them."""

    def encode_prompts(captions: list[str]) -> PromptEmbedding:
        values = np.array([float(caption) for caption in captions], np.float32)
        return PromptEmbedding(np.tile(values[:, None, None], (1, 3, 4)), values[:, None])

    def drop(embedding: PromptEmbedding, vector: np.ndarray, u: np.ndarray) -> tuple[Any, Any]:
        return embedding, vector + 1000 * u[:, None]

    model: Any = SimpleNamespace(
        conditioner=SimpleNamespace(vector=lambda embedding, sizes: sizes["size"], drop=drop),
        first_stage=SimpleNamespace(
            moments=lambda pixels: -pixels, latents=lambda moments, posterior: posterior - moments
        ),
    )
    six = Coefficients(*(np.arange(8.0) + 10 * row for row in range(6)))
    encode: Any = Encoder(model, encode_prompts, positions=range(4, 8), size=2)  # type: ignore[arg-type]
    batches = list(encode(given(batch()), six))
    assert len(batches) == 2
    for start, arrays in zip((0, 2), batches, strict=True):
        numbers = np.arange(start, start + 2.0)
        latents, noise, coefficients, context, vector, mask = arrays
        np.testing.assert_array_equal(latents[:, 0, 0, 0], 101 * numbers)
        np.testing.assert_array_equal(noise[:, 0, 0, 0], 10 * numbers)
        np.testing.assert_array_equal(coefficients[0], 4 + numbers)
        np.testing.assert_array_equal(coefficients[5], 54 + numbers)
        np.testing.assert_array_equal(context[:, 0, 0], numbers)
        np.testing.assert_array_equal(vector[:, 0], 1001 * numbers)
        assert mask.shape == (2, 3)
        assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
        assert all(array.flags.c_contiguous for array in arrays)
