"""Rectified flow: its six numbers, its noise levels, and that sampling finds the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import special
from sdxl_host import DiffusionModel, NoiseDistribution, NoiseSchedule
from sdxl_host.testing import (
    SAMPLERS,
    PluginContract,
    coefficients,
    denoise,
    sample,
    sampling_sigmas,
    tiny_hooks,
)

from rectified_flow import (
    FlowPreconditioning,
    LogitNormal,
    Options,
    RectifiedFlow,
    UniformTime,
    time_of,
)

SCHEDULE = NoiseSchedule.scaled_linear()
SIGMA = np.logspace(-4, 4, 161)
T = SIGMA / (1 + SIGMA)
FLOW = FlowPreconditioning()
UNIFORMS = np.concatenate([[2.0**-54, 1e-9], (np.arange(999) + 0.5) / 999, [1 - 2.0**-53]])


class TestContract(PluginContract):
    plugin = "rectified_flow"
    options = {"times": "uniform"}


def built(**options: Any) -> DiffusionModel:
    """A model of numbers alone, as the plugin leaves it."""
    return tiny_hooks(RectifiedFlow(Options(**options))).build_model()


# ---- preconditioning


def test_the_network_sees_the_line_and_learns_its_direction() -> None:
    """Input (1 - t) z + t n, target n - z, weight 1, told 1000 t."""
    six = coefficients(FLOW, SIGMA, FLOW.loss_weight(SIGMA))
    np.testing.assert_allclose(six.p, 1 - T, rtol=1e-12)
    np.testing.assert_allclose(six.q, T, rtol=1e-12)
    np.testing.assert_allclose(six.a, -1.0, rtol=1e-12)
    np.testing.assert_allclose(six.b, 1.0, rtol=1e-12)
    np.testing.assert_allclose(six.w, 1.0, rtol=1e-12)
    np.testing.assert_allclose(six.c_noise, 1000 * T, rtol=1e-12)


def test_the_loss_is_conditional_flow_matching_s() -> None:
    """Any network, any t: |F((1 - t) z + t n, 1000 t) - (n - z)|^2, a loss a sample."""
    random = np.random.default_rng(3)
    t = random.uniform(0.001, 0.999, 50)[:, None]
    z, n = random.normal(size=(2, 50, 16))

    def network(x: np.ndarray, told: np.ndarray) -> np.ndarray:
        return np.tanh(x + told / 500) - 0.3 * x * told / 1000

    theirs = ((network((1 - t) * z + t * n, 1000 * t) - (n - z)) ** 2).mean(axis=1)
    sigma = (t / (1 - t))[:, 0]
    six = coefficients(FLOW, sigma, FLOW.loss_weight(sigma))
    p, q, a, b, told = (row[:, None] for row in (six.p, six.q, six.a, six.b, six.c_noise))
    ours = six.w * ((network(p * z + q * n, told) - (a * z + b * n)) ** 2).mean(axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_the_true_direction_gives_back_the_latent() -> None:
    z, n = np.random.default_rng(4).normal(size=(2, 6))
    for sigma in (0.01, 1.0, 50.0):
        np.testing.assert_allclose(denoise(FLOW, z + sigma * n, sigma, n - z), z, atol=1e-12)


def test_one_minus_c_skip_does_not_cancel() -> None:
    np.testing.assert_allclose(FLOW.one_minus_c_skip(SIGMA), 1 - FLOW.c_skip(SIGMA), rtol=1e-11)
    tiny = np.array([1e-17])
    assert 1 - FLOW.c_skip(tiny)[0] == 0  # what the subtraction would give
    np.testing.assert_allclose(FLOW.one_minus_c_skip(tiny), tiny, rtol=1e-12)


def test_time_holds_from_no_noise_to_nothing_else() -> None:
    sigma = np.array([0.0, 1e-320, 1.0, 1e300, np.inf])
    np.testing.assert_allclose(time_of(sigma), [0.0, 0.0, 0.5, 1.0, 1.0], atol=1e-300)


def test_the_scheduler_is_one_that_diffusers_sdxl_pipeline_takes() -> None:
    """The keys are those of diffusers 0.42.1, whose FlowMatchEulerDiscreteScheduler has neither
    the scale_model_input nor the init_noise_sigma that its SDXL pipeline uses."""
    assert FLOW.scheduler_config() == {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
        "num_train_timesteps": 1000,
    }


# ---- noise levels

DISTRIBUTIONS = {
    "paper": LogitNormal(SCHEDULE, 0.0, 1.0),
    "noisier": LogitNormal(SCHEDULE, 0.7, 0.5),
    "uniform": UniformTime(SCHEDULE),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=list(DISTRIBUTIONS))
def test_cdf_and_quantile_undo_each_other(distribution: NoiseDistribution) -> None:
    sigma = distribution.quantile(UNIFORMS)
    assert np.isfinite(sigma).all()
    assert (np.diff(sigma) > 0).all()
    np.testing.assert_allclose(distribution.cdf(sigma), UNIFORMS, rtol=1e-12)
    ends = distribution.cdf(np.array([0.0, np.inf]))
    assert ends.tolist() == [0.0, 1.0]


def density_of_the_paper(t: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Esser et al. 2024, eq. 19."""
    logit = np.log(t / (1 - t))
    scale = 1 / (std * np.sqrt(2 * np.pi)) / (t * (1 - t))
    return scale * np.exp(-((logit - mean) ** 2) / (2 * std**2))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.0, 2.0)])
def test_t_has_the_density_of_the_paper(mean: float, std: float) -> None:
    """The CDF's growth over each thousandth of t is the integral of eq. 19 there."""
    edges = np.linspace(0.05, 0.95, 901)
    ours = np.diff(LogitNormal(SCHEDULE, mean, std).cdf(edges / (1 - edges)))
    middle = (edges[:-1] + edges[1:]) / 2
    corners = density_of_the_paper(edges, mean, std)
    simpson = (corners[:-1] + 4 * density_of_the_paper(middle, mean, std) + corners[1:]) / 6
    np.testing.assert_allclose(ours, simpson * np.diff(edges), rtol=1e-6, atol=1e-13)


def test_the_quantile_is_a_sigmoid_of_scipy_s_normal() -> None:
    ours = LogitNormal(SCHEDULE, 0.7, 0.5).quantile(UNIFORMS)
    np.testing.assert_allclose(
        ours / (1 + ours), special.expit(0.7 + 0.5 * special.ndtri(UNIFORMS)), rtol=1e-12
    )


def test_uniform_times_are_uniform() -> None:
    sigma = UniformTime(SCHEDULE).quantile(UNIFORMS)
    np.testing.assert_allclose(sigma / (1 + sigma), UNIFORMS, rtol=1e-12)
    assert UniformTime(SCHEDULE).expect(time_of) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=list(DISTRIBUTIONS))
def test_it_can_be_reweighted(distribution: NoiseDistribution) -> None:
    """As timestep_bias does: twice the odds of the noisier half of the timesteps."""
    border = SCHEDULE.sigma(499.5)
    share = 1 - distribution.cdf(border)
    biased = distribution.reweighted(np.where(np.arange(1000) < 500, 1.0, 2.0))
    assert 1 - biased.cdf(border) == pytest.approx(2 * share / (1 + share), rel=1e-9)


def test_one_object_as_long_as_the_schedule_is_one() -> None:
    plugin, model = RectifiedFlow(Options()), built()
    assert plugin.sample_timesteps(model) is plugin.sample_timesteps(model)
    assert isinstance(plugin.sample_timesteps(model), LogitNormal)
    assert isinstance(RectifiedFlow(Options(times="uniform")).sample_timesteps(model), UniformTime)


# ---- sampling

MEAN, SPREAD = 0.8, 0.5


def exact_network(x: np.ndarray, told: float) -> np.ndarray:
    """E[n - z | x_t = x] for z ~ N(MEAN, SPREAD^2), from the covariances of z, n and x_t."""
    t = told / 1000
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def exact_denoiser(x: np.ndarray, sigma: float) -> np.ndarray:
    told, scale = float(FLOW.c_noise(np.array(sigma))), float(FLOW.c_in(np.array(sigma)))
    return denoise(FLOW, x, sigma, exact_network(scale * x, told))


def drawn(sampler: str, sigmas: np.ndarray) -> np.ndarray:
    """Images of 40,000 values from noise, with the host's sampler."""
    shape = (1, 1, 200, 200)
    noise = np.random.default_rng(2).standard_normal(shape)

    def fresh(index: int) -> np.ndarray:
        return np.random.default_rng([5, index]).standard_normal(shape)

    return sample(sampler, exact_denoiser, noise * sigmas[0], sigmas, fresh)


@pytest.mark.parametrize("times", ["logit_normal", "uniform"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_becomes_the_data(sampler: str, times: str) -> None:
    """Over the model's own noise levels: mean and deviation lie within 4 standard errors, and what
    the first of them, x = sigma_max * n without the data, and the steps leave."""
    model = built(times=times)
    steps = 400 if sampler.startswith("euler") else 80
    images = drawn(sampler, sampling_sigmas(model, steps))
    error = SPREAD / np.sqrt(images.size)
    unseen = MEAN * SPREAD / model.sampling.sigma_max
    assert images.mean() == pytest.approx(MEAN, abs=4 * error + unseen + 0.02 * SPREAD)
    assert images.std() == pytest.approx(SPREAD, abs=4 * error + 0.02 * SPREAD)


def test_euler_s_step_in_sigma_is_euler_s_step_in_t() -> None:
    """x_t + (t' - t) F, as flow models are sampled, is the host's Euler on x = (1 + sigma) x_t."""
    t = np.linspace(0.95, 0.0, 20)
    x = start = np.random.default_rng(6).standard_normal((1, 1, 4, 4))
    for now, then in zip(t[:-1], t[1:], strict=True):
        x = x + (then - now) * exact_network(x, 1000 * now)
    sigmas = t / (1 - t)
    ours = sample("euler", exact_denoiser, start * (1 + sigmas[0]), sigmas, lambda _: start)
    np.testing.assert_allclose(ours, x, rtol=1e-9, atol=1e-12)


def test_its_own_sampler_takes_the_steps_of_the_exported_scheduler() -> None:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) on x_t itself, with
    alpha = 1 - t, sigma = t and lambda = ln(alpha / sigma); the last step gives D."""
    t = np.linspace(0.95, 0.05, 8)
    lambdas = np.log((1 - t) / t)
    x = start = np.random.default_rng(7).standard_normal((1, 1, 4, 4))
    latents = []
    for i, now in enumerate(t):
        latents.append(x - now * exact_network(x, 1000 * now))
        if i == len(t) - 1:
            break
        h, guess = lambdas[i + 1] - lambdas[i], latents[-1]
        if i > 0:
            r = (lambdas[i] - lambdas[i - 1]) / h
            guess = (1 + 1 / (2 * r)) * latents[-1] - 1 / (2 * r) * latents[-2]
        x = t[i + 1] / now * x - (1 - t[i + 1]) * np.expm1(-h) * guess
    sigmas = np.append(t / (1 - t), 0.0)
    own = built().sampling.sampler
    ours = sample(own, exact_denoiser, start * (1 + sigmas[0]), sigmas, lambda _: start)
    np.testing.assert_allclose(ours, latents[-1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"times": "uniform"}, {"mean": 1.0, "std": 0.3}])
def test_it_samples_where_it_was_trained(options: dict[str, Any]) -> None:
    """All but one draw in five hundred lie between the two ends, one in a thousand beyond each."""
    hooks = tiny_hooks(RectifiedFlow(Options(**options)))
    model, distribution = hooks.build_model(), hooks.sample_timesteps()
    ends = np.array([model.sampling.sigma_min, model.sampling.sigma_max])
    np.testing.assert_allclose(distribution.cdf(ends), [0.001, 0.999], rtol=1e-9)


def test_options_without_effect_are_named() -> None:
    assert RectifiedFlow(Options(mean=0.5, std=2.0)).notes() == []
    assert RectifiedFlow(Options(times="uniform")).notes() == []
    assert RectifiedFlow(Options(times="uniform", mean=0.5, std=2.0)).notes() == [
        "mean has no effect with times uniform",
        "std has no effect with times uniform",
    ]
