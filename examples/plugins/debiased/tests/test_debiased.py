"""Debiased Estimation: the paper's weight, whatever the network predicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sdxl_host import NoiseLevels, Preconditioning
from sdxl_host.testing import PluginContract, coefficients, tiny_hooks, tiny_model

from debiased import Debiased, Options

MODEL = tiny_model()
SCHEDULE, UNIFORM = MODEL.schedule, MODEL.distribution
EVERY_TIMESTEP = NoiseLevels.at(SCHEDULE.sigmas, SCHEDULE, UNIFORM)
EPS, V = MODEL.preconditioning, tiny_model("v").preconditioning


class TestContract(PluginContract):
    plugin = "debiased"
    options = {"max_snr": 1000.0}


def weights(noise: NoiseLevels = EVERY_TIMESTEP, **options: Any) -> np.ndarray:
    return tiny_hooks(Debiased(Options(**options))).weight_loss(noise)


def paper_s_loss(predicted: np.ndarray, n: np.ndarray, alpha_bar: np.ndarray) -> np.ndarray:
    """sqrt((1 - abar) / abar) * |n - predicted|^2, a loss a sample, from alpha_bar as in DDPM."""
    error = ((n - predicted) ** 2).mean(axis=1)
    return np.sqrt(1 - alpha_bar) / np.sqrt(alpha_bar) * error


def noise_of_eps(output: np.ndarray, x: np.ndarray, alpha_bar: np.ndarray) -> np.ndarray:
    return output


def noise_of_v(output: np.ndarray, x: np.ndarray, alpha_bar: np.ndarray) -> np.ndarray:
    """n = sqrt(abar) * v + sqrt(1 - abar) * x (Salimans and Ho 2022, appendix D)."""
    return np.sqrt(alpha_bar)[:, None] * output + np.sqrt(1 - alpha_bar)[:, None] * x


@pytest.mark.parametrize(("kind", "noise_of"), [(EPS, noise_of_eps), (V, noise_of_v)])
def test_the_loss_is_the_paper_s_on_the_noise_that_the_network_means(
    kind: Preconditioning, noise_of: Any
) -> None:
    """Any network: the six numbers of the host give the paper's loss of the noise it stands for."""
    random = np.random.default_rng(1)
    z, n, output = random.normal(size=(3, 1000, 8))
    alpha_bar = 1 / (1 + SCHEDULE.sigmas**2)
    x = np.sqrt(alpha_bar)[:, None] * z + np.sqrt(1 - alpha_bar)[:, None] * n

    six = coefficients(kind, SCHEDULE.sigmas, weights())
    target = six.a[:, None] * z + six.b[:, None] * n
    ours = six.w * ((output - target) ** 2).mean(axis=1)
    theirs = paper_s_loss(noise_of(output, x, alpha_bar), n, alpha_bar)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize(("kind", "mean"), [(EPS, 3.021), (V, 0.322)])
def test_on_the_network_s_own_error_it_is_sqrt_snr_over_what_the_kind_has(
    kind: Preconditioning, mean: float
) -> None:
    """SNR * |D - z|^2 is the error of eps and (SNR + 1) * |D - z|^2 that of v."""
    snr = EVERY_TIMESTEP.snr
    per_latent = {"eps": snr, "v": snr + 1}[kind.name]
    factor = weights() * kind.c_out(SCHEDULE.sigmas) ** 2
    np.testing.assert_allclose(factor, np.sqrt(snr) / per_latent, rtol=1e-12)
    assert factor.mean() == pytest.approx(mean, abs=5e-4)


def test_the_weight_undoes_how_the_latent_amplifies_an_error() -> None:
    """One error of the predicted noise, e, moves D by sigma * e: what it costs, over how far it
    moves D, is the same at every noise level."""
    error = 0.3
    costs = weights() * (SCHEDULE.sigmas * error) ** 2
    np.testing.assert_allclose(costs / (SCHEDULE.sigmas * error), error, rtol=1e-12)


def test_a_bound_keeps_the_factor_above_it_and_changes_nothing_below() -> None:
    snr = EVERY_TIMESTEP.snr
    factor = weights(max_snr=9.0) / snr
    np.testing.assert_allclose(factor[snr >= 9], 1 / 3, rtol=1e-12)
    assert np.array_equal(weights(max_snr=9.0)[snr < 9], weights()[snr < 9])
    # The bound of other trainers touches the first of SDXL's timesteps alone.
    assert np.flatnonzero(weights(max_snr=1000.0) != weights()).tolist() == [0]


@pytest.mark.parametrize("max_snr", [None, 1000.0])
def test_it_is_finite_and_falls_over_sixteen_orders_of_magnitude(max_snr: float | None) -> None:
    ours = weights(NoiseLevels.at(np.logspace(-4, 4, 161), SCHEDULE, UNIFORM), max_snr=max_snr)
    assert ours.dtype == np.float64
    assert np.isfinite(ours).all()
    assert (ours > 0).all()
    assert (np.diff(ours) < 0).all()


@pytest.mark.parametrize(
    ("prediction", "told"), [("eps", "(eps) is multiplied by 3.021"), ("v", "0.322")]
)
def test_notes_say_how_much_larger_the_loss_is(prediction: Any, told: str) -> None:
    (line,) = tiny_hooks(Debiased(Options()), model=tiny_model(prediction)).notes()
    assert told in line
