"""How a raw network F becomes a denoiser D, and what weight its squared error carries.

    D(x; s) = c_skip * x + c_out * F(c_in * x, c_noise)        (Karras et al. 2022, eq. 7)

An instance answers for arrays of sigma of any shape, in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from sdxl_host.diffusion.arrays import FloatArray, floats
from sdxl_host.diffusion.schedule import NoiseSchedule

__all__ = [
    "EpsPreconditioning",
    "Preconditioning",
    "VPreconditioning",
    "eps_weighting",
    "unit_weighting",
    "v_weighting",
]

Weighting = Callable[[FloatArray], FloatArray]


def eps_weighting(sigma: FloatArray) -> FloatArray:
    """1 / s^2: weighs |D - z|^2 so that eps-prediction gets its plain squared error."""
    return 1.0 / sigma**2


def v_weighting(sigma: FloatArray) -> FloatArray:
    """(s^2 + 1) / s^2: weighs |D - z|^2 so that v-prediction gets its plain squared error."""
    return (sigma**2 + 1.0) / sigma**2


def unit_weighting(sigma: FloatArray) -> FloatArray:
    """1: the squared error of the denoised latent itself."""
    return np.ones_like(sigma)


class Preconditioning(ABC):
    """The four coefficients of a denoiser and its own loss weight, as functions of sigma.

    Subclasses define the four `c_*` methods; `name` stands in messages and saved metadata.
    """

    name: str = "preconditioning"

    @abstractmethod
    def c_skip(self, sigma: FloatArray) -> FloatArray:
        """Share of the noisy latent in the denoised one."""

    @abstractmethod
    def c_out(self, sigma: FloatArray) -> FloatArray:
        """Scale of the network's output; not 0."""

    @abstractmethod
    def c_in(self, sigma: FloatArray) -> FloatArray:
        """Scale of the network's input."""

    @abstractmethod
    def c_noise(self, sigma: FloatArray) -> FloatArray:
        """What the network is told about the noise level: its time embedding's argument."""

    def one_minus_c_skip(self, sigma: FloatArray) -> FloatArray:
        """1 - c_skip; override it where the subtraction would cancel at small sigma."""
        return 1.0 - self.c_skip(sigma)

    def loss_weight(self, sigma: FloatArray) -> FloatArray:
        """lambda, the weight on |D - z|^2; by default the network's own plain squared error."""
        return 1.0 / self.c_out(sigma) ** 2

    def scheduler_config(self) -> dict[str, Any] | None:
        """The diffusers scheduler that samples such a network, as its config with `_class_name`;
        None where diffusers has none. It is recorded in checkpoints and written on export."""
        return None


class _ScheduledPreconditioning(Preconditioning):
    """What eps and v share: variance-preserving input, timesteps as noise condition."""

    prediction_type: str  # as diffusers calls it

    def __init__(self, schedule: NoiseSchedule, weighting: Weighting | None = None) -> None:
        self.schedule = schedule
        self.weighting = weighting

    def c_in(self, sigma: FloatArray) -> FloatArray:
        return 1.0 / np.sqrt(floats(sigma) ** 2 + 1.0)

    def c_noise(self, sigma: FloatArray) -> FloatArray:
        return self.schedule.timestep(sigma)

    def loss_weight(self, sigma: FloatArray) -> FloatArray:
        if self.weighting is None:
            return super().loss_weight(floats(sigma))
        return self.weighting(floats(sigma))

    def scheduler_config(self) -> dict[str, Any]:
        # Betas follow from the noise levels, so a schedule of one's own is told as well as SDXL's.
        alpha_bar = 1.0 / (1.0 + self.schedule.sigmas**2)
        betas = 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        usual = np.array_equal(self.schedule.sigmas, NoiseSchedule.scaled_linear().sigmas)
        return {
            "_class_name": "EulerDiscreteScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "trained_betas": None if usual else betas.tolist(),
            "num_train_timesteps": len(self.schedule),
            "prediction_type": self.prediction_type,
            "timestep_spacing": "trailing",
        }


class EpsPreconditioning(_ScheduledPreconditioning):
    """The network predicts the unit noise n: SDXL's own parametrisation (Ho et al. 2020)."""

    name = "eps"
    prediction_type = "epsilon"

    def c_skip(self, sigma: FloatArray) -> FloatArray:
        return np.ones_like(floats(sigma))

    def one_minus_c_skip(self, sigma: FloatArray) -> FloatArray:
        return np.zeros_like(floats(sigma))

    def c_out(self, sigma: FloatArray) -> FloatArray:
        return -floats(sigma)


class VPreconditioning(_ScheduledPreconditioning):
    """The network predicts v = alpha * n - sigma_vp * z (Salimans and Ho 2022, app. D)."""

    name = "v"
    prediction_type = "v_prediction"

    def c_skip(self, sigma: FloatArray) -> FloatArray:
        return 1.0 / (floats(sigma) ** 2 + 1.0)

    def one_minus_c_skip(self, sigma: FloatArray) -> FloatArray:
        squared = floats(sigma) ** 2
        return squared / (squared + 1.0)

    def c_out(self, sigma: FloatArray) -> FloatArray:
        return -floats(sigma) / np.sqrt(floats(sigma) ** 2 + 1.0)
