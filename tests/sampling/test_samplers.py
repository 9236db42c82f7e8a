"""Samplers and noise levels against what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from sdxl_host.diffusion.model import SamplingDefaults
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.errors import ConfigError
from sdxl_host.sampling.samplers import (
    SAMPLERS,
    SPACINGS,
    dpmpp_2m,
    euler_ancestral,
    heun,
    karras_sigmas,
    noise_levels,
    sample,
)

SCHEDULE = NoiseSchedule.scaled_linear()


# ---- samplers

MEAN, SPREAD = 0.8, 0.5


def gaussian_denoiser(x: np.ndarray, sigma: float) -> np.ndarray:
    """D of data from N(MEAN, SPREAD^2): the mean of what is known of z, given x."""
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def exact_end(x: np.ndarray, sigma: float) -> np.ndarray:
    """Where the flow of that D takes x from noise level sigma to 0."""
    return MEAN + (x - MEAN) * SPREAD / np.sqrt(SPREAD**2 + sigma**2)


def unit_noise(shape: tuple[int, ...], seed: int = 5) -> Callable[[int], np.ndarray]:
    """noise(i) as the samplers take it, each step's of its own."""
    return lambda i: np.random.default_rng([seed, i]).standard_normal(shape).astype(np.float32)


def run(name: str, model: Callable, x: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    return sample(name, model, x, np.asarray(sigmas, float), unit_noise(x.shape))


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_gives_the_denoised_latent(name):
    """From sigma straight to 0 every sampler returns D: for Euler x + (x - D) / s * (0 - s)."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    answer = np.random.default_rng(1).standard_normal(x.shape)
    result = run(name, lambda _, sigma: answer * sigma, x * 9, [9.0, 0.0])
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, answer * 9, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_model_is_never_asked_at_sigma_0(name):
    """It is asked from the noisiest level down, as often as the table says; the last step costs
    one call, and noise is asked for every step but that one."""
    asked, noised = [], []

    def model(x: np.ndarray, sigma: float) -> np.ndarray:
        assert type(sigma) is float
        asked.append(sigma)
        return x * 0

    def noise(index: int) -> np.ndarray:
        noised.append(index)
        return x * 0

    x = np.ones((1, 1, 1, 1), np.float32)
    sample(name, model, x, np.array([3.0, 2.0, 0.5, 0.0]), noise)
    twice = SAMPLERS[name].calls == 2
    assert asked == ([3.0, 2.0, 2.0, 0.5, 0.5] if twice else [3.0, 2.0, 0.5])
    assert noised == ([0, 1] if SAMPLERS[name].takes_noise else [])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_leaves_its_input_alone(name):
    x = np.full((1, 1, 2, 2), 9.0, np.float32)
    run(name, gaussian_denoiser, x, [9.0, 3.0, 1.0, 0.0])
    assert (x == 9.0).all()


@pytest.mark.parametrize(
    ("name", "steps", "bias"),
    [("euler", 400, 0.02), ("heun", 40, 0.004), ("dpmpp_2m", 60, 0.004), ("euler_a", 400, 0.02)],
)
def test_noise_becomes_the_data(name, steps, bias):
    """Samples of N(MEAN, SPREAD^2): mean and standard deviation of 40,000 lie within 4 standard
    errors and the share of SPREAD that the steps leave, `bias`."""
    noise = np.random.default_rng(2).standard_normal((1, 1, 200, 200)).astype(np.float32)
    x = run(name, gaussian_denoiser, noise * np.float32(80.0), karras_sigmas(0.002, 80.0, steps))
    error = SPREAD / np.sqrt(x.size)
    assert x.mean() == pytest.approx(MEAN, abs=4 * error + bias * SPREAD)
    assert x.std() == pytest.approx(SPREAD, abs=4 * error / np.sqrt(2) + bias * SPREAD)


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)], ids=["1", "2-heun", "2-2m"]
)
def test_order(name, order):
    """Twice the steps leave 1 / 2^order of the distance to where the exact flow ends.

    In float64, down to a noise level whose last step to 0 leaves nothing.
    """
    x = np.array([[[[30.0, -7.0]]]])
    errors = []
    for steps in (80, 160, 320):
        end = run(name, gaussian_denoiser, x, karras_sigmas(1e-5, 20.0, steps))
        errors.append(np.abs(end - exact_end(x, 20.0)).max())
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2.0**order, rtol=0.1)


def test_dpmpp_2m_is_exact_for_a_constant_denoiser():
    """With D fixed the flow is linear in sigma, which every step solves exactly."""
    x = np.array([[[[4.0]]]])
    end = dpmpp_2m(lambda x, sigma: x * 0 + 1.0, x, np.array([5.0, 2.0, 1.0, 0.25]))
    np.testing.assert_allclose(end, 1.0 + (4.0 - 1.0) * 0.25 / 5.0, rtol=1e-12)


def test_dpmpp_2m_extrapolates_to_the_middle_of_its_step():
    """D linear in ln sigma: at uneven steps its value at the geometric mean is used."""
    x = np.array([[[[4.0]]]])
    end = dpmpp_2m(lambda x, sigma: x * 0 + np.log(sigma), x, np.array([8.0, 2.0, 1.5]))
    first = 4.0 * 0.25 + 0.75 * np.log(8.0)
    expected = first * 0.75 + 0.25 * np.log(np.sqrt(2.0 * 1.5))
    np.testing.assert_allclose(end, expected, rtol=1e-12)


def test_heun_averages_the_slopes_of_both_ends():
    """D = 0: dx/dsigma = x / sigma, whose slopes at both ends are one, so x stays on its ray."""
    x = np.array([[[[6.0]]]])
    np.testing.assert_allclose(heun(lambda x, _: x * 0, x, np.array([3.0, 1.0])), 2.0, rtol=1e-12)
    # D = sigma^2: slopes (6 - 9) / 3 at 3 and (8 - 1) / 1 at 1, where Euler arrives at 8.
    end = heun(lambda x, sigma: x * 0 + sigma**2, x, np.array([3.0, 1.0]))
    np.testing.assert_allclose(end, 6.0 + 0.5 * (-1.0 + 7.0) * (1.0 - 3.0), rtol=1e-12)


def test_euler_ancestral_keeps_the_noise_level():
    """D = 0, x = sigma * n: after each step its deviation is the next noise level's."""
    sigmas = np.array([8.0, 5.0, 1.0, 0.3])
    x = 8.0 * np.random.default_rng(3).standard_normal((1, 1, 200, 200))
    for count in range(1, len(sigmas) + 1):
        state = run("euler_a", lambda x, _: x * 0, x, sigmas[:count])
        assert state.std() == pytest.approx(sigmas[count - 1], rel=4 / np.sqrt(2 * x.size))


def test_euler_ancestral_is_the_ddpm_posterior():
    """q(x_s' | x_s, z) of Gaussians: mean z + (s'/s)^2 (x - z), variance s'^2 (1 - (s'/s)^2)."""
    x, z, n = (np.array([[[[value]]]]) for value in (7.0, 2.0, -1.5))
    end = euler_ancestral(lambda *_: z, x, np.array([4.0, 1.0]), lambda _: n)
    np.testing.assert_allclose(end, z + (x - z) / 16 + n * np.sqrt(1 - 1 / 16), rtol=1e-12)


def test_an_unknown_sampler_is_refused():
    x = np.ones((1, 1, 1, 1), np.float32)
    with pytest.raises(ConfigError, match=r"'dpmpp_2' is not known \(did you mean dpmpp_2m\?\)"):
        run("dpmpp_2", gaussian_denoiser, x, [1.0, 0.0])


# ---- noise levels

TRAINED = SamplingDefaults("trailing", float(SCHEDULE.sigmas[0]), float(SCHEDULE.sigmas[-1]))
EDM_TRAINED = SamplingDefaults("karras", 0.002, 80.0)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_noise_levels_descend_from_the_noisiest_to_0(spacing, steps):
    """Whatever the spacing: steps + 1 levels, the first the largest trained on, the last 0."""
    sampling = EDM_TRAINED if spacing == "edm" else TRAINED
    levels = noise_levels(sampling, SCHEDULE, steps, spacing)
    assert levels.shape == (steps + 1,)
    assert levels.dtype == np.float64
    assert levels[0] == pytest.approx(sampling.sigma_max, rel=1e-12)
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("sampling", [TRAINED, EDM_TRAINED], ids=["trailing", "karras"])
def test_the_default_spacing_is_the_models_own(sampling):
    own = noise_levels(sampling, SCHEDULE, 9)
    assert np.array_equal(own, noise_levels(sampling, SCHEDULE, 9, sampling.spacing))
    others = set(SPACINGS) - {sampling.spacing, "edm"}
    assert not any(np.array_equal(own, noise_levels(sampling, SCHEDULE, 9, s)) for s in others)


def test_karras_ends_at_sigma_min_before_0():
    """Eq. 5: the seventh roots are evenly spaced from sigma_max to sigma_min."""
    roots = karras_sigmas(0.01, 50.0, 9)[:-1] ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), (0.01 ** (1 / 7) - 50 ** (1 / 7)) / 8, rtol=1e-10)
    assert roots[-1] ** 7 == pytest.approx(0.01)


def test_edm_spacing_is_that_of_the_paper():
    """Table 1's range whatever wider one the model was trained on."""
    levels = noise_levels(SamplingDefaults("karras", 0.001, 100.0), SCHEDULE, 18, "edm")
    assert np.array_equal(levels, karras_sigmas(0.002, 80.0, 18))


@pytest.mark.parametrize(
    ("low", "high"), [(TRAINED.sigma_min, TRAINED.sigma_max), (0.0021, 80.0), (0.002, 79.0)]
)
def test_edm_spacing_outside_of_the_trained_range_is_refused(low, high):
    """The network was never told of such noise levels."""
    with pytest.raises(ConfigError, match=r"^spacing: edm needs .* to 80.*; use karras$"):
        noise_levels(SamplingDefaults("karras", low, high), SCHEDULE, 10, "edm")


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ConfigError, match=r"'karas' is not known \(did you mean karras\?\)"):
        noise_levels(TRAINED, SCHEDULE, 10, "karas")


def test_more_trailing_steps_than_timesteps_are_refused():
    """Two steps at one noise level would divide by 0."""
    with pytest.raises(ConfigError, match=r"1001 steps of 1000 timesteps; use .* karras$"):
        noise_levels(TRAINED, SCHEDULE, 1001)
