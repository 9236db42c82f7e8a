"""The `model` section of a config: which classes its nodes name and the model they make.

Class names and parameters are those of the original SDXL configs. numpy only; the networks are
built when first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdxl_host.diffusion.distributions import DiscreteDistribution
from sdxl_host.diffusion.model import DiffusionModel, Lazy, SamplingDefaults
from sdxl_host.diffusion.preconditioning import (
    EpsPreconditioning,
    Preconditioning,
    VPreconditioning,
    Weighting,
    eps_weighting,
    unit_weighting,
    v_weighting,
)
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.settings.targets import build

__all__ = [
    "Denoiser",
    "DiffusionEngine",
    "DiscreteDenoiser",
    "DiscreteSampling",
    "EpsScaling",
    "EpsWeighting",
    "LegacyDDPMDiscretization",
    "StandardDiffusionLoss",
    "UnitWeighting",
    "VScaling",
    "VWeighting",
]

_EPS_SCALING = {"target": "sdxl_host.EpsScaling"}
_EPS_WEIGHTING = {"target": "sdxl_host.EpsWeighting"}
_LEGACY_DDPM = {"target": "sdxl_host.LegacyDDPMDiscretization"}
_DENOISER = {"target": "sdxl_host.DiscreteDenoiser"}
_SIGMA_SAMPLER = {"target": "sdxl_host.DiscreteSampling"}
_LOSS = {"target": "sdxl_host.StandardDiffusionLoss"}

Node = Mapping[str, Any]


class EpsScaling:
    """The network predicts the noise."""

    def preconditioning(self, schedule: NoiseSchedule, weighting: Weighting) -> Preconditioning:
        """Eps-prediction over `schedule`."""
        return EpsPreconditioning(schedule, weighting)


class VScaling:
    """The network predicts v."""

    def preconditioning(self, schedule: NoiseSchedule, weighting: Weighting) -> Preconditioning:
        """v-prediction over `schedule`."""
        return VPreconditioning(schedule, weighting)


class EpsWeighting:
    """lambda = 1 / sigma^2 on the denoised latent's squared error."""

    function = staticmethod(eps_weighting)


class VWeighting:
    """lambda = (sigma^2 + 1) / sigma^2 on the denoised latent's squared error."""

    function = staticmethod(v_weighting)


class UnitWeighting:
    """lambda = 1: the denoised latent's plain squared error."""

    function = staticmethod(unit_weighting)


class LegacyDDPMDiscretization:
    """SDXL's schedule, linear in the square root of beta."""

    def __init__(
        self,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        num_timesteps: int = 1000,
    ) -> None:
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, not {num_timesteps}")
        self.schedule = NoiseSchedule.scaled_linear(linear_start, linear_end, num_timesteps)


class DiscreteDenoiser:
    """Scaling and weighting over a discrete schedule."""

    def __init__(
        self,
        scaling_config: Node | None = None,
        weighting_config: Node | None = None,
        discretization_config: Node | None = None,
    ) -> None:
        where = "model.params.denoiser_config.params"
        scaling = build(scaling_config or _EPS_SCALING, "scaling", f"{where}.scaling_config")
        weighting = build(
            weighting_config or _EPS_WEIGHTING, "weighting", f"{where}.weighting_config"
        )
        self.schedule = build(
            discretization_config or _LEGACY_DDPM,
            "discretization",
            f"{where}.discretization_config",
        ).schedule
        self.preconditioning = scaling.preconditioning(self.schedule, weighting.function)


class Denoiser(DiscreteDenoiser):
    """The same under the name of the original's continuous denoiser: the noise condition stays a
    float here in any case."""


class DiscreteSampling:
    """Timesteps drawn uniformly from a discrete schedule."""

    def __init__(self, discretization_config: Node | None = None) -> None:
        self.schedule = build(
            discretization_config or _LEGACY_DDPM,
            "discretization",
            "model.params.sigma_sampler_config.params.discretization_config",
        ).schedule


class StandardDiffusionLoss:
    """Mean squared error, with noise offset (each channel's noise shifted by a random constant).

    type: "l2". offset_noise_level: standard deviation of the shift, 0 for none.
    """

    def __init__(self, type: str = "l2", offset_noise_level: float = 0.0) -> None:
        if type != "l2":
            raise ValueError(
                f"StandardDiffusionLoss: type {type!r} is not supported; it must be l2, because "
                "the six coefficients of an objective describe a squared error"
            )
        if offset_noise_level < 0:
            raise ValueError(
                f"StandardDiffusionLoss: offset_noise_level must be at least 0, not "
                f"{offset_noise_level}"
            )
        self.offset_noise_level = offset_noise_level


def _first_stage(node: Node, where: str, scale_factor: float, keeps_float32: bool) -> Any:
    where = f"{where}.first_stage_config"
    first_stage = build(node, "first_stage", where, scale_factor=scale_factor)
    first_stage.keeps_float32 = keeps_float32
    return first_stage


class DiffusionEngine:
    """The whole of the `model` section.

    scale_factor: latents are the first stage's output times this (0.13025 for SDXL's autoencoder).
    disable_first_stage_amp: True, and the first stage computes in float32 at every precision level;
    False, and it follows `train.ms_amp_level`.
    """

    def __init__(
        self,
        network_config: Node,
        conditioner_config: Node,
        first_stage_config: Node,
        denoiser_config: Node | None = None,
        sigma_sampler_config: Node | None = None,
        loss_fn_config: Node | None = None,
        scale_factor: float = 1.0,
        disable_first_stage_amp: bool = True,
    ) -> None:
        where = "model.params"
        if scale_factor <= 0:
            raise ValueError(f"scale_factor must be above 0, not {scale_factor}")
        denoiser = build(denoiser_config or _DENOISER, "denoiser", f"{where}.denoiser_config")
        sampler = build(
            sigma_sampler_config or _SIGMA_SAMPLER, "sigma_sampler", f"{where}.sigma_sampler_config"
        )
        if not np.array_equal(denoiser.schedule.sigmas, sampler.schedule.sigmas):
            raise ValueError(
                "denoiser_config and sigma_sampler_config describe two different schedules; give "
                "both the same discretization_config"
            )
        loss = build(loss_fn_config or _LOSS, "loss", f"{where}.loss_fn_config")
        schedule = denoiser.schedule

        conditioner = Lazy(
            lambda: build(conditioner_config, "conditioner", f"{where}.conditioner_config")
        )
        self.model = DiffusionModel(
            preconditioning=denoiser.preconditioning,
            schedule=schedule,
            sampling=SamplingDefaults(
                "trailing", float(schedule.sigmas[0]), float(schedule.sigmas[-1])
            ),
            distribution=DiscreteDistribution(schedule),
            offset_noise_level=loss.offset_noise_level,
            conditioner_part=conditioner,
            network_part=Lazy(lambda: build(network_config, "network", f"{where}.network_config")),
            first_stage_part=Lazy(
                lambda: _first_stage(
                    first_stage_config, where, scale_factor, disable_first_stage_amp
                )
            ),
            encoders_part=Lazy(lambda: conditioner.get().encoders),
        )
