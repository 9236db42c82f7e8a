"""`tiny_hooks`: the hooks of a run with a test's objects, and what it spares the test to write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from sdxl_host import PluginError, hookimpl, option
from sdxl_host.testing import (
    HostError,
    make_options,
    noise_levels,
    tiny_encoders,
    tiny_hooks,
    tiny_model,
)

NOISE = noise_levels(3)


@dataclass
class Options:
    factor: float = option(2.0, help="what weights are multiplied by", above=0.0)


class TimesTwo:
    Options = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.seen: list[Any] = []

    @hookimpl(wrapper=True)
    def build_model(self, config):
        self.seen.append(config)
        return (yield)

    @hookimpl(wrapper=True)
    def weight_loss(self, model, step):
        self.seen.append((model, step))
        weights = yield
        return weights * self.options.factor

    def notes(self):
        return [f"factor {self.options.factor:g}"]

    def state_dict(self):
        return {"calls": len(self.seen)}

    def load_state_dict(self, state):
        self.seen = [None] * state["calls"]


def test_without_plugins_the_host_answers_over_the_tiny_model():
    hooks = tiny_hooks()
    assert hooks.build_model().preconditioning.name == "eps"
    assert hooks.sample_timesteps() is hooks.build_model().distribution
    np.testing.assert_array_equal(hooks.weight_loss(NOISE), NOISE.snr)
    assert hooks.encode_prompt(["a cat"]).context.shape == (1, 77, 8)
    assert hooks.chain("weight_loss") == "host"


def test_build_model_is_called_once_and_the_others_with_what_it_gave():
    plugin = TimesTwo()
    hooks = tiny_hooks(plugin)
    hooks.weight_loss(NOISE, step=7)
    model = hooks.build_model()
    config, call = plugin.seen
    assert config.data.total_step > 0
    assert call == (model, 7)


def test_model_and_config_may_be_given():
    plugin, model = TimesTwo(), tiny_model("v")
    hooks = tiny_hooks(plugin, model=model, config="mine")
    assert hooks.build_model() is model
    assert plugin.seen == ["mine"]


def test_a_plugin_is_named_as_it_is_installed_or_after_its_class():
    from sdxl_snr import MinSNR
    from sdxl_snr import Options as SNROptions

    three = [TimesTwo(), TimesTwo(Options(factor=3.0)), TimesTwo(Options(factor=1.0))]
    hooks = tiny_hooks(MinSNR(SNROptions()), *three)
    assert hooks.chain("weight_loss") == "snr -> times_two -> times_two_2 -> times_two_3"
    assert hooks.describe()[0] == "snr (sdxl-snr 0.1.0): claims weight_loss"
    assert hooks.notes()[1:3] == ["times_two: factor 2", "times_two_2: factor 3"]
    np.testing.assert_array_equal(hooks.weight_loss(NOISE), 6 * np.minimum(NOISE.snr, 5))


def test_what_a_plugin_does_wrong_is_refused_by_name():
    class Negative:
        @hookimpl
        def weight_loss(self, noise):
            return -noise.snr

    with pytest.raises(PluginError, match=r"^weight_loss: negative: plugin negative .* negative w"):
        tiny_hooks(Negative()).weight_loss(NOISE)
    with pytest.raises(PluginError, match=r"claimed by two plugins, negative .* and negative_2 "):
        tiny_hooks(Negative(), Negative())


def test_noise_at_has_the_distribution_after_all_adapters():
    class Noisier:
        @hookimpl(wrapper=True)
        def sample_timesteps(self, step):
            distribution = yield
            return distribution.reweighted(np.linspace(1, 1 + step, 1000))

    noise = tiny_hooks(Noisier()).noise_at(np.array([0.5, 2.0]), step=2)
    assert noise.snr.tolist() == [4.0, 0.25]
    expected = tiny_model().distribution.reweighted(np.linspace(1, 3, 1000))
    assert noise.distribution.expect(np.log) == pytest.approx(expected.expect(np.log))


def test_other_encoders_may_be_given():
    class Wide:
        @hookimpl
        def encode_prompt(self, prompts, encoders):
            assert len(encoders) == 1
            raise PluginError("seen; go on")

    one = type(tiny_encoders())(tiny_encoders()[1:])
    with pytest.raises(PluginError, match="seen; go on"):
        tiny_hooks(Wide()).encode_prompt(["a cat"], one)


def test_observers_and_state():
    class Counts:
        steps = 0

        @hookimpl
        def on_step_end(self, trainer, result):
            self.steps += trainer + result

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    hooks, other = tiny_hooks(Counts()), tiny_hooks(Counts())
    hooks.on_step_end(1, 2)
    assert hooks.state_dict() == {"counts": {"steps": 3}}
    other.load_state_dict(hooks.state_dict())
    assert other.state_dict() == hooks.state_dict()


def test_options_are_made_as_from_a_config():
    assert make_options(TimesTwo) == Options(2.0)
    assert make_options(TimesTwo, {"factor": 3}) == replace(Options(), factor=3.0)
    with pytest.raises(HostError, match=r"^plugins\.times_two\.factor"):
        make_options(TimesTwo, {"factor": 0})
