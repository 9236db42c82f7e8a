"""EDM: the coefficients of the paper's Table 1, its log-normal noise, and its place in a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sdxl_host import DiffusionModel, NoiseSchedule, PluginError, SamplingDefaults
from sdxl_host.testing import (
    HostError,
    TinyHooks,
    coefficients,
    make_options,
    tiny_hooks,
    tiny_model,
)

from sdxl_edm import EDM, EDMPreconditioning, LogNormal, Options

SCHEDULE = NoiseSchedule.scaled_linear()
SIGMA = np.logspace(-4, 4, 161)  # SNR from 1e8 to 1e-8


def run(options: Options | None = None, model: DiffusionModel | None = None) -> TinyHooks:
    return tiny_hooks(EDM(options or Options()), model=model)


def own_weights(hooks: TinyHooks, sigma: np.ndarray) -> np.ndarray:
    """The factor on the network's own squared error, which the hooks come to."""
    weights = hooks.weight_loss(hooks.noise_at(sigma))
    return coefficients(hooks.build_model().preconditioning, sigma, weights).w


# ---- preconditioning


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_the_coefficients_are_those_of_table_1(sd: float) -> None:
    edm, s = EDMPreconditioning(sd), SIGMA
    np.testing.assert_allclose(edm.c_skip(s), sd**2 / (s**2 + sd**2), rtol=1e-14)
    np.testing.assert_allclose(edm.c_out(s), s * sd / np.sqrt(s**2 + sd**2), rtol=1e-14)
    np.testing.assert_allclose(edm.c_in(s), 1 / np.sqrt(s**2 + sd**2), rtol=1e-14)
    np.testing.assert_allclose(edm.c_noise(s), np.log(s) / 4, rtol=1e-14)
    np.testing.assert_allclose(edm.loss_weight(s), (s**2 + sd**2) / (s * sd) ** 2, rtol=1e-14)
    assert all(np.isfinite(f(s)).all() for f in (edm.c_skip, edm.c_out, edm.c_in, edm.loss_weight))


def nvlabs_loss(
    network: Any, y: np.ndarray, n: np.ndarray, sigma: np.ndarray, sigma_data: float
) -> np.ndarray:
    """EDMLoss over EDMPrecond of NVlabs' edm, a loss a sample, with their noise n * sigma given."""
    noisy = y + n * sigma
    skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    scale_in = 1 / (sigma_data**2 + sigma**2) ** 0.5
    denoised = skip * noisy + out * network(scale_in * noisy, np.log(sigma) / 4)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight * (denoised - y) ** 2).mean(axis=-1)


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_the_loss_is_that_of_the_paper_s_code(sd: float) -> None:
    """Any network, any sigma: the six numbers give EDMLoss."""
    random = np.random.default_rng(3)
    sigma = np.exp(random.normal(-1.2, 1.2, 40))[:, None]
    z, n = random.normal(size=(2, 40, 16))

    def network(x: np.ndarray, c_noise: np.ndarray) -> np.ndarray:
        return np.tanh(x + c_noise) - 0.3 * x * c_noise

    hooks = run(Options(sigma_data=sd))
    model = hooks.build_model()
    weights = hooks.weight_loss(hooks.noise_at(sigma[:, 0]))
    six = coefficients(model.preconditioning, sigma[:, 0], weights)
    p, q, a, b, c_noise = (x[:, None] for x in (six.p, six.q, six.a, six.b, six.c_noise))
    error = network(p * z + q * n, c_noise) - (a * z + b * n)
    ours = six.w * (error**2).mean(axis=-1)
    np.testing.assert_allclose(ours, nvlabs_loss(network, z, n, sigma, sd), rtol=1e-9)


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_input_and_target_have_unit_variance_and_the_weight_is_one(sd: float) -> None:
    """With Var z = sd^2 and Var n = 1: the requirements of the paper's appendix B.6."""
    edm = EDMPreconditioning(sd)
    six = coefficients(edm, SIGMA, edm.loss_weight(SIGMA))
    np.testing.assert_allclose((six.p * sd) ** 2 + six.q**2, 1.0, rtol=1e-12)
    np.testing.assert_allclose((six.a * sd) ** 2 + six.b**2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(six.w, 1.0, rtol=1e-12)


def test_c_skip_minimises_c_out() -> None:
    """Appendix B.6: c_skip is where c_out^2 = (1 - c_skip)^2 sd^2 + c_skip^2 s^2 is smallest."""
    sd = 0.5
    edm = EDMPreconditioning(sd)

    def c_out_squared(c_skip: np.ndarray) -> np.ndarray:
        return (1 - c_skip) ** 2 * sd**2 + c_skip**2 * SIGMA**2

    skip = edm.c_skip(SIGMA)
    np.testing.assert_allclose(c_out_squared(skip), edm.c_out(SIGMA) ** 2, rtol=1e-7)
    assert (c_out_squared(skip) <= c_out_squared(skip * 1.01)).all()
    assert (c_out_squared(skip) <= c_out_squared(skip * 0.99)).all()


def test_one_minus_c_skip_does_not_cancel() -> None:
    edm = EDMPreconditioning(0.5)
    middle = np.logspace(-1, 3, 50)
    np.testing.assert_allclose(
        edm.one_minus_c_skip(middle), 1 - edm.c_skip(middle), rtol=1e-13, atol=1e-15
    )
    tiny = np.array([1e-9])
    assert 1 - edm.c_skip(tiny)[0] == 0  # what the subtraction would give
    np.testing.assert_allclose(edm.one_minus_c_skip(tiny), (tiny / 0.5) ** 2, rtol=1e-12)


def test_the_scheduler_is_diffusers_edm_euler_with_our_numbers() -> None:
    """The keys are those of diffusers 0.42.1; the values are what this plugin samples with."""
    config = EDMPreconditioning(0.7).scheduler_config()
    assert config == {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.7,
        "sigma_schedule": "karras",
        "prediction_type": "epsilon",
        "rho": 7.0,
        "final_sigmas_type": "zero",
    }
    sampling = run().build_model().sampling
    assert (sampling.sigma_min, sampling.sigma_max) == (config["sigma_min"], config["sigma_max"])


# ---- noise levels


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4833, 1.1943)])
def test_the_distribution_is_scipy_s_log_normal(mean: float, std: float) -> None:
    ours, theirs = LogNormal(SCHEDULE, mean, std), stats.lognorm(s=std, scale=np.exp(mean))
    u = (np.arange(999) + 0.5) / 999
    np.testing.assert_allclose(ours.quantile(u), theirs.ppf(u), rtol=1e-10)
    np.testing.assert_allclose(ours.cdf(SIGMA), theirs.cdf(SIGMA), rtol=1e-10, atol=1e-16)


def test_cdf_and_quantile_undo_each_other() -> None:
    ours = LogNormal(SCHEDULE, -1.2, 1.2)
    u = np.concatenate([[2.0**-54, 1e-12], (np.arange(1000) + 0.5) / 1000, [1 - 2.0**-53]])
    np.testing.assert_allclose(ours.cdf(ours.quantile(u)), u, rtol=0, atol=1e-10)
    sigma = np.exp(np.linspace(-7, 4, 200))
    np.testing.assert_allclose(ours.quantile(ours.cdf(sigma)), sigma, rtol=1e-8)


def test_the_logarithm_of_sigma_has_the_mean_and_deviation_asked_for() -> None:
    ours = LogNormal(SCHEDULE, -1.2, 1.2)
    mean = ours.expect(np.log)
    variance = ours.expect(lambda s: (np.log(s) + 1.2) ** 2)
    assert mean == pytest.approx(-1.2, abs=1e-10)
    assert variance == pytest.approx(1.2**2, rel=1e-3)
    assert ours.quantile(np.array([0.5]))[0] == pytest.approx(np.exp(-1.2), rel=1e-14)


@pytest.mark.parametrize(
    ("mean", "std", "below", "above"), [(-1.2, 1.2, 0.50, 0.16), (0.4833, 1.1943, 0.079, 0.657)]
)
def test_how_much_of_the_draw_is_nearly_clean(
    mean: float, std: float, below: float, above: float
) -> None:
    ours = LogNormal(SCHEDULE, mean, std)
    assert ours.cdf(np.array(0.3)) == pytest.approx(below, abs=5e-3)
    assert 1 - ours.cdf(np.array(1.0)) == pytest.approx(above, abs=5e-3)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4833, 1.1943), (4.0, 0.5), (-4.0, 1.4)])
def test_restricted_it_is_the_log_normal_given_that_sigma_lies_within(
    mean: float, std: float
) -> None:
    """P(sigma <= s | low <= sigma <= high), by scipy's truncated normal."""
    low, high = SCHEDULE.sigmas[[0, -1]]
    ours = LogNormal(SCHEDULE, mean, std, low, high)
    theirs = stats.truncnorm((np.log(low) - mean) / std, (np.log(high) - mean) / std, mean, std)
    u = np.concatenate([[2.0**-54], (np.arange(999) + 0.5) / 999, [1 - 2.0**-53]])
    drawn = ours.quantile(u)
    assert ((low <= drawn) & (drawn <= high)).all()
    np.testing.assert_allclose(np.log(drawn), theirs.ppf(u), rtol=1e-9, atol=1e-9)
    inside = np.exp(np.linspace(np.log(low), np.log(high), 200))
    np.testing.assert_allclose(ours.cdf(inside), theirs.cdf(np.log(inside)), atol=1e-12)
    np.testing.assert_allclose(ours.cdf(drawn), u, atol=1e-10)
    assert ours.cdf(np.array([low / 2, low, high, 2 * high])) == pytest.approx([0, 0, 1, 1])
    assert ours.cdf(np.array(low / 2)) == 0
    assert ours.cdf(np.array(2 * high)) == 1


def test_unrestricted_is_the_same_to_the_bit() -> None:
    from scipy.special import ndtri

    u = (np.arange(999) + 0.5) / 999
    assert np.array_equal(LogNormal(SCHEDULE, -1.2, 1.2).quantile(u), np.exp(-1.2 + 1.2 * ndtri(u)))


def test_a_restriction_that_leaves_nothing_is_refused() -> None:
    hooks = run(Options(parametrization="native", p_mean=-10.0))
    with pytest.raises(PluginError, match=r"p_mean -10 and p_std 1\.2 leave .* 0\.02917 to 14\.61"):
        hooks.sample_timesteps(step=1)
    LogNormal(SCHEDULE, -100.0, 1.2)


def test_a_millionth_of_the_draws_is_enough_to_restrict_to() -> None:
    low = SCHEDULE.sigmas[0]
    # Far below the schedule only the lower bound counts: P(ln sigma > ln low) = share.
    for share in (0.995e-6, 1.005e-6):
        mean = np.log(low) - 1.2 * stats.norm.isf(share)
        if share > 1e-6:
            LogNormal(SCHEDULE, mean, 1.2, low, SCHEDULE.sigmas[-1])
        else:
            with pytest.raises(PluginError, match=r"leave 9\.9e-07|leave 1\.0e-06"):
                LogNormal(SCHEDULE, mean, 1.2, low, SCHEDULE.sigmas[-1])


# ---- presets


def test_the_preset_sdxl_holds_the_moments_of_its_schedule() -> None:
    preset = Options(preset="sdxl").constants()
    assert SCHEDULE.log_sigmas.mean() == pytest.approx(preset["p_mean"], abs=5e-5)
    assert SCHEDULE.log_sigmas.std() == pytest.approx(preset["p_std"], abs=5e-5)
    assert preset["sigma_data"] == 1.0
    assert preset == {"sigma_data": 1.0, "p_mean": 0.4833, "p_std": 1.1943}


def test_the_paper_s_constants_are_the_default_and_a_preset() -> None:
    paper = {"sigma_data": 0.5, "p_mean": -1.2, "p_std": 1.2}
    assert Options().constants() == paper
    assert Options(preset="paper").constants() == paper
    assert Options(p_mean=0.0).constants() == {**paper, "p_mean": 0.0}


@pytest.mark.parametrize("preset", ["paper", "sdxl"])
@pytest.mark.parametrize("name", ["sigma_data", "p_mean", "p_std"])
def test_a_constant_beside_a_preset_must_be_its_own(preset: Any, name: str) -> None:
    """Also where the value given is the paper's default: it was said, and it contradicts."""
    own = Options(preset=preset).constants()
    other = {"paper": 0.7, "sdxl": Options().constants()[name]}[preset]
    assert Options(preset=preset, **{name: own[name]}).constants() == own
    values = {"preset": preset, name: other}
    with pytest.raises(HostError, match=rf"plugins\.edm: {name} is {own[name]} in the preset"):
        make_options(EDM, values)


@pytest.mark.parametrize(
    ("mean", "std", "sd", "factor"), [(-1.2, 1.2, 0.5, 0.207), (0.4833, 1.1943, 1.0, 0.295)]
)
def test_min_snr_with_gamma_5_shrinks_the_loss_by_a_known_factor(
    mean: float, std: float, sd: float, factor: float
) -> None:
    edm = EDMPreconditioning(sd)
    mean_factor = LogNormal(SCHEDULE, mean, std).expect(
        lambda s: np.minimum(s**-2.0, 5.0) * edm.c_out(s) ** 2
    )
    assert mean_factor == pytest.approx(factor, abs=5e-4)


# ---- in a run


def test_it_replaces_preconditioning_and_sampling_and_nothing_else() -> None:
    plain = tiny_model()
    model = run(model=plain).build_model()
    assert model.preconditioning.name == "edm"
    assert model.sampling == SamplingDefaults(
        "karras", sigma_min=0.002, sigma_max=80.0, sampler="heun"
    )
    assert model.schedule is plain.schedule
    assert model.changes == ()


def test_it_claims_the_noise_levels_and_hands_out_one_object() -> None:
    hooks = run()
    model = hooks.build_model()
    first = hooks.sample_timesteps(step=1)
    assert isinstance(first, LogNormal)
    assert first.schedule is model.schedule
    assert hooks.sample_timesteps(step=2) is first
    assert hooks.chain("sample_timesteps") == "edm"
    plugin, few = EDM(Options()), NoiseSchedule.scaled_linear(num_timesteps=10)
    for other in (model, replace(model, schedule=few)):
        assert plugin.sample_timesteps(other).schedule is other.schedule


def test_its_loss_weight_comes_through_the_host_s_default() -> None:
    hooks, s = run(), np.array([0.1, 1.0, 10.0])
    weight = hooks.weight_loss(hooks.noise_at(s))
    np.testing.assert_allclose(weight, (s**2 + 0.25) / (s * 0.5) ** 2, rtol=1e-14)
    assert hooks.chain("weight_loss") == "host"


def test_every_option_has_an_effect() -> None:
    def result(**options: Any) -> tuple[float, float, float, float]:
        hooks = run(Options(**options))
        model = hooks.build_model()
        draws = hooks.sample_timesteps(step=1).quantile(np.array([0.3, 0.5]))
        skip = model.preconditioning.c_skip(np.array(1.0))
        weight = round(own_weights(hooks, np.array([2.0]))[0], 12)
        return float(skip), *draws, weight

    skip, low, median, weight = result()
    assert (skip, low, median, weight) == result(sigma_data=0.5, p_mean=-1.2, p_std=1.2)
    assert (skip, low, median, weight) == result(preset="paper")
    assert result(sigma_data=1.0) == (0.5, low, median, weight)
    assert result(p_mean=0.0)[::2] == (skip, 1.0)
    assert result(p_mean=0.0)[1] > low
    assert result(p_std=2.0)[::2] == (skip, median)
    assert result(p_std=2.0)[1] < low
    sdxl = result(sigma_data=1.0, p_mean=0.4833, p_std=1.1943)
    assert result(preset="sdxl") == sdxl
    assert sdxl[2] == pytest.approx(np.exp(0.4833))
    native = result(parametrization="native")
    assert native[0] == 1.0
    assert native[2] != median
    assert native[3] == 1.0
    assert result(parametrization="native", weighting="edm") == (*native[:3], 17.0)
    assert result(parametrization="native", weighting="edm", sigma_data=1.0)[3] == 5.0


def test_notes_warn_of_what_pretrained_weights_make_of_c_noise() -> None:
    hooks = run()
    (line,) = hooks.notes()
    assert line.startswith("edm: ")
    assert "timesteps 0 to 999" in line
    central = LogNormal(SCHEDULE, -1.2, 1.2).quantile(np.array([0.001, 0.5, 0.999]))
    assert (np.abs(EDMPreconditioning(0.5).c_noise(central)) < 1.3).all()


def test_notes_name_options_without_effect() -> None:
    def notes(**options: Any) -> list[str]:
        return run(Options(**options)).notes()

    assert notes(weighting="edm")[1:] == [
        "edm: weighting edm has no effect with parametrization edm"
    ]
    assert notes(parametrization="native") == []
    assert notes(parametrization="native", preset="sdxl") == []
    assert notes(parametrization="native", sigma_data=0.7) == [
        "edm: sigma_data has no effect with parametrization native and weighting own"
    ]
    # Both are true: nothing changes.
    assert np.array_equal(
        own_weights(run(Options(weighting="edm")), SIGMA), own_weights(run(), SIGMA)
    )
    idle = run(Options(parametrization="native", sigma_data=0.7))
    np.testing.assert_allclose(own_weights(idle, SIGMA), 1.0, rtol=1e-15)


# ---- the native parametrisation


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("weighting", ["own", "edm"])
def test_native_keeps_the_configured_preconditioning(prediction: Any, weighting: Any) -> None:
    plain = tiny_model(prediction)
    configured, weight_before = plain.preconditioning, plain.preconditioning.loss_weight(SIGMA)
    hooks = run(Options(parametrization="native", weighting=weighting), plain)
    model = hooks.build_model()
    assert model.sampling == plain.sampling
    ours = model.preconditioning
    assert ours.name == configured.name
    assert ours.scheduler_config() == configured.scheduler_config()
    for function in ("c_skip", "one_minus_c_skip", "c_out", "c_in", "c_noise"):
        assert np.array_equal(getattr(ours, function)(SIGMA), getattr(configured, function)(SIGMA))
    if weighting == "own":
        assert model is plain
    # The configured object is left as it was.
    assert np.array_equal(configured.loss_weight(SIGMA), weight_before)


def test_native_draws_from_the_schedule_s_range_alone() -> None:
    hooks = run(Options(parametrization="native"))
    model = hooks.build_model()
    drawn = hooks.sample_timesteps(step=1)
    assert hooks.sample_timesteps(step=2) is drawn
    ends = drawn.quantile(np.array([1e-12, 1 - 1e-12]))
    np.testing.assert_allclose(ends, SCHEDULE.sigmas[[0, -1]], rtol=1e-7)
    timestep = model.preconditioning.c_noise(drawn.quantile((np.arange(9999) + 0.5) / 9999))
    # No two draws meet at an end of the scale, where t(sigma) would be clamped.
    assert (np.diff(timestep) > 0).all()
    outside = LogNormal(SCHEDULE, -1.2, 1.2).cdf(SCHEDULE.sigmas[[0, -1]])
    assert outside[0] + 1 - outside[1] > 0.02


def test_edm_s_weight_on_native_eps() -> None:
    """w = 1 + (s / sd)^2; the figures of 200,000 evenly spaced draws with the paper's constants."""
    hooks = run(Options(parametrization="native", weighting="edm"))
    drawn = hooks.sample_timesteps()
    sigma = drawn.quantile((np.arange(200_000) + 0.5) / 200_000)
    weights = own_weights(hooks, sigma)
    np.testing.assert_allclose(weights, 1 + (sigma / 0.5) ** 2, rtol=1e-12)
    assert weights.mean() == pytest.approx(6.3, abs=0.05)
    assert weights.max() == pytest.approx(853, abs=0.5)
    heaviest = np.sort(weights)[-2000:]
    assert heaviest.sum() / weights.sum() == pytest.approx(0.35, abs=5e-3)
    (line,) = hooks.notes()
    assert line.startswith("edm: warning: ")
    assert "(eps) weighs 6.3 on average and up to 855," in line


def test_edm_s_weight_on_native_v() -> None:
    """lambda * c_out^2 = (s^2 + sd^2) / (sd^2 * (s^2 + 1))."""
    hooks = run(Options(parametrization="native", weighting="edm"), tiny_model("v"))
    expected = (SIGMA**2 + 0.25) / (0.25 * (SIGMA**2 + 1))
    np.testing.assert_allclose(own_weights(hooks, SIGMA), expected, rtol=1e-12)


# ---- options


def test_options_come_from_a_config_section() -> None:
    assert make_options(EDM, {}) == Options()
    assert Options() == Options("edm", "own", "none", None, None, None)
    built = make_options(EDM, {"p_mean": 1, "p_std": None})
    assert built.constants() == {"sigma_data": 0.5, "p_mean": 1.0, "p_std": 1.2}
    tiny = make_options(EDM, {"sigma_data": 1e-6, "p_std": 1e-6})
    assert tiny.constants() == {"sigma_data": 1e-6, "p_mean": -1.2, "p_std": 1e-6}
    bad_values = [
        ("sigma_data", 0),
        ("sigma_data", -1.0),
        ("p_std", 0.0),
        ("p_mean", "low"),
        ("parametrization", "eps"),
        ("weighting", "none"),
        ("preset", "cosxl"),
    ]
    for key, bad in bad_values:
        with pytest.raises(HostError, match=rf"plugins\.edm\.{key}"):
            make_options(EDM, {key: bad})
