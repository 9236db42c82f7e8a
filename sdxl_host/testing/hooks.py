"""The hooks of a run over the tiny model, for tests that call them. No MindSpore."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from sdxl_host.config.load import load
from sdxl_host.diffusion.conditioning import PromptEmbedding, TextEncoders
from sdxl_host.diffusion.distributions import NoiseDistribution
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.diffusion.objective import NoiseLevels
from sdxl_host.hookspecs import hookimpl
from sdxl_host.plugins.attribution import Plugin
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed, discover
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.settings.options import build_options
from sdxl_host.testing.parts import tiny_model

__all__ = ["TinyHooks", "make_options", "tiny_hooks"]


class TinyHooks:
    """What `tiny_hooks` gives: the hooks as a run calls them, each with fewer arguments to write.

    The model is the one that the plugins make of the tiny model, so `build_model` is called once,
    before any hook that needs it.
    """

    def __init__(self, hooks: Hooks, config: Any = None) -> None:
        self._hooks = hooks
        self._config = config

    @cached_property
    def _model(self) -> DiffusionModel:
        config = _tiny_config() if self._config is None else self._config
        return self._hooks.build_model(config)

    def build_model(self) -> DiffusionModel:
        """The model after all adapters: made in the first call, and the same one in later calls."""
        return self._model

    def sample_timesteps(self, step: int = 1) -> NoiseDistribution:
        """The distribution of the noise levels at a step."""
        return self._hooks.sample_timesteps(self._model, step)

    def noise_at(self, sigma: np.ndarray, step: int = 1) -> NoiseLevels:
        """The noise levels (G,) at sigma, as `weight_loss` receives them at a step."""
        distribution = self.sample_timesteps(step)
        return NoiseLevels.at(np.asarray(sigma, float), self._model.schedule, distribution)

    def weight_loss(self, noise: NoiseLevels, step: int = 1) -> np.ndarray:
        """lambda, the weight on |D - z|^2 of each sample, float64 (G,)."""
        return self._hooks.weight_loss(self._model, noise, step)

    def encode_prompt(
        self, prompts: Sequence[str], encoders: TextEncoders | None = None
    ) -> PromptEmbedding:
        """The embedding of the prompts; encoders: the tiny ones where none are given."""
        given = self._model.encoders if encoders is None else encoders
        return self._hooks.encode_prompt(prompts, given)

    def on_step_end(self, trainer: Any, result: Any) -> None:
        """Calls the observers."""
        self._hooks.on_step_end(trainer, result)

    def chain(self, hook: str) -> str:
        """Who answers a hook, in order: `snr -> timestep_bias`."""
        return self._hooks.chain(hook)

    def describe(self) -> list[str]:
        """One line a plugin: its package and what it does to which hook."""
        return self._hooks.describe()

    def notes(self) -> list[str]:
        """What the plugins say at the start of a run, each line with its plugin's name."""
        return self._hooks.notes(self._model)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The state of every plugin that keeps one, by name."""
        return self._hooks.state_dict()

    def load_state_dict(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Gives each plugin what its `state_dict` returned."""
        self._hooks.load_state_dict(states)


def tiny_hooks(*plugins: Any, model: DiffusionModel | None = None, config: Any = None) -> TinyHooks:
    """The hooks of a run with these objects of plugin classes, in this order, as of `--plugins`.

    A plugin's name is that of its entry point; one that is not installed is named after its class,
    `MyWeight` is my_weight. A second object of one class is my_weight_2.

    Args:
        model: what the host answers to `build_model`; `tiny_model()` where none is given.
        config: what `build_model` receives; that of configs/tiny.yaml where none is given.

    Raises PluginError where two plugins claim one hook, or one breaks the contract.
    """
    host = _TinyDefaults(tiny_model() if model is None else model)
    found: dict[str, Plugin] = {}
    for instance in plugins:
        installed = _installed(type(instance))
        name, number = installed.name, 2
        while name in found:
            name, number = f"{installed.name}_{number}", number + 1
        options = getattr(instance, "options", None)
        found[name] = Plugin(replace(installed, name=name), options, instance)
    return TinyHooks(Hooks(host, list(found.values())), config)


def make_options(cls: type, values: Mapping[str, Any] | None = None) -> Any:
    """The options of a plugin's class with `values`, as from the config's section of the plugin.

    Raises HostError for a value that does not fit, with its key: `plugins.snr.gamma`.
    """
    return build_options(cls.Options, values or {}, f"plugins.{_installed(cls).name}")  # type: ignore[attr-defined]


class _TinyDefaults(Defaults):
    """The host's answers, with a model that is there already."""

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model

    @hookimpl
    def build_model(self) -> DiffusionModel:
        return self._model


@cache
def _tiny_config() -> Any:
    return load(["--config", "tiny.yaml"]).tree


def _installed(cls: type) -> Installed:
    """What is known of the package that provides the class."""
    for plugin in discover():
        if (plugin.module, plugin.attribute) == (cls.__module__, cls.__qualname__):
            return plugin
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    return Installed(name, name.replace("_", "-"), "0.0", None, cls.__module__, cls.__qualname__)
