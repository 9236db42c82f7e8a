"""Min-SNR loss weight (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting
Strategy", arXiv 2303.09556).

The paper weighs the error of the denoised latent by

    w_t = min(SNR(t), gamma)

and derives other forms for networks that predict noise or velocity. Here the weight stands on the
denoised latent whatever the network predicts, so the paper's one line is the whole of it; the host
turns it into min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from sdxl_host import DiffusionModel, NoiseDistribution, NoiseLevels, hookimpl, option

__all__ = ["MinSNR", "Options"]


@dataclass
class Options:
    """gamma is the paper's; it recommends 5."""

    gamma: float = option(
        5.0, help="upper bound on the signal-to-noise ratio as a weight", above=0.0
    )
    normalize: Literal["none", "mean1"] = option(
        "none", help="mean1: scale the weights so that the network's own squared error keeps 1"
    )


class MinSNR:
    """Claims `weight_loss`: min(SNR, gamma), divided by its mean with normalize mean1."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self._distribution_and_mean: tuple[NoiseDistribution, float] | None = None

    @hookimpl
    def weight_loss(self, model: DiffusionModel, noise: NoiseLevels) -> np.ndarray:
        """lambda on |D - z|^2, float64 (G,): the signal-to-noise ratio, at most gamma."""
        weights = np.minimum(noise.snr, self.options.gamma)
        if self.options.normalize == "none":
            return weights
        return weights / self._mean(model, noise.distribution)

    def notes(self, model: DiffusionModel, distribution: NoiseDistribution) -> list[str]:
        """How much smaller the loss becomes, because gradients shrink with it."""
        mean = self._mean(model, distribution)
        told = (
            f"gamma {self.options.gamma:g}: the network's own squared error "
            f"({model.preconditioning.name}) is multiplied by {mean:.3f} on average over the draws"
        )
        if self.options.normalize == "mean1":
            told += ", and normalize mean1 divides by that"
        return [told]

    def _mean(self, model: DiffusionModel, distribution: NoiseDistribution) -> float:
        """Mean factor on the network's own squared error over the draws from `distribution`."""
        # Kept for as long as the distribution is the same object, as the host keeps its tables.
        if (
            self._distribution_and_mean is None
            or self._distribution_and_mean[0] is not distribution
        ):
            mean = distribution.expect(lambda sigma: self._factor(model, sigma))
            self._distribution_and_mean = distribution, mean
        return self._distribution_and_mean[1]

    def _factor(self, model: DiffusionModel, sigma: np.ndarray) -> np.ndarray:
        # A weight on |D - z|^2 is worth weight * c_out^2 on the network's own squared error.
        weights = np.minimum(sigma**-2.0, self.options.gamma)
        return weights * model.preconditioning.c_out(sigma) ** 2
