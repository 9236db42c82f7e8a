"""What a plugin's class implements, and what is refused of it before any hook is called."""

from __future__ import annotations

import pytest

from sdxl_host.errors import PluginError
from sdxl_host.hookspecs import hookimpl
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.roles import Implementation, implementations
from sdxl_host.testing import tiny_hooks

SNR = Installed("snr", "dist-snr", "2.1", None, "module_snr", "Plugin")


class Several:
    @hookimpl(wrapper=True)
    def weight_loss(self):
        weights = yield
        return weights * 3

    @hookimpl
    def sample_timesteps(self, model):
        return model.distribution

    @hookimpl
    def on_step_end(self, result):
        result.seen = True


class Inherits(Several):
    pass


@pytest.mark.parametrize("cls", [Several, Inherits])
def test_what_a_class_does_to_which_hook(cls):
    assert implementations(SNR, cls) == [
        Implementation("sample_timesteps", "claims"),
        Implementation("weight_loss", "adapts"),
        Implementation("on_step_end", "observes"),
    ]


def value():
    return lambda self: 1


def generator():
    def method(self):
        weights = yield
        return weights

    return method


def made(name, method=None, /, **mark):
    """A plugin class with one marked method."""
    return type("Made", (), {name: hookimpl(**mark)(method or value())})


def unmarked(method):
    return type("Made", (made("sample_timesteps"),), {"weight_loss": method})


def stateful(*names):
    return type("Made", (made("weight_loss"),), dict.fromkeys(names, value()))


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (made("weight_loss", tryfirst=True), "(tryfirst=...), which is refused; the order is that"),
        (made("weight_loss", trylast=True), "(trylast=...), which is refused; the order is that"),
        (
            made("weight_loss", optionalhook=True),
            "(optionalhook=...), which is refused; a misspelt",
        ),
        (made("weight", specname="weight_loss"), "(specname=...), which is refused; a method must"),
        (
            made("weight_loss", generator(), hookwrapper=True),
            "(hookwrapper=...), which is refused; ",
        ),
        (
            made("on_step_end", generator(), wrapper=True),
            "on_step_end observes; it can't be a wrapp",
        ),
        (made("on_step_end", wrapper=True), "on_step_end observes; it can't be a wrapper"),
        (made("on_step_end", generator()), "on_step_end observes; it can't be a wrapper"),
        (made("weight_loss", lambda self, step=0: 1), "gives the parameter step a default, so it "),
        (made("weight_loss", lambda self, *, g=5: 1), "gives the parameter g a default, so it wo"),
        (unmarked(value()), "weight_loss has a hook's name but is not marked; put @hookimpl above"),
        (unmarked(staticmethod(value())), "weight_loss has a hook's name but is not marked"),
        (
            type("Made", (), {"helper": value()}),
            "implements no hook; mark at least one of build_mod",
        ),
        (made("weight_loss", wrapper=True), "weight_loss is a wrapper without `result = yield`"),
        (
            made("weight_loss", generator()),
            "weight_loss has a yield but is no wrapper; use @hookimp",
        ),
        (made("weigh_loss"), "there is no hook named weigh_loss (did you mean weight_loss?) (hook"),
        (made("zzz"), "there is no hook named zzz (hooks: build_model, sample_timesteps, weight_"),
        (made("weight_loss", lambda self, nois: 1), "no argument nois (did you mean noise?) (arg"),
        (made("weight_loss", lambda self, zz: 1), "no argument zz (arguments: model, noise, step)"),
        (stateful("state_dict"), "has state_dict but no load_state_dict; it needs both or neither"),
        (stateful("load_state_dict"), "has load_state_dict but no state_dict; it needs both or n"),
    ],
)
def test_refused_at_registration(cls, text):
    """Each by name: the plugin, its package, the method and the remedy."""
    with pytest.raises(PluginError) as refused:
        implementations(SNR, cls)
    assert str(refused.value).startswith("plugin snr (dist-snr 2.1)")
    assert text in str(refused.value)
    with pytest.raises(PluginError):
        tiny_hooks(cls())
