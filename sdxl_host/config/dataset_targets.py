"""Datasets and transforms of other packages: a config's `my.NightlyDataset` is a class of theirs.

A package declares it in the entry-point group `sdxl_host.targets`, each name with one class: in the
place of the dataset a subclass of `sdxl_host.Text2ImageDataset`, in that of a transform any class
whose objects take a sample and a generator. The package needs no plugin. What a config names is
registered here and imported when it is built, and nothing else is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from sdxl_host.config.interpolation import as_written
from sdxl_host.config.plugin_targets import declared
from sdxl_host.errors import PluginError
from sdxl_host.plugins.discovery import entry_problem
from sdxl_host.settings.targets import Target, is_known, register

__all__ = ["register_datasets"]


def register_datasets(tree: DictConfig) -> None:
    """Registers the targets in the section `data` that other packages declare.

    A name that nobody declares is left for whoever builds it to refuse. Raises PluginError for one
    that two packages declare, or whose package does not fit this host.
    """
    named = [node for node in _named(as_written(tree.data)) if not is_known(node[2])]
    if not named:
        return
    entries = declared()
    for place, slot, name in named:
        entry = entries.get(name)
        if entry is None:
            continue
        problem = entry_problem(entry)
        if problem:
            raise PluginError(f"{place}.target: {name}: {problem}")
        path = ":".join(part.strip() for part in entry.value.split(":"))
        package = f"{entry.distribution} {entry.version}"
        register(Target(name, slot, path, package=package))


def _named(data: Any) -> Iterator[tuple[str, str, str]]:
    """(its place, its slot, the name) of every target in the section."""
    place, node = "data.dataset_config", (data or {}).get("dataset_config")
    if not isinstance(node, Mapping):
        return
    yield place, "dataset", str(node.get("target"))
    params = node.get("params")
    transforms = params.get("transforms") if isinstance(params, Mapping) else None
    for index, inner in enumerate(transforms if isinstance(transforms, list) else ()):
        if isinstance(inner, Mapping):
            inside = f"{place}.params.transforms[{index}]"
            yield inside, "transform", str(inner.get("target"))
