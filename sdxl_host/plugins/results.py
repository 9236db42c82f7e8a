"""Checks of what the implementations of a hook answer.

They return the answer, and raise TypeError or ValueError whose text ends the sentence "the plugin
returned ...". Imports are late: a plugin may be registered where NumPy is not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from sdxl_host.diffusion.conditioning import PromptEmbedding
    from sdxl_host.diffusion.distributions import NoiseDistribution
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.diffusion.objective import NoiseLevels

__all__ = ["check_distribution", "check_embedding", "check_model", "check_weights"]


def check_model(result: Any) -> DiffusionModel:
    """A DiffusionModel with a Preconditioning."""
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.diffusion.preconditioning import Preconditioning

    _expect(result, DiffusionModel)
    _expect(result.preconditioning, Preconditioning)
    return result


def check_distribution(result: Any) -> NoiseDistribution:
    """A NoiseDistribution."""
    from sdxl_host.diffusion.distributions import NoiseDistribution

    _expect(result, NoiseDistribution)
    return result


def check_weights(result: Any, noise: NoiseLevels) -> np.ndarray:
    """Weights (G,), finite and not negative; returned as float64."""
    import numpy as np

    _expect(result, np.ndarray)
    weights = result.astype(np.float64)
    if weights.shape != noise.sigma.shape:
        raise ValueError(f"an array of shape {weights.shape}, not {noise.sigma.shape}")
    for fault, where in (
        ("weights that are not finite", ~np.isfinite(weights)),
        ("negative weights", weights < 0),
    ):
        if where.any():
            first = int(where.argmax())
            raise ValueError(f"{fault} ({weights[first]:g} at sigma {noise.sigma[first]:.4g})")
    return weights


def check_embedding(result: Any, prompts: Sequence[str], encoders: Any) -> PromptEmbedding:
    """An embedding of B prompts with the encoders' widths: finite, and attended somewhere."""
    import numpy as np

    from sdxl_host.diffusion.conditioning import PromptEmbedding

    _expect(result, PromptEmbedding)
    for name in ("context", "pooled", "mask"):
        array = getattr(result, name)
        if not isinstance(array, np.ndarray) and not (name == "mask" and array is None):
            given = "None" if array is None else f"a {type(array).__name__}"
            raise TypeError(f"a {name} that is {given}, not an array")
    count = len(prompts)
    length = result.context.shape[1] if result.context.ndim > 1 else 77
    context = (count, length, sum(encoder.width for encoder in encoders))
    pooled = (count, sum(encoder.pooled_width for encoder in encoders))
    for name, array, shape in (
        ("context", result.context, context),
        ("pooled", result.pooled, pooled),
    ):
        if array.shape != shape:
            raise ValueError(f"a {name} of shape {array.shape}, not {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"a {name} that is not finite")
    if result.mask is not None:
        if result.mask.shape != context[:2] or result.mask.dtype != bool:
            raise ValueError(
                f"a mask of shape {result.mask.shape} and type {result.mask.dtype}, not "
                f"{context[:2]} and bool"
            )
        if not result.mask.any(axis=1).all():
            raise ValueError("a mask with a row that attends nothing")
    return result


def _expect(result: Any, kind: type) -> None:
    if not isinstance(result, kind):
        given = "None" if result is None else f"a {type(result).__name__}"
        raise TypeError(f"{given}, not a {kind.__name__}")
