"""What is checked of an answer, and how a wrong one is described."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_host.diffusion.conditioning import PromptEmbedding, TextEncoders
from sdxl_host.diffusion.distributions import DiscreteDistribution
from sdxl_host.plugins.results import (
    check_distribution,
    check_embedding,
    check_model,
    check_weights,
)
from sdxl_host.testing import noise_levels, tiny_model

MODEL, NOISE = tiny_model(), noise_levels(3)
ENCODERS: Any = TextEncoders(
    [SimpleNamespace(width=4, pooled_width=0), SimpleNamespace(width=6, pooled_width=5)]  # type: ignore[list-item]
)


def embedding(
    context: tuple[int, ...] = (2, 7, 10), pooled: tuple[int, ...] = (2, 5), mask: Any = None
) -> PromptEmbedding:
    return PromptEmbedding(np.zeros(context, np.float32), np.zeros(pooled, np.float32), mask)


def check_prompts(result: Any) -> PromptEmbedding:
    return check_embedding(result, ["a cat", "a dog"], ENCODERS)


def check_three_weights(result: Any) -> np.ndarray:
    return check_weights(result, NOISE)


WITHOUT_CONTEXT = PromptEmbedding(None, np.zeros((2, 5)))  # type: ignore[arg-type]
WITHOUT_POOLED = PromptEmbedding(np.zeros((2, 7, 10)), None)  # type: ignore[arg-type]
NAN_CONTEXT = PromptEmbedding(np.full((2, 7, 10), np.nan), np.zeros((2, 5)))
INFINITE_POOLED = PromptEmbedding(np.zeros((2, 7, 10)), np.full((2, 5), np.inf))
ATTENDS_NOTHING = np.array([[True] * 7, [False] * 7])


@pytest.mark.parametrize(
    ("check", "answer", "text"),
    [
        (check_model, None, "None, not a DiffusionModel"),
        (check_model, {"network": 1}, "a dict, not a DiffusionModel"),
        (check_model, MODEL.with_preconditioning("eps"), "a str, not a Preconditioning"),  # type: ignore[arg-type]
        (check_distribution, None, "None, not a NoiseDistribution"),
        (check_distribution, np.ones(3), "a ndarray, not a NoiseDistribution"),
        (check_distribution, DiscreteDistribution, "not a NoiseDistribution"),
        (check_three_weights, None, "None, not a ndarray"),
        (check_three_weights, [1.0, 1.0, 1.0], "a list, not a ndarray"),
        (check_three_weights, 1.0, "a float, not a ndarray"),
        (check_three_weights, np.array(1.0), "an array of shape (), not (3,)"),
        (check_three_weights, np.ones(2), "an array of shape (2,), not (3,)"),
        (check_three_weights, np.ones((3, 1)), "an array of shape (3, 1), not (3,)"),
        (check_three_weights, np.array([1.0, np.nan, 1.0]), "not finite (nan at sigma 1)"),
        (check_three_weights, np.array([1.0, np.inf, 1.0]), "not finite (inf at sigma 1)"),
        (check_three_weights, np.array([1.0, 1.0, -1e-9]), "negative weights (-1e-09 at sigma 10"),
        (check_three_weights, np.array(["a", "b", "c"]), ""),
        (check_prompts, None, "None, not a PromptEmbedding"),
        (check_prompts, (np.zeros((2, 7, 10)),), "a tuple, not a PromptEmbedding"),
        (check_prompts, embedding((1, 7, 10)), "a context of shape (1, 7, 10), not (2, 7, 10)"),
        (check_prompts, embedding((2, 7, 9)), "a context of shape (2, 7, 9), not (2, 7, 10)"),
        (check_prompts, embedding((2, 70)), "a context of shape (2, 70)"),
        (check_prompts, embedding((2,)), "a context of shape (2,)"),
        (check_prompts, embedding(pooled=(2, 6)), "a pooled of shape (2, 6), not (2, 5)"),
        (check_prompts, embedding(pooled=(1, 5)), "a pooled of shape (1, 5), not (2, 5)"),
        (check_prompts, WITHOUT_CONTEXT, "a context that is None"),
        (check_prompts, WITHOUT_POOLED, "a pooled that is None"),
        (check_prompts, NAN_CONTEXT, "a context that is not finite"),
        (check_prompts, INFINITE_POOLED, "a pooled that is not finite"),
        (check_prompts, embedding(mask=np.ones((2, 8), bool)), "shape (2, 8) and type bool, not"),
        (check_prompts, embedding(mask=np.ones((2, 7))), "type float64, not (2, 7) and bool"),
        (check_prompts, embedding(mask=[[True] * 7] * 2), "a mask that is a list"),
        (check_prompts, embedding(mask=ATTENDS_NOTHING), "a mask with a row that attends nothing"),
    ],
)
def test_a_wrong_answer_is_described(check, answer, text):
    with pytest.raises((TypeError, ValueError)) as refused:
        check(answer)
    assert text in str(refused.value)


def test_models_and_distributions_pass_as_they_are():
    """Tables of a distribution are kept by identity."""
    assert check_model(MODEL) is MODEL
    other = MODEL.distribution.reweighted(np.ones(1000))
    assert check_distribution(other) is other


@pytest.mark.parametrize("dtype", [np.float32, int, bool])
def test_weights_become_float64(dtype):
    result = check_three_weights(np.array([0, 1, 1], dtype))
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, [0, 1, 1])


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_context_of_any_length_passes_with_a_mask_or_without(length, is_masked):
    given = embedding((2, length, 10), mask=np.ones((2, length), bool) if is_masked else None)
    assert check_prompts(given) is given
