"""Preconditioning and noise levels of EDM (Karras et al. 2022, "Elucidating the Design Space of
Diffusion-Based Generative Models", arXiv 2206.00364).

Everything is column "Ours" of the paper's Table 1: the four coefficients of eq. 7, the loss weight
lambda, and the distribution of noise levels that training draws from.
"""

from __future__ import annotations

from collections.abc import Generator
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from sdxl_host import (
    DiffusionModel,
    NoiseDistribution,
    NoiseSchedule,
    PluginError,
    Preconditioning,
    SamplingDefaults,
    hookimpl,
    option,
)

__all__ = ["EDM", "EDMPreconditioning", "LogNormal", "Options"]

FloatArray: TypeAlias = npt.NDArray[np.float64]

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # Table 1, "Time steps"
PAPER = {"sigma_data": 0.5, "p_mean": -1.2, "p_std": 1.2}  # Table 1; small images in pixel space
# The unit variance of SDXL's latents, and the mean and deviation of ln sigma over its timesteps.
SDXL = {"sigma_data": 1.0, "p_mean": 0.4833, "p_std": 1.1943}


@dataclass
class Options:
    """Raises ValueError for a constant that is not the preset's."""

    parametrization: Literal["edm", "native"] = option(
        "edm", help="edm, or native: the configured preconditioning at EDM's noise levels"
    )
    weighting: Literal["own", "edm"] = option(
        "own", help="loss weight: own to the parametrization, or edm: EDM's, on native too"
    )
    preset: Literal["none", "paper", "sdxl"] = option(
        "none", help="sets the three constants: paper, or sdxl: as SDXL's own"
    )
    sigma_data: float | None = option(
        None, help="standard deviation of the data (0.5, or the preset's)", above=0.0
    )
    p_mean: float | None = option(None, help="mean of ln sigma (-1.2, or the preset's)")
    p_std: float | None = option(
        None, help="deviation of ln sigma (1.2, or the preset's)", above=0.0
    )

    def __post_init__(self) -> None:
        fixed = {"none": self.constants(), "paper": PAPER, "sdxl": SDXL}[self.preset]
        for name, value in self.constants().items():
            if value != fixed[name]:
                raise ValueError(
                    f"{name} is {fixed[name]} in the preset {self.preset}, and {value} is given; "
                    f"leave out {name}, or the preset"
                )
            # As numbers, so that what a run records does not depend on what the defaults become.
            setattr(self, name, value)

    def constants(self) -> dict[str, float]:
        """sigma_data, p_mean and p_std: as given, else the preset's, else the paper's."""
        given = {name: getattr(self, name) for name in PAPER if getattr(self, name) is not None}
        return (SDXL if self.preset == "sdxl" else PAPER) | given


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

    def scheduler_config(self) -> dict[str, Any]:
        levels = {"sigma_data": self.sigma_data, "sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX}
        spacing = {"sigma_schedule": "karras", "rho": 7.0, "final_sigmas_type": "zero"}
        # "epsilon" is diffusers' word for a c_out above 0.
        return {
            "_class_name": "EDMEulerScheduler",
            "prediction_type": "epsilon",
            **levels,
            **spacing,
        }


class LogNormal(NoiseDistribution):
    """ln sigma ~ N(mean, std^2): Table 1, "Noise distribution". Restricted to [low, high].

    Raises PluginError when next to nothing of it lies there.
    """

    _below, _within = 0.0, 1.0  # probability under low, and from low to high

    def __init__(
        self,
        schedule: NoiseSchedule,
        mean: float,
        std: float,
        low: float = 0.0,
        high: float = np.inf,
    ) -> None:
        self.schedule, self.mean, self.std, self.low, self.high = schedule, mean, std, low, high
        below, upto = self.cdf(np.array([low, high]))
        self._below, self._within = below, upto - below
        if self._within < 1e-6:  # the difference has lost its digits
            raise PluginError(
                f"p_mean {mean:g} and p_std {std:g} leave {self._within:.1e} of the draws from "
                f"sigma {low:.4g} to {high:.4g}; choose a p_mean between their logarithms"
            )

    def quantile(self, u: FloatArray) -> FloatArray:
        # Imported here because scipy takes longer to import than the rest of the plugin.
        from scipy.special import ndtri

        sigma = np.exp(self.mean + self.std * ndtri(self._below + self._within * u))
        return np.clip(sigma, self.low, self.high)  # against rounding

    def cdf(self, sigma: FloatArray) -> FloatArray:
        from scipy.special import ndtr

        with np.errstate(divide="ignore"):  # ln 0 is rightly -infinity
            unrestricted = ndtr((np.log(sigma) - self.mean) / self.std)
        return np.clip((unrestricted - self._below) / self._within, 0.0, 1.0)


class EDM:
    """Adapts `build_model` (preconditioning, sampling) and claims `sample_timesteps`.

    EDM's loss weight belongs to its preconditioning, so `weight_loss` stays free for others.
    """

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options, self.constants = options, options.constants()
        self._distribution: LogNormal | None = None

    @hookimpl(wrapper=True)
    def build_model(self) -> Generator[None, DiffusionModel, DiffusionModel]:
        """edm: the model with EDM's preconditioning, drawn with Heun and the paper's eq. 5.

        native: as configured, in drawing too, for the network stays of its kind; lambda may change.
        """
        model = yield
        edm = EDMPreconditioning(self.constants["sigma_data"])
        if self.options.parametrization == "edm":
            sampling = SamplingDefaults("karras", SIGMA_MIN, SIGMA_MAX, sampler="heun")
            return model.with_preconditioning(edm, sampling)
        if self.options.weighting == "own":
            return model
        native = copy(model.preconditioning)
        native.loss_weight = edm.loss_weight
        return model.with_preconditioning(native)

    @hookimpl
    def sample_timesteps(self, model: DiffusionModel) -> NoiseDistribution:
        """The log-normal distribution; one object, because tables are kept by identity.

        native: only from the schedule's lowest sigma to its highest, as t(sigma) tells apart.
        """
        if self._distribution is None or self._distribution.schedule is not model.schedule:
            native = self.options.parametrization == "native"
            low, high = model.schedule.sigmas[[0, -1]] if native else (0.0, np.inf)
            mean, std = self.constants["p_mean"], self.constants["p_std"]
            self._distribution = LogNormal(model.schedule, mean, std, low, high)
        return self._distribution

    def notes(self, model: DiffusionModel, distribution: NoiseDistribution) -> list[str]:
        """What c_noise or the weighting mean for the training, and options without effect."""
        chosen, kind = self.options, model.preconditioning
        idle = f"has no effect with parametrization {chosen.parametrization}"
        if chosen.parametrization == "edm":
            told = (
                "the network is told c_noise = 0.25 ln sigma; weights trained on timesteps 0 to "
                f"{len(model.schedule) - 1} read every value of it as almost clean, so training "
                "from them takes long, and parametrization native spares it"
            )
            return [told] + [f"weighting edm {idle}"] * (chosen.weighting == "edm")
        if chosen.weighting == "own":
            is_usual = chosen.sigma_data in (PAPER["sigma_data"], SDXL["sigma_data"])
            return [] if is_usual else [f"sigma_data {idle} and weighting own"]

        def own(sigma: FloatArray) -> FloatArray:
            return kind.loss_weight(sigma) * kind.c_out(sigma) ** 2

        mean, most = distribution.expect(own), own(model.schedule.sigmas).max()
        return [
            f"warning: the network's own squared error ({kind.name}) weighs {mean:.1f} on average "
            f"and up to {most:.0f}, so few draws decide an update; weighting own gives each 1"
        ]
