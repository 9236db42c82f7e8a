"""Importance sampling by the loss's second moment: the paper's probabilities, and what it keeps."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sdxl_host import DiscreteDistribution, NoiseDistribution, NoiseLevels
from sdxl_host.testing import PluginContract, tiny_model

from loss_aware import LossAware, Options

MODEL = tiny_model()
SCHEDULE, UNIFORM, EPS = MODEL.schedule, MODEL.distribution, MODEL.preconditioning
TRAINER: Any = SimpleNamespace(model=SimpleNamespace(preconditioning=EPS, schedule=SCHEDULE))


class TestContract(PluginContract):
    plugin = "loss_aware"
    options = {"warmup": 1, "bins": 5, "decay": 0.5}


class LogUniform(NoiseDistribution):
    """ln sigma uniform from ln low to ln high: a continuous distribution."""

    def __init__(self, low: float = 0.05, high: float = 10.0) -> None:
        self.schedule, self.low, self.high = SCHEDULE, low, high

    def quantile(self, u: np.ndarray) -> np.ndarray:
        return self.low * (self.high / self.low) ** u

    def cdf(self, sigma: np.ndarray) -> np.ndarray:
        return np.clip(np.log(sigma / self.low) / np.log(self.high / self.low), 0.0, 1.0)


def answer(wrapper: Generator[None, Any, Any], given: Any) -> Any:
    """What a wrapper makes of `given`."""
    next(wrapper)
    with pytest.raises(StopIteration) as ended:
        wrapper.send(given)
    return ended.value.value


def step(
    plugin: LossAware,
    sigma: Any,
    losses: Any,
    source: NoiseDistribution = UNIFORM,
    scale: float = 1.0,
) -> NoiseDistribution:
    """One step as the host makes it: losses of the network, and a lambda that makes each weigh
    `scale`. Returns what the noise levels would have been drawn from."""
    distribution = answer(plugin.sample_timesteps(), source)
    noise = NoiseLevels.at(np.asarray(sigma, float), SCHEDULE, distribution)
    weights = answer(plugin.weight_loss(noise), scale * EPS.loss_weight(noise.sigma))
    result: Any = SimpleNamespace(
        noise=noise, per_sample_loss=np.float32(losses), loss_weight=weights
    )
    plugin.on_step_end(TRAINER, result)
    return distribution


def masses(distribution: NoiseDistribution) -> np.ndarray:
    """The probability of each timestep."""
    borders = SCHEDULE.sigma(np.arange(1, 1000) - 0.5)
    return np.diff(np.concatenate([[0.0], distribution.cdf(borders), [1.0]]))


def measured(source: NoiseDistribution = UNIFORM, **options: Any) -> tuple[LossAware, np.ndarray]:
    """A plugin that has seen each timestep once, and the root of each timestep's moment."""
    plugin = LossAware(Options(**{"warmup": 0, "bins": 8, "decay": 0.0, **options}))
    losses = np.random.default_rng(1).uniform(0.01, 3.0, 1000)
    step(plugin, SCHEDULE.sigmas, losses, source)
    count = plugin.options.bins
    bins = [losses.astype(np.float32)[np.arange(1000) * count // 1000 == b] for b in range(count)]
    roots = [np.sqrt((b.astype(float) ** 2).mean()) for b in bins]
    return plugin, np.repeat(roots, [len(b) for b in bins])


# ---- what is drawn


def papers_probabilities(roots: np.ndarray, uniform: float) -> np.ndarray:
    """Section 3.3: p_t ~ sqrt(E[L_t^2]), mixed with a uniform share as in the authors' code."""
    return (1 - uniform) * roots / roots.sum() + uniform / len(roots)


@pytest.mark.parametrize("floor", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("bins", [1, 7, 8, 1000])
def test_timesteps_are_drawn_by_the_root_of_their_second_moment(bins: int, floor: float) -> None:
    plugin, roots = measured(bins=bins, floor=floor)
    drawn = answer(plugin.sample_timesteps(), UNIFORM)
    np.testing.assert_allclose(masses(drawn), papers_probabilities(roots, floor), rtol=1e-9)


@pytest.mark.parametrize("source", [UNIFORM, LogUniform()], ids=["discrete", "continuous"])
def test_every_timestep_keeps_its_floor(source: NoiseDistribution) -> None:
    plugin, roots = measured(source, floor=0.2)
    before, after = masses(source), masses(answer(plugin.sample_timesteps(), source))
    assert (after >= 0.2 * before - 1e-12).all()
    np.testing.assert_allclose(
        after, before * (0.2 + 0.8 * roots / (before @ roots)), rtol=1e-9, atol=1e-12
    )


def test_what_nothing_is_known_of_is_taken_for_average() -> None:
    plugin = LossAware(Options(bins=4, warmup=0, floor=0.001))
    step(plugin, SCHEDULE.sigma(np.array([100.0, 900.0])), [1.0, 3.0])
    shares = masses(answer(plugin.sample_timesteps(), UNIFORM)).reshape(4, 250).sum(axis=1)
    middle = np.sqrt((1 + 9) / 2)
    roots = np.array([1.0, middle, middle, 3.0])
    np.testing.assert_allclose(shares, papers_probabilities(roots, 0.001), rtol=1e-6)


# ---- what is learned


@pytest.mark.parametrize("source", [UNIFORM, LogUniform()], ids=["discrete", "continuous"])
def test_the_correction_keeps_the_mean_of_any_loss(source: NoiseDistribution) -> None:
    """E_q[L p / q] = E_p[L]."""
    plugin, _ = measured(source)
    drawn = answer(plugin.sample_timesteps(), source)

    def corrected(sigma: np.ndarray) -> np.ndarray:
        noise = NoiseLevels.at(sigma, SCHEDULE, drawn)
        return answer(plugin.weight_loss(noise), np.sqrt(sigma) + np.sin(sigma))

    plain = source.expect(lambda sigma: np.sqrt(sigma) + np.sin(sigma))
    assert drawn.expect(corrected) == pytest.approx(plain, rel=1e-9)


def test_the_variance_is_the_least_there_is() -> None:
    """E_q[(L p / q)^2] >= E_p[L]^2 with equality at q ~ p L (Cauchy-Schwarz): reached where the
    loss is as even as the bins, and under that of plain draws with the default floor."""
    losses = np.repeat([0.1, 0.2, 1.0, 3.0], 250)
    for floor, bound in ((1e-6, 1e-4), (0.1, 0.2)):
        plugin = LossAware(Options(bins=4, warmup=0, floor=floor))
        step(plugin, SCHEDULE.sigmas, losses)
        drawn = answer(plugin.sample_timesteps(), UNIFORM)
        noise = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, drawn)
        weighed = losses * answer(plugin.weight_loss(noise), np.ones(1000))
        variance = masses(drawn) @ weighed**2 - losses.mean() ** 2
        assert -1e-12 <= variance < bound * losses.var()


def test_no_weight_grows_over_one_by_the_floor() -> None:
    plugin, _ = measured(bins=1000, floor=0.05)
    drawn = answer(plugin.sample_timesteps(), UNIFORM)
    noise = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, drawn)
    assert 1.0 < answer(plugin.weight_loss(noise), np.ones(1000)).max() <= 1 / 0.05


def test_without_the_correction_the_weight_passes_unchanged() -> None:
    plugin, _ = measured(importance_correction=False)
    noise = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, answer(plugin.sample_timesteps(), UNIFORM))
    given = np.ones(1000)
    assert answer(plugin.weight_loss(noise), given) is given


def test_only_its_own_change_is_corrected() -> None:
    """Beside a plugin that reweights too, before it or after."""
    biased = UNIFORM.reweighted(np.linspace(1.0, 3.0, 1000))
    plugin, _ = measured(biased)
    drawn = answer(plugin.sample_timesteps(), biased)
    for last in (drawn, drawn.reweighted(np.linspace(2.0, 1.0, 1000))):
        noise = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, last)
        correction = answer(plugin.weight_loss(noise), np.ones(1000))
        np.testing.assert_allclose(correction, masses(biased) / masses(drawn), rtol=1e-9)


# ---- what is measured


@pytest.mark.parametrize("correct", [True, False])
def test_the_loss_that_is_measured_is_the_one_without_the_correction(correct: bool) -> None:
    """lambda * c_out^2 times the network's own squared error, before this plugin divides it."""
    plugin, roots = measured(importance_correction=correct)
    losses = np.full(1000, 2.0)
    step(plugin, SCHEDULE.sigmas, losses, scale=3.0)
    np.testing.assert_allclose(plugin.moments, 36.0, rtol=1e-9)


def test_moments_are_running_means_of_each_step_s_mean() -> None:
    plugin = LossAware(Options(bins=2, decay=0.75, warmup=10))
    low, high = SCHEDULE.sigma(np.array([100.0, 900.0]))
    step(plugin, [low, low], [1.0, 3.0])
    assert plugin.moments[0] == pytest.approx(5.0)  # the first is taken as it is
    assert np.isnan(plugin.moments[1])
    step(plugin, [high, low], [2.0, 1.0])
    np.testing.assert_allclose(plugin.moments, [0.75 * 5 + 0.25, 4.0])
    step(plugin, [high, high], [0.0, 4.0])
    np.testing.assert_allclose(plugin.moments, [4.0, 0.75 * 4 + 0.25 * 8])


def test_losses_that_are_not_finite_are_left_out() -> None:
    with_them, without = (LossAware(Options(bins=4, warmup=0)) for _ in range(2))
    step(with_them, SCHEDULE.sigmas[[10, 11, 500, 900]], [1.0, np.nan, np.inf, 2.0])
    step(without, SCHEDULE.sigmas[[10, 900]], [1.0, 2.0])
    np.testing.assert_array_equal(with_them.moments, without.moments)


def test_it_finds_what_the_losses_are() -> None:
    """Drawn from its own distribution step by step, as in a run."""
    plugin = LossAware(Options(bins=4, warmup=5, decay=0.5, floor=0.1))
    random = np.random.default_rng(7)
    true = np.array([0.5, 0.1, 1.0, 4.0])
    for _ in range(60):
        drawn = answer(plugin.sample_timesteps(), UNIFORM)
        sigma = drawn.quantile(random.uniform(size=16))
        step(plugin, sigma, true[SCHEDULE.nearest(sigma) // 250])
    shares = masses(answer(plugin.sample_timesteps(), UNIFORM)).reshape(4, 250).sum(axis=1)
    np.testing.assert_allclose(shares, papers_probabilities(true, 0.1), rtol=1e-6)


# ---- one object, warm-up, state


def test_one_object_while_nothing_changed() -> None:
    plugin, _ = measured()
    drawn = answer(plugin.sample_timesteps(), UNIFORM)
    assert drawn is not UNIFORM
    assert answer(plugin.sample_timesteps(), UNIFORM) is drawn
    # Nothing was measured in a step without a finite loss.
    assert step(plugin, [1.0, 2.0], [np.nan, np.inf]) is drawn
    assert answer(plugin.sample_timesteps(), UNIFORM) is drawn
    step(plugin, [1.0, 2.0], [5.0, 1.0])
    assert answer(plugin.sample_timesteps(), UNIFORM) is not drawn
    # A source that changes is followed.
    other = DiscreteDistribution(SCHEDULE, np.arange(1.0, 1001.0))
    assert masses(answer(plugin.sample_timesteps(), other))[0] < 1e-4


def test_it_only_measures_during_the_warmup() -> None:
    plugin = LossAware(Options(bins=2, warmup=3))
    for _ in range(3):
        assert step(plugin, SCHEDULE.sigmas[[100, 900]], [1.0, 2.0]) is UNIFORM
    assert answer(plugin.sample_timesteps(), UNIFORM) is not UNIFORM


def test_it_acts_after_a_warmup_whose_last_step_measured_nothing() -> None:
    plugin = LossAware(Options(bins=2, warmup=2))
    step(plugin, SCHEDULE.sigmas[[100, 900]], [1.0, 2.0])
    step(plugin, SCHEDULE.sigmas[[100, 900]], [np.nan, np.nan])
    assert answer(plugin.sample_timesteps(), UNIFORM) is not UNIFORM


def test_losses_of_zero_draw_as_before() -> None:
    plugin = LossAware(Options(bins=2, warmup=0))
    step(plugin, SCHEDULE.sigmas[[100, 900]], [0.0, 0.0])
    assert answer(plugin.sample_timesteps(), UNIFORM) is UNIFORM


def test_state_that_is_loaded_goes_on_to_the_bit() -> None:
    random = np.random.default_rng(3)
    steps = [(np.exp(random.normal(size=6)), random.uniform(0.1, 2.0, 6)) for _ in range(8)]
    first, second, twin = (LossAware(Options(bins=5, warmup=2)) for _ in range(3))
    for sigma, losses in steps[:4]:
        step(first, sigma, losses)
        step(twin, sigma, losses)
    state = first.state_dict()
    kept = state["moments"].copy()
    step(first, *steps[4])  # what was saved does not change under the hands of the one who saves
    np.testing.assert_array_equal(state["moments"], kept)
    answer(second.sample_timesteps(), UNIFORM)  # as the notes of a resumed run do
    second.load_state_dict(state)
    u = np.linspace(0.001, 0.999, 500)
    for sigma, losses in steps[4:]:
        resumed, straight = (step(plugin, sigma, losses) for plugin in (second, twin))
        assert resumed is not UNIFORM
        np.testing.assert_array_equal(resumed.quantile(u), straight.quantile(u))
    np.testing.assert_array_equal(second.moments, twin.moments)
    assert second.steps == twin.steps == 8


def test_options_that_do_nothing_say_so() -> None:
    assert LossAware(Options()).notes() == []
    assert LossAware(Options(floor=1.0)).notes() == ["does nothing: floor is 1"]
    assert LossAware(Options(bins=1)).notes() == ["does nothing: bins is 1"]
