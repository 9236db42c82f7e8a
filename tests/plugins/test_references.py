"""The plugins against what others publish, and several of them together.

What needs the golden arrays, or more than one plugin, stands here; the rest is beside each plugin.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sdxl_edm import EDM
from sdxl_snr import MinSNR
from sdxl_timestep_bias import TimestepBias

from sdxl_host.diffusion.distributions import DiscreteDistribution, NoiseDistribution
from sdxl_host.diffusion.model import DiffusionModel, Lazy, SamplingDefaults
from sdxl_host.diffusion.objective import NoiseLevels, coefficients
from sdxl_host.diffusion.preconditioning import (
    EpsPreconditioning,
    Preconditioning,
    VPreconditioning,
)
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.hookspecs import hookimpl
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.hooks import Hooks, Plugin

SCHEDULE = NoiseSchedule.scaled_linear()
CLASSES: dict[str, Any] = {"edm": EDM, "snr": MinSNR, "timestep_bias": TimestepBias}
PAPER, SDXL = {"sigma_data": 0.5}, {"preset": "sdxl"}
LATER = {"strategy": "later", "multiplier": 3.0, "portion": 0.4}
DRAWS = 1_000_000


def never() -> Any:
    raise AssertionError("no network is needed here")


class Given(Defaults):
    """The host's own answers, over a model that is given."""

    def __init__(self, preconditioning: Preconditioning) -> None:
        parts: dict[str, Any] = {
            part.name: Lazy(never) for part in fields(DiffusionModel) if "_part" in part.name
        }
        self._model = DiffusionModel(
            preconditioning=preconditioning,
            schedule=SCHEDULE,
            sampling=SamplingDefaults("trailing", SCHEDULE.sigmas[0], SCHEDULE.sigmas[-1]),
            distribution=DiscreteDistribution(SCHEDULE),
            offset_noise_level=0.0,
            **parts,
        )

    @hookimpl
    def build_model(self, config: Any) -> DiffusionModel:
        return self._model


class Run:
    """Hooks over eps (or another kind) with the plugins named, and what they come to."""

    def __init__(self, kind: type[Preconditioning] = EpsPreconditioning, **options: Any) -> None:
        plugins = []
        for name, values in options.items():
            chosen = CLASSES[name].Options(**values)
            installed = Installed(name, f"sdxl-{name}", "0.1.0", None, "", "")
            plugins.append(Plugin(installed, chosen, CLASSES[name](chosen)))
        self.hooks = Hooks(Given(kind(SCHEDULE)), plugins)  # type: ignore[call-arg]
        self.model: DiffusionModel = self.hooks.build_model(config=None)
        self.distribution: NoiseDistribution = self.hooks.sample_timesteps(self.model, step=1)

    def weights(self, sigma: np.ndarray) -> np.ndarray:
        """lambda on |D - z|^2."""
        noise = NoiseLevels.at(sigma, SCHEDULE, self.distribution)
        return self.hooks.weight_loss(self.model, noise, step=1)

    def own_weights(self, sigma: np.ndarray) -> np.ndarray:
        """The factor on the network's own squared error."""
        return coefficients(self.model.preconditioning, sigma, self.weights(sigma)).w


# ---- Min-SNR


@pytest.mark.parametrize(
    ("kind", "key"), [(EpsPreconditioning, "epsilon"), (VPreconditioning, "v_prediction")]
)
def test_min_snr_is_what_diffusers_scripts_compute(golden: Path, kind: Any, key: str) -> None:
    """`compute_snr` and the recipe around it, whose SNR is float32 and off by 2e-4 near t = 0."""
    with np.load(golden / "min_snr.npz") as stored:
        gamma, expected = float(stored["gamma"]), stored[key]
    ours = Run(kind, snr={"gamma": gamma}).own_weights(SCHEDULE.sigmas)
    np.testing.assert_allclose(ours, expected, rtol=2e-4)


@pytest.mark.parametrize("options", [PAPER, SDXL])
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_with_edm_and_snr_the_latent_s_error_weighs_min_snr(options: Any, gamma: float) -> None:
    """min(1/s^2, gamma) whatever sigma_data is, and times c_out^2 on the network's own error."""
    run = Run(edm=options, snr={"gamma": gamma})
    sigma = np.logspace(-4, 4, 161)
    np.testing.assert_allclose(run.weights(sigma), np.minimum(sigma**-2.0, gamma), rtol=1e-14)
    c_out = run.model.preconditioning.c_out(sigma)
    np.testing.assert_allclose(run.own_weights(sigma), run.weights(sigma) * c_out**2, rtol=1e-14)


@pytest.mark.parametrize(("options", "mean"), [(PAPER, 0.207), (SDXL, 0.295)])
def test_how_much_snr_shrinks_edm_s_loss_and_that_mean1_undoes_it(
    options: Any, mean: float
) -> None:
    run = Run(edm=options, snr={})
    assert run.distribution.expect(run.own_weights) == pytest.approx(mean, abs=5e-4)
    (line,) = [line for line in run.hooks.notes(run.model) if line.startswith("snr: ")]
    assert f"(edm) is multiplied by {mean} on average" in line
    run = Run(edm=options, snr={"normalize": "mean1"}, timestep_bias=LATER)
    assert run.distribution.expect(run.own_weights) == pytest.approx(1.0, rel=1e-9)


# ---- EDM's noise levels under a bias


@pytest.mark.parametrize(
    "options", [PAPER, SDXL, {"parametrization": "native"}], ids=["paper", "sdxl", "native"]
)
def test_a_million_biased_draws_follow_the_density(options: dict[str, Any]) -> None:
    """p(s) * w(t(s)) / Z, integrated anew on a fine grid of ln s: the Kolmogorov-Smirnov distance
    of N draws stays under 1.95 / sqrt(N) but for one time in a thousand."""
    run = Run(edm=options, timestep_bias=LATER)
    assert run.hooks.chain("sample_timesteps") == "edm -> timestep_bias"
    u = np.random.default_rng(4).random(DRAWS)
    drawn = np.sort(np.log(run.distribution.quantile(u)))

    mean, std = (0.4833, 1.1943) if options is SDXL else (-1.2, 1.2)
    grid = np.linspace(mean - 9 * std, mean + 9 * std, 2_000_001)
    density = np.exp(-0.5 * ((grid - mean) / std) ** 2)
    log_sigmas = np.log(SCHEDULE.sigmas)
    if "parametrization" in options:
        density[(grid < log_sigmas[0]) | (grid > log_sigmas[-1])] = 0.0
    # The last 400 timesteps weigh 3: from half way between 599 and 600 in ln sigma.
    density[grid >= (log_sigmas[599] + log_sigmas[600]) / 2] *= 3.0

    def distance(density: np.ndarray) -> float:
        mass = np.cumsum(density)
        expected = np.interp(drawn, grid, mass / mass[-1])
        ranks = np.arange(DRAWS + 1) / DRAWS
        return float(np.maximum(ranks[1:] - expected, expected - ranks[:-1]).max())

    assert distance(density) < 1.95 / np.sqrt(DRAWS)
    # The test can tell: a bias of 3.1 is refuted.
    stronger = density * np.where(grid >= (log_sigmas[599] + log_sigmas[600]) / 2, 3.1 / 3, 1.0)
    assert distance(stronger) > 1.95 / np.sqrt(DRAWS)


@pytest.mark.parametrize("options", [PAPER, SDXL, {"parametrization": "native"}])
def test_quantile_and_cdf_undo_each_other_under_a_bias(options: dict[str, Any]) -> None:
    distribution = Run(edm=options, timestep_bias=LATER).distribution
    u = (np.arange(4000) + 0.5) / 4000
    np.testing.assert_allclose(distribution.cdf(distribution.quantile(u)), u, atol=1e-10)
    assert float(distribution.cdf(np.array(1e6))) == 1.0


def test_importance_correction_over_edm_and_snr_keeps_the_mean_loss() -> None:
    """E_q[w * p/q * loss] = E_p[w * loss] for any loss of sigma."""
    biased = Run(edm=SDXL, snr={}, timestep_bias={**LATER, "importance_correction": True})
    plain = Run(edm=SDXL, snr={})

    def mean(run: Run) -> float:
        return run.distribution.expect(lambda s: run.own_weights(s) * np.cos(np.log(s)))

    assert mean(biased) == pytest.approx(mean(plain), rel=1e-4)
    assert mean(Run(edm=SDXL, snr={}, timestep_bias=LATER)) != pytest.approx(mean(plain), rel=0.1)
