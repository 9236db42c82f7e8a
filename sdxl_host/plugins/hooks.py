"""Plugins at work: each hook's call, with its result checked.

Composition is pluggy's own (see `hookspecs`). Beside it stands a guard after each link of a chain:
it attributes an error, or a wrong result, to the plugin it came from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pluggy

from sdxl_host import hookspecs
from sdxl_host.errors import HostError, PluginError
from sdxl_host.hookspecs import HOOKS, PROJECT, hookimpl
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed, make_instance
from sdxl_host.plugins.results import CHECKS
from sdxl_host.plugins.roles import Implementation, implementations
from sdxl_host.plugins.selection import SelectedPlugin

__all__ = ["Hooks", "Plugin", "make_hooks"]

_CLAIMABLE = tuple(hook for hook in HOOKS if hook != "on_step_end")


@dataclass(frozen=True)
class Plugin:
    """A selected plugin: its package, its options (or None) and the object with its hooks."""

    installed: Installed
    options: Any
    instance: Any

    @property
    def name(self) -> str:
        return self.installed.name


def make_hooks(selected: Sequence[SelectedPlugin]) -> Hooks:
    """The hooks of a run: the host's defaults, and each selected plugin with its options."""
    plugins = []
    for plugin in selected:
        instance = make_instance(plugin.installed, plugin.cls, plugin.options)
        plugins.append(Plugin(plugin.installed, plugin.options, instance))
    return Hooks(Defaults(), plugins)


class _Attributed(PluginError):
    """Already says which plugin it came from."""


class Hooks:
    """The five hooks of a run, called with the host's defaults and the selected plugins.

    defaults: the host's own plugin. plugins: the selected ones, in order. observers: the host's
    own observers of `on_step_end`, called after the plugins'.
    Raises PluginError when two plugins claim one hook or a plugin breaks the contract.
    """

    def __init__(
        self, defaults: Any, plugins: Sequence[Plugin] = (), observers: Sequence[Any] = ()
    ) -> None:
        self.plugins = tuple(plugins)
        self._observers = tuple(observers)
        self._roles = {p.name: implementations(p.installed, type(p.instance)) for p in plugins}
        self._claims = self._find_claims()
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        # The host answers only where no plugin claims, so that a claim that answers None is seen
        # and not papered over.
        unclaimed = [hook for hook in _CLAIMABLE if hook not in self._claims]
        answers = {hook: getattr(defaults, hook) for hook in unclaimed if hasattr(defaults, hook)}
        self._manager.register(SimpleNamespace(**answers), name="host")
        self._manager.register(self._guard(None, _CLAIMABLE))
        for plugin in plugins:
            try:
                self._manager.register(plugin.instance, name=plugin.name)
            except (pluggy.PluginValidationError, ValueError) as error:
                raise PluginError(f"plugin {plugin.installed}: {error}") from error
            adapted = [i.hook for i in self._roles[plugin.name] if i.role == "adapts"]
            if adapted:
                self._manager.register(self._guard(plugin, adapted))
        self._manager.check_pending()
        self._preconditioning_owner: str | None = None
        self._preconditioning: Any = None
        self._own_errors: list[Exception] = []  # the host's, which no wrapper around it caused

    # ---- the hooks

    def build_model(self, config: Any) -> Any:
        """The `DiffusionModel` of this run."""
        self._preconditioning_owner = self._preconditioning = None
        return self._call("build_model", config=config)

    def sample_timesteps(self, model: Any, step: int) -> Any:
        """The `NoiseDistribution` of noise levels at this step."""
        return self._call("sample_timesteps", model=model, step=step)

    def weight_loss(self, model: Any, noise: Any, step: int) -> Any:
        """lambda on |D - z|^2, float64 (G,)."""
        return self._call("weight_loss", model=model, noise=noise, step=step)

    def encode_prompt(self, prompts: Sequence[str], encoders: Any) -> Any:
        """The `PromptEmbedding` of the prompts."""
        return self._call("encode_prompt", prompts=list(prompts), encoders=encoders)

    def on_step_end(self, trainer: Any, result: Any) -> None:
        """Calls the plugins' observers in the order of --plugins, then the host's own."""
        arguments = {"trainer": trainer, "result": result}
        # One by one, because pluggy would call the last registered first.
        for implementation in self._manager.hook.on_step_end.get_hookimpls():
            wanted = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(**wanted)
            except Exception as error:
                self._blame(implementation.plugin_name, "on_step_end", error)
                raise
        for observer in self._observers:
            observer.on_step_end(trainer=trainer, result=result)

    def observe(self, observers: Sequence[Any]) -> None:
        """Sets the host's own observers of `on_step_end`."""
        self._observers = tuple(observers)

    # ---- what is known of them

    def chain(self, hook: str) -> str:
        """Who answers a hook, in order: `edm -> timestep_bias`."""
        links = [self._claims.get(hook, "host")]
        for name, roles in self._roles.items():
            links += [name for role in roles if role == Implementation(hook, "adapts")]
        return " -> ".join(links)

    def observing(self, hooks: Sequence[str]) -> list[tuple[Installed, str]]:
        """The plugins that observe steps and answer one of `hooks`, each with that hook."""
        found = []
        for plugin in self.plugins:
            own = [role.hook for role in self._roles[plugin.name]]
            answered = [hook for hook in hooks if hook in own]
            if "on_step_end" in own and answered:
                found.append((plugin.installed, answered[0]))
        return found

    def observing_plugins(self) -> set[str]:
        """The names of the plugins that observe steps."""
        observer = Implementation("on_step_end", "observes")
        return {name for name, roles in self._roles.items() if observer in roles}

    def describe(self) -> list[str]:
        """One line a plugin: its package and what it does to which hook."""
        lines = []
        for plugin in self.plugins:
            does = ", ".join(f"{i.role} {i.hook}" for i in self._roles[plugin.name])
            lines.append(f"{plugin.installed}: {does}")
        return lines

    def notes(self, model: Any) -> list[str]:
        """What the plugins have to say of their options at the start of a run.

        A plugin's `notes` may name `model` and `distribution`, the one of step 1 after all
        adapters, and takes what it names.
        """
        lines = []
        for plugin in self.plugins:
            notes = getattr(plugin.instance, "notes", None)
            if notes is None:
                continue
            with self._blamed(plugin.name, "notes"):
                named = inspect.signature(notes).parameters
                given: dict[str, Any] = {"model": model} if "model" in named else {}
                if "distribution" in named:
                    given["distribution"] = self.sample_timesteps(model, 1)
                lines += [f"{plugin.name}: {line}" for line in notes(**given)]
        return lines

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The state of every plugin that keeps one, by name."""
        states = {}
        for plugin in self.plugins:
            if hasattr(plugin.instance, "state_dict"):
                with self._blamed(plugin.name, "state_dict"):
                    states[plugin.name] = plugin.instance.state_dict()
        return states

    def load_state_dict(
        self, states: Mapping[str, dict[str, Any]], is_lenient: bool = False
    ) -> list[str]:
        """Gives each plugin back what its `state_dict` returned.

        is_lenient: a plugin without saved state begins anew, and a line returned says so.
        """
        notes = []
        for plugin in self.plugins:
            if not hasattr(plugin.instance, "load_state_dict"):
                continue
            if plugin.name in states:
                with self._blamed(plugin.name, "load_state_dict"):
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

    def _find_claims(self) -> dict[str, str]:
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
        return {hook: plugin.name for hook, plugin in claims.items()}

    def _call(self, hook: str, **arguments: Any) -> Any:
        self._own_errors.clear()
        try:
            return getattr(self._manager.hook, hook)(**arguments)
        except RuntimeError as error:
            # pluggy's own word for a wrapper that yields twice; it passes by the guards.
            if any(error is own for own in self._own_errors):
                raise
            raise _Attributed(
                f"{hook}: {self.chain(hook)}: {error}; mend the plugin, or run without it"
            ) from error

    def _guard(self, plugin: Plugin | None, hooks: Sequence[str]) -> Any:
        """A plugin of wrappers that check what `plugin` (None: the claims) made of each hook."""

        def guarded(hook: str) -> Any:
            def source() -> str:
                return plugin.name if plugin else self._claims.get(hook, "host")

            def check(result: Any, **arguments: Any) -> Any:
                try:
                    checked = CHECKS[hook](result, **arguments)
                    return self._taken_over(checked, source()) if hook == "build_model" else checked
                except (TypeError, ValueError) as error:
                    self._blame(source(), hook, error, "returned")
                    raise

            return source, check

        guards = {hook: _GUARDS[hook](*guarded(hook), self._blame) for hook in hooks}
        return SimpleNamespace(**guards)

    def _blame(self, name: str, hook: str, error: Exception, verb: str = "raised") -> None:
        """Raises `error` again as one of the plugin `name`; returns where there is nothing to add:
        it came from the host, or says already whose it is."""
        if name == "host":
            self._own_errors.append(error)
        if isinstance(error, _Attributed) or any(error is own for own in self._own_errors):
            return
        plugin = next(p for p in self.plugins if p.name == name)
        told = str(error)
        if verb == "raised" and not isinstance(error, HostError):
            told = f"{type(error).__name__}: {error}"
        chain = self.chain(hook) if hook in _CLAIMABLE else plugin.name
        raise _Attributed(
            f"{hook}: {chain}: plugin {plugin.installed} {verb} {told}; mend the plugin, or run "
            f"without it"
        ) from error

    @contextmanager
    def _blamed(self, name: str, method: str) -> Iterator[None]:
        """What is raised inside is the plugin's, in a method that is no hook."""
        try:
            yield
        except Exception as error:
            self._blame(name, method, error)
            raise

    def _attributed(self, model: Any, source: str) -> Any:
        """The model; what `source` gave to `with_network` is blamed on it wherever it is called.

        That of plugins before it is theirs already, which stands.
        """

        def guarded(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                with self._blamed(source, f"with_network: {part}"):
                    return function(*arguments)

            return call

        changes = []
        for change in model.changes:
            given = {name: part for name, part in vars(change).items() if part is not None}
            changes.append(replace(change, **{n: guarded(n, part) for n, part in given.items()}))
        return replace(model, changes=tuple(changes)) if changes else model

    def _taken_over(self, result: Any, source: str) -> Any:
        """The model that `source` answered. Raises PluginError where it is the second to replace
        the preconditioning."""
        if self._preconditioning is None:
            self._preconditioning = result.preconditioning
            self._preconditioning_owner = None if source == "host" else source
        elif result.preconditioning is not self._preconditioning:
            if self._preconditioning_owner:
                raise _Attributed(
                    f"build_model: the plugins {self._preconditioning_owner} and {source} both "
                    "replace the preconditioning; select one of them with --plugins"
                )
            self._preconditioning = result.preconditioning
            self._preconditioning_owner = source
        return self._attributed(result, source)


# One wrapper a hook, because pluggy passes arguments by the names in the signature. Each awaits
# what the links inside it answer and hands it, or its error, to the two functions it was given.


def _guard_build_model(source: Any, check: Any, blame: Any) -> Any:
    @hookimpl(wrapper=True)
    def build_model(config: Any) -> Any:
        try:
            result = yield
        except Exception as error:
            blame(source(), "build_model", error)
            raise
        return check(result, config=config)

    return build_model


def _guard_sample_timesteps(source: Any, check: Any, blame: Any) -> Any:
    @hookimpl(wrapper=True)
    def sample_timesteps(model: Any, step: int) -> Any:
        try:
            result = yield
        except Exception as error:
            blame(source(), "sample_timesteps", error)
            raise
        return check(result, model=model, step=step)

    return sample_timesteps


def _guard_weight_loss(source: Any, check: Any, blame: Any) -> Any:
    @hookimpl(wrapper=True)
    def weight_loss(model: Any, noise: Any, step: int) -> Any:
        try:
            result = yield
        except Exception as error:
            blame(source(), "weight_loss", error)
            raise
        return check(result, model=model, noise=noise, step=step)

    return weight_loss


def _guard_encode_prompt(source: Any, check: Any, blame: Any) -> Any:
    @hookimpl(wrapper=True)
    def encode_prompt(prompts: Any, encoders: Any) -> Any:
        try:
            result = yield
        except Exception as error:
            blame(source(), "encode_prompt", error)
            raise
        return check(result, prompts=prompts, encoders=encoders)

    return encode_prompt


_GUARDS: dict[str, Any] = {
    "build_model": _guard_build_model,
    "sample_timesteps": _guard_sample_timesteps,
    "weight_loss": _guard_weight_loss,
    "encode_prompt": _guard_encode_prompt,
}
