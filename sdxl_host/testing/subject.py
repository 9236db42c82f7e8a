"""One plugin under the contract, and what its broken promises are said with. No MindSpore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_host.config.load import RunConfig
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import HostError, PluginError, did_you_mean
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed, discover, import_class, make_instance, normalize
from sdxl_host.plugins.hooks import Hooks, Plugin
from sdxl_host.plugins.inspection import check_metadata
from sdxl_host.plugins.roles import implementations
from sdxl_host.settings.options import build_options, first_line
from sdxl_host.testing.runs import tiny_config

__all__ = ["Subject", "check_array"]


class Subject:
    """One plugin under the contract: found, imported and made as a run would.

    name: its entry point's. folder: where configs and runs are written. options: those that the
    checks use besides the defaults. Raises PluginError where the plugin can't be had.
    """

    def __init__(
        self, name: str, folder: Path, options: Mapping[str, Any] | None = None, steps: int = 4
    ) -> None:
        self.name = normalize(name)
        self.folder = folder
        self.options = dict(options or {})
        self.steps = steps

    @cached_property
    def installed(self) -> Installed:
        """What the package's metadata say. Raises PluginError where they do not fit."""
        found = discover()
        for plugin in found:
            if plugin.name == self.name:
                check_metadata(plugin, found)
                return plugin
        names = [plugin.name for plugin in found]
        raise PluginError(
            f"plugin {self.name} is not installed{did_you_mean(self.name, names)} (installed: "
            f"{', '.join(names) or 'none'}); run pip install -e . in its folder"
        )

    @cached_property
    def cls(self) -> type:
        """The plugin's class."""
        return import_class(self.installed)

    @cached_property
    def roles(self) -> dict[str, str]:
        """What it does to each of its hooks. Raises PluginError where that breaks the contract."""
        return {i.hook: i.role for i in implementations(self.installed, self.cls)}

    @cached_property
    def config(self) -> RunConfig:
        """The settings of a tiny run with this plugin alone."""
        return tiny_config(
            [self.name], folder=self.folder / "config", options={self.name: self.options}
        )

    def instance(self) -> Any:
        """A new object of the plugin's class, made from the options of `config`."""
        return make_instance(self.installed, self.cls, self._settings())

    def hooks(self, defaults: Any = None) -> Hooks:
        """New hooks: the host's defaults, or `defaults`, and a new object of the plugin."""
        plugin = Plugin(self.installed, self._settings(), self.instance())
        return Hooks(Defaults() if defaults is None else defaults, [plugin])

    def model(self, hooks: Hooks) -> DiffusionModel:
        """The model that `hooks` build from `config`; its networks are not made."""
        return hooks.build_model(self.config.tree)

    def fault(self, told: str, remedy: str, cause: Exception | None = None) -> PluginError:
        """The error of a promise that is not kept."""
        error = PluginError(f"plugin {self.installed}: {told}; {remedy}")
        error.__cause__ = cause
        return error

    def _settings(self) -> Any:
        schema = getattr(self.cls, "Options", None)
        if schema is None or not is_dataclass(schema):
            return None
        return build_options(schema, self.options, f"plugins.{self.name}")

    @contextmanager
    def asked(self, what: str) -> Iterator[None]:
        """Blames an error inside on the plugin: `what` names whom it came from."""
        try:
            yield
        except HostError:
            raise
        except Exception as error:
            told = f"{what} raised {type(error).__name__}: {first_line(error)}"
            raise self.fault(told, "mend it") from error


def check_array(
    subject: Subject, told: str, result: Any, shape: tuple[int, ...], over: str, at: np.ndarray
) -> None:
    """Floating, of `shape`, and finite; `at` is what it was asked for, called `over`."""
    if not isinstance(result, np.ndarray | np.generic | float):
        given = "None" if result is None else f"a {type(result).__name__}"
        raise subject.fault(f"{told} gives {given}", "return a float64 array")
    array = np.asarray(result)
    if not np.issubdtype(array.dtype, np.floating):
        raise subject.fault(
            f"{told} gives {array.dtype}, not floating numbers", "return a float64 array"
        )
    if array.shape != shape:
        raise subject.fault(
            f"{told} gives the shape {array.shape} for {over} of shape {shape}",
            "return one number for each, in its shape (np.ones_like, np.full_like)",
        )
    finite = np.isfinite(array)
    if not finite.all():
        first = np.argmin(finite.ravel())
        raise subject.fault(
            f"{told} is {array.ravel()[first]} at {over} {at.ravel()[first]:.4g}",
            "keep it finite over the whole range",
        )
