"""EDM: the coefficients of the paper's Table 1, its log-normal noise, and its place in a run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sdxl_host import DiffusionModel, DiscreteDistribution, Sampling, Schedule, hookimpl
from sdxl_host.diffusion.objective import coefficients
from sdxl_host.diffusion.preconditioning import EpsPreconditioning
from sdxl_host.errors import ConfigError
from sdxl_host.hooks import Hooks, Plugin
from sdxl_host.model import Lazy
from sdxl_host.options import build_options
from sdxl_host.plugins import Installed

from sdxl_edm import EDM, EDMPreconditioning, LogNormal, Options

SCHEDULE = Schedule.scaled_linear()
SIGMA = np.logspace(-4, 4, 161)  # SNR from 1e8 to 1e-8


def plain_model() -> DiffusionModel:
    def never() -> Any:
        raise AssertionError("no network is needed here")

    return DiffusionModel(
        preconditioning=EpsPreconditioning(SCHEDULE),
        schedule=SCHEDULE,
        sampling=Sampling("trailing", SCHEDULE.sigmas[0], SCHEDULE.sigmas[-1]),
        distribution=DiscreteDistribution(SCHEDULE),
        offset_noise_level=0.0,
        **{part.name: Lazy(never) for part in fields(DiffusionModel) if "_part" in part.name},
    )


class Defaults:
    """Stands in for the host's own answers."""

    @hookimpl
    def build_model(self) -> DiffusionModel:
        return plain_model()

    @hookimpl
    def sample_timesteps(self, model: DiffusionModel) -> Any:
        return model.distribution

    @hookimpl
    def weight_loss(self, model: DiffusionModel, noise: Any) -> np.ndarray:
        return model.preconditioning.loss_weight(noise.sigma)


def run(options: Options | None = None) -> Hooks:
    options = options or Options()
    installed = Installed("edm", "sdxl-edm", "0.1.0", None, "sdxl_edm", "EDM")
    return Hooks(Defaults(), [Plugin(installed, options, EDM(options))])


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


def test_the_readme_s_values_for_sdxl_are_the_moments_of_its_schedule() -> None:
    assert SCHEDULE.log_sigmas.mean() == pytest.approx(0.4833, abs=5e-5)
    assert SCHEDULE.log_sigmas.std() == pytest.approx(1.1943, abs=5e-5)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for flag in ("--edm_p_mean 0.4833", "--edm_p_std 1.1943", "--edm_sigma_data 1.0"):
        assert flag in readme


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
    model = run().build_model(config=None)
    assert model.preconditioning.name == "edm"
    assert model.sampling == Sampling(spacing="karras", sigma_min=0.002, sigma_max=80.0)
    assert model.schedule is SCHEDULE
    assert model.changes == ()


def test_it_claims_the_noise_levels_and_hands_out_one_object() -> None:
    hooks = run()
    model = hooks.build_model(config=None)
    first = hooks.sample_timesteps(model=model, step=1)
    assert isinstance(first, LogNormal)
    assert first.schedule is model.schedule
    assert hooks.sample_timesteps(model=model, step=2) is first
    assert hooks.chain("sample_timesteps") == "edm"
    other: Any = SimpleNamespace(schedule=Schedule.scaled_linear(num_timesteps=10))
    assert hooks.sample_timesteps(model=other, step=3).schedule is other.schedule


def test_its_loss_weight_comes_through_the_host_s_default() -> None:
    hooks = run()
    model = hooks.build_model(config=None)
    noise: Any = SimpleNamespace(sigma=np.array([0.1, 1.0, 10.0]))
    weight = hooks.weight_loss(model=model, noise=noise, step=1)
    s = noise.sigma
    np.testing.assert_allclose(weight, (s**2 + 0.25) / (s * 0.5) ** 2, rtol=1e-14)
    assert hooks.chain("weight_loss") == "host"


def test_every_option_has_an_effect() -> None:
    def result(options: Options) -> tuple[float, float, float]:
        hooks = run(options)
        model = hooks.build_model(config=None)
        draws = hooks.sample_timesteps(model=model, step=1).quantile(np.array([0.3, 0.5]))
        return float(model.preconditioning.c_skip(np.array(1.0))), draws[0], draws[1]

    default = result(Options())
    assert default == result(Options(sigma_data=0.5, p_mean=-1.2, p_std=1.2))
    skip, low, median = result(Options(sigma_data=1.0))
    assert skip == 0.5
    assert (low, median) == default[1:]
    skip, low, median = result(Options(p_mean=0.0))
    assert skip == default[0]
    assert median == 1.0
    assert low > default[1]
    skip, low, median = result(Options(p_std=2.0))
    assert skip == default[0]
    assert median == default[2]
    assert low < default[1]


def test_notes_warn_of_what_pretrained_weights_make_of_c_noise() -> None:
    hooks = run()
    (line,) = hooks.notes(hooks.build_model(config=None))
    assert line.startswith("edm: ")
    assert "timesteps 0 to 999" in line
    central = LogNormal(SCHEDULE, -1.2, 1.2).quantile(np.array([0.001, 0.5, 0.999]))
    assert (np.abs(EDMPreconditioning(0.5).c_noise(central)) < 1.3).all()


def test_options_come_from_a_config_section() -> None:
    assert build_options(Options, {}, "plugins.edm") == Options(0.5, -1.2, 1.2)
    assert build_options(Options, {"p_mean": 1}, "plugins.edm").p_mean == 1.0
    for key, bad in (("sigma_data", 0), ("sigma_data", -1.0), ("p_std", 0.0), ("p_mean", "low")):
        with pytest.raises(ConfigError, match=rf"plugins\.edm\.{key}"):
            build_options(Options, {key: bad}, "plugins.edm")


def test_importing_it_is_light() -> None:
    code = "import sys, sdxl_edm; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert not {"mindspore", "torch", "transformers", "scipy", "PIL"} & set(done.stdout.split())
