"""Timestep bias: where the draws go, that it stays exact under any distribution, and its notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from sdxl_host import DiscreteDistribution, NoiseDistribution, NoiseSchedule, hookimpl
from sdxl_host.testing import HostError, TinyHooks, make_options, tiny_hooks, tiny_model

from sdxl_timestep_bias import Options, TimestepBias

MODEL = tiny_model()
SCHEDULE, UNIFORM = MODEL.schedule, MODEL.distribution
U = (np.arange(20000) + 0.5) / 20000
GUIDE = {"multiplier": 2, "strategy": "range", "begin": 200, "end": 500, "portion": 0.25}


class LogNormal(NoiseDistribution):
    """ln sigma ~ N(-1.2, 1.2^2), what EDM draws from."""

    schedule = SCHEDULE
    _normal = NormalDist(-1.2, 1.2)

    def quantile(self, u: np.ndarray) -> np.ndarray:
        return np.exp(np.vectorize(self._normal.inv_cdf)(u))

    def cdf(self, sigma: np.ndarray) -> np.ndarray:
        return np.vectorize(self._normal.cdf)(np.log(sigma))


def run(options: Options, distribution: NoiseDistribution = UNIFORM) -> TinyHooks:
    return chain([options], distribution)


def chain(several: Sequence[Options], distribution: NoiseDistribution = UNIFORM) -> TinyHooks:
    """One plugin after the other, as in the order of --plugins."""
    plugins = [TimestepBias(options) for options in several]
    return tiny_hooks(*plugins, model=replace(MODEL, distribution=distribution))


def biased(options: Options, distribution: NoiseDistribution = UNIFORM) -> NoiseDistribution:
    return run(options, distribution).sample_timesteps(step=1)


def share(distribution: NoiseDistribution, first: int, end: int) -> float:
    """Share of the draws whose nearest timestep lies in [first, end)."""
    timestep = SCHEDULE.nearest(distribution.quantile(U))
    return float(np.mean((first <= timestep) & (timestep < end)))


# ---- where the draws go


def test_later_means_noisier_and_draws_forty_percent_from_the_last_quarter() -> None:
    later = biased(Options(strategy="later", multiplier=2.0, portion=0.25))
    assert 1 - later.cdf(SCHEDULE.sigmas[749]) == pytest.approx(0.4, abs=1e-12)
    assert share(later, 750, 1000) == pytest.approx(0.4, abs=1e-4)
    assert later.expect(np.log) > UNIFORM.expect(np.log)


def test_earlier_is_its_mirror_image() -> None:
    earlier = biased(Options(strategy="earlier", multiplier=2.0, portion=0.25))
    assert earlier.cdf(SCHEDULE.sigmas[249]) == pytest.approx(0.4, abs=1e-12)
    assert share(earlier, 0, 250) == pytest.approx(0.4, abs=1e-4)


def test_the_guide_s_own_command_draws_46_percent_from_its_range() -> None:
    options = make_options(TimestepBias, GUIDE)
    within = biased(options)
    expected = 600 / 1300
    assert expected == pytest.approx(0.462, abs=5e-4)
    mass = within.cdf(SCHEDULE.sigmas[499]) - within.cdf(SCHEDULE.sigmas[199])
    assert mass == pytest.approx(expected, abs=1e-12)
    assert share(within, 200, 500) == pytest.approx(expected, abs=1e-4)


def test_a_range_holds_its_begin_and_not_its_end() -> None:
    weights = TimestepBias(Options(strategy="range", multiplier=3.0, begin=2, end=5)).weights(8)
    assert weights.tolist() == [1, 1, 3, 3, 3, 1, 1, 1]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("earlier", [3, 3, 1, 1, 1, 1, 1, 1]), ("later", [1, 1, 1, 1, 1, 1, 3, 3])],
)
def test_a_portion_is_cut_to_whole_timesteps(strategy: Any, expected: list[float]) -> None:
    # 0.3 * 8 = 2.4 timesteps.
    options = Options(strategy=strategy, multiplier=3.0, portion=0.3)
    assert TimestepBias(options).weights(8).tolist() == expected


def test_a_continuous_distribution_is_biased_at_the_nearest_timestep() -> None:
    source = LogNormal()
    later = biased(Options(strategy="later", multiplier=2.0, portion=0.25), source)
    edge = SCHEDULE.edges[750]
    before = 1 - source.cdf(edge)
    assert 1 - later.cdf(edge) == pytest.approx(2 * before / (1 + before), rel=1e-9)
    assert 1 - later.cdf(edge) == pytest.approx(0.0293, abs=5e-5)
    np.testing.assert_allclose(later.cdf(later.quantile(U[::50])), U[::50], atol=1e-10)


def test_a_multiplier_below_one_draws_them_less_often() -> None:
    rarer = biased(Options(strategy="later", multiplier=0.5, portion=0.25))
    assert 1 - rarer.cdf(SCHEDULE.sigmas[749]) == pytest.approx(0.125 / 0.875, abs=1e-12)


def test_the_number_of_timesteps_is_the_schedule_s() -> None:
    schedule = NoiseSchedule.scaled_linear(num_timesteps=40)
    later = biased(Options(strategy="later", multiplier=2.0), DiscreteDistribution(schedule))
    assert 1 - later.cdf(schedule.sigmas[29]) == pytest.approx(0.4, abs=1e-12)


# ---- against diffusers' training scripts


def timestep_weights(
    strategy: str, multiplier: float, portion: float, begin: int, end: int
) -> np.ndarray:
    """What diffusers' `generate_timestep_weights` returns, stated anew: (1000,), sum 1."""
    weights = np.ones(1000)
    number = int(portion * 1000)
    if strategy == "later":
        biased = np.arange(1000)[-number:]
    elif strategy == "earlier":
        biased = np.arange(1000)[:number]
    else:
        biased = np.arange(begin, end)
    weights[biased] *= multiplier
    return weights / weights.sum()


def excess(drawn: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's chi-square of the draws, in deviations above what it is for right draws.

    Over 1000 timesteps it has the mean 999 and the variance 2 * 999, and is next to normal.
    """
    counts = drawn.size * expected
    chi_square = np.sum((np.bincount(drawn, minlength=1000) - counts) ** 2 / counts)
    return float((chi_square - 999) / np.sqrt(2 * 999))


@pytest.mark.parametrize(
    ("strategy", "multiplier", "portion", "begin", "end"),
    [
        ("later", 2.0, 0.25, 0, 1000),
        ("earlier", 5.0, 0.1, 0, 1000),
        ("range", 2.0, 0.25, 200, 500),
        ("range", 0.25, 0.25, 900, 1000),
    ],
)
def test_a_million_draws_follow_diffusers_weights(
    strategy: Any, multiplier: float, portion: float, begin: int, end: int
) -> None:
    """The uniforms are the same at every run of the test, so it passes always or never."""
    u = np.random.default_rng(20).random(1_000_000)
    drawn = SCHEDULE.nearest(biased(Options(strategy, multiplier, begin, end, portion)).quantile(u))
    right = timestep_weights(strategy, multiplier, portion, begin, end)
    assert abs(excess(drawn, right)) < 3
    # The test can tell: a bias one timestep beside it, or a tenth stronger, is refuted.
    assert excess(drawn, np.roll(right, 1)) > 5
    stronger = timestep_weights(strategy, 1.1 * multiplier, portion, begin, end)
    assert excess(drawn, stronger) > 4


def test_probabilities_sum_to_one() -> None:
    for options in (Options("later", 2.0), Options("range", 0.3, 10, 11)):
        drawn = biased(options)
        assert drawn.cdf(SCHEDULE.sigmas[-1]) == pytest.approx(1.0, abs=1e-15)
        masses = np.diff(np.concatenate([[0.0], drawn.cdf(SCHEDULE.sigmas)]))
        assert masses.sum() == pytest.approx(1.0, abs=1e-12)
        np.testing.assert_allclose(
            masses,
            timestep_weights(
                options.strategy,
                options.multiplier,
                options.portion,
                options.begin,
                options.end,
            ),
            atol=1e-15,
        )


def test_quantile_and_cdf_find_each_other() -> None:
    """Discrete: quantile(cdf(s_t)) = s_t, and u <= cdf(quantile(u)) < u + the mass there."""
    drawn = biased(Options("range", 3.0, 100, 300))
    assert np.array_equal(drawn.quantile(drawn.cdf(SCHEDULE.sigmas)), SCHEDULE.sigmas)
    reached = drawn.cdf(drawn.quantile(U))
    assert (reached >= U).all()
    assert (reached < U + 3 / 1400 + 1e-15).all()


# ---- one object while nothing changes


def test_it_returns_one_object_as_long_as_it_is_given_one() -> None:
    hooks = run(Options(strategy="later", multiplier=2.0))
    first = hooks.sample_timesteps(step=1)
    assert hooks.sample_timesteps(step=2) is first


class Curriculum:
    """Draws from its distribution, which a test changes."""

    distribution: NoiseDistribution = UNIFORM

    @hookimpl
    def sample_timesteps(self) -> NoiseDistribution:
        return self.distribution


def test_it_follows_a_source_that_changes() -> None:
    source = Curriculum()
    hooks = tiny_hooks(source, TimestepBias(Options(strategy="later", multiplier=2.0)))
    first = hooks.sample_timesteps(step=1)
    source.distribution = DiscreteDistribution(SCHEDULE, np.arange(1.0, 1001.0))
    second = hooks.sample_timesteps(step=2)
    assert second is not first
    assert second.expect(np.log) > first.expect(np.log)


# ---- importance correction


@pytest.mark.parametrize("source", [UNIFORM, LogNormal()], ids=["discrete", "continuous"])
def test_importance_correction_keeps_the_mean_of_the_loss(source: NoiseDistribution) -> None:
    """E_q[f / (q/p)] = E_p[f], for any loss f of sigma."""
    options = Options(
        strategy="range", multiplier=4.0, begin=200, end=500, importance_correction=True
    )
    hooks = run(options, source)
    q = hooks.sample_timesteps(step=1)

    assert mean(hooks) == pytest.approx(source.expect(loss), rel=1e-9)
    assert q.expect(loss) != pytest.approx(source.expect(loss), rel=1e-2)


def loss(sigma: np.ndarray) -> np.ndarray:
    return 1 / (1 + sigma**2)


def mean(hooks: TinyHooks) -> float:
    """The weighted loss's mean over the draws, without the default's own weight."""
    q = hooks.sample_timesteps(step=1)

    def weighed(sigma: np.ndarray) -> np.ndarray:
        return hooks.weight_loss(hooks.noise_at(sigma)) * sigma**2 * loss(sigma)

    return q.expect(weighed)


@pytest.mark.parametrize("source", [UNIFORM, LogNormal()], ids=["discrete", "continuous"])
def test_two_that_correct_keep_the_mean_of_the_loss(source: NoiseDistribution) -> None:
    """Each undoes its own change: E_q12[f / (q1/p) / (q12/q1)] = E_p[f]. The source is reweighted
    already, by someone who corrects nothing."""
    given = source.reweighted(np.linspace(1.0, 2.0, 1000))
    first = Options("range", 4.0, begin=200, end=500, importance_correction=True)
    second = Options("later", 3.0, portion=0.6, importance_correction=True)
    for several in ([first, second], [second, first]):
        hooks = chain(several, given)
        drawn = hooks.sample_timesteps(step=1)
        assert drawn.expect(loss) != pytest.approx(given.expect(loss), rel=1e-2)
        assert mean(hooks) == pytest.approx(given.expect(loss), rel=1e-9)


@pytest.mark.parametrize("source", [UNIFORM, LogNormal()], ids=["discrete", "continuous"])
def test_one_that_corrects_leaves_the_other_s_draws(source: NoiseDistribution) -> None:
    """E_q12[f q1/q12] = E_q1[f]; corrected by the first, it is E_q2[f] times what does not depend
    on f."""
    one = Options("range", 4.0, begin=200, end=500)
    other = Options("later", 3.0, portion=0.6)
    corrected = replace(other, importance_correction=True)
    alone = biased(one, source)
    assert mean(chain([one, corrected], source)) == pytest.approx(alone.expect(loss), rel=1e-9)
    first = mean(chain([corrected, one], source))
    weights = [TimestepBias(options).weights(1000) for options in (one, other)]
    totals = [
        source.expect(lambda sigma, w=w: w[SCHEDULE.nearest(sigma)])
        for w in (*weights, weights[0] * weights[1])
    ]
    factor = totals[0] * totals[1] / totals[2]
    assert factor != pytest.approx(1.0, rel=1e-3)
    assert first == pytest.approx(factor * alone.expect(loss), rel=1e-4)


def test_importance_correction_divides_by_the_change_of_density() -> None:
    hooks = run(Options(strategy="later", multiplier=2.0, importance_correction=True))
    noise = hooks.noise_at(SCHEDULE.sigmas[[10, 900]])
    plain, corrected = tiny_hooks().weight_loss(noise), hooks.weight_loss(noise)
    np.testing.assert_allclose(corrected / plain, [1.25, 0.625], rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        Options(strategy="later", multiplier=2.0),
        Options(strategy="later", multiplier=1.0, importance_correction=True),
    ],
    ids=["off", "idle"],
)
def test_without_it_the_weight_passes_unchanged(options: Options) -> None:
    # Someone else's reweighting is not this plugin's to correct.
    other = replace(MODEL, distribution=UNIFORM.reweighted(np.linspace(1, 2, 1000)))
    noise = tiny_hooks(model=other).noise_at(SCHEDULE.sigmas[::100])
    plain = tiny_hooks().weight_loss(noise)
    assert np.array_equal(run(options).weight_loss(noise), plain)


# ---- options


IDLE = {
    "strategy is none": Options(multiplier=2.0),
    "multiplier is 1": Options(strategy="later"),
    "biases 1000 of 1000": Options(strategy="range", multiplier=2.0),
    "biases 0 of 1000": Options(strategy="later", multiplier=2.0, portion=0.0005),
}


@pytest.mark.parametrize(("reason", "options"), IDLE.items(), ids=list(IDLE))
def test_options_that_do_nothing_say_so_and_do_nothing(reason: str, options: Options) -> None:
    (line,) = run(options).notes()
    assert line.startswith("timestep_bias: does nothing: ")
    assert reason in line
    assert biased(options) is UNIFORM


def test_options_that_others_make_idle_are_named() -> None:
    guide = make_options(TimestepBias, GUIDE)
    assert run(guide).notes()[1:] == [
        "timestep_bias: portion 0.25 has no effect with strategy range"
    ]
    later = Options(strategy="later", multiplier=2.0, begin=200, end=500)
    assert run(later).notes()[1:] == [
        "timestep_bias: begin 200 has no effect with strategy later",
        "timestep_bias: end 500 has no effect with strategy later",
    ]
    assert len(run(Options(strategy="earlier", multiplier=2.0)).notes()) == 1


@pytest.mark.parametrize(
    ("options", "source", "line"),
    [
        (
            Options(strategy="range", multiplier=2.0, begin=200, end=500),
            UNIFORM,
            "46.15% of the draws fall on the 300 timesteps of weight 2",
        ),
        (
            Options(strategy="later", multiplier=2.0),
            LogNormal(),
            "2.93% of the draws fall on the 250 timesteps of weight 2",
        ),
        (
            Options(strategy="earlier", multiplier=0.5),
            UNIFORM,
            "14.29% of the draws fall on the 250 timesteps of weight 0.5",
        ),
    ],
)
def test_notes_tell_where_the_draws_go(
    options: Options, source: NoiseDistribution, line: str
) -> None:
    assert run(options, source).notes()[0] == f"timestep_bias: {line}"


@pytest.mark.parametrize(("begin", "end"), [(500, 200), (200, 200), (-1, 200), (200, 1001)])
def test_a_range_that_is_none_is_refused(begin: int, end: int) -> None:
    values = {**GUIDE, "begin": begin, "end": end}
    with pytest.raises(HostError, match=rf"plugins\.timestep_bias.*begin {begin} and end {end}"):
        make_options(TimestepBias, values)
    # With another strategy it is idle, and idle options are named, not refused.
    make_options(TimestepBias, {**values, "strategy": "later"})


def test_a_range_may_be_all_timesteps_or_one() -> None:
    for begin, end in ((0, 1000), (999, 1000), (0, 1)):
        make_options(TimestepBias, {**GUIDE, "begin": begin, "end": end})


def test_values_out_of_range_are_refused() -> None:
    assert make_options(TimestepBias, {}) == Options()
    assert make_options(TimestepBias, {"portion": 1.0}).portion == 1.0
    least = make_options(TimestepBias, {"multiplier": 1e-6, "portion": 1e-6})
    assert (least.multiplier, least.portion) == (1e-6, 1e-6)
    bad_values = [
        ("multiplier", 0),
        ("multiplier", -2.0),
        ("portion", 0.0),
        ("portion", 1.01),
        ("strategy", "sooner"),
        ("begin", 1.5),
        ("importance_correction", 1),
    ]
    for key, bad in bad_values:
        with pytest.raises(HostError, match=rf"plugins\.timestep_bias\.{key}"):
            make_options(TimestepBias, {key: bad})
