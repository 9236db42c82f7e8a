"""The promises of a plugin, each a function of a `Subject`; `PluginContract` calls them all.

They raise PluginError with the plugin, what is wrong and how to mend it. None needs MindSpore; for
those that only runs can show, see `run_checks`, and for prompts, `prompt_checks`.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np

from sdxl_host.diffusion.distributions import NoiseDistribution
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.diffusion.objective import NoiseLevels
from sdxl_host.diffusion.preconditioning import Preconditioning
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.hookspecs import hookimpl
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.sampling.samplers import SAMPLERS, SPACINGS
from sdxl_host.testing.parts import noise_levels
from sdxl_host.testing.subject import Subject, check_array
from sdxl_host.testing.watch import Watch

__all__ = [
    "check_build_model",
    "check_notes",
    "check_sample_timesteps",
    "check_weight_loss",
    "levels_of",
]

_ROUNDING = 1e-9
# Of a quantile and a cdf, which may be tables.
_TABLES = 1e-6
# Shares of the draws that may lie outside the noise levels that the model states, on either side.
_OUTSIDE = 0.025
_DRAWS = (np.arange(4096) + 0.5) / 4096
_EXTREMES = np.array([2.0**-54, 1.0 - 2.0**-53])  # the least and the greatest uniform of a run


# ---- build_model


class _Recorder(Defaults):
    """The host's answers; keeps the model that adapters were given."""

    model: DiffusionModel
    before: dict[str, Any]

    @hookimpl
    def build_model(self, config: Any) -> DiffusionModel:
        self.model = super().build_model(config)
        self.before = _numbers_of(self.model)
        return self.model


def _numbers_of(model: DiffusionModel) -> dict[str, Any]:
    """What a model's numpy parts answer, to see whether someone changed them."""
    sigma = model.schedule.sigmas.copy()
    kind = model.preconditioning
    answers = {f"preconditioning.{n}": getattr(kind, n)(sigma).copy() for n in _METHODS}
    answers["schedule.sigmas"] = sigma
    answers["distribution.quantile"] = model.distribution.quantile(_DRAWS).copy()
    for field in fields(model):
        answers[field.name] = getattr(model, field.name)
    return answers


_METHODS = ("c_skip", "c_out", "c_in", "c_noise", "loss_weight", "one_minus_c_skip")


def check_build_model(subject: Subject) -> None:
    """The model that comes of the hooks: its preconditioning, its sampling, and that the one which
    adapters were given is as it was."""
    recorder = _Recorder()
    hooks = subject.hooks(recorder)
    model = subject.model(hooks)
    if "build_model" in subject.roles and hasattr(recorder, "model"):
        _check_not_mutated(subject, recorder)
    _check_sampling(subject, model)
    _check_preconditioning(subject, model)
    with subject.asked("the preconditioning's scheduler_config"):
        scheduler = model.preconditioning.scheduler_config()
        if scheduler is not None:
            json.dumps(scheduler, allow_nan=False)
            if "_class_name" not in scheduler:
                raise subject.fault(
                    "the preconditioning's scheduler_config has no _class_name",
                    "name the diffusers scheduler there, or return None",
                )


def _check_not_mutated(subject: Subject, recorder: _Recorder) -> None:
    after = _numbers_of(recorder.model)
    for name, before in recorder.before.items():
        same = before is after[name] or (
            isinstance(before, np.ndarray) and np.array_equal(before, after[name])
        )
        if not same:
            raise subject.fault(
                f"build_model changed {name} of the model it was given",
                "return a copy with the change, as model.with_preconditioning(...) gives, and "
                "change copies of its parts",
            )


def _check_sampling(subject: Subject, model: DiffusionModel) -> None:
    sampling = model.sampling
    low, high = sampling.sigma_min, sampling.sigma_max
    if not (np.isfinite([low, high]).all() and 0 < low < high):
        raise subject.fault(
            f"the model's sampling goes from sigma {low} to {high}",
            "give with_preconditioning a sampling with 0 < sigma_min < sigma_max, both finite",
        )
    for name, known in (("spacing", SPACINGS), ("sampler", tuple(SAMPLERS))):
        given = getattr(sampling, name)
        if given not in known:
            raise subject.fault(
                f"the model's sampling has the {name} {given!r}", f"use one of {', '.join(known)}"
            )


def _levels(model: DiffusionModel) -> np.ndarray:
    """Noise levels over SNR 1e-4 to 1e4, as far as the model's own range goes."""
    low, high = model.sampling.sigma_min, model.sampling.sigma_max
    return np.unique(np.clip(noise_levels().sigma, low, high))


def _check_preconditioning(subject: Subject, model: DiffusionModel) -> None:
    kind: Preconditioning = model.preconditioning
    if not isinstance(kind.name, str) or not kind.name.strip():
        raise subject.fault(
            f"the preconditioning's name is {kind.name!r}",
            'give its class a name = "..."; checkpoints and messages say it',
        )
    levels = _levels(model)
    # A narrow range has few of them.
    shaped = (levels, np.resize(levels, (2, 3)), levels[len(levels) // 2].reshape(()))
    for name in _METHODS:
        for sigma in shaped:
            given = sigma.copy()
            with subject.asked(f"the preconditioning's {name} at sigma of shape {sigma.shape}"):
                result = getattr(kind, name)(given)
            told = f"the preconditioning's {name}"
            check_array(subject, told, result, sigma.shape, "sigma", sigma)
            if not np.array_equal(given, sigma):
                raise subject.fault(
                    f"{told} changes the sigma it is given", "compute into a new array"
                )
            if name == "c_out" and (result == 0).any():
                raise subject.fault(
                    f"{told} is 0 at sigma {sigma[result == 0][0]:.4g}",
                    "let it be 0 nowhere; the network would have no say there",
                )
    if (kind.loss_weight(levels) < 0).any():
        raise subject.fault(
            "the preconditioning's loss_weight is negative", "return weights that are at least 0"
        )
    c_skip = kind.c_skip(levels)
    rest, expected = kind.one_minus_c_skip(levels), 1.0 - c_skip
    apart = np.abs(rest - expected) > _ROUNDING * np.maximum(1.0, np.abs(c_skip))
    if apart.any():
        first = int(apart.argmax())
        raise subject.fault(
            f"the preconditioning's one_minus_c_skip is {rest[first]:.6g} at sigma "
            f"{levels[first]:.4g}, where 1 - c_skip is {expected[first]:.6g}",
            "make it the same, or leave it out",
        )


# ---- notes


def check_notes(subject: Subject) -> None:
    """What the plugin says at the start of a run: a list of lines."""
    hooks = subject.hooks()
    model = subject.model(hooks)
    with subject.asked("notes"):
        lines = hooks.notes(model)
    for line in lines:
        if len(line.splitlines()) != 1:
            raise subject.fault(f"notes gives {line!r}", "return a list of texts of one line each")


# ---- sample_timesteps


def check_sample_timesteps(subject: Subject) -> None:
    """The distribution of noise levels: its quantile and cdf, and that it stays one object."""
    hooks = subject.hooks()
    model = subject.model(hooks)
    distribution = hooks.sample_timesteps(model, 1)
    if hooks.sample_timesteps(model, 1) is not distribution:
        raise subject.fault(
            "sample_timesteps gives a new distribution at each call, though nothing changed",
            "keep it and return the same object, because tables are kept by identity",
        )
    if not isinstance(getattr(distribution, "schedule", None), NoiseSchedule):
        raise subject.fault(
            "its distribution has no schedule", "set self.schedule = model.schedule in __init__"
        )
    sigma = _check_quantile(subject, distribution, model, hooks.chain("sample_timesteps"))
    _check_cdf(subject, distribution, sigma)
    _check_rest(subject, distribution, sigma)


def _check_quantile(
    subject: Subject, distribution: NoiseDistribution, model: DiffusionModel, source: str
) -> np.ndarray:
    """Returns sigma at `_DRAWS`. source: who made the distribution."""
    for u in (_DRAWS, _EXTREMES, _DRAWS[:6].reshape(2, 3)):
        given = u.copy()
        with subject.asked("its distribution's quantile"):
            sigma = distribution.quantile(given)
        told = "its distribution's quantile"
        check_array(subject, told, sigma, u.shape, "u", u)
        if (sigma <= 0).any():
            first = (sigma <= 0).ravel().argmax()
            raise subject.fault(
                f"{told} is {sigma.ravel()[first]:.4g} at u {u.ravel()[first]:.4g}",
                "every sigma must be above 0",
            )
        if not np.array_equal(given, u):
            raise subject.fault(f"{told} changes the u it is given", "compute into a new array")
    sigma = distribution.quantile(_DRAWS)
    falls = np.diff(sigma) < 0
    if falls.any():
        first = int(falls.argmax())
        raise subject.fault(
            f"its distribution's quantile falls from {sigma[first]:.6g} at u {_DRAWS[first]:.4g} "
            f"to {sigma[first + 1]:.6g} at u {_DRAWS[first + 1]:.4g}",
            "a quantile never falls as u grows; turn u around, or sort the noise levels",
        )
    low, high = model.sampling.sigma_min, model.sampling.sigma_max
    inner = distribution.quantile(np.array([_OUTSIDE, 1.0 - _OUTSIDE]))
    if inner[0] < low * (1 - _TABLES) or inner[1] > high * (1 + _TABLES):
        raise subject.fault(
            f"{1 - 2 * _OUTSIDE:.0%} of the draws (sample_timesteps: {source}) reach from sigma "
            f"{inner[0]:.4g} to {inner[1]:.4g}, and the model states the range from {low:.4g} to "
            f"{high:.4g}",
            "draw inside that range, or state the true one in build_model: "
            "model.with_preconditioning(..., SamplingDefaults(spacing, sigma_min, sigma_max))",
        )
    return sigma


def _check_cdf(subject: Subject, distribution: NoiseDistribution, sigma: np.ndarray) -> None:
    """F(s-) <= u <= F(s) at s = quantile(u), whether F is continuous or has steps."""
    told = "its distribution's cdf"
    with subject.asked(told):
        upto, below = distribution.cdf(sigma), distribution.cdf(sigma * (1 - _ROUNDING))
    for values in (upto, below):
        check_array(subject, told, values, sigma.shape, "sigma", sigma)
        if (values < 0).any() or (values > 1).any():
            raise subject.fault(f"{told} leaves 0 to 1", "return probabilities")
    wrong = (upto < _DRAWS - _TABLES) | (below > _DRAWS + _TABLES)
    if wrong.any():
        first = int(wrong.argmax())
        raise subject.fault(
            f"{told} is {upto[first]:.6g} at sigma {sigma[first]:.6g}, which is the quantile of "
            f"u {_DRAWS[first]:.6g}",
            "make cdf the inverse of quantile: cdf(quantile(u)) is u where noise levels are "
            "continuous, and the probability of a sigma up to this one where they are not",
        )


def _check_rest(subject: Subject, distribution: NoiseDistribution, sigma: np.ndarray) -> None:
    """`expect`, `density_ratio` and `reweighted`, which a subclass may have made its own."""
    with subject.asked("its distribution"):
        mean = distribution.expect(lambda s: 1.0 / (1.0 + s**2))
        ratio = distribution.density_ratio(sigma)
        same = distribution.reweighted(np.ones(len(distribution.schedule))).quantile(_DRAWS)
    expected = float(np.mean(1.0 / (1.0 + sigma**2)))
    if not np.isclose(mean, expected, rtol=0, atol=1e-3):
        raise subject.fault(
            f"its distribution's expect gives {mean:.5g} for the mean of 1 / (1 + sigma^2), and "
            f"its quantile {expected:.5g}",
            "leave expect out, or make it a mean over the same draws",
        )
    check_array(subject, "its distribution's ratio", ratio, sigma.shape, "sigma", sigma)
    if not np.allclose(same, sigma, rtol=1e-4):
        raise subject.fault(
            "its distribution is another one after reweighted(ones)",
            "leave reweighted out, or make weights that are all 1 change nothing",
        )


# ---- weight_loss


def check_weight_loss(subject: Subject) -> None:
    """lambda for each sample: floating, finite and above 0 over SNR 1e-4 to 1e4, whatever the
    sample's place in the batch. Where the plugin has no `weight_loss`, the host's, in the model's
    own range."""
    hooks = subject.hooks()
    model = subject.model(hooks)
    sigma = levels_of(subject, model)
    # A few noise levels twice, and none in order.
    sigma = np.random.default_rng(0).permutation(np.concatenate([sigma, sigma[::40]]))
    distribution = hooks.sample_timesteps(model, 1)
    noise = NoiseLevels.at(sigma, model.schedule, distribution)
    given = NoiseLevels.at(sigma.copy(), model.schedule, distribution)
    weights = _weights(subject, hooks, model, given)
    for field in ("sigma", "snr", "timestep"):
        if not np.array_equal(getattr(given, field), getattr(noise, field)):
            raise subject.fault(
                f"weight_loss changes noise.{field}, which others read after it",
                "compute into a new array (np.minimum(...), not out= or *=)",
            )
    order = np.random.default_rng(1).permutation(len(sigma))
    other = _weights_anew(subject, sigma[order], step=1)
    if not np.allclose(other, weights[order], rtol=1e-6, atol=0):
        raise subject.fault(
            "weight_loss gives a sample another weight at another place in the batch",
            "let a weight depend on the sample's own noise level (noise.sigma, noise.snr), on the "
            "batch as a whole and on step, and on nothing that is drawn anew",
        )
    for count in (1, 2):
        _weights_anew(subject, sigma[:count], step=1000)


def levels_of(subject: Subject, model: DiffusionModel) -> np.ndarray:
    """The noise levels at which its weights are asked for."""
    return noise_levels().sigma if "weight_loss" in subject.roles else _levels(model)


def _weights_anew(subject: Subject, sigma: np.ndarray, step: int) -> np.ndarray:
    """The weights that a new object of the plugin gives at sigma, its hooks called as in a run."""
    hooks = subject.hooks()
    model = subject.model(hooks)
    noise = NoiseLevels.at(sigma, model.schedule, hooks.sample_timesteps(model, step))
    return _weights(subject, hooks, model, noise, step)


def _weights(
    subject: Subject, hooks: Hooks, model: DiffusionModel, noise: NoiseLevels, step: int = 1
) -> np.ndarray:
    """The weights that `hooks` give; the plugin's own answer is looked at as it is, for the host's
    guard makes it float64."""
    watch = Watch(hooks, subject.name)
    try:
        weights = hooks.weight_loss(model, noise, step)
    finally:
        for call in watch.calls.get("weight_loss", []):
            # Of a wrapper that returns nothing the host's own message says more.
            if call.result is not None or subject.roles["weight_loss"] == "claims":
                _check_weights(subject, call.result, noise)
    _check_weights(subject, weights, noise)
    return weights


def _check_weights(subject: Subject, weights: Any, noise: NoiseLevels) -> None:
    check_array(subject, "weight_loss", weights, noise.snr.shape, "noise.snr", noise.snr)
    if (weights <= 0).any():
        first = int((weights <= 0).argmax())
        raise subject.fault(
            f"weight_loss gives {weights[first]:.4g} at SNR {noise.snr[first]:.4g}",
            "a weight is above 0 everywhere; bound it from below",
        )
