"""Finding plugins by their packages' metadata, and importing those a run selects.

Nothing is imported to list plugins, and an unselected plugin, broken or not, is never imported.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from sdxl_host.errors import PluginError, did_you_mean, one_line
from sdxl_host.version import __version__

__all__ = [
    "GROUP",
    "Entry",
    "Installed",
    "discover",
    "entries",
    "entry_problem",
    "find",
    "fitting",
    "import_class",
    "make_instance",
    "normalize",
    "package_name",
    "package_names",
]

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
    module, attribute: where its class is. damage: what of its package can't be read, or "".
    """

    name: str
    distribution: str
    version: str
    requires: SpecifierSet | None
    module: str
    attribute: str
    damage: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Entry:
    """An entry point `name = value` with what its package's metadata say.

    distribution: the package's name, or its folder where the metadata can't be read; version is
    then "?" and requires is empty. damage: what can't be read of them or of the entry point, or "".
    """

    name: str
    value: str
    distribution: str
    version: str
    requires: Sequence[str]
    damage: str


def normalize(name: str) -> str:
    """A plugin's name as it is compared: a hyphen reads as an underscore."""
    return name.strip().replace("-", "_")


def discover() -> list[Installed]:
    """Every installed plugin, sorted by name; two packages with one name give two entries."""
    found = []
    for entry in entries(GROUP):
        module, _, attribute = entry.value.partition(":")
        found.append(
            Installed(
                name=normalize(entry.name),
                distribution=entry.distribution,
                version=entry.version,
                requires=_required_host(entry.requires),
                module=module.strip(),
                attribute=attribute.strip(),
                damage=entry.damage,
            )
        )
    # Of two with one name, the one that can be used comes first.
    return sorted(found, key=lambda plugin: (plugin.name, plugin.damage, plugin.distribution))


def entries(group: str) -> list[Entry]:
    """The entry points of a group; those of a damaged package say so and hide no others."""
    try:
        points = list(importlib_metadata.entry_points(group=group))
    except Exception:
        # One file that can't be read fails them all. By itself, each tells its own fault.
        return list(_one_by_one(group))
    return [Entry(point.name, point.value, *_metadata(point.dist)) for point in points]


def package_name(distribution: importlib_metadata.Distribution) -> str:
    """A package's normalized name; of a damaged one, as its folder has it."""
    name, _, _, damage = _metadata(distribution)
    # name-1.0.dist-info
    return canonicalize_name(PurePath(name).stem.partition("-")[0] if damage else name)


def package_names() -> set[str]:
    """The normalized name of every installed package."""
    return {package_name(one) for one in importlib_metadata.distributions()}


def _one_by_one(group: str) -> Iterator[Entry]:
    packages: dict[str, importlib_metadata.Distribution] = {}
    # Of two copies counts what comes first on the import path, of those that can be read.
    for one in sorted(importlib_metadata.distributions(), key=lambda one: bool(_metadata(one)[-1])):
        packages.setdefault(package_name(one), one)
    for one in packages.values():
        name, version, requires, damage = _metadata(one)
        text, unread = _entry_text(one)
        for line in _lines(text, group):
            own, _, value = (part.strip() for part in line.partition("="))
            wrong = "" if value else f"{_folder(one)}: entry_points.txt holds the line {line!r}"
            yield Entry(own, value, name, version, requires, damage or unread or wrong)


def _lines(text: str, group: str) -> Iterator[str]:
    """The lines of the section `[group]`."""
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif line and not line.startswith(("#", ";")) and section == group:
            yield line


def _entry_text(distribution: importlib_metadata.Distribution) -> tuple[str, str]:
    """(the text of entry_points.txt, what is wrong with it)."""
    try:
        return distribution.read_text("entry_points.txt") or "", ""
    except UnicodeDecodeError as error:
        wrong = f"{_folder(distribution)}: entry_points.txt can't be read ({one_line(error)})"
        return error.object.decode("utf-8", "replace"), wrong


def _metadata(
    distribution: importlib_metadata.Distribution | None,
) -> tuple[str, str, Sequence[str], str]:
    """(name, version, requirements, "") of a package, or (its folder, "?", [], what is wrong)."""
    if distribution is None:
        return "unknown distribution", "?", [], ""
    try:
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
        if name and version:
            return name, version, distribution.requires or [], ""
        cause = "no Name" if version else "no Version"
    except Exception as error:
        # What is raised for a damaged file differs between versions of importlib_metadata.
        cause = one_line(error)
    folder = _folder(distribution)
    return folder, "?", [], f"the metadata in {folder} can't be read ({cause})"


def _folder(distribution: importlib_metadata.Distribution) -> str:
    """Where a package's metadata lie."""
    return str(getattr(distribution, "_path", None) or distribution.locate_file(""))


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
    if plugin.damage:
        return f"{plugin.damage}; delete this folder, or install the package again"
    twins = [other for other in installed if other.name == plugin.name and not other.damage]
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
    return _version_problem(plugin.distribution, plugin.version, plugin.requires)


def entry_problem(entry: Entry) -> str | None:
    """The same for an entry point that is no plugin's."""
    if entry.damage:
        return f"{entry.damage}; delete this folder, or install the package again"
    return _version_problem(entry.distribution, entry.version, _required_host(entry.requires))


def _version_problem(distribution: str, version: str, requires: SpecifierSet | None) -> str | None:
    if requires is None:
        return (
            f"{distribution} {version} does not say which versions of sdxl-host it "
            "works with; it must declare one in its dependencies (sdxl-host>=X,<Y)"
        )
    if not requires.contains(__version__, prereleases=True):
        return (
            f"{distribution} {version} needs sdxl-host{requires}, and this is "
            f"sdxl-host {__version__}; pip install --upgrade {distribution} sdxl-host"
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


def make_instance(plugin: Installed, cls: type, options: Any) -> Any:
    """An object of the plugin's class, made as for a run. Raises PluginError."""
    try:
        return cls() if options is None else cls(options)
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(
            f"plugin {plugin}: could not be made from its options: {one_line(error)}; mend the "
            "plugin, or run without it"
        ) from error


def timed_import(plugin: Installed) -> tuple[type, float]:
    """The plugin's class and the seconds its import took."""
    start = time.perf_counter()
    found = import_class(plugin)
    return found, time.perf_counter() - start
