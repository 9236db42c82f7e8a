"""The hooks of a run: one owner for each thing, what is known of the plugins, and their state."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_host.diffusion.model import Lazy, SamplingDefaults
from sdxl_host.diffusion.preconditioning import EpsPreconditioning, VPreconditioning
from sdxl_host.errors import PluginError
from sdxl_host.hookspecs import hookimpl
from sdxl_host.plugins.attribution import Plugin
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.testing import tiny_model

MODEL = tiny_model()
HOOKS = ("build_model", "sample_timesteps", "weight_loss", "encode_prompt")


class Host(Defaults):
    @hookimpl
    def build_model(self):
        return MODEL


def hooks_of(**instances: Any) -> Hooks:
    """The hooks of plugins named as the arguments are, in their order."""
    plugins = [
        Plugin(Installed(name, f"dist-{name}", "2.1", None, name, ""), None, instance)
        for name, instance in instances.items()
    ]
    return Hooks(Host(), plugins)


def claiming(hook: str, answer: Any = None) -> Any:
    return type("Made", (), {hook: hookimpl(lambda self: answer)})()


def adapting(hook: str, change: Any = lambda result: result) -> Any:
    def method(self):
        result = yield
        return change(result)

    return type("Made", (), {hook: hookimpl(wrapper=True)(method)})()


# ---- one owner


@pytest.mark.parametrize("hook", HOOKS)
def test_two_claims_on_one_hook_are_refused(hook):
    """Before anything is called, naming both plugins, their packages and the way out."""
    edm, snr = claiming(hook), claiming(hook)
    with pytest.raises(PluginError) as refused:
        hooks_of(edm=edm, bias=adapting("weight_loss"), snr=snr)
    assert str(refused.value) == (
        f"{hook} is claimed by two plugins, edm (dist-edm 2.1) and snr (dist-snr 2.1); "
        "select one of them with --plugins"
    )


def test_the_same_plugin_twice_is_refused():
    plugin = Plugin(Installed("snr", "d", "1", None, "", ""), None, adapting("weight_loss"))
    with pytest.raises(PluginError, match="snr"):
        Hooks(Host(), [plugin, plugin])


def replacing(kind: type) -> Any:
    return adapting("build_model", lambda m: m.with_preconditioning(kind(MODEL.schedule)))


def test_one_plugin_may_replace_the_preconditioning():
    hooks = hooks_of(bias=adapting("build_model"), edm=replacing(VPreconditioning))
    for _ in range(2):  # nothing of one call is held against the next
        assert hooks.build_model(None).preconditioning.name == "v"


@pytest.mark.parametrize("is_claimed", [False, True])
def test_a_second_replacement_of_the_preconditioning_is_refused(is_claimed):
    """It has one owner, be that an adapter or the plugin that claims the model."""
    v = MODEL.with_preconditioning(VPreconditioning(MODEL.schedule))
    first = claiming("build_model", v) if is_claimed else replacing(VPreconditioning)
    hooks = hooks_of(edm=first, bias=adapting("build_model"), flow=replacing(EpsPreconditioning))
    for _ in range(2):
        with pytest.raises(PluginError) as refused:
            hooks.build_model(None)
        assert str(refused.value) == (
            "build_model: the plugins edm and flow both replace the preconditioning; select one "
            "of them with --plugins"
        )


@pytest.mark.parametrize("hook", HOOKS)
def test_a_plugin_may_be_a_dataclass(hook):
    """An object that has __eq__ and no __hash__ claims and adapts like any other."""
    one, two = (dataclasses.dataclass(type(made)) for made in (claiming(hook), adapting(hook)))
    assert one.__hash__ is None
    assert hooks_of(one=one(), two=two()).chain(hook) == "one -> two"


# ---- what is known of the plugins


def test_describe_is_one_line_a_plugin_in_order():
    class Both:
        @hookimpl(wrapper=True)
        def weight_loss(self):
            return (yield)

        @hookimpl
        def on_step_end(self): ...

    hooks = hooks_of(snr=claiming("weight_loss"), bias=adapting("sample_timesteps"), both=Both())
    assert hooks.describe() == [
        "snr (dist-snr 2.1): claims weight_loss",
        "bias (dist-bias 2.1): adapts sample_timesteps",
        "both (dist-both 2.1): adapts weight_loss, observes on_step_end",
    ]
    assert hooks.observing(["encode_prompt", "weight_loss"]) == [
        (hooks.plugins[2].installed, "weight_loss")
    ]
    assert hooks.observing(["sample_timesteps"]) == []


def test_notes_take_what_they_name_and_begin_with_the_plugins_name():
    one, two, three = (adapting("weight_loss") for _ in range(3))
    one.notes = lambda model: [f"schedule of {len(model.schedule)}", "multiplier 1 does nothing"]
    three.notes = lambda distribution: [type(distribution).__name__]
    assert hooks_of(one=one, two=two, three=three).notes(MODEL) == [
        "one: schedule of 1000",
        "one: multiplier 1 does nothing",
        "three: DiscreteDistribution",
    ]
    assert hooks_of(two=two).notes(MODEL) == []


def test_an_error_in_notes_is_the_plugins():
    """Of what it answers itself; what another plugin answers to `distribution` is that one's."""
    one, two = adapting("weight_loss"), claiming("sample_timesteps")
    one.notes = lambda distribution: [distribution.nothing_such]
    with pytest.raises(PluginError, match=r"^sample_timesteps: two: plugin two .* returned None"):
        hooks_of(one=one, two=two).notes(MODEL)
    with pytest.raises(PluginError, match=r"^notes: one: plugin one .* raised AttributeError"):
        hooks_of(one=one).notes(MODEL)


# ---- state


class Counter:
    def __init__(self) -> None:
        self.steps = 0
        self.models = 0

    @hookimpl(wrapper=True)
    def build_model(self):
        model = yield
        self.models += 1
        self.model = model
        return model

    @hookimpl(wrapper=True)
    def weight_loss(self):
        self.steps += 1
        return (yield)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_state_makes_a_round_trip_by_name():
    hooks = hooks_of(one=Counter(), bias=adapting("weight_loss"), two=Counter())
    hooks.plugins[0].instance.steps, hooks.plugins[2].instance.steps = 3, 7
    states = hooks.state_dict()
    assert states == {"one": {"steps": 3}, "two": {"steps": 7}}
    fresh = hooks_of(two=Counter(), one=Counter())
    fresh.load_state_dict(states)
    assert fresh.state_dict() == states


def test_a_checkpoint_without_a_plugins_state_is_refused_or_begins_anew():
    """That of a plugin which is no longer selected is left alone."""
    hooks, states = hooks_of(one=Counter(), two=Counter()), {"one": {"steps": 3}, "gone": {}}
    with pytest.raises(PluginError) as refused:
        hooks.load_state_dict(states)
    assert str(refused.value) == (
        "plugin two (dist-two 2.1): the checkpoint holds no state of it; start a new run"
    )
    lines = hooks.load_state_dict(states, is_lenient=True)
    assert lines == ["the state of two (dist-two 2.1) begins anew"]
    assert hooks.state_dict() == {"one": {"steps": 3}, "two": {"steps": 0}}


def test_asking_a_copy_leaves_the_runs_plugins_as_they_are():
    """The copy goes on from where they are, `build_model` included, and shares the model."""
    hooks = hooks_of(one=Counter())
    model = hooks.build_model(None)
    hooks.load_state_dict({"one": {"steps": 5}})
    asked, noise = hooks.copy(), SimpleNamespace(sigma=np.ones(2))
    asked.weight_loss(model, noise, 1)  # type: ignore[arg-type]
    original, copied = hooks.plugins[0].instance, asked.plugins[0].instance
    assert (original.steps, copied.steps) == (5, 6)
    assert (original.models, copied.models) == (1, 1)
    assert copied.model is original.model is model


def test_an_attribute_that_cannot_be_copied_is_shared_and_the_others_are_copied():
    """The copy has seen `build_model`, and asking it changes nothing of the run's."""

    class Locked(Counter):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

            self.seen = self.also_seen = []
            self.guarded = self.also_guarded = [1, self.lock]

    hooks = hooks_of(one=Locked())
    model = hooks.build_model(None)
    hooks.load_state_dict({"one": {"steps": 5}})
    asked, noise = hooks.copy(), SimpleNamespace(sigma=np.ones(2))
    asked.weight_loss(model, noise, 1)  # type: ignore[arg-type]
    original, copied = hooks.plugins[0].instance, asked.plugins[0].instance
    assert (original.steps, copied.steps) == (5, 6)
    assert (copied.models, copied.model, copied.lock) == (1, model, original.lock)
    assert copied.guarded is copied.also_guarded is original.guarded
    assert copied.seen is copied.also_seen is not original.seen


# ---- the model that adapters change


def test_a_model_is_copied_with_its_unbuilt_parts():
    """Adapters change a copy; the networks are shared and still not built."""

    def change(network):
        return None

    sampling = SamplingDefaults("karras", 0.002, 80.0)
    copy = MODEL.with_preconditioning(VPreconditioning(MODEL.schedule), sampling)
    assert copy.preconditioning.name == "v"
    assert copy.sampling == sampling
    assert copy.network_part is MODEL.network_part
    assert MODEL.preconditioning.name == "eps"
    assert copy.with_preconditioning(MODEL.preconditioning).sampling == sampling
    twice = copy.with_network(change, trainable=str.isupper).with_network(print)
    assert [one.change for one in twice.changes] == [change, print]
    assert [one.trainable for one in twice.changes] == [str.isupper, None]
    assert copy.changes == ()


def test_a_lazy_part_is_built_once_when_first_asked_for():
    built = []
    part = Lazy(lambda: built.append(1) or object())
    assert built == []
    assert part.get() is part.get()
    assert built == [1]
