"""Min-SNR: the paper's weight, and what it comes to for each parametrisation."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sdxl_host import DiscreteDistribution, Noise, Schedule, hookimpl
from sdxl_host.diffusion.preconditioning import EpsPreconditioning, VPreconditioning
from sdxl_host.errors import ConfigError
from sdxl_host.hooks import Hooks, Plugin
from sdxl_host.options import build_options
from sdxl_host.plugins import Installed

from sdxl_snr import MinSNR, Options

SCHEDULE = Schedule.scaled_linear()
UNIFORM = DiscreteDistribution(SCHEDULE)
EVERY_TIMESTEP = Noise.at(SCHEDULE.sigmas, SCHEDULE, UNIFORM)


class Defaults:
    """Stands in for the host's own answer."""

    @hookimpl
    def weight_loss(self, noise: Noise) -> np.ndarray:
        return noise.snr


def run(options: Options | None = None) -> Hooks:
    options = options or Options()
    installed = Installed("snr", "sdxl-snr", "0.1.0", None, "sdxl_snr", "MinSNR")
    return Hooks(Defaults(), [Plugin(installed, options, MinSNR(options))])


def weights(noise: Noise = EVERY_TIMESTEP, options: Options | None = None) -> np.ndarray:
    return run(options).weight_loss(model=None, noise=noise, step=1)


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


def test_it_is_finite_over_sixteen_orders_of_magnitude() -> None:
    noise = Noise.at(np.logspace(-4, 4, 161), SCHEDULE, UNIFORM)
    assert noise.snr.min() == pytest.approx(1e-8)
    assert noise.snr.max() == pytest.approx(1e8)
    ours = weights(noise)
    assert np.isfinite(ours).all()
    assert (ours > 0).all()
    assert (np.diff(ours) <= 0).all()


@pytest.mark.parametrize(
    ("preconditioning", "name", "mean"),
    [(EpsPreconditioning, "eps", "0.917"), (VPreconditioning, "v", "0.294")],
)
def test_notes_say_how_much_smaller_the_loss_is(preconditioning: Any, name: str, mean: str) -> None:
    model: Any = SimpleNamespace(schedule=SCHEDULE, preconditioning=preconditioning(SCHEDULE))
    (line,) = run().notes(model)
    assert line.startswith("snr: gamma 5:")
    assert f"({name})" in line
    assert mean in line


def test_options_come_from_a_config_section() -> None:
    assert build_options(Options, {}, "plugins.snr") == Options(gamma=5.0)
    assert build_options(Options, {"gamma": 7}, "plugins.snr").gamma == 7.0
    for bad in (0, -1.0, float("inf"), float("nan"), "five", True):
        with pytest.raises(ConfigError, match=r"plugins\.snr\.gamma"):
            build_options(Options, {"gamma": bad}, "plugins.snr")


def test_importing_it_is_light() -> None:
    code = "import sys, sdxl_snr; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert not {"mindspore", "torch", "transformers", "scipy", "PIL"} & set(done.stdout.split())
