"""Rectified flow (Liu et al. 2023, arXiv 2209.03003) with the noise levels of Stable Diffusion 3
(Esser et al. 2024, "Scaling Rectified Flow Transformers", arXiv 2403.03206).

Data and noise are joined by a straight line, and the network learns its direction:

    x_t = (1 - t) * z + t * n        F(x_t, 1000 t) -> n - z        0 < t < 1

The host writes x = z + sigma * n. Divided by 1 + sigma that is x_t, with t = sigma / (1 + sigma),
and D = x_t - t * F is the clean latent: four coefficients, and the weight that leaves F's own
squared error as it is. Since logit t = ln sigma, a distribution of t is one of sigma.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from sdxl_host import (
    DiffusionModel,
    NoiseDistribution,
    NoiseSchedule,
    Preconditioning,
    SamplingDefaults,
    hookimpl,
    option,
)

__all__ = ["FlowPreconditioning", "LogitNormal", "Options", "RectifiedFlow", "UniformTime"]

TAIL = 0.001  # share of the draws under the lowest sigma of sampling, and over its highest

_ndtri = np.vectorize(NormalDist().inv_cdf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])


@dataclass
class Options:
    """mean and std belong to logit_normal; the paper's are 0 and 1 (its section 3.1)."""

    times: Literal["logit_normal", "uniform"] = option(
        "logit_normal", help="how t is drawn in training: logit_normal, or uniform from 0 to 1"
    )
    mean: float = option(
        0.0, help="mean of logit t; above 0 is noisier", minimum=-10.0, maximum=10.0
    )
    std: float = option(1.0, help="deviation of logit t", above=0.0, maximum=10.0)


def time_of(sigma: np.ndarray) -> np.ndarray:
    """t = sigma / (1 + sigma), exact from sigma 0 to infinity."""
    with np.errstate(divide="ignore", over="ignore"):
        return 1.0 / (1.0 + 1.0 / sigma)


class FlowPreconditioning(Preconditioning):
    """D = c_skip * x + c_out * F(c_in * x, c_noise) with c_in * x = x_t and D = x_t - t * F.

    The base's loss weight 1 / c_out^2 is the paper's: F's squared error against n - z weighs 1.
    """

    name = "flow"

    def c_in(self, sigma: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + sigma)

    def c_skip(self, sigma: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + sigma)

    def one_minus_c_skip(self, sigma: np.ndarray) -> np.ndarray:
        return time_of(sigma)  # 1 - c_skip would lose every digit where sigma is small

    def c_out(self, sigma: np.ndarray) -> np.ndarray:
        return -time_of(sigma)

    def c_noise(self, sigma: np.ndarray) -> np.ndarray:
        return 1000.0 * time_of(sigma)

    def scheduler_config(self) -> dict[str, Any]:
        # diffusers' own flow scheduler lacks what its SDXL pipeline calls; this one has both.
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 1.0,
            "num_train_timesteps": 1000,
        }


class LogitNormal(NoiseDistribution):
    """logit t ~ N(mean, std^2) (Esser et al. 2024, eq. 19), which is ln sigma."""

    def __init__(self, schedule: NoiseSchedule, mean: float, std: float) -> None:
        self.schedule, self.mean, self.std = schedule, mean, std

    def quantile(self, u: np.ndarray) -> np.ndarray:
        return np.exp(self.mean + self.std * _ndtri(u))

    def cdf(self, sigma: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):  # ln 0 is rightly -infinity
            z = (np.log(sigma) - self.mean) / self.std
        return 0.5 * _erfc(-z / math.sqrt(2.0))


class UniformTime(NoiseDistribution):
    """t uniform from 0 to 1, so that t itself is the probability of less noise."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def quantile(self, u: np.ndarray) -> np.ndarray:
        return u / (1.0 - u)

    def cdf(self, sigma: np.ndarray) -> np.ndarray:
        return time_of(sigma)


class RectifiedFlow:
    """Adapts `build_model` (preconditioning, sampling) and claims `sample_timesteps`."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self._distribution: NoiseDistribution | None = None

    @hookimpl(wrapper=True)
    def build_model(self) -> Generator[None, DiffusionModel, DiffusionModel]:
        """The model with the flow's preconditioning, drawn over the noise levels it trains on."""
        model = yield
        low, high = self._times(model.schedule).quantile(np.array([TAIL, 1.0 - TAIL]))
        sampling = SamplingDefaults("karras", float(low), float(high), sampler="dpmpp_2m")
        return model.with_preconditioning(FlowPreconditioning(), sampling)

    @hookimpl
    def sample_timesteps(self, model: DiffusionModel) -> NoiseDistribution:
        """The distribution of t, as one of sigma; one object, because tables are kept by it."""
        return self._times(model.schedule)

    def notes(self) -> list[str]:
        """Options that have no effect beside the others."""
        idle = {"mean": self.options.mean != 0.0, "std": self.options.std != 1.0}
        return [
            f"{name} has no effect with times uniform"
            for name, given in idle.items()
            if given and self.options.times == "uniform"
        ]

    def _times(self, schedule: NoiseSchedule) -> NoiseDistribution:
        if self._distribution is None or self._distribution.schedule is not schedule:
            self._distribution = UniformTime(schedule)
            if self.options.times == "logit_normal":
                self._distribution = LogitNormal(schedule, self.options.mean, self.options.std)
        return self._distribution
