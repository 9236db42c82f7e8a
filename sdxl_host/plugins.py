"""Finding plugins by their packages' metadata, and importing those a run selects.

Nothing is imported to list plugins, and an unselected plugin, broken or not, is never imported.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from sdxl_host.errors import PluginError, did_you_mean
from sdxl_host.version import __version__

__all__ = ["GROUP", "Installed", "discover", "find", "fitting", "import_class", "normalize"]

GROUP = "sdxl_host.plugins"
HOST_DISTRIBUTION = "sdxl-host"
RESERVED_NAMES = ("host", "train", "data", "model", "optim", "plugins", "none")
_NAME = re.compile(r"[a-z][a-z0-9_]*")

# Plugins that exist and the package to install for each: only for the message that one is missing.
KNOWN_DISTRIBUTIONS = {
    "edm": "sdxl-edm",
    "lpw": "sdxl-lpw",
    "snr": "sdxl-snr",
    "timestep_bias": "sdxl-timestep-bias",
}


@dataclass(frozen=True)
class Installed:
    """A plugin as its package's metadata declares it.

    requires: the versions of sdxl-host it accepts, or None where it does not say.
    module, attribute: where its class is.
    """

    name: str
    distribution: str
    version: str
    requires: SpecifierSet | None
    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


def normalize(name: str) -> str:
    """A plugin's name as it is compared: a hyphen reads as an underscore."""
    return name.strip().replace("-", "_")


def discover() -> list[Installed]:
    """Every installed plugin, sorted by name; two packages with one name give two entries."""
    found = []
    for entry in importlib_metadata.entry_points(group=GROUP):
        module, _, attribute = entry.value.partition(":")
        distribution = entry.dist
        found.append(
            Installed(
                name=normalize(entry.name),
                distribution=distribution.name if distribution else "unknown distribution",
                version=distribution.version if distribution else "?",
                requires=_required_host(distribution.requires or [] if distribution else []),
                module=module.strip(),
                attribute=attribute.strip(),
            )
        )
    return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))


def _required_host(requirements: Iterable[str]) -> SpecifierSet | None:
    for line in requirements:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(requirement.name) == HOST_DISTRIBUTION:
            return requirement.specifier or None  # a bare name states no version
    return None


def fitting(plugin: Installed, installed: Sequence[Installed]) -> str | None:
    """Why `plugin` can't be used, with the remedy, or None; decided from metadata alone."""
    twins = [other for other in installed if other.name == plugin.name]
    if len(twins) > 1:
        names = " and ".join(f"{twin.distribution} {twin.version}" for twin in twins)
        return (
            f"{names} both provide a plugin named {plugin.name}; uninstall one of them "
            f"(pip uninstall {twins[-1].distribution})"
        )
    if not _NAME.fullmatch(plugin.name):
        return (
            f"{plugin.name!r} is not a plugin name (a lower-case letter, then letters, digits and "
            f"underscores); {plugin.distribution} must rename its entry point"
        )
    if plugin.name in RESERVED_NAMES:
        return (
            f"the name {plugin.name} belongs to the host; {plugin.distribution} must rename its "
            "entry point"
        )
    if plugin.requires is None:
        return (
            f"{plugin.distribution} {plugin.version} does not say which versions of sdxl-host it "
            "works with; it must declare one in its dependencies (sdxl-host>=X,<Y)"
        )
    if not plugin.requires.contains(__version__, prereleases=True):
        return (
            f"{plugin.distribution} {plugin.version} needs sdxl-host{plugin.requires}, and this is "
            f"sdxl-host {__version__}; pip install --upgrade {plugin.distribution} sdxl-host"
        )
    return None


def find(name: str, installed: Sequence[Installed]) -> Installed:
    """The installed plugin called `name`, fit for use. Raises PluginError otherwise."""
    for plugin in installed:
        if plugin.name == name:
            problem = fitting(plugin, installed)
            if problem:
                raise PluginError(f"plugin {name}: {problem}")
            return plugin
    if name in KNOWN_DISTRIBUTIONS:
        raise PluginError(
            f"plugin {name} is not installed; pip install {KNOWN_DISTRIBUTIONS[name]}"
        )
    names = [plugin.name for plugin in installed]
    raise PluginError(
        f"plugin {name} is not installed{did_you_mean(name, [*names, *KNOWN_DISTRIBUTIONS])} "
        f"(installed: {', '.join(names) or 'none'}); pip install the package that provides it"
    )


def import_class(plugin: Installed) -> type:
    """The plugin's class. Raises PluginError, naming package and cause, when it can't be had."""
    try:
        module = importlib.import_module(plugin.module)
    except BaseException as error:
        # Whatever a package does while it is imported, the user is told whose fault it is.
        if isinstance(error, KeyboardInterrupt):
            raise
        cause = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"plugin {plugin} could not be imported: {cause}; "
            f"pip install --force-reinstall {plugin.distribution}, or run without it"
        ) from error
    found: Any = getattr(module, plugin.attribute, None)
    if not isinstance(found, type):
        raise PluginError(
            f"plugin {plugin}: its entry point {plugin.module}:{plugin.attribute} is not a class; "
            f"{plugin.distribution} must name the plugin's class there"
        )
    return found


def timed_import(plugin: Installed) -> tuple[type, float]:
    """The plugin's class and the seconds its import took."""
    start = time.perf_counter()
    found = import_class(plugin)
    return found, time.perf_counter() - start
