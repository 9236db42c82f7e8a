"""Debiased Estimation loss weight (Yu et al. 2023, "Unmasking Bias in Diffusion Model Training",
arXiv 2310.08442).

A network that predicts the noise estimates the clean latent as D = x - sigma * F, so an error of
its output is amplified by sigma = 1 / sqrt(SNR). The paper weighs its squared error by that factor,

    L = E[ |n - F|^2 / sqrt(SNR(t)) ]

and |n - F|^2 = SNR * |D - z|^2, so the weight on the denoised latent is sqrt(SNR).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sdxl_host import DiffusionModel, NoiseDistribution, NoiseLevels, hookimpl, option

__all__ = ["Debiased", "Options"]


@dataclass
class Options:
    """The paper has no bound; other trainers set one of 1000."""

    max_snr: float | None = option(
        None, help="above this signal-to-noise ratio the factor 1 / sqrt(SNR) stays", above=0.0
    )


class Debiased:
    """Claims `weight_loss`: sqrt(SNR), which is the paper's 1 / sqrt(SNR) on the noise."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def weight_loss(self, noise: NoiseLevels) -> np.ndarray:
        """lambda on |D - z|^2, float64 (G,)."""
        return self._weights(noise.snr)

    def notes(self, model: DiffusionModel, distribution: NoiseDistribution) -> list[str]:
        """How much larger the loss becomes, because gradients grow with it."""

        def factor(sigma: np.ndarray) -> np.ndarray:
            # A weight on |D - z|^2 is worth weight * c_out^2 on the network's own squared error.
            return self._weights(sigma**-2.0) * model.preconditioning.c_out(sigma) ** 2

        return [
            f"the network's own squared error ({model.preconditioning.name}) is multiplied by "
            f"{distribution.expect(factor):.3f} on average over the draws"
        ]

    def _weights(self, snr: np.ndarray) -> np.ndarray:
        # SNR for |n - F|^2 in terms of |D - z|^2, times the paper's factor.
        return snr / np.sqrt(np.minimum(snr, self.options.max_snr or np.inf))
