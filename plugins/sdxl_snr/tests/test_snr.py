"""Min-SNR: the paper's weight, and what it comes to for each parametrisation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sdxl_host import DiffusionModel, DiscreteDistribution, NoiseDistribution, NoiseLevels
from sdxl_host.testing import HostError, TinyHooks, make_options, tiny_hooks, tiny_model

from sdxl_snr import MinSNR, Options

EPS, V = tiny_model("eps"), tiny_model("v")
SCHEDULE, UNIFORM = EPS.schedule, EPS.distribution
NOISIER = UNIFORM.reweighted(np.linspace(1.0, 9.0, 1000))
EVERY_TIMESTEP = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, UNIFORM)


def run(options: Options | None = None, model: DiffusionModel = EPS) -> TinyHooks:
    return tiny_hooks(MinSNR(options or Options()), model=model)


def weights(
    noise: NoiseLevels = EVERY_TIMESTEP,
    options: Options | None = None,
    model: DiffusionModel = EPS,
) -> np.ndarray:
    return run(options, model).weight_loss(noise)


def test_the_weight_is_the_ratio_bounded_by_gamma() -> None:
    ours = weights()
    snr = EVERY_TIMESTEP.snr
    assert np.array_equal(ours[snr < 5], snr[snr < 5])
    assert (ours[snr >= 5] == 5.0).all()
    assert ours.dtype == np.float64
    assert ours.shape == snr.shape


def test_it_replaces_the_host_s_own_weight() -> None:
    assert run().chain("weight_loss") == "snr"
    assert not np.array_equal(weights(), tiny_hooks().weight_loss(EVERY_TIMESTEP))


def test_on_eps_it_is_the_paper_s_min_snr_over_snr() -> None:
    factor = weights() * EPS.preconditioning.c_out(SCHEDULE.sigmas) ** 2
    snr = EVERY_TIMESTEP.snr
    np.testing.assert_allclose(factor, np.minimum(snr, 5) / snr, rtol=1e-12)
    assert factor.mean() == pytest.approx(0.917, abs=5e-4)
    changed = factor < 1 - 1e-12
    assert changed.mean() == 0.147
    assert changed[:147].all()


def test_on_v_it_is_min_snr_over_snr_plus_one() -> None:
    factor = weights() * V.preconditioning.c_out(SCHEDULE.sigmas) ** 2
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
        results.append(hooks.weight_loss(noise, step))
    assert (first.asked, second.asked) == (2, 1)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[4])
    assert (results[2] < results[0]).all()  # noisier draws are cut less, so their mean is higher


@pytest.mark.parametrize(("model", "name", "mean"), [(EPS, "eps", "0.917"), (V, "v", "0.294")])
def test_notes_say_how_much_smaller_the_loss_is(model: Any, name: str, mean: str) -> None:
    (line,) = run(model=model).notes()
    assert line.startswith("snr: gamma 5:")
    assert f"({name})" in line
    assert line.endswith(f"{mean} on average over the draws")
    (normalized,) = run(Options(normalize="mean1"), model).notes()
    assert normalized == f"{line}, and normalize mean1 divides by that"


def test_notes_speak_of_what_is_drawn() -> None:
    model = replace(V, distribution=NOISIER)
    masses = np.linspace(1, 9, 1000) / np.linspace(1, 9, 1000).sum()
    snr = EVERY_TIMESTEP.snr
    mean = np.sum(masses * np.minimum(snr, 5) / (snr + 1))
    (line,) = run(model=model).notes()
    assert f" {mean:.3f} on average" in line
    assert mean < 0.25


# ---- options


def test_options_come_from_a_config_section() -> None:
    assert make_options(MinSNR, {}) == Options(gamma=5.0, normalize="none")
    assert make_options(MinSNR, {"gamma": 7}).gamma == 7.0
    assert make_options(MinSNR, {"gamma": 1e-6}).gamma == 1e-6
    for bad in (0, -1.0, float("inf"), float("nan"), "five", True):
        with pytest.raises(HostError, match=r"plugins\.snr\.gamma"):
            make_options(MinSNR, {"gamma": bad})
    assert make_options(MinSNR, {"normalize": "mean1"}).normalize == "mean1"
    for bad in ("max1", True, 1):
        with pytest.raises(HostError, match=r"plugins\.snr\.normalize"):
            make_options(MinSNR, {"normalize": bad})
