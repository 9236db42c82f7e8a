"""Distributions of noise levels: quantile and cdf as inverses, and exact reweighting."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from sdxl_host.diffusion.distributions import DiscreteDistribution, NoiseDistribution
from sdxl_host.diffusion.schedule import NoiseSchedule

EXACT = 1e-10
SCHEDULE = NoiseSchedule.scaled_linear()
# The smallest and largest uniforms the host draws, and some between.
EXTREMES = np.array([2.0**-54, 2.0**-53, 1e-12, 0.5, 1 - 2.0**-52, 1 - 2.0**-53])

_inverse_normal = np.vectorize(NormalDist().inv_cdf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])


class LogNormal(NoiseDistribution):
    """ln s ~ N(mean, deviation^2)."""

    def __init__(self, mean: float = -1.2, deviation: float = 1.2) -> None:
        self.schedule = SCHEDULE
        self.mean, self.deviation = mean, deviation

    def quantile(self, u):
        return np.exp(self.mean + self.deviation * _inverse_normal(u))

    def cdf(self, sigma):
        with np.errstate(divide="ignore"):
            z = (np.log(sigma) - self.mean) / self.deviation
        return 0.5 * _erfc(-z / math.sqrt(2))


def later(portion: float = 0.25, multiplier: float = 2.0) -> np.ndarray:
    weights = np.ones(1000)
    weights[1000 - int(portion * 1000) :] *= multiplier
    return weights


def between(begin: int, end: int, multiplier: float = 2.0) -> np.ndarray:
    weights = np.ones(1000)
    weights[begin:end] *= multiplier
    return weights


def rough(seed: int = 0) -> np.ndarray:
    """Weights over four orders of magnitude, another for every timestep."""
    return np.exp(np.random.default_rng(seed).uniform(-4.6, 4.6, 1000))


def gappy() -> np.ndarray:
    """Probabilities with runs of zeros at both ends and inside."""
    probabilities = rough(3)
    probabilities[:5] = probabilities[300:400] = probabilities[990:] = 0
    return probabilities


UNIFORMS = np.concatenate([EXTREMES, np.random.default_rng(2).uniform(size=2000)])
BASES = {
    "uniform": DiscreteDistribution(SCHEDULE),
    "discrete": DiscreteDistribution(SCHEDULE, rough(5)),
    "gappy": DiscreteDistribution(SCHEDULE, gappy()),
    "lognormal": LogNormal(),
    "narrow": LogNormal(0.3, 0.01),
    "wide": LogNormal(0.5, 6.0),
}
CONTINUOUS = ["lognormal", "narrow", "wide"]
DISCRETE = ["uniform", "discrete", "gappy"]
WEIGHTS = {"later": later(), "range": between(200, 500), "rough": rough(), "ones": np.ones(1000)}


def piece_masses(base: NoiseDistribution) -> np.ndarray:
    """(1000,) F(e_{j+1}) - F(e_j)."""
    return np.diff(np.concatenate([[0.0], base.cdf(SCHEDULE.edges[1:-1]), [1.0]]))


# ---- discrete


def test_uniform_masses_are_equal():
    uniform = DiscreteDistribution(SCHEDULE)
    np.testing.assert_allclose(uniform.probabilities, np.full(1000, 1e-3), rtol=1e-14)
    np.testing.assert_allclose(uniform.cdf(SCHEDULE.sigmas), np.arange(1, 1001) / 1000, rtol=1e-13)


def test_probabilities_are_normalised():
    given = rough(7)
    distribution = DiscreteDistribution(SCHEDULE, given)
    np.testing.assert_allclose(distribution.probabilities, given / given.sum(), rtol=1e-12)
    assert distribution.probabilities.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_quantile_of_cdf_is_the_sigma(name):
    """quantile(cdf(s_t)) = s_t, exactly, wherever t has a probability above 0."""
    base = BASES[name]
    drawn = SCHEDULE.sigmas[base.probabilities > 0]
    np.testing.assert_array_equal(base.quantile(base.cdf(drawn)), drawn)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_cdf_of_quantile_is_the_next_step_up(name):
    """u <= cdf(quantile(u)) < u + p, with p the probability of the timestep drawn."""
    base = BASES[name]
    sigma = base.quantile(UNIFORMS)
    reached = base.cdf(sigma)
    step = base.probabilities[SCHEDULE.nearest(sigma)]
    assert (reached >= UNIFORMS).all()
    assert (reached < UNIFORMS + step * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", DISCRETE)
def test_a_timestep_of_probability_0_is_never_drawn(name):
    base = BASES[name]
    drawn = SCHEDULE.nearest(base.quantile(UNIFORMS))
    assert (base.probabilities[drawn] > 0).all()
    assert np.isin(base.quantile(UNIFORMS), SCHEDULE.sigmas).all()


def test_discrete_cdf_counts_the_sigma_itself_and_steps_there():
    uniform = BASES["uniform"]
    below = np.nextafter(SCHEDULE.sigmas, 0)
    np.testing.assert_allclose(uniform.cdf(below), np.arange(1000) / 1000, atol=1e-13)
    assert uniform.cdf(np.array(1e-9)) == 0
    assert uniform.cdf(np.array(1e9)) == 1


def test_discrete_expectation_is_the_sum_over_timesteps():
    base = BASES["discrete"]
    expected = (base.probabilities * np.log(SCHEDULE.sigmas)).sum()
    assert base.expect(np.log) == pytest.approx(expected, rel=1e-13)
    assert base.expect(np.ones_like) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize(
    ("probabilities", "reason"),
    [
        (np.ones(999), "shape"),
        (np.ones((1000, 1)), "shape"),
        (np.full(1000, np.nan), "finite"),
        (np.r_[np.ones(999), np.inf], "finite"),
        (np.r_[np.ones(999), -1.0], "not negative"),
        (np.zeros(1000), "not all be 0"),
    ],
    ids=["short", "2d", "nan", "inf", "negative", "zero"],
)
def test_refused_probabilities(probabilities, reason):
    with pytest.raises(ValueError, match=f"^probabilities must .*{reason}"):
        DiscreteDistribution(SCHEDULE, probabilities)


# ---- continuous


def test_mean_of_a_continuous_distribution():
    """E[ln s] = mean and E[(ln s)^2] = mean^2 + deviation^2, by quadrature over quantiles."""
    base = LogNormal()
    assert base.expect(np.log) == pytest.approx(-1.2, abs=1e-8)
    second = base.expect(lambda sigma: np.log(sigma) ** 2)
    assert second == pytest.approx(1.2**2 + 1.2**2, rel=1e-3)


@pytest.mark.parametrize("name", BASES)
def test_ratio_is_1_where_nothing_was_reweighted(name):
    sigma = np.array([[0.01, 1.0], [5.0, 100.0]])
    np.testing.assert_array_equal(BASES[name].density_ratio(sigma), np.ones((2, 2)))


# ---- reweighted


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_reweighted_cdf_of_quantile_is_u(name, weights):
    """cdf(quantile(u)) = u for a continuous base, at the extremes of u as well."""
    distribution = BASES[name].reweighted(WEIGHTS[weights])
    np.testing.assert_allclose(
        distribution.cdf(distribution.quantile(UNIFORMS)), UNIFORMS, atol=EXACT, rtol=0
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", DISCRETE)
def test_reweighted_discrete_cdf_of_quantile_is_the_next_step_up(name, weights):
    """u <= cdf(quantile(u)) < u + q, with q the probability of the timestep drawn."""
    distribution = BASES[name].reweighted(WEIGHTS[weights])
    masses = BASES[name].probabilities * WEIGHTS[weights]
    masses = masses / masses.sum()
    sigma = distribution.quantile(UNIFORMS)
    reached = distribution.cdf(sigma)
    step = masses[SCHEDULE.nearest(sigma)]
    assert (step > 0).all()
    assert (reached - UNIFORMS >= -1e-12).all()
    assert (reached - UNIFORMS - step <= 1e-12).all()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", DISCRETE)
def test_reweighted_discrete_quantile_of_cdf_is_the_sigma(name, weights):
    """quantile(cdf(s_t)) = s_t holds after reweighting too, for every timestep that is drawn."""
    distribution = BASES[name].reweighted(WEIGHTS[weights])
    drawn = SCHEDULE.sigmas[BASES[name].probabilities > 0]
    np.testing.assert_array_equal(distribution.quantile(distribution.cdf(drawn)), drawn)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", BASES)
def test_reweighted_piece_masses_are_weight_times_base_mass(name, weights):
    """mass of piece j = w_j (F(e_{j+1}) - F(e_j)) / Z."""
    expected = WEIGHTS[weights] * piece_masses(BASES[name])
    actual = piece_masses(BASES[name].reweighted(WEIGHTS[weights]))
    np.testing.assert_allclose(actual, expected / expected.sum(), atol=1e-13)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", BASES)
def test_drawn_shares_are_the_masses(name, weights):
    """Evenly spread uniforms fall on each timestep as often as its mass says, within one draw."""
    masses = WEIGHTS[weights] * piece_masses(BASES[name])
    masses = masses / masses.sum()
    count = 20_000
    u = (np.arange(count) + 0.5) / count
    drawn = SCHEDULE.nearest(BASES[name].reweighted(WEIGHTS[weights]).quantile(u))
    shares = np.bincount(drawn, minlength=1000)
    assert np.abs(shares - masses * count).max() <= 1 + 1e-6


@pytest.mark.parametrize("name", BASES)
def test_reweighted_quantile_is_non_decreasing_finite_and_positive(name):
    u = np.sort(UNIFORMS)
    sigma = BASES[name].reweighted(rough()).quantile(u)
    assert (np.diff(sigma) >= 0).all()
    assert np.isfinite(sigma).all()
    assert (sigma > 0).all()
    if name in DISCRETE:
        assert np.isin(sigma, SCHEDULE.sigmas).all()


@pytest.mark.parametrize("name", BASES)
def test_equal_weights_change_nothing(name):
    base = BASES[name]
    same = base.reweighted(np.full(1000, 7.0))
    sigma = np.geomspace(0.01, 50, 777)
    np.testing.assert_allclose(same.cdf(sigma), base.cdf(sigma), atol=1e-13)
    np.testing.assert_allclose(same.density_ratio(sigma), np.ones(777), rtol=1e-12)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e200])
def test_the_scale_of_the_weights_does_not_matter(name, scale):
    one, other = BASES[name].reweighted(rough()), BASES[name].reweighted(rough() * scale)
    sigma = np.geomspace(0.01, 50, 777)
    np.testing.assert_allclose(one.cdf(sigma), other.cdf(sigma), atol=1e-12)
    np.testing.assert_allclose(one.density_ratio(sigma), other.density_ratio(sigma), rtol=1e-12)
    cdf = BASES[name].cdf  # a quantile itself is ill-conditioned in the tails
    np.testing.assert_allclose(
        cdf(one.quantile(EXTREMES)), cdf(other.quantile(EXTREMES)), atol=1e-13
    )


@pytest.mark.parametrize(
    ("name", "weights", "begin", "end", "share", "tolerance"),
    [
        ("uniform", later(0.25, 2.0), 750, 1000, 0.40, 1e-12),
        ("uniform", between(200, 500), 200, 500, 6 / 13, 1e-12),
        ("uniform", between(200, 500), 200, 500, 0.462, 5e-4),
        ("uniform", between(0, 250, 3.0), 0, 250, 0.5, 1e-12),
        ("lognormal", later(0.25, 2.0), 750, 1000, 0.0293, 5e-5),
    ],
)
def test_figures_of_timestep_bias(name, weights, begin, end, share, tolerance):
    """The shares of draws that a bias moves, by the cdf and by drawing."""
    distribution = BASES[name].reweighted(weights)
    masses = piece_masses(distribution)
    assert masses[begin:end].sum() == pytest.approx(share, abs=tolerance)
    u = (np.arange(10_000) + 0.5) / 10_000
    drawn = SCHEDULE.nearest(distribution.quantile(u))
    inside = ((drawn >= begin) & (drawn < end)).mean()
    assert inside == pytest.approx(share, abs=tolerance + 2e-4)


@pytest.mark.parametrize("name", BASES)
def test_nested_reweighting_is_the_product(name):
    """reweighted(v).reweighted(w) = reweighted(v w), its ratio to the first base included."""
    nested = BASES[name].reweighted(rough(1)).reweighted(rough(2)).reweighted(later())
    product = BASES[name].reweighted(rough(1) * rough(2) * later())
    sigma = np.geomspace(0.01, 50, 777)
    np.testing.assert_allclose(nested.cdf(sigma), product.cdf(sigma), atol=1e-13)
    np.testing.assert_allclose(
        nested.density_ratio(sigma), product.density_ratio(sigma), rtol=1e-12
    )
    np.testing.assert_allclose(nested.quantile(UNIFORMS), product.quantile(UNIFORMS), rtol=1e-9)


# ---- ratio


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", BASES)
def test_ratio_integrates_to_1(name, weights):
    """Integral of ratio * p over sigma = 1: it is a density ratio, not a weight."""
    ratio = BASES[name].reweighted(WEIGHTS[weights]).density_ratio(SCHEDULE.sigmas)
    assert (ratio * piece_masses(BASES[name])).sum() == pytest.approx(1, abs=1e-12)


def test_ratio_is_the_quotient_of_the_densities():
    """q(s) / p(s) = (Q(s + d) - Q(s)) / (P(s + d) - P(s)) inside one timestep's piece."""
    base = LogNormal()
    distribution = base.reweighted(rough())
    low, high = SCHEDULE.edges[1:-2], SCHEDULE.edges[2:-1]
    a, b = low + 0.2 * (high - low), low + 0.8 * (high - low)
    quotient = (distribution.cdf(b) - distribution.cdf(a)) / (base.cdf(b) - base.cdf(a))
    np.testing.assert_allclose(distribution.density_ratio(a), quotient, rtol=1e-6)
    np.testing.assert_array_equal(distribution.density_ratio(a), distribution.density_ratio(b))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("f", [np.log, np.tanh, lambda sigma: 1 / (1 + sigma**2)])
def test_mean_after_is_the_mean_of_ratio_times_f_before(name, f):
    """E_q[f] = E_p[ratio f], against draws from q itself."""
    distribution = BASES[name].reweighted(later(0.5, 3.0))
    u = (np.arange(40_000) + 0.5) / 40_000
    drawn = f(distribution.quantile(u)).mean()
    before = BASES[name].expect(lambda sigma: distribution.density_ratio(sigma) * f(sigma))
    assert distribution.expect(f) == pytest.approx(drawn, abs=5e-4)
    assert before == pytest.approx(drawn, abs=5e-4)


@pytest.mark.parametrize("name", BASES)
def test_importance_correction_restores_the_mean(name):
    """E_q[f / ratio] = E_p[f]."""
    distribution = BASES[name].reweighted(rough())
    corrected = distribution.expect(lambda sigma: np.log(sigma) / distribution.density_ratio(sigma))
    assert corrected == pytest.approx(BASES[name].expect(np.log), rel=EXACT)


# ---- edges of the domain


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", BASES)
def test_cdf_is_0_at_0_and_1_at_infinity(name, weights):
    distribution = BASES[name].reweighted(WEIGHTS[weights])
    assert distribution.cdf(np.array([0.0]))[0] == 0
    assert distribution.cdf(np.array([np.inf]))[0] == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("name", DISCRETE)
def test_extreme_uniforms_give_the_ends_of_a_discrete_distribution(name):
    """u = 2^-54 draws the first timestep with a probability, 1 - 2^-53 the last."""
    base = BASES[name]
    possible = SCHEDULE.sigmas[base.probabilities > 0]
    for distribution in (base, base.reweighted(rough())):
        ends = distribution.quantile(np.array([2.0**-54, 1 - 2.0**-53]))
        np.testing.assert_array_equal(ends, [possible[0], possible[-1]])


@pytest.mark.parametrize(
    "u", [2.0**-54, 2.0**-53, 2.0**-30, 1 - 2.0**-30, 1 - 2.0**-52, 1 - 2.0**-53]
)
def test_extreme_uniforms_keep_their_tail_in_a_reweighted_one(u):
    """In the first or last piece, q's tail is ratio times p's, so it draws p's quantile there."""
    base = LogNormal()
    distribution = base.reweighted(later(0.25, 2.0))
    sigma = distribution.quantile(np.array([u]))
    ratio = distribution.density_ratio(sigma)[0]
    expected = u / ratio if u < 0.5 else 1 - (1 - u) / ratio
    assert sigma[0] == pytest.approx(
        base.quantile(np.array([min(expected, 1 - 2.0**-53)]))[0], 0.05
    )
    assert 0 < sigma[0] < np.inf


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", BASES)
def test_shapes_are_kept(name, shape):
    u = np.full(shape, 0.3)
    for distribution in (BASES[name], BASES[name].reweighted(later())):
        assert np.shape(distribution.quantile(u)) == shape
        assert np.shape(distribution.cdf(u)) == shape
        assert np.shape(distribution.density_ratio(u)) == shape


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "weights",
    [
        np.ones(999),
        np.ones((1, 1000)),
        np.float64(1),
        np.full(1000, np.nan),
        np.r_[np.ones(999), np.inf],
        np.r_[0.0, np.ones(999)],
        np.r_[np.ones(999), -1.0],
    ],
    ids=["short", "2d", "scalar", "nan", "inf", "zero", "negative"],
)
def test_refused_weights(weights, nested):
    base = LogNormal().reweighted(later()) if nested else LogNormal()
    with pytest.raises(ValueError, match=r"^weights must have shape \(1000,\) and be finite"):
        base.reweighted(weights)
