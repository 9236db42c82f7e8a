"""Min-SNR: the paper's weight, and what it comes to for each parametrisation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sdxl_host import DiscreteDistribution, NoiseDistribution, NoiseLevels, NoiseSchedule, hookimpl
from sdxl_host.diffusion.preconditioning import EpsPreconditioning, VPreconditioning
from sdxl_host.errors import ConfigError
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.hooks import Hooks, Plugin
from sdxl_host.settings.options import build_options

from sdxl_snr import MinSNR, Options

SCHEDULE = NoiseSchedule.scaled_linear()
UNIFORM = DiscreteDistribution(SCHEDULE)
NOISIER = UNIFORM.reweighted(np.linspace(1.0, 9.0, 1000))
EVERY_TIMESTEP = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, UNIFORM)
EPS: Any = SimpleNamespace(
    schedule=SCHEDULE, preconditioning=EpsPreconditioning(SCHEDULE), distribution=UNIFORM
)
V: Any = SimpleNamespace(
    schedule=SCHEDULE, preconditioning=VPreconditioning(SCHEDULE), distribution=UNIFORM
)


class Defaults:
    """Stands in for the host's own answer."""

    @hookimpl
    def sample_timesteps(self, model: Any) -> NoiseDistribution:
        return model.distribution

    @hookimpl
    def weight_loss(self, noise: NoiseLevels) -> np.ndarray:
        return noise.snr


def run(options: Options | None = None) -> Hooks:
    options = options or Options()
    installed = Installed("snr", "sdxl-snr", "0.1.0", None, "sdxl_snr", "MinSNR")
    return Hooks(Defaults(), [Plugin(installed, options, MinSNR(options))])


def weights(
    noise: NoiseLevels = EVERY_TIMESTEP, options: Options | None = None, model: Any = EPS
) -> np.ndarray:
    return run(options).weight_loss(model=model, noise=noise, step=1)


def test_the_weight_is_the_ratio_bounded_by_gamma() -> None:
    ours = weights()
    snr = EVERY_TIMESTEP.snr
    assert np.array_equal(ours[snr < 5], snr[snr < 5])
    assert (ours[snr >= 5] == 5.0).all()
    assert ours.dtype == np.float64
    assert ours.shape == snr.shape


def test_it_replaces_the_host_s_own_weight() -> None:
    assert run().chain("weight_loss") == "snr"
    assert not np.array_equal(weights(), Defaults().weight_loss(EVERY_TIMESTEP))


def test_on_eps_it_is_the_paper_s_min_snr_over_snr() -> None:
    factor = weights() * EpsPreconditioning(SCHEDULE).c_out(SCHEDULE.sigmas) ** 2
    snr = EVERY_TIMESTEP.snr
    np.testing.assert_allclose(factor, np.minimum(snr, 5) / snr, rtol=1e-12)
    assert factor.mean() == pytest.approx(0.917, abs=5e-4)
    changed = factor < 1 - 1e-12
    assert changed.mean() == 0.147
    assert changed[:147].all()


def test_on_v_it_is_min_snr_over_snr_plus_one() -> None:
    factor = weights() * VPreconditioning(SCHEDULE).c_out(SCHEDULE.sigmas) ** 2
    snr = EVERY_TIMESTEP.snr
    np.testing.assert_allclose(factor, np.minimum(snr, 5) / (snr + 1), rtol=1e-12)
    # The two wrong forms for v that are in use elsewhere.
    assert np.abs(factor - np.minimum(snr + 1, 5) / (snr + 1)).max() > 0.1
    assert np.abs(factor - np.minimum(snr, 5) / snr).max() > 0.1
    assert factor.mean() == pytest.approx(0.294, abs=5e-4)


def test_gamma_is_the_bound() -> None:
    assert weights(options=Options(gamma=2.0)).max() == 2.0
    # Above every ratio of the schedule it bounds nothing.
    assert np.array_equal(weights(options=Options(gamma=1e6)), EVERY_TIMESTEP.snr)


@pytest.mark.parametrize("normalize", ["none", "mean1"])
@pytest.mark.parametrize("model", [EPS, V])
def test_it_is_finite_over_sixteen_orders_of_magnitude(normalize: Any, model: Any) -> None:
    noise = NoiseLevels.at(np.logspace(-4, 4, 161), SCHEDULE, UNIFORM)
    assert noise.snr.min() == pytest.approx(1e-8)
    assert noise.snr.max() == pytest.approx(1e8)
    ours = weights(noise, Options(normalize=normalize), model)
    assert np.isfinite(ours).all()
    assert (ours > 0).all()
    assert (np.diff(ours) <= 0).all()


def test_the_limits_at_no_noise_and_at_nothing_else() -> None:
    """SNR to infinity: gamma on the latent, and 0 on the network's own error. SNR to 0: the SNR
    itself, which is 1 on the network's own error for eps and 0 for v."""
    ends = NoiseLevels.at(np.array([1e-100, 1e100]), SCHEDULE, UNIFORM)
    np.testing.assert_allclose(weights(ends), [5.0, 1e-200], rtol=1e-12)
    on_eps = weights(ends) * EPS.preconditioning.c_out(ends.sigma) ** 2
    np.testing.assert_allclose(on_eps, [0.0, 1.0], atol=1e-12)
    on_v = weights(ends) * V.preconditioning.c_out(ends.sigma) ** 2
    np.testing.assert_allclose(on_v, [0.0, 0.0], atol=1e-12)


# ---- normalize


@pytest.mark.parametrize("model", [EPS, V])
@pytest.mark.parametrize("distribution", [UNIFORM, NOISIER])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_mean1_keeps_the_mean_of_the_network_s_own_weight_at_one(
    model: Any, distribution: NoiseDistribution, gamma: float
) -> None:
    """E[min(SNR, gamma) * c_out^2] / that mean = 1 over what is drawn, whatever is drawn."""
    noise = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, distribution)
    ours = weights(noise, Options(gamma=gamma, normalize="mean1"), model)
    c_out = model.preconditioning.c_out
    masses = np.diff(np.concatenate([[0.0], distribution.cdf(SCHEDULE.sigmas)]))
    assert np.sum(masses * ours * c_out(SCHEDULE.sigmas) ** 2) == pytest.approx(1.0, rel=1e-12)
    # It is one number for all noise levels.
    plain = weights(noise, Options(gamma=gamma), model)
    np.testing.assert_allclose(ours / plain, ours[0] / plain[0], rtol=1e-12)
    np.testing.assert_allclose(plain, np.minimum(noise.snr, gamma), rtol=1e-15)


class Counted(DiscreteDistribution):
    """Counts how often its mean is asked for."""

    asked = 0

    def expect(self, f: Any) -> float:
        self.asked += 1
        return super().expect(f)


def test_the_mean_is_taken_once_for_each_distribution() -> None:
    hooks = run(Options(normalize="mean1"))
    first, second = Counted(SCHEDULE), Counted(SCHEDULE, np.arange(1.0, 1001.0))
    results = []
    for step, distribution in enumerate([first, first, second, second, first], start=1):
        noise = NoiseLevels.at(np.array([0.1, 1.0]), SCHEDULE, distribution)
        results.append(hooks.weight_loss(model=EPS, noise=noise, step=step))
    assert (first.asked, second.asked) == (2, 1)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[4])
    assert (results[2] < results[0]).all()  # noisier draws are cut less, so their mean is higher


@pytest.mark.parametrize(("model", "name", "mean"), [(EPS, "eps", "0.917"), (V, "v", "0.294")])
def test_notes_say_how_much_smaller_the_loss_is(model: Any, name: str, mean: str) -> None:
    (line,) = run().notes(model)
    assert line.startswith("snr: gamma 5:")
    assert f"({name})" in line
    assert line.endswith(f"{mean} on average over the draws")
    (normalized,) = run(Options(normalize="mean1")).notes(model)
    assert normalized == f"{line}, and normalize mean1 divides by that"


def test_notes_speak_of_what_is_drawn() -> None:
    model: Any = SimpleNamespace(**{**vars(V), "distribution": NOISIER})
    masses = np.linspace(1, 9, 1000) / np.linspace(1, 9, 1000).sum()
    snr = EVERY_TIMESTEP.snr
    mean = np.sum(masses * np.minimum(snr, 5) / (snr + 1))
    (line,) = run().notes(model)
    assert f" {mean:.3f} on average" in line
    assert mean < 0.25


# ---- options


def test_options_come_from_a_config_section() -> None:
    assert build_options(Options, {}, "plugins.snr") == Options(gamma=5.0, normalize="none")
    assert build_options(Options, {"gamma": 7}, "plugins.snr").gamma == 7.0
    assert build_options(Options, {"gamma": 1e-6}, "plugins.snr").gamma == 1e-6
    for bad in (0, -1.0, float("inf"), float("nan"), "five", True):
        with pytest.raises(ConfigError, match=r"plugins\.snr\.gamma"):
            build_options(Options, {"gamma": bad}, "plugins.snr")
    assert build_options(Options, {"normalize": "mean1"}, "plugins.snr").normalize == "mean1"
    for bad in ("max1", True, 1):
        with pytest.raises(ConfigError, match=r"plugins\.snr\.normalize"):
            build_options(Options, {"normalize": bad}, "plugins.snr")
