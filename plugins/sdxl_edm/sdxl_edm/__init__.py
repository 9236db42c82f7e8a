"""Preconditioning and noise levels of EDM (Karras et al. 2022, "Elucidating the Design Space of
Diffusion-Based Generative Models", arXiv 2206.00364).

Everything is column "Ours" of the paper's Table 1: the four coefficients of eq. 7, the loss weight
lambda, and the distribution of noise levels that training draws from.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from sdxl_host import (
    DiffusionModel,
    Distribution,
    Preconditioning,
    Sampling,
    Schedule,
    hookimpl,
    option,
)

__all__ = ["EDM", "EDMPreconditioning", "LogNormal", "Options"]

FloatArray: TypeAlias = npt.NDArray[np.float64]


@dataclass
class Options:
    """The paper's three constants, which it fitted to small pictures in pixel space."""

    sigma_data: float = option(
        0.5, help="standard deviation that the preconditioning takes the data to have", above=0.0
    )
    p_mean: float = option(-1.2, help="mean of ln sigma in training")
    p_std: float = option(1.2, help="standard deviation of ln sigma in training", above=0.0)


class EDMPreconditioning(Preconditioning):
    """c_skip, c_out, c_in, c_noise and lambda of Table 1, for arrays of sigma of any shape.

    The network's input and its target have unit variance at every sigma when the data have
    standard deviation sigma_data (the paper's appendix B.6).
    """

    name = "edm"

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    def c_skip(self, sigma: FloatArray) -> FloatArray:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def one_minus_c_skip(self, sigma: FloatArray) -> FloatArray:
        # 1 - c_skip would lose every digit where sigma is small.
        return sigma**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: FloatArray) -> FloatArray:
        return sigma * self.sigma_data / np.sqrt(sigma**2 + self.sigma_data**2)

    def c_in(self, sigma: FloatArray) -> FloatArray:
        return 1.0 / np.sqrt(sigma**2 + self.sigma_data**2)

    def c_noise(self, sigma: FloatArray) -> FloatArray:
        return 0.25 * np.log(sigma)

    def loss_weight(self, sigma: FloatArray) -> FloatArray:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class LogNormal(Distribution):
    """ln sigma ~ N(mean, std^2): Table 1, "Noise distribution"."""

    def __init__(self, schedule: Schedule, mean: float, std: float) -> None:
        self.schedule = schedule
        self.mean = mean
        self.std = std

    def quantile(self, u: FloatArray) -> FloatArray:
        # Imported here because scipy takes longer to import than the rest of the plugin.
        from scipy.special import ndtri

        return np.exp(self.mean + self.std * ndtri(u))

    def cdf(self, sigma: FloatArray) -> FloatArray:
        from scipy.special import ndtr

        return ndtr((np.log(sigma) - self.mean) / self.std)


class EDM:
    """Adapts `build_model` (preconditioning, sampling) and claims `sample_timesteps`.

    EDM's loss weight belongs to its preconditioning, so `weight_loss` stays free for others.
    """

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self._distribution: LogNormal | None = None

    @hookimpl(wrapper=True)
    def build_model(self) -> Generator[None, DiffusionModel, DiffusionModel]:
        """The model with EDM's preconditioning, and with the paper's eq. 5 to draw pictures."""
        model = yield
        return model.with_preconditioning(
            EDMPreconditioning(self.options.sigma_data),
            # The range of noise levels of Table 1, "Time steps".
            sampling=Sampling(spacing="karras", sigma_min=0.002, sigma_max=80.0),
        )

    @hookimpl
    def sample_timesteps(self, model: DiffusionModel) -> Distribution:
        """The log-normal distribution; one object, because tables are kept by identity."""
        if self._distribution is None or self._distribution.schedule is not model.schedule:
            self._distribution = LogNormal(model.schedule, self.options.p_mean, self.options.p_std)
        return self._distribution

    def notes(self, model: DiffusionModel) -> list[str]:
        """That the network meets inputs it was not trained on."""
        return [
            "the network is told c_noise = 0.25 ln sigma; weights trained on timesteps 0 to "
            f"{len(model.schedule) - 1} read every value of it as almost clean, so training from "
            "them takes long"
        ]
