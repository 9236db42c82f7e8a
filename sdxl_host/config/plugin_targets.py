"""Target names that plugins stand for: a config's `EDMScaling` selects the plugin edm.

A package declares them in the entry-point group `sdxl_host.targets`, each name with one function:

    options(parts: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Any]

It is called once with every part that the config's model section names, by slot ("denoiser",
"scaling", "weighting", "discretization", "sigma_sampler"): the target's last word and its params.
What it returns are options of the package's plugin. It raises PluginError for a combination that no
option expresses. The nodes are then taken out, so the host's own parts stand in their place.

A name may stand for a class instead, which is then a dataset or a transform: `dataset_targets`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from sdxl_host.config.interpolation import as_written
from sdxl_host.config.layers import Layers
from sdxl_host.config.mindone import PLUGIN_TARGETS
from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.plugins.discovery import (
    KNOWN_DISTRIBUTIONS,
    Entry,
    Installed,
    entries,
)
from sdxl_host.plugins.selection_and_order import Selection
from sdxl_host.settings.targets import is_known

__all__ = ["GROUP", "adopt", "declared"]

GROUP = "sdxl_host.targets"


@dataclass(frozen=True)
class _Node:
    """A target in the config: its dotted place, slot, name and params without nodes of its own."""

    place: str
    slot: str
    target: str
    params: Mapping[str, Any]

    @property
    def short(self) -> str:
        return self.target.rpartition(".")[2]


def adopt(layers: Layers, selection: Selection) -> None:
    """Turns the targets of plugins in `tree.model` into those plugins' options, and selects them.

    Options that the command line sets go before. Raises ConfigError where a target's plugin is not
    installed or left out, or where the config says two things.
    """
    nodes = list(_nodes(as_written(layers.tree.model), "model"))
    foreign = [node for node in nodes if not is_known(node.target)]
    if not foreign:
        return
    served = declared()
    by_distribution: dict[str, list[_Node]] = {}
    for node in foreign:
        if node.target in served:
            by_distribution.setdefault(served[node.target].distribution, []).append(node)
        elif node.short in PLUGIN_TARGETS:
            raise PluginError(
                f"{node.place}.target: {node.target} needs a plugin that is not installed; "
                f"pip install {KNOWN_DISTRIBUTIONS[PLUGIN_TARGETS[node.short]]}"
            )
    for distribution, adopted in by_distribution.items():
        plugin = _plugin_of(distribution, selection.installed)
        _select(plugin, adopted[0], selection)
        options = _options(served[adopted[0].target], plugin, _parts(nodes))
        names = sorted({node.short for node in adopted})
        _merge(layers, plugin, options, adopted[0], f"target {', '.join(names)}")
        for node in adopted:
            parent, _, key = node.place.rpartition(".")
            holder = OmegaConf.select(layers.tree, parent)
            if holder is not None and key in holder:
                del holder[key]


def _nodes(section: Any, place: str) -> Iterator[_Node]:
    """Every node below `section` that stands in a slot called `<slot>_config`."""
    if not isinstance(section, Mapping):
        return
    for key, value in section.items():
        inside = f"{place}.{key}"
        if str(key).endswith("_config") and isinstance(value, Mapping) and "target" in value:
            params = value.get("params") or {}
            plain = {k: v for k, v in params.items() if not str(k).endswith("_config")}
            yield _Node(inside, str(key).removesuffix("_config"), str(value["target"]), plain)
        yield from _nodes(value, inside)


def _parts(nodes: list[_Node]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The nodes by slot. Raises ConfigError where one slot stands twice and differs."""
    found: dict[str, _Node] = {}
    for node in nodes:
        other = found.setdefault(node.slot, node)
        if (other.target, other.params) != (node.target, node.params):
            raise ConfigError(
                f"{node.place}: differs from {other.place}; give both the same target and params"
            )
    return {slot: (node.short, node.params) for slot, node in found.items()}


def declared() -> dict[str, Entry]:
    """The declared target names. Raises PluginError for one that two packages declare."""
    found: dict[str, Entry] = {}
    # One that can't be read stands back; its plugin, once selected, says so.
    for entry in sorted(entries(GROUP), key=lambda entry: entry.damage):
        other = found.setdefault(entry.name, entry)
        if other.distribution != entry.distribution and not entry.damage:
            raise PluginError(
                f"{other.distribution} and {entry.distribution} both declare the target "
                f"{entry.name}; uninstall one of them"
            )
    return found


def _plugin_of(distribution: str, installed: list[Installed]) -> Installed:
    provided = [plugin for plugin in installed if plugin.distribution == distribution]
    if len(provided) != 1:
        raise PluginError(
            f"{distribution} declares targets and {len(provided)} plugins; it must provide exactly "
            "one"
        )
    return provided[0]


def _select(plugin: Installed, node: _Node, selection: Selection) -> None:
    if not selection.configure(plugin.name, f"{node.place}.target {node.target}"):
        raise ConfigError(
            f"{node.place}.target: {node.target} is a part of the plugin {plugin.name}, which "
            f"--plugins leaves out; add {plugin.name} to it, or use another config"
        )


def _options(
    entry: Entry,
    plugin: Installed,
    parts: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> dict[str, Any]:
    """What the package's function makes of the parts; its faults are attributed to it."""
    module, _, attribute = entry.value.partition(":")
    try:
        function = getattr(importlib.import_module(module.strip()), attribute.strip())
        if isinstance(function, type):
            raise PluginError(
                f"plugin {plugin}: the target {entry.name} is a class, which can stand for a "
                "dataset or a transform alone; name it there, or another target here"
            )
        options = function(parts)
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(
            f"plugin {plugin}: its function for the target {entry.name} failed: "
            f"{type(error).__name__}: {error}; mend the config's params, or the plugin"
        ) from error
    if not isinstance(options, dict):
        raise PluginError(
            f"plugin {plugin}: its function for the target {entry.name} gave "
            f"{type(options).__name__}, not a dict of options; mend the plugin"
        )
    return options


def _merge(
    layers: Layers, plugin: Installed, options: Mapping[str, Any], node: _Node, origin: str
) -> None:
    """Options into `plugins.<name>`, where one that is there already must be the same."""
    if layers.tree.plugins.get(plugin.name) is None:
        layers.tree.plugins[plugin.name] = {}
    layers.select(plugin.name, origin)
    section = layers.tree.plugins[plugin.name]
    for name, value in options.items():
        key = f"plugins.{plugin.name}.{name}"
        if layers.on_command_line(key):
            continue
        if name not in section:
            layers.set(key, value, origin, key)
        elif section[name] != value:
            raise ConfigError(
                f"{key}: is {section[name]!r}, and {node.place} with what belongs to it says "
                f"{value!r}; remove one of them"
            )
