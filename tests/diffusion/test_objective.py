"""The six numbers of an objective, for eps, v and EDM, and what must hold between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdxl_host.diffusion.distributions import DiscreteDistribution
from sdxl_host.diffusion.objective import Coefficients, NoiseLevels, coefficients, denoise
from sdxl_host.diffusion.preconditioning import (
    EpsPreconditioning,
    Preconditioning,
    VPreconditioning,
    eps_weighting,
    unit_weighting,
    v_weighting,
)
from sdxl_host.diffusion.schedule import NoiseSchedule

GOLDEN = Path(__file__).parents[1] / "golden"
EXACT = 1e-10
SCHEDULE = NoiseSchedule.scaled_linear()
SIGMA = np.geomspace(1e-3, 1e3, 61)
SIGMA_DATA = 0.5


class EDM(Preconditioning):
    """Karras et al. 2022, table 1, sigma_data 0.5."""

    name = "edm"

    def c_skip(self, sigma):
        return SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)

    def c_out(self, sigma):
        return sigma * SIGMA_DATA / np.sqrt(sigma**2 + SIGMA_DATA**2)

    def c_in(self, sigma):
        return 1 / np.sqrt(sigma**2 + SIGMA_DATA**2)

    def c_noise(self, sigma):
        return 0.25 * np.log(sigma)


EPS, V = EpsPreconditioning(SCHEDULE), VPreconditioning(SCHEDULE)
ALL = pytest.mark.parametrize("preconditioning", [EPS, V, EDM()], ids=lambda p: p.name)
S2, SD2 = SIGMA**2, SIGMA_DATA**2

# c_skip, c_out, c_in, c_noise and lambda of each row of the table, at SIGMA.
TABLE = {
    "eps": (EPS, np.ones(61), -SIGMA, 1 / np.sqrt(S2 + 1), SCHEDULE.timestep(SIGMA), 1 / S2),
    "v": (
        V,
        1 / (S2 + 1),
        -SIGMA / np.sqrt(S2 + 1),
        1 / np.sqrt(S2 + 1),
        SCHEDULE.timestep(SIGMA),
        (S2 + 1) / S2,
    ),
    "edm": (
        EDM(),
        SD2 / (S2 + SD2),
        SIGMA * SIGMA_DATA / np.sqrt(S2 + SD2),
        1 / np.sqrt(S2 + SD2),
        0.25 * np.log(SIGMA),
        (S2 + SD2) / (SIGMA * SIGMA_DATA) ** 2,
    ),
}


@pytest.mark.parametrize("row", TABLE)
def test_table_of_preconditioning(row):
    preconditioning, c_skip, c_out, c_in, c_noise, weight = TABLE[row]
    assert preconditioning.name == row
    np.testing.assert_allclose(preconditioning.c_skip(SIGMA), c_skip, rtol=1e-12)
    np.testing.assert_allclose(preconditioning.c_out(SIGMA), c_out, rtol=1e-12)
    np.testing.assert_allclose(preconditioning.c_in(SIGMA), c_in, rtol=1e-12)
    np.testing.assert_allclose(preconditioning.c_noise(SIGMA), c_noise, rtol=1e-12)
    np.testing.assert_allclose(preconditioning.loss_weight(SIGMA), weight, rtol=1e-12)


@ALL
def test_own_weight_is_the_networks_plain_squared_error(preconditioning):
    """lambda * c_out^2 = 1."""
    product = preconditioning.loss_weight(SIGMA) * preconditioning.c_out(SIGMA) ** 2
    np.testing.assert_allclose(product, np.ones(61), rtol=1e-12)


@ALL
def test_one_minus_c_skip_is_just_that_without_cancelling(preconditioning):
    """1 - c_skip, and for eps and v relatively exact at sigma 1e-6 (0 and s^2 / (s^2 + 1))."""
    expected = 1 - preconditioning.c_skip(SIGMA)
    np.testing.assert_allclose(preconditioning.one_minus_c_skip(SIGMA), expected, atol=1e-15)
    assert EPS.one_minus_c_skip(np.array([1e-6])) == 0
    np.testing.assert_allclose(V.one_minus_c_skip(np.array([1e-6])), [1e-12], rtol=1e-10)


@pytest.mark.parametrize(
    ("weighting", "formula"),
    [(eps_weighting, 1 / S2), (v_weighting, 1 + 1 / S2), (unit_weighting, np.ones(61))],
)
@pytest.mark.parametrize("kind", [EpsPreconditioning, VPreconditioning])
def test_configured_weighting_replaces_the_own_one(kind, weighting, formula):
    """`weighting` is lambda on |D - z|^2 whatever the network predicts."""
    preconditioning = kind(SCHEDULE, weighting=weighting)
    np.testing.assert_allclose(preconditioning.loss_weight(SIGMA), formula, rtol=1e-12)


def test_eps_and_v_weightings_are_those_networks_own():
    np.testing.assert_allclose(EPS.loss_weight(SIGMA), eps_weighting(SIGMA), rtol=1e-12)
    np.testing.assert_allclose(V.loss_weight(SIGMA), v_weighting(SIGMA), rtol=1e-12)


def test_whole_numbers_are_read_as_floats():
    """A sigma given as an integer array gives the float64 answer."""
    for preconditioning in (EPS, V):
        for name in ("c_skip", "c_out", "c_in", "c_noise", "one_minus_c_skip", "loss_weight"):
            actual = getattr(preconditioning, name)(np.array([2, 3]))
            assert actual.dtype == np.float64
            np.testing.assert_array_equal(
                actual, getattr(preconditioning, name)(np.array([2.0, 3]))
            )


# ---- the six numbers


@ALL
def test_network_input_is_c_in_times_x(preconditioning):
    """p z + q n = c_in x, with x = z + s n."""
    z, n = images()
    six = coefficients(preconditioning, SIGMA, np.ones(61))
    x = z + column(SIGMA) * n
    expected = column(preconditioning.c_in(SIGMA)) * x
    assert_close(column(six.p) * z + column(six.q) * n, expected)


@ALL
def test_network_target_is_the_output_that_denoises_exactly(preconditioning):
    """a z + b n = (z - c_skip x) / c_out, the F for which D = z."""
    z, n = images()
    six = coefficients(preconditioning, SIGMA, np.ones(61))
    x = z + column(SIGMA) * n
    c_skip, c_out = column(preconditioning.c_skip(SIGMA)), column(preconditioning.c_out(SIGMA))
    target = column(six.a) * z + column(six.b) * n
    assert_close(c_skip * x + c_out * target, z, peak=np.abs(x).max(1, keepdims=True))
    np.testing.assert_allclose(six.a, (1 - c_skip[:, 0]) / c_out[:, 0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(six.b, -c_skip[:, 0] * SIGMA / c_out[:, 0], rtol=1e-12)


def test_eps_network_predicts_the_noise():
    """a = 0 and b = 1, so w = 1 with lambda = 1 / s^2."""
    six = coefficients(EPS, SIGMA, EPS.loss_weight(SIGMA))
    np.testing.assert_array_equal(six.a, np.zeros(61))
    np.testing.assert_allclose(six.b, np.ones(61), rtol=1e-14)
    np.testing.assert_allclose(six.w, np.ones(61), rtol=1e-14)


def test_v_network_predicts_alpha_n_minus_sigma_z():
    """v = alpha n - sigma_vp z with alpha = 1/sqrt(s^2+1) and sigma_vp = s/sqrt(s^2+1)."""
    six = coefficients(V, SIGMA, V.loss_weight(SIGMA))
    alpha = 1 / np.sqrt(S2 + 1)
    np.testing.assert_allclose(six.a, -SIGMA * alpha, rtol=1e-12)
    np.testing.assert_allclose(six.b, alpha, rtol=1e-12)
    np.testing.assert_allclose(six.w, np.ones(61), rtol=1e-12)


@pytest.mark.parametrize("preconditioning", [EPS, V], ids=lambda p: p.name)
def test_input_of_eps_and_v_preserves_the_variance(preconditioning):
    """p^2 + q^2 = 1."""
    six = coefficients(preconditioning, SIGMA, np.ones(61))
    np.testing.assert_allclose(six.p**2 + six.q**2, np.ones(61), rtol=1e-12)


def test_input_and_target_of_edm_have_unit_variance():
    """For data of deviation sigma_data: var(p z + q n) = var(a z + b n) = 1."""
    six = coefficients(EDM(), SIGMA, np.ones(61))
    np.testing.assert_allclose(SD2 * six.p**2 + six.q**2, np.ones(61), rtol=1e-12)
    np.testing.assert_allclose(SD2 * six.a**2 + six.b**2, np.ones(61), rtol=1e-9)


@ALL
def test_noise_condition_stays_a_float(preconditioning):
    """c_noise is what the preconditioning says, not cut to an integer."""
    six = coefficients(preconditioning, SIGMA, np.ones(61))
    assert six.c_noise.dtype == np.float64
    np.testing.assert_array_equal(six.c_noise, preconditioning.c_noise(SIGMA))
    assert (six.c_noise != np.floor(six.c_noise)).any()


def test_stacked_is_the_six_rows_in_float32():
    rows = [np.arange(3) + 10.0 * index for index in range(6)]
    stacked = Coefficients(*rows).stacked()
    assert stacked.dtype == np.float32
    np.testing.assert_array_equal(stacked, rows)
    fields = Coefficients.__dataclass_fields__
    assert list(fields) == ["p", "q", "a", "b", "w", "c_noise"]


@ALL
def test_every_number_is_finite_at_the_ends_of_snr(preconditioning):
    """SNR from 1e-8 to 1e8 gives finite numbers, in float32 too."""
    sigma = np.array([1e-4, 1e4])
    six = coefficients(preconditioning, sigma, preconditioning.loss_weight(sigma))
    assert np.isfinite(six.stacked()).all()


# ---- law 1: the parametrisation does not matter


def images(count: int = 61, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """z and n, (G, size) float64."""
    generator = np.random.default_rng(11)
    return generator.normal(size=(count, size)), generator.normal(size=(count, size))


def column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[:, None]


def assert_close(actual, expected, peak=None):
    peak = np.abs(expected).max() if peak is None else peak
    assert (np.abs(actual - expected) <= EXACT * peak).all()


def any_denoiser(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Some function of x and sigma that no parametrisation favours."""
    scaled = x / np.sqrt(sigma**2 + 1)
    return np.tanh(scaled + 0.3) + 0.2 * np.sin(3 * scaled) * np.exp(-sigma)


def loss_of_six_numbers(preconditioning, z, n, weight) -> np.ndarray:
    """(G,) what the compiled step computes, with F the network behind `any_denoiser`."""
    six = coefficients(preconditioning, SIGMA, weight)
    network_input = column(six.p) * z + column(six.q) * n
    x = network_input / column(preconditioning.c_in(SIGMA))
    denoised = any_denoiser(x, column(SIGMA))
    c_skip, c_out = column(preconditioning.c_skip(SIGMA)), column(preconditioning.c_out(SIGMA))
    output = (denoised - c_skip * x) / c_out
    target = column(six.a) * z + column(six.b) * n
    return six.w * ((output - target) ** 2).mean(axis=1)


WEIGHTS = {
    "eps": eps_weighting(SIGMA),
    "unit": unit_weighting(SIGMA),
    "min_snr": np.minimum(1 / S2, 5.0),
    "any": np.random.default_rng(4).uniform(0, 9, 61),
    "nothing": np.zeros(61),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@ALL
def test_law_1_parametrisation_invariance(preconditioning, weight):
    """w |F - target|^2 = lambda |D - z|^2, for the same D and lambda, whatever F predicts."""
    z, n = images()
    denoised = any_denoiser(z + column(SIGMA) * n, column(SIGMA))
    expected = WEIGHTS[weight] * ((denoised - z) ** 2).mean(axis=1)
    actual = loss_of_six_numbers(preconditioning, z, n, WEIGHTS[weight])
    np.testing.assert_allclose(actual, expected, rtol=EXACT)
    if weight != "nothing":
        assert expected.max() > 0


@ALL
def test_law_1_gradient(preconditioning):
    """d loss / dD is that of lambda |D - z|^2: 2 w (F - target) / c_out = 2 lambda (D - z)."""
    z, n = images()
    weight = WEIGHTS["any"]
    six = coefficients(preconditioning, SIGMA, weight)
    x = z + column(SIGMA) * n
    denoised = any_denoiser(x, column(SIGMA))
    c_skip, c_out = column(preconditioning.c_skip(SIGMA)), column(preconditioning.c_out(SIGMA))
    output = (denoised - c_skip * x) / c_out
    residual = output - (column(six.a) * z + column(six.b) * n)
    assert_close(2 * column(six.w) * residual / c_out, 2 * column(weight) * (denoised - z))


@ALL
@pytest.mark.parametrize("sigma", [1e-3, 0.02917, 1.0, 14.6146, 1e3])
def test_denoise_inverts_the_target(preconditioning, sigma):
    """denoise(x, a z + b n) = z: the perfect output gives the clean latent."""
    z, n = images(1)
    six = coefficients(preconditioning, np.array([sigma]), np.ones(1))
    x = z + sigma * n
    restored = denoise(preconditioning, x, sigma, six.a * z + six.b * n)
    assert_close(restored, z, peak=max(1.0, np.abs(x).max()))


@ALL
def test_denoise_is_c_skip_x_plus_c_out_f(preconditioning):
    x, output = images(1)
    expected = preconditioning.c_skip(np.array(0.7)) * x + preconditioning.c_out(0.7) * output
    np.testing.assert_allclose(denoise(preconditioning, x, 0.7, output), expected, rtol=1e-12)


# ---- Min-SNR: one formula in clean-latent space, three factors on the network's own error


@ALL
def test_min_snr_factor_on_the_networks_own_error(preconditioning):
    """w = min(SNR, g)/SNR for eps, min(SNR, g)/(SNR + 1) for v, min(SNR, g) c_out^2 for EDM."""
    snr = 1 / S2
    clipped = np.minimum(snr, 5.0)
    expected = {
        "eps": clipped / snr,
        "v": clipped / (snr + 1),
        "edm": clipped * S2 * SD2 / (S2 + SD2),
    }[preconditioning.name]
    six = coefficients(preconditioning, SIGMA, clipped)
    np.testing.assert_allclose(six.w, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("preconditioning", "key"), [(EPS, "epsilon"), (V, "v_prediction")], ids=["eps", "v"]
)
def test_golden_min_snr(preconditioning, key):
    """diffusers' compute_snr and its two formulas, in float32 (abar 0.00466 costs it 3e-4)."""
    noise = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, DiscreteDistribution(SCHEDULE))
    with np.load(GOLDEN / "min_snr.npz") as golden:
        clipped = np.minimum(noise.snr, float(golden["gamma"]))
        six = coefficients(preconditioning, noise.sigma, clipped)
        np.testing.assert_allclose(noise.snr, golden["snr"], rtol=5e-4)
        np.testing.assert_allclose(six.w, golden[key], atol=1e-5)


@pytest.mark.parametrize(("preconditioning", "mean"), [(EPS, 0.917), (V, 0.294)], ids=["eps", "v"])
def test_mean_of_min_snr_over_the_timesteps(preconditioning, mean):
    sigma = SCHEDULE.sigmas
    six = coefficients(preconditioning, sigma, np.minimum(1 / sigma**2, 5.0))
    assert six.w.mean() == pytest.approx(mean, abs=5e-4)
    if preconditioning is EPS:
        assert (six.w < 1 - 1e-12).mean() == pytest.approx(0.147, abs=1e-12)


# ---- noise


def test_noise_at_sigma():
    """snr = 1 / s^2 and timestep = t(s), all float64 (G,)."""
    distribution = DiscreteDistribution(SCHEDULE)
    noise = NoiseLevels.at(SIGMA.astype(np.float32), SCHEDULE, distribution)
    sigma = SIGMA.astype(np.float32).astype(float)
    np.testing.assert_array_equal(noise.sigma, sigma)
    np.testing.assert_allclose(noise.snr, sigma**-2, rtol=1e-14)
    np.testing.assert_array_equal(noise.timestep, SCHEDULE.timestep(sigma))
    assert {noise.sigma.dtype, noise.snr.dtype, noise.timestep.dtype} == {np.dtype(np.float64)}
    assert noise.distribution is distribution
