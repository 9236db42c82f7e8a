"""Golden sampling: diffusers' schedulers, step by step, on a network that is a formula.

A run is stored as `sigmas` (7,) with the final 0, `timesteps` (6,) as the network is told them and
`x` (7, B, C, H, W), every state, the start first. States are variance exploding, x = z + sigma * n,
whatever the scheduler keeps inside; the start is noise * sigmas[0]. (diffusers' pipelines multiply
by init_noise_sigma, which is sqrt(sigma^2 + 1) for EDM.)
"""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from deterministic import array
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from formulas import SDXL_BETAS
from loading import Arrays

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

STEPS = 6
PREDICTIONS = ("epsilon", "v_prediction")
EDM_RANGE: dict[str, Any] = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
}


def discrete(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """F for epsilon and v_prediction: x the scaled input, t a timestep in [0, 999]."""
    return torch.tanh(0.7 * x + 0.001 * t)


def continuous(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """F for EDM: x the scaled input, t its c_noise = 0.25 ln sigma."""
    return torch.tanh(0.7 * x + t)


def sample(
    scheduler: Any,
    noise: np.ndarray,
    network: Network,
    calls: int = 1,
    variance_preserving: bool = False,
) -> Arrays:
    """A run of STEPS steps; `calls` of the network in each but the last, which costs one.

    variance_preserving: the scheduler keeps x / sqrt(sigma^2 + 1).
    """
    scheduler.set_timesteps(STEPS)
    # With two calls a step the scheduler lists every inner noise level twice.
    sigmas = torch.cat([scheduler.sigmas[:-1:calls], scheduler.sigmas[-1:]])
    scales = torch.sqrt(sigmas**2 + 1) if variance_preserving else torch.ones_like(sigmas)
    x = torch.from_numpy(noise) * sigmas[0] / scales[0]
    states = [x]
    for index, timestep in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
        if index % calls == calls - 1 or index == len(scheduler.timesteps) - 1:
            states.append(x)
    return {
        "sigmas": sigmas.numpy().astype(np.float64),
        "timesteps": scheduler.timesteps[::calls].numpy().astype(np.float64),
        "x": np.stack([(x * by).numpy() for x, by in zip(states, scales, strict=True)]),
    }


def named(label: str, run: Arrays) -> Arrays:
    """The run's arrays with `label` before their keys."""
    return {f"{label}_{key}": values for key, values in run.items()}


def golden_euler() -> Arrays:
    """Euler at the trailing spacing, and EDM's over its own range."""
    noise = array("euler.noise", (2, 4, 6, 6))
    arrays: Arrays = {"noise": noise}
    for prediction in PREDICTIONS:
        scheduler = EulerDiscreteScheduler(
            **SDXL_BETAS, timestep_spacing="trailing", prediction_type=prediction
        )
        arrays |= named(prediction, sample(scheduler, noise, discrete))
    return arrays | named("edm", sample(EDMEulerScheduler(**EDM_RANGE), noise, continuous))


def golden_euler_a() -> Arrays:
    """Euler ancestral; `steps_noise` (6, B, C, H, W) is what the scheduler drew, here from Philox.

    It draws in the last step too, where the noise is multiplied by 0.
    """
    noise = array("euler_a.noise", (2, 4, 6, 6))
    drawn = np.stack([array(f"euler_a.noise.{step}", noise.shape) for step in range(STEPS)])
    arrays: Arrays = {"noise": noise, "steps_noise": drawn}
    for prediction in PREDICTIONS:
        scheduler = EulerAncestralDiscreteScheduler(
            **SDXL_BETAS, timestep_spacing="trailing", prediction_type=prediction
        )
        with given_noise(drawn):
            arrays |= named(prediction, sample(scheduler, noise, discrete))
    return arrays


def given_noise(drawn: Sequence[np.ndarray]) -> Any:
    """A context in which the ancestral scheduler draws these arrays in turn."""
    rows = iter(drawn)

    def draw(shape: torch.Size, **_: object) -> torch.Tensor:
        row = torch.from_numpy(next(rows))
        if row.shape != shape:
            raise ValueError(f"noise of shape {tuple(shape)} is drawn; {tuple(row.shape)} is given")
        return row

    return mock.patch.object(scheduling_euler_ancestral_discrete, "randn_tensor", draw)


def golden_heun() -> Arrays:
    """Heun at the trailing and at Karras's spacing.

    The scheduler takes Karras's range from the timesteps of its other spacing, so "linspace",
    which holds 0 and 999, gives sigma_0 to sigma_999.
    """
    noise = array("heun.noise", (2, 4, 6, 6))
    arrays: Arrays = {"noise": noise}
    spacings: dict[str, dict[str, Any]] = {
        "trailing": {"timestep_spacing": "trailing"},
        "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    }
    for prediction in PREDICTIONS:
        for label, options in spacings.items():
            scheduler = HeunDiscreteScheduler(**SDXL_BETAS, prediction_type=prediction, **options)
            run = sample(scheduler, noise, discrete, calls=2)
            arrays |= named(f"{prediction}_{label}", run)
    return arrays


def golden_dpmpp_2m() -> Arrays:
    """DPM-Solver++(2M) at the trailing and at Karras's spacing, and EDM's over its own range.

    It is that algorithm with `solver_type` "midpoint", which extrapolates D as the paper's
    algorithm 2 does, and `final_sigmas_type` "zero", which makes the last step one of first order
    to noise level 0 whatever `lower_order_final` and `euler_at_final` say. Karras's noise levels
    are told to the network as the nearest whole timesteps.
    """
    noise = array("dpmpp_2m.noise", (2, 4, 6, 6))
    solver: dict[str, Any] = {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
    }
    arrays: Arrays = {"noise": noise}
    for prediction in PREDICTIONS:
        for label in ("trailing", "karras"):
            scheduler = DPMSolverMultistepScheduler(
                **SDXL_BETAS,
                **solver,
                prediction_type=prediction,
                timestep_spacing="trailing",
                use_karras_sigmas=label == "karras",
            )
            run = sample(scheduler, noise, discrete, variance_preserving=True)
            arrays |= named(f"{prediction}_{label}", run)
    edm = EDMDPMSolverMultistepScheduler(**solver, **EDM_RANGE)
    return arrays | named("edm", sample(edm, noise, continuous))
