"""What a run learns where: p, w and p * w against closed forms, with and without plugins."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdxl_host
from sdxl_host.config.load import RunConfig, load
from sdxl_host.diffusion.distributions import DiscreteDistribution, NoiseDistribution
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.errors import PluginError
from sdxl_host.planning.curves import (
    Curve,
    curve,
    curves,
    host_curve,
    probabilities,
    quarters,
    tenths,
)
from sdxl_host.plugins.hooks import make_hooks

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
_DENOISER = "model.params.denoiser_config.params"
V = [f"{_DENOISER}.{part}_config.target=sdxl_host.V{part.title()}" for part in
     ("scaling", "weighting")]  # fmt: skip
SDXL_PRESET = ["--edm_p_mean", "0.4833", "--edm_p_std", "1.1943", "--edm_sigma_data", "1.0"]
LATER = ["--timestep_bias_strategy", "later", "--timestep_bias_multiplier", "2"]
SCHEDULE = NoiseSchedule.scaled_linear()


def read(*words: str) -> RunConfig:
    return load(["--config", TINY, *words])


def both(*words: str) -> tuple[Curve, Curve]:
    """The curves without plugins and with them."""
    config = read(*words)
    hooks = make_hooks(config.plugins)
    return curves(hooks, hooks.build_model(config.tree), config.tree)


def active(*words: str) -> NoiseDistribution:
    config = read(*words)
    hooks = make_hooks(config.plugins)
    return hooks.sample_timesteps(hooks.build_model(config.tree), 1)


# ---- p


@pytest.mark.parametrize(
    "words",
    [[], ["--plugins", "edm"], LATER, ["--plugins", "edm", *LATER], ["--plugins", "edm,snr"]],
)
def test_p_is_a_probability(words: list[str]) -> None:
    for one in both(*words):
        assert one.p.shape == one.w.shape == one.sigma.shape == (1000,)
        assert (one.p >= 0).all()
        assert one.p.sum() == pytest.approx(1.0, abs=1e-12)
        assert one.share.sum() == pytest.approx(1.0, abs=1e-12)


def test_the_hosts_draws_are_uniform() -> None:
    before, _ = both("--plugins", "edm")
    assert np.allclose(before.p, 1 / 1000, rtol=1e-12)
    assert np.allclose(before.w, 1.0, rtol=1e-12)
    assert before.mean_weight == pytest.approx(1.0)


def test_p_of_a_discrete_distribution_is_its_own() -> None:
    masses = np.random.default_rng(0).uniform(0.1, 1.0, 1000)
    p = probabilities(DiscreteDistribution(SCHEDULE, masses))
    assert np.allclose(p, masses / masses.sum(), rtol=1e-9)


@pytest.mark.parametrize("words", [["--plugins", "edm"], ["--plugins", "edm", *LATER], LATER])
def test_p_is_how_often_a_timestep_is_the_nearest_of_a_draw(words: list[str]) -> None:
    """Against the quantile function alone, at a million evenly spaced uniforms."""
    distribution = active(*words)
    count = 1_000_000
    drawn = distribution.quantile((np.arange(count) + 0.5) / count)
    often = np.bincount(SCHEDULE.nearest(drawn), minlength=1000) / count
    assert np.abs(often - probabilities(distribution)).max() <= 1.01 / count


def test_p_of_edm_is_the_normal_distribution_between_the_edges() -> None:
    p = probabilities(active("--plugins", "edm"))
    sigmas = SCHEDULE.sigmas
    lower, upper = np.sqrt(sigmas[399:401].prod()), np.sqrt(sigmas[400:402].prod())
    normal = [0.5 * (1 + math.erf((math.log(s) + 1.2) / (1.2 * 2**0.5))) for s in (lower, upper)]
    assert p[400] == pytest.approx(normal[1] - normal[0], rel=1e-9)
    # What lies beyond the schedule belongs to its ends.
    end = 0.5 * (1 - math.erf((0.5 * math.log(sigmas[-2:].prod()) + 1.2) / (1.2 * 2**0.5)))
    assert p[999] == pytest.approx(end, rel=1e-9)


def test_edm_draws_half_of_its_noise_levels_where_sdxl_spends_8_percent() -> None:
    before, after = both("--plugins", "edm")
    low = after.sigma < 0.3
    assert after.p[low].sum() == pytest.approx(0.5, abs=0.005)
    assert before.p[low].sum() == pytest.approx(0.081, abs=0.0005)
    assert after.p[after.sigma > 1].sum() == pytest.approx(0.16, abs=0.005)


def test_a_later_bias_puts_40_percent_of_the_draws_into_the_last_quarter() -> None:
    _, after = both(*LATER)
    assert after.p[750:].sum() == pytest.approx(0.4, abs=1e-12)
    assert np.allclose(after.p[:750], 0.6 / 750)


def test_under_edm_the_same_bias_gives_the_last_quarter_2_93_percent() -> None:
    _, after = both("--plugins", "edm", *LATER)
    assert after.p[750:].sum() == pytest.approx(0.0293, abs=5e-5)


class _Falling(NoiseDistribution):
    """Its cdf is none."""

    def __init__(self, values: Any) -> None:
        self.schedule = SCHEDULE
        self._values = values

    def quantile(self, u):
        return np.ones_like(u)

    def cdf(self, sigma):
        return self._values(sigma)


@pytest.mark.parametrize(
    "values",
    [
        lambda sigma: np.linspace(1.0, 0.0, len(sigma)),
        lambda sigma: np.full(len(sigma), 1.5),
        lambda sigma: np.full(len(sigma), np.nan),
        lambda sigma: np.zeros(3),
    ],
)
def test_a_cdf_that_does_not_rise_from_0_to_1_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match=r"_Falling\.cdf does not rise from 0 to 1"):
        probabilities(_Falling(values))


# ---- w


def test_min_snr_on_eps_is_min_snr_gamma_over_snr() -> None:
    _, after = both("--plugins", "snr")
    snr = SCHEDULE.sigmas**-2.0
    assert np.allclose(after.w, np.minimum(snr, 5.0) / snr, rtol=1e-12)
    assert after.mean_weight == pytest.approx(0.917, abs=5e-4)
    assert (after.w < 1 - 1e-9).sum() == 147


def test_min_snr_on_v_is_min_snr_gamma_over_snr_plus_1() -> None:
    _, after = both("--plugins", "snr", *V)
    snr = SCHEDULE.sigmas**-2.0
    assert np.allclose(after.w, np.minimum(snr, 5.0) / (snr + 1), rtol=1e-12)
    assert after.mean_weight == pytest.approx(0.294, abs=5e-4)


@pytest.mark.parametrize(("constants", "mean"), [([], 0.207), (SDXL_PRESET, 0.295)])
def test_min_snr_on_edm(constants: list[str], mean: float) -> None:
    _, after = both("--plugins", "edm,snr", *constants)
    assert after.mean_weight == pytest.approx(mean, abs=5e-4)


def test_the_mean_weight_is_the_exact_mean_over_the_distribution() -> None:
    """Though w is taken at the timesteps only, and EDM draws between them."""
    config = read("--plugins", "edm,snr")
    hooks = make_hooks(config.plugins)
    model = hooks.build_model(config.tree)

    def own_error(sigma: np.ndarray) -> np.ndarray:
        return np.minimum(sigma**-2.0, 5.0) * model.preconditioning.c_out(sigma) ** 2

    exact = hooks.sample_timesteps(model, 1).expect(own_error)
    assert curve(hooks, model).mean_weight == pytest.approx(exact, rel=1e-3)


def test_before_knows_the_configs_own_weighting() -> None:
    """lambda = 1 on eps: the network's own error weighs sigma^2."""
    before, after = both(f"{_DENOISER}.weighting_config.target=sdxl_host.UnitWeighting")
    assert np.allclose(before.w, SCHEDULE.sigmas**2)
    assert after.is_like(before)
    share = SCHEDULE.sigmas**2 / (SCHEDULE.sigmas**2).sum()
    assert np.allclose(before.share, share)


def test_importance_correction_gives_the_product_back() -> None:
    """q(s) * lambda / (q(s) / p(s)) = p(s) * lambda, whatever q is."""
    before, after = both(*LATER, "--timestep_bias_importance_correction")
    assert not np.allclose(after.p, before.p, rtol=0.1)
    assert np.allclose(after.share, before.share, rtol=1e-9)
    assert after.mean_weight == pytest.approx(before.mean_weight)


def test_a_loss_of_no_weight_has_no_share() -> None:
    nothing = Curve(SCHEDULE.sigmas, np.full(1000, 1e-3), np.zeros(1000))
    assert nothing.mean_weight == 0
    assert (nothing.share == 0).all()
    assert all(part.share == (0, 0) for part in tenths(nothing, nothing))


# ---- before and after


@pytest.mark.parametrize("words", [[], V])
def test_without_plugins_before_equals_after(words: list[str]) -> None:
    before, after = both("--plugins", "none", *words)
    assert np.array_equal(before.p, after.p)
    assert np.array_equal(before.w, after.w)


def test_before_is_the_configs_own_objective_not_the_plugins() -> None:
    before, after = both("--plugins", "edm", *V)
    plain, _ = both("--plugins", "none", *V)
    assert np.array_equal(before.p, plain.p)
    assert np.array_equal(before.w, plain.w)
    assert not after.is_like(before)


def test_rounding_makes_no_difference() -> None:
    one = Curve(SCHEDULE.sigmas, np.full(1000, 1e-3), np.ones(1000))
    assert one.is_like(Curve(one.sigma, one.p + 1e-15, one.w * (1 + 1e-12)))
    assert not one.is_like(Curve(one.sigma, one.p, one.w * 1.001))
    assert not one.is_like(Curve(one.sigma, one.p[::-1] * np.linspace(0.9, 1.1, 1000), one.w))


COUNTING = """
import numpy as np
from sdxl_host import hookimpl

class Fake:
    def __init__(self):
        self.calls = []
        self.factor = 3.0

    @hookimpl(wrapper=True)
    def sample_timesteps(self, step):
        result = yield
        self.calls.append(("sample_timesteps", step))
        return result

    @hookimpl(wrapper=True)
    def weight_loss(self, noise, step):
        weights = yield
        self.calls.append(("weight_loss", step, noise.sigma.shape, noise.distribution))
        return weights * self.factor

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]
"""


def test_each_hook_is_called_once_and_a_restored_state_is_used(site) -> None:
    site.add("count", source=COUNTING)
    config = read("--plugins", "count")
    running = make_hooks(config.plugins)
    model = running.build_model(config.tree)
    asked = running.copy()
    asked.load_state_dict({"count": {"factor": 7.0}})
    before, after = curves(asked, model, config.tree)
    calls = asked.plugins[0].instance.calls
    assert [call[:2] for call in calls] == [("sample_timesteps", 1), ("weight_loss", 1)]
    assert calls[1][2] == (1000,)
    assert calls[1][3].schedule is not None
    assert np.allclose(after.w, 7.0)
    assert np.allclose(before.w, 1.0)
    # The hooks of the run were not asked, so what they keep is as it was.
    assert running.plugins[0].instance.calls == []


CLAIMS_MODEL = """
from sdxl_host import hookimpl

class Fake:
    @hookimpl
    def build_model(self, config):
        from dataclasses import replace
        from sdxl_host.config.load import load
        from sdxl_host.plugins.defaults import Defaults
        import numpy as np
        model = Defaults().build_model(load(["--config", config.train.weight]).tree)
        masses = np.arange(1000) >= 500
        return replace(model, distribution=type(model.distribution)(model.schedule, masses))
"""


def test_a_model_that_only_a_plugin_can_build_has_curves(site) -> None:
    """The host can't build it, so before is the plugin's own model."""
    site.add("maker", source=CLAIMS_MODEL)
    before, after = both("--plugins", "maker", "--weight", TINY, "model.target=none.Such")
    assert before.p[500:].sum() == pytest.approx(1.0)
    assert after.is_like(before)


def test_a_plugins_wrong_cdf_is_told_with_its_name(site) -> None:
    site.add(
        "wrong",
        source="from sdxl_host import NoiseDistribution, hookimpl\nimport numpy as np\n"
        "class Odd(NoiseDistribution):\n"
        "    def __init__(self, schedule): self.schedule = schedule\n"
        "    def quantile(self, u): return np.ones_like(u)\n"
        "    def cdf(self, sigma): return -sigma\n"
        "class Fake:\n    @hookimpl\n    def sample_timesteps(self, model):\n"
        "        return Odd(model.schedule)\n",
    )
    with pytest.raises(PluginError, match=r"^sample_timesteps: wrong: Odd\.cdf does not rise"):
        both("--plugins", "wrong")


# ---- in parts


def test_quarters_are_sums_of_the_curves_without_plugins_and_with_them() -> None:
    before = both("--plugins", "snr")[1]
    after = both("--plugins", "edm,snr")[1]
    found = quarters(before, after)
    ends = (slice(0, 250), slice(250, 500), slice(500, 750), slice(750, 1000))
    for draws, shares, mean, one in zip(
        found.draws, found.shares, found.mean_weights, (before, after), strict=True
    ):
        assert draws == pytest.approx([one.p[part].sum() for part in ends])
        assert shares == pytest.approx([one.share[part].sum() for part in ends])
        assert mean == pytest.approx(one.mean_weight)
    assert found.is_changed
    assert not quarters(before, before).is_changed


def test_tenths_are_sums_of_draws_and_shares_and_means_of_weights() -> None:
    before, after = both("--plugins", "edm,snr")
    found = tenths(before, after)
    assert [(part.first, part.last) for part in found][::9] == [(0, 99), (900, 999)]
    assert len(found) == 10
    second = found[1]
    place = slice(100, 200)
    assert second.sigma == (after.sigma[100], after.sigma[199])
    assert second.draws == pytest.approx((before.p[place].sum(), after.p[place].sum()))
    assert second.share == pytest.approx((before.share[place].sum(), after.share[place].sum()))
    assert second.weight == pytest.approx((before.w[place].mean(), after.w[place].mean()))


def test_small_schedules_have_curves_too() -> None:
    """Fewer timesteps than parts."""
    few = NoiseSchedule(np.array([0.1, 1.0, 10.0]))
    uniform = DiscreteDistribution(few)
    one = Curve(few.sigmas, probabilities(uniform), np.ones(3))
    assert np.allclose(one.p, 1 / 3)
    assert quarters(one, one).draws[0] == pytest.approx([1 / 3] * 3)
    assert [(part.first, part.last) for part in tenths(one, one)] == [(0, 0), (1, 1), (2, 2)]


def test_curves_import_no_mindspore() -> None:
    code = "import sys, sdxl_host.planning.curves; sys.exit('mindspore' in sys.modules)"
    host = str(Path(sdxl_host.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": host}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def test_the_host_curve_asks_no_plugin() -> None:
    config = read("--plugins", "snr")
    model = make_hooks(config.plugins).build_model(config.tree)
    assert np.allclose(host_curve(model).w, 1.0)
