"""Which plugins run, in which order, and which of them a flag belongs to."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig

from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.plugins import discovery
from sdxl_host.plugins.discovery import KNOWN_DISTRIBUTIONS, Installed

__all__ = ["Selection"]


@dataclass(frozen=True)
class SelectedPlugin:
    """A plugin of this run: its package, its class and its options (None if it has none)."""

    installed: Installed
    cls: type
    options: Any


class Selection:
    """Which plugins run, in order, and whose flags are whose.

    configured: the names in the config's section `plugins`. chosen: those of --plugins, which take
    their place, or None.
    """

    def __init__(self, configured: list[str], chosen: list[str] | None) -> None:
        self.installed = discovery.discover()
        self._configured = configured
        self._names = list(configured if chosen is None else chosen)
        self._is_chosen = chosen is not None
        self._used_by: dict[str, str] = {}
        self._removed: set[str] = set()
        self._classes: dict[str, type] = {}

    def is_plugin(self, name: str) -> bool:
        """Whether --NAME switches a plugin: an installed one, or one known by its name."""
        return name in KNOWN_DISTRIBUTIONS or any(p.name == name for p in self.installed)

    def switch(self, name: str, on: bool) -> None:
        """`--lpw True` appends, `--lpw False` removes."""
        if on and name not in self._names:
            self._names.append(name)
        if not on:
            self._removed.add(name)
            self._names = [other for other in self._names if other != name]

    def configure(self, name: str, by: str) -> bool:
        """The config asks for a plugin elsewhere than in `plugins`; False where --plugins leaves it
        out."""
        if name not in self._names:
            if self._is_chosen:
                return False
            self._names.append(name)
        self._configured.append(name)
        self._used_by.setdefault(name, by)
        return True

    def use(self, name: str, by: str) -> None:
        """A flag of the plugin was given: it runs."""
        self._used_by.setdefault(name, by)
        if name not in self._names:
            self._names.append(name)

    def owner_of(self, flag: str) -> tuple[str, str, Any] | None:
        """(plugin, option, type) that a flag such as snr_gamma means, or None for no plugin's flag.

        Raises HostError for one of two plugins, and of a plugin that is not installed or broken.
        """
        selected = [p for p in self.installed if p.name in self._names]
        others = [p for p in self.installed if p.name not in self._names]
        broken: list[PluginError] = []
        for group in (selected, others):
            owners = []
            for name, field in _candidates(flag, group):
                try:
                    hints = self._option_types(name)
                except PluginError as error:
                    # It may be no concern of this flag, which another plugin may own.
                    broken.append(error)
                    continue
                if field in hints:
                    owners.append((name, field, hints[field]))
            if len(owners) > 1:
                raise _ambiguous(flag, owners)
            if owners:
                return owners[0]
        prefixed = [name for name, _ in _candidates(flag, self.installed)]
        for name, distribution in KNOWN_DISTRIBUTIONS.items():
            if flag.startswith(f"{name}_") and name not in prefixed:
                raise PluginError(
                    f"--{flag}: the plugin {name} is not installed; pip install {distribution}"
                )
        if broken:
            raise broken[0]
        return None

    def flags_like(self, flag: str) -> list[str]:
        """The flags of every installed plugin whose name begins `flag`."""
        names = [name for name, _ in _candidates(flag, self.installed)]
        return [f"{name}_{option}" for name in names for option in self._option_types(name)]

    def _class(self, name: str) -> type:
        if name not in self._classes:
            found = discovery.find(name, self.installed)
            self._classes[name] = discovery.import_class(found)
        return self._classes[name]

    def _option_types(self, name: str) -> dict[str, Any]:
        schema = getattr(self._class(name), "Options", None)
        return get_type_hints(schema) if schema is not None and is_dataclass(schema) else {}

    def finish(self, tree: DictConfig) -> tuple[list[tuple[Installed, type]], list[str]]:
        """The selected plugins, imported, and notices about configured ones that are off."""
        for name in self._removed:
            if name in self._used_by:
                raise ConfigError(
                    f"--{name} False contradicts {self._used_by[name]}; remove one of them"
                )
        for name in list(tree.plugins):
            if name not in self._names and name not in self._configured:
                raise ConfigError(f"plugins.{name}: can't be set while {name} is switched off")
        chosen = [(discovery.find(name, self.installed), self._class(name)) for name in self._names]
        off = [name for name in tree.plugins if name not in self._names]
        notices = [f"plugins.{name} is configured but switched off" for name in off]
        for name in off:
            del tree.plugins[name]
        for name in self._names:
            if tree.plugins.get(name) is None:
                tree.plugins[name] = {}
        return chosen, notices


def _candidates(flag: str, group: list[Installed]) -> list[tuple[str, str]]:
    """(plugin, option) for each plugin whose name begins the flag; a name given by two packages
    counts once."""
    names = dict.fromkeys(p.name for p in group if flag.startswith(f"{p.name}_"))
    return [(name, flag.removeprefix(f"{name}_")) for name in names]


def _ambiguous(flag: str, owners: list[tuple[str, str, Any]]) -> ConfigError:
    ways = " or ".join(f"plugins.{name}.{field}=..." for name, field, _ in owners)
    names = " and ".join(name for name, _, _ in owners)
    return ConfigError(
        f"--{flag}: could belong to the plugins {names}; select one with --plugins, or write {ways}"
    )
