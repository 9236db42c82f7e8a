"""The five hooks of a run: who answers each of them, and what is checked of the answer.

pluggy keeps the plugins' implementations and validates them; `chain` runs them. Here stand the
hooks themselves, as the rest of the host calls them, and what else a run asks of its plugins.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from sdxl_host import hookspecs
from sdxl_host.errors import PluginError
from sdxl_host.hookspecs import HOOKS, PROJECT
from sdxl_host.plugins import results
from sdxl_host.plugins.attribution import AttributedError, Plugin, attribute_changes, attributed
from sdxl_host.plugins.chain import HookCall, Link
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed, make_instance
from sdxl_host.plugins.roles import implementations
from sdxl_host.plugins.selection_and_order import SelectedPlugin

if TYPE_CHECKING:
    import numpy as np

    from sdxl_host.diffusion.conditioning import PromptEmbedding, TextEncoders
    from sdxl_host.diffusion.distributions import NoiseDistribution
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.diffusion.objective import NoiseLevels

__all__ = ["Hooks", "Plugin", "make_hooks"]

Answer = TypeVar("Answer")


def make_hooks(selected: Sequence[SelectedPlugin]) -> Hooks:
    """The hooks of a run: the host's defaults, and each selected plugin with its options."""
    plugins = []
    for plugin in selected:
        instance = make_instance(plugin.installed, plugin.cls, plugin.options)
        plugins.append(Plugin(plugin.installed, plugin.options, instance))
    return Hooks(Defaults(), plugins)


class Hooks:
    """The five hooks of a run, called with the host's defaults and the selected plugins.

    defaults: the host's own answers. plugins: the selected ones, in order. observers: the host's
    own observers of `on_step_end`, called after the plugins'.
    Raises PluginError when two plugins claim one hook or a plugin breaks the contract.
    """

    def __init__(
        self, defaults: Any, plugins: Sequence[Plugin] = (), observers: Sequence[Any] = ()
    ) -> None:
        self.plugins = tuple(plugins)
        self._defaults = defaults
        self._observers = tuple(observers)
        self._roles = {p.name: implementations(p.installed, type(p.instance)) for p in plugins}
        self._by_name = {p.name: p for p in plugins}
        self._manager = self._register(self._find_claims())

    # ---- the hooks

    def build_model(self, config: Any) -> DiffusionModel:
        """The model of this run; called once a run."""
        known, owner = None, None  # the preconditioning so far, and the plugin that put it there

        def check(answer: Any, plugin: Plugin | None) -> DiffusionModel:
            nonlocal known, owner
            model = results.check_model(answer)
            if model.preconditioning is not known:
                if owner is not None and plugin is not None:
                    raise AttributedError(
                        f"build_model: the plugins {owner.name} and {plugin.name} both replace the "
                        "preconditioning; select one of them with --plugins"
                    )
                known, owner = model.preconditioning, plugin
            return attribute_changes(model, plugin)

        return self._call("build_model", check, config=config)

    def sample_timesteps(self, model: DiffusionModel, step: int) -> NoiseDistribution:
        """The distribution of the noise levels at this step."""

        def check(answer: Any, plugin: Plugin | None) -> NoiseDistribution:
            return results.check_distribution(answer)

        return self._call("sample_timesteps", check, model=model, step=step)

    def weight_loss(self, model: DiffusionModel, noise: NoiseLevels, step: int) -> np.ndarray:
        """lambda, the weight on |D - z|^2 of each sample, float64 (G,)."""

        def check(answer: Any, plugin: Plugin | None) -> np.ndarray:
            return results.check_weights(answer, noise)

        return self._call("weight_loss", check, model=model, noise=noise, step=step)

    def encode_prompt(self, prompts: Sequence[str], encoders: TextEncoders) -> PromptEmbedding:
        """The embedding of the prompts."""

        def check(answer: Any, plugin: Plugin | None) -> PromptEmbedding:
            return results.check_embedding(answer, prompts, encoders)

        return self._call("encode_prompt", check, prompts=list(prompts), encoders=encoders)

    def on_step_end(self, trainer: Any, result: Any) -> None:
        """Calls the plugins' observers in the order of --plugins, then the host's own."""
        arguments = {"trainer": trainer, "result": result}
        for link in self.links("on_step_end"):
            with attributed(link.plugin, f"on_step_end: {link.name}"):
                link.call(arguments)
        for observer in self._observers:
            observer.on_step_end(trainer=trainer, result=result)

    def observe(self, observers: Sequence[Any]) -> None:
        """Sets the host's own observers of `on_step_end`."""
        self._observers = tuple(observers)

    def links(self, hook: str) -> list[Link]:
        """The implementations of a hook, in the order in which they answer."""
        found = getattr(self._manager.hook, hook).get_hookimpls()
        return [Link(each, self._by_name.get(each.plugin_name)) for each in found]

    def chain(self, hook: str) -> str:
        """Who answers a hook, in order: `snr -> timestep_bias`."""
        return " -> ".join(link.name for link in self.links(hook))

    def _call(
        self, hook: str, check: Callable[[Any, Plugin | None], Answer], **arguments: Any
    ) -> Answer:
        return HookCall(hook, self.links(hook), check, arguments).answer()

    # ---- what is known of the plugins

    def observing(self, hooks: Sequence[str]) -> list[tuple[Installed, str]]:
        """The plugins that observe steps and answer one of `hooks`, each with that hook."""
        found = []
        for plugin in self.plugins:
            implemented = [role.hook for role in self._roles[plugin.name]]
            answered = [hook for hook in hooks if hook in implemented]
            if "on_step_end" in implemented and answered:
                found.append((plugin.installed, answered[0]))
        return found

    def describe(self) -> list[str]:
        """One line a plugin: its package and what it does to which hook."""
        lines = []
        for plugin in self.plugins:
            does = ", ".join(f"{i.role} {i.hook}" for i in self._roles[plugin.name])
            lines.append(f"{plugin.installed}: {does}")
        return lines

    def notes(self, model: DiffusionModel) -> list[str]:
        """What the plugins say about their options at the start of a run.

        A plugin's `notes` names the arguments it wants: `model`, and `distribution`, which is that
        of step 1 after all adapters.
        """
        lines = []
        for plugin in self.plugins:
            notes = getattr(plugin.instance, "notes", None)
            if notes is None:
                continue
            named = inspect.signature(notes).parameters
            given: dict[str, Any] = {"model": model} if "model" in named else {}
            if "distribution" in named:
                given["distribution"] = self.sample_timesteps(model, 1)
            with attributed(plugin, f"notes: {plugin.name}"):
                lines += [f"{plugin.name}: {line}" for line in notes(**given)]
        return lines

    # ---- the plugins' state

    def copy(self) -> Hooks:
        """Hooks to ask outside a run's steps: each plugin's object is a copy, so that asking it
        does not change the state that the run goes on with.

        A copy, not a new object, because what `build_model` and `load_state_dict` left in the
        object counts, and `build_model` is called once a run. Attributes that can't be copied,
        such as a lock or an open file, are shared with the run's object.
        """
        plugins = [
            Plugin(plugin.installed, plugin.options, _copied(plugin.instance))
            for plugin in self.plugins
        ]
        return Hooks(self._defaults, plugins)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The state of every plugin that keeps one, by name."""
        states = {}
        for plugin in self.plugins:
            if hasattr(plugin.instance, "state_dict"):
                with attributed(plugin, f"state_dict: {plugin.name}"):
                    states[plugin.name] = plugin.instance.state_dict()
        return states

    def load_state_dict(
        self, states: Mapping[str, dict[str, Any]], is_lenient: bool = False
    ) -> list[str]:
        """Gives each plugin what its `state_dict` returned.

        is_lenient: a plugin without saved state begins anew, and a line returned says so.
        """
        notes = []
        for plugin in self.plugins:
            if not hasattr(plugin.instance, "load_state_dict"):
                continue
            if plugin.name in states:
                with attributed(plugin, f"load_state_dict: {plugin.name}"):
                    plugin.instance.load_state_dict(states[plugin.name])
            elif is_lenient:
                notes.append(f"the state of {plugin.installed} begins anew")
            else:
                raise PluginError(
                    f"plugin {plugin.installed}: the checkpoint holds no state of it; "
                    "start a new run"
                )
        return notes

    # ---- registration

    def _find_claims(self) -> set[str]:
        """The hooks that a plugin claims. Raises PluginError for one that two claim."""
        claims: dict[str, Plugin] = {}
        for plugin in self.plugins:
            for implementation in self._roles[plugin.name]:
                if implementation.role != "claims":
                    continue
                first = claims.setdefault(implementation.hook, plugin)
                if first is not plugin:
                    raise PluginError(
                        f"{implementation.hook} is claimed by two plugins, {first.installed} and "
                        f"{plugin.installed}; select one of them with --plugins"
                    )
        return set(claims)

    def _register(self, claimed: set[str]) -> pluggy.PluginManager:
        """pluggy's register of the implementations, validated.

        The host answers only where no plugin claims, so that a claim that answers None is an
        error of that plugin and not silently replaced.
        """
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(hookspecs)
        answers = {h: getattr(self._defaults, h, None) for h in HOOKS if h not in claimed}
        host = SimpleNamespace(**{hook: answer for hook, answer in answers.items() if answer})
        manager.register(host, name="host")
        for plugin in self.plugins:
            try:
                manager.register(plugin.instance, name=plugin.name)
            except (pluggy.PluginValidationError, ValueError) as error:
                raise PluginError(f"plugin {plugin.installed}: {error}") from error
        manager.check_pending()
        return manager


def _copied(instance: Any) -> Any:
    """A deep copy, in which only the attributes that can't be copied are the object's."""
    try:
        return copy.deepcopy(instance)
    except Exception:
        copied = copy.copy(instance)
    # One memo, so that an object that two attributes hold stays one object.
    memo: dict[int, Any] = {id(instance): copied}
    for name, value in getattr(instance, "__dict__", {}).items():
        before = dict(memo)
        try:
            vars(copied)[name] = copy.deepcopy(value, memo)
        except Exception:
            memo.clear()  # of what was half copied
            memo.update(before)
    return copied
