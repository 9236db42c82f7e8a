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

import numpy as np
from sdxl_host import DiffusionModel, Noise, hookimpl, option

__all__ = ["MinSNR", "Options"]


@dataclass
class Options:
    """gamma is the paper's; it recommends 5."""

    gamma: float = option(
        5.0, help="upper bound on the signal-to-noise ratio as a weight", above=0.0
    )


class MinSNR:
    """Claims `weight_loss`: min(SNR, gamma)."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def weight_loss(self, noise: Noise) -> np.ndarray:
        """lambda on |D - z|^2, float64 (G,): the signal-to-noise ratio, at most gamma."""
        return np.minimum(noise.snr, self.options.gamma)

    def notes(self, model: DiffusionModel) -> list[str]:
        """How much smaller the loss becomes, because gradients shrink with it."""
        sigma = model.schedule.sigmas
        # The weight on |D - z|^2 is worth weight * c_out^2 on the network's own squared error.
        on_own_error = model.preconditioning.c_out(sigma) ** 2
        mean = np.mean(np.minimum(sigma**-2.0, self.options.gamma) * on_own_error)
        return [
            f"gamma {self.options.gamma:g}: the network's own squared error "
            f"({model.preconditioning.name}) is multiplied by {mean:.3f} on average over the "
            f"{len(sigma)} timesteps"
        ]
