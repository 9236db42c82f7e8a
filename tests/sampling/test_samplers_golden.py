"""Samplers and noise levels against diffusers' schedulers, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdxl_host.diffusion.model import SamplingDefaults
from sdxl_host.diffusion.objective import denoise
from sdxl_host.diffusion.preconditioning import EpsPreconditioning, VPreconditioning
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.sampling.samplers import (
    SAMPLERS,
    edm_sigmas,
    karras_sigmas,
    noise_levels,
    sample,
    trailing_sigmas,
)

SCHEDULE = NoiseSchedule.scaled_linear()
PRECONDITIONING = {
    "epsilon": EpsPreconditioning(SCHEDULE),
    "v_prediction": VPreconditioning(SCHEDULE),
}
SPACED = [f"{p}_{spacing}" for p in PRECONDITIONING for spacing in ("trailing", "karras")]
RUNS = [
    *(("euler", run) for run in (*PRECONDITIONING, "edm")),
    *(("euler_a", run) for run in PRECONDITIONING),
    *(("heun", run) for run in SPACED),
    *(("dpmpp_2m", run) for run in (*SPACED, "edm")),
]


def discrete_denoiser(run: str) -> Callable[[np.ndarray, float, float], np.ndarray]:
    """D of the golden files' network F = tanh(0.7 * scaled input + 0.001 * t)."""
    preconditioning = PRECONDITIONING[run.removesuffix("_trailing").removesuffix("_karras")]

    def denoiser(x: np.ndarray, sigma: float, timestep: float) -> np.ndarray:
        output = np.tanh(0.7 * preconditioning.c_in(sigma) * x + 0.001 * timestep)
        return denoise(preconditioning, x, sigma, output)

    return denoiser


def edm_denoiser(x: np.ndarray, sigma: float, c_noise: float) -> np.ndarray:
    """Karras et al. 2022, table 1, sigma_data 0.5; F = tanh(0.7 * scaled input + c_noise)."""
    total = sigma**2 + 0.25
    output = np.tanh(0.7 * x / np.sqrt(total) + c_noise)
    return 0.25 / total * x + 0.5 * sigma / np.sqrt(total) * output


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[f"{name}-{run}" for name, run in RUNS])
def test_golden_states(golden: Path, name: str, run: str):
    """Six steps at the stored noise levels: every state, the noise's and the latent's too."""
    with np.load(golden / f"{name}.npz") as file:
        arrays = dict(file)
    sigmas, states = arrays[f"{run}_sigmas"], arrays[f"{run}_x"]
    told = dict(zip(sigmas.tolist(), arrays[f"{run}_timesteps"].tolist(), strict=False))
    denoiser = edm_denoiser if run == "edm" else discrete_denoiser(run)
    noises = arrays.get("steps_noise")

    def model(x: np.ndarray, sigma: float) -> np.ndarray:
        return denoiser(x, sigma, told[sigma])

    def noise(step: int) -> np.ndarray:
        assert noises is not None, f"{name} takes no noise"
        return noises[step]

    assert len(states) == len(sigmas) == 7
    start = arrays["noise"] * np.float32(sigmas[0])
    for count in range(len(sigmas)):
        x = sample(name, model, start, sigmas[: count + 1], noise)
        assert x.dtype == np.float32
        assert np.abs(x - states[count]).max() <= 2e-6 * np.abs(states[count]).max()


def test_every_sampler_is_compared():
    assert {name for name, _ in RUNS} == set(SAMPLERS)


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[f"{name}-{run}" for name, run in RUNS])
def test_golden_noise_levels_as_the_network_is_told(golden: Path, name: str, run: str):
    """c_noise of each level; diffusers' DPM-Solver rounds those of Karras's to whole timesteps."""
    with np.load(golden / f"{name}.npz") as file:
        sigmas, told = file[f"{run}_sigmas"][:-1], file[f"{run}_timesteps"]
    rounded = name == "dpmpp_2m" and run.endswith("karras")
    ours = 0.25 * np.log(sigmas) if run == "edm" else SCHEDULE.timestep(sigmas)
    np.testing.assert_allclose(told, np.round(ours) if rounded else ours, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("steps", [10, 25])
def test_golden_trailing_sigmas(golden: Path, steps: int):
    """The reference computes in float32; its first sigmas have lost digits."""
    with np.load(golden / "schedule.npz") as file:
        expected, timesteps = file[f"trailing_{steps}"], file[f"timesteps_{steps}"]
    actual = trailing_sigmas(SCHEDULE, steps)
    np.testing.assert_allclose(actual, expected, rtol=2e-5)
    assert np.array_equal(SCHEDULE.nearest(actual[:-1]), timesteps)


def test_trailing_timesteps_are_cut_as_in_the_original(golden: Path):
    """int(linspace(999, 0, 6)) where diffusers rounds 1000 * (6 - i) / 6 and subtracts 1: one
    timestep apart at one of the six."""
    ours = SCHEDULE.nearest(trailing_sigmas(SCHEDULE, 6)[:-1]).tolist()
    with np.load(golden / "euler.npz") as file:
        theirs = file["epsilon_timesteps"].tolist()
    assert ours == [999, 832, 666, 499, 333, 166]
    assert theirs == [999, 832, 666, 499, 332, 166]


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_golden_karras_sigmas(golden: Path, name: str):
    """Between the first and the last noise level of the schedule."""
    sampling = SamplingDefaults("trailing", float(SCHEDULE.sigmas[0]), float(SCHEDULE.sigmas[-1]))
    with np.load(golden / f"{name}.npz") as file:
        expected = file["epsilon_karras_sigmas"]
    np.testing.assert_allclose(noise_levels(sampling, SCHEDULE, 6, "karras"), expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_golden_edm_sigmas(golden: Path, name: str):
    with np.load(golden / f"{name}.npz") as file:
        np.testing.assert_allclose(edm_sigmas(6), file["edm_sigmas"], rtol=2e-6)
        np.testing.assert_allclose(karras_sigmas(0.002, 80.0, 6), file["edm_sigmas"], rtol=2e-6)
