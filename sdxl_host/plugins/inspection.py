"""What can be said of an installed plugin without a run: its package, import, hooks and options.

`sdxl-host plugins --check` and `sdxl_host.testing` share these checks. Each raises PluginError with
the plugin, what is wrong, and how to mend it. Nothing here imports pytest or MindSpore.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from sdxl_host.errors import HostError, PluginError, one_line
from sdxl_host.plugins.discovery import Installed, fitting, timed_import
from sdxl_host.plugins.roles import implementations
from sdxl_host.processes import run_child, tell
from sdxl_host.settings.options import build_options, describe, first_line
from sdxl_host.version import __version__

__all__ = [
    "HEAVY",
    "Report",
    "check_import",
    "check_metadata",
    "check_options",
    "inspect_alone",
]

# What listing, configuring and planning shall not wait for: imported inside the methods that use
# it, or not at all.
HEAVY = ("mindspore", "torch", "transformers", "scipy", "PIL")

_LOWER, _UPPER = (">=", ">", "==", "===", "~="), ("<", "<=", "==", "===", "~=")
_PATIENCE = 120.0  # seconds that an import may take


@dataclass(frozen=True)
class Report:
    """What importing a plugin in a process of its own shows.

    import_seconds: of the plugin's module and all that it imports. hooks: role by hook.
    options: as `options.describe` gives them.
    """

    import_seconds: float
    hooks: dict[str, str]
    options: list[dict[str, Any]]


# ---- the package


def check_metadata(plugin: Installed, installed: Sequence[Installed]) -> None:
    """Name, entry point and version bounds; and that no other of `installed` has the name."""
    problem = fitting(plugin, installed)
    if problem is None and not (plugin.module and plugin.attribute):
        problem = (
            f"its entry point {plugin.module}:{plugin.attribute} names no class; "
            f'{plugin.distribution} must write it as {plugin.name} = "module:Class"'
        )
    if problem is None and plugin.requires is not None:
        problem = _unbounded(plugin, plugin.requires)
    if problem:
        raise PluginError(f"plugin {plugin.name}: {problem}")


def _unbounded(plugin: Installed, requires: SpecifierSet) -> str | None:
    operators = {specifier.operator for specifier in requires}
    missing = [
        kind
        for kind, known in (("lower", _LOWER), ("upper", _UPPER))
        if not operators.intersection(known)
    ]
    if not missing:
        return None
    major, minor = __version__.split(".")[:2]
    return (
        f"{plugin.distribution} {plugin.version} needs sdxl-host{requires}, which has no "
        f"{' and no '.join(missing)} bound; it must declare both, for this version "
        f"sdxl-host>={major}.{minor},<{major}.{int(minor) + 1}"
    )


# ---- in a process of its own


def check_import(plugin: Installed) -> float:
    """Imports the plugin in a process of its own, where it may load none of `HEAVY`; returns the
    seconds that took."""
    return _ask_child(plugin, everything=False)["import_seconds"]


def inspect_alone(plugin: Installed) -> Report:
    """All that can be said of an imported plugin, without importing it here."""
    return Report(**_ask_child(plugin, everything=True))


def _ask_child(plugin: Installed, everything: bool) -> dict[str, Any]:
    asked = json.dumps({**vars(plugin), "requires": None, "everything": everything})
    child = run_child("plugins.inspection", f"answer({asked!r})", _PATIENCE)
    if child.is_late:
        raise PluginError(
            f"plugin {plugin} is broken: importing it takes over {_PATIENCE:.0f} s; do slow work "
            "inside the methods that need it"
        )
    if not child.records:
        how = child.end.removeprefix("ended ")
        last = f" ({child.last})" if child.last else "" if how else " without a word"
        raise PluginError(
            f"plugin {plugin} is broken: importing it ended Python{' ' * bool(how)}{how}{last}; "
            f"mend it, or pip uninstall {plugin.distribution}"
        )
    (found,) = child.records
    if "error" in found:
        raise PluginError(found["error"])
    return found


def answer(text: str) -> None:
    """In the child: tells what is asked for in `text`, as JSON, and ends Python."""
    try:
        record = _answer(json.loads(text))
    except HostError as error:
        record = {"error": str(error)}
    tell(**record)
    os._exit(0)  # threads that the plugin has started end here too


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Imports the plugin and says what it finds."""
    everything = asked.pop("everything")
    plugin = Installed(**asked)
    before = set(sys.modules)
    cls, seconds = timed_import(plugin)
    heavy = [name for name in HEAVY if name in sys.modules and name not in before]
    if heavy:
        raise PluginError(
            f"plugin {plugin}: importing it imports {', '.join(heavy)}; import them inside the "
            "methods that use them"
        )
    found: dict[str, Any] = {"import_seconds": seconds}
    if everything:
        found["hooks"] = {i.hook: i.role for i in implementations(plugin, cls)}
        check_options(plugin, cls)
        schema = getattr(cls, "Options", None)
        found["options"] = [] if schema is None else describe(schema)
    return found


# ---- the class


def check_options(plugin: Installed, cls: type, values: Mapping[str, Any] | None = None) -> Any:
    """The options of the plugin's class with `values` in them; None where it has no options.

    Options is a dataclass whose fields each have a default and help; two instances share nothing;
    and what is written to a config as YAML comes back from it. Raises ConfigError for `values` that
    do not fit.
    """
    schema = getattr(cls, "Options", None)
    if schema is None:
        if values:
            raise PluginError(f"plugin {plugin} has no options; leave out {', '.join(values)}")
        return None
    if not (isinstance(schema, type) and is_dataclass(schema)):
        raise PluginError(
            f"plugin {plugin}: its Options is not a dataclass, so it has no options; put "
            "@dataclass above the class"
        )
    for field in fields(schema):
        _check_field(plugin, field)
    where = f"plugins.{plugin.name}"
    try:
        one, other = schema(), schema()
        build_options(schema, {}, where)
    except Exception as error:
        reason = first_line(error) if isinstance(error, HostError) else one_line(error)
        raise PluginError(
            f"plugin {plugin}: its Options can't be made from their defaults: {reason}; mend the "
            "default or the type (int, float, bool, str, Literal, list, dict, or one of them | "
            "None)"
        ) from error
    for name, value in vars(one).items():
        if value is getattr(other, name) and isinstance(value, list | dict | set | bytearray):
            raise PluginError(
                f"plugin {plugin}: its option {name} has one {type(value).__name__} for all "
                f"instances, so a change to it would show in every run; use option({value!r}, "
                "help=...), which copies it"
            )
    chosen = build_options(schema, values or {}, where)
    _check_round_trip(plugin, schema, chosen)
    return chosen


def _check_field(plugin: Installed, field: Field[Any]) -> None:
    if field.default is MISSING and field.default_factory is MISSING:
        raise PluginError(
            f"plugin {plugin}: its option {field.name} has no default; write {field.name}: ... = "
            "option(default, help=...)"
        )
    told = field.metadata.get("help")
    if not isinstance(told, str) or not told.strip():
        raise PluginError(
            f"plugin {plugin}: its option {field.name} has no help; write {field.name}: ... = "
            'option(default, help="one line that says what it does")'
        )
    if len(told.splitlines()) > 1:
        raise PluginError(
            f"plugin {plugin}: the help of its option {field.name} has several lines; put it on one"
        )


def _check_round_trip(plugin: Installed, schema: type, chosen: Any) -> None:
    from omegaconf import OmegaConf

    written = asdict(chosen)
    try:
        text = OmegaConf.to_yaml(OmegaConf.create(written))
        read = OmegaConf.to_container(OmegaConf.create(text))
        again = asdict(build_options(schema, read or {}, f"plugins.{plugin.name}"))
    except Exception as error:
        raise PluginError(
            f"plugin {plugin}: its Options do not survive a config file: {one_line(error)}; keep "
            "to the types int, float, bool, str, Literal, list and dict"
        ) from error
    for name, value in written.items():
        if again[name] != value:
            raise PluginError(
                f"plugin {plugin}: its option {name} is {value!r}, and {again[name]!r} once it was "
                "written to a config and read again; __post_init__ must leave a finished value as "
                "it is"
            )
