"""What a plugin implements, as its class shows it: hooks that are marked, and how."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from sdxl_host import hookspecs
from sdxl_host.errors import PluginError, did_you_mean
from sdxl_host.hookspecs import HOOKS, PROJECT
from sdxl_host.plugins.discovery import Installed

__all__ = ["Implementation", "implementations"]

_REFUSED_OPTIONS = {
    "tryfirst": "the order is that of --plugins",
    "trylast": "the order is that of --plugins",
    "optionalhook": "a misspelt hook must be an error",
    "specname": "a method must have the hook's own name",
    "hookwrapper": "use wrapper=True, which returns its result",
}


@dataclass(frozen=True)
class Implementation:
    """One hook of a plugin, and what it does there: claims, adapts or observes."""

    hook: str
    role: str


def implementations(plugin: Installed, cls: type) -> list[Implementation]:
    """The hooks of the class `cls`, in the order of `HOOKS`. Raises PluginError for what the
    contract refuses."""
    found: dict[str, Implementation] = {}
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        function = getattr(method, "__func__", method)
        marked: dict[str, Any] | None = getattr(function, f"{PROJECT}_impl", None)
        if marked is None:
            if name in HOOKS and callable(function):
                raise PluginError(
                    f"plugin {plugin}: {name} has a hook's name but is not marked; "
                    "put @hookimpl above it"
                )
            continue
        _check_marked(plugin, name, function, marked)
        role = "adapts" if marked["wrapper"] else "claims"
        found[name] = Implementation(name, "observes" if name == "on_step_end" else role)
    if not found:
        raise PluginError(
            f"plugin {plugin} implements no hook; mark at least one of {', '.join(HOOKS)} "
            "with @hookimpl"
        )
    for one, other in (("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")):
        if hasattr(cls, one) and not hasattr(cls, other):
            raise PluginError(f"plugin {plugin} has {one} but no {other}; it needs both or neither")
    return [found[hook] for hook in HOOKS if hook in found]


def _check_marked(plugin: Installed, name: str, function: Any, marked: dict[str, Any]) -> None:
    for option, remedy in _REFUSED_OPTIONS.items():
        if marked.get(option):
            raise PluginError(
                f"plugin {plugin}: {name} uses @hookimpl({option}=...), which is refused; {remedy}"
            )
    if name not in HOOKS:
        raise PluginError(
            f"plugin {plugin}: there is no hook named {name}{did_you_mean(name, HOOKS)} "
            f"(hooks: {', '.join(HOOKS)})"
        )
    specified = inspect.signature(getattr(hookspecs, name)).parameters
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.default is not inspect.Parameter.empty:
            raise PluginError(
                f"plugin {plugin}: {name} gives the parameter {parameter.name} a default, so it "
                "would never be passed; remove the default"
            )
        if parameter.name not in specified:
            raise PluginError(
                f"plugin {plugin}: {name} has no argument {parameter.name}"
                f"{did_you_mean(parameter.name, specified)} (arguments: {', '.join(specified)})"
            )
    generator = inspect.isgeneratorfunction(function)
    if name == "on_step_end" and (marked["wrapper"] or generator):
        raise PluginError(f"plugin {plugin}: on_step_end observes; it can't be a wrapper")
    if marked["wrapper"] and not generator:
        raise PluginError(
            f"plugin {plugin}: {name} is a wrapper without `result = yield`; add it, or remove "
            "wrapper=True"
        )
    if generator and not marked["wrapper"]:
        raise PluginError(
            f"plugin {plugin}: {name} has a yield but is no wrapper; use @hookimpl(wrapper=True)"
        )
