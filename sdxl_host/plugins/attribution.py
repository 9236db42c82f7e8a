"""Whose fault an error is: each error raised in a plugin names the plugin, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdxl_host.errors import HostError, PluginError
from sdxl_host.plugins.discovery import Installed

if TYPE_CHECKING:
    from sdxl_host.diffusion.model import DiffusionModel

__all__ = ["AttributedError", "Plugin", "attribute_changes", "attributed"]


@dataclass(frozen=True)
class Plugin:
    """A selected plugin: its package, its options (or None) and the object with its hooks."""

    installed: Installed
    options: Any
    instance: Any

    @property
    def name(self) -> str:
        return self.installed.name


class AttributedError(PluginError):
    """An error whose message already names the plugin it came from."""


@contextmanager
def attributed(plugin: Plugin | None, where: str, verb: str = "raised") -> Iterator[None]:
    """Raises AttributedError for an error inside, which `plugin` caused; None is the host, whose
    errors are left as they are.

    where: the hook and its chain, or the method. verb: what the plugin did, "raised" or "returned".
    """
    try:
        yield
    except AttributedError:
        raise
    except Exception as error:
        if plugin is None:
            raise
        is_sentence = verb == "returned" or isinstance(error, HostError)
        text = str(error) if is_sentence else f"{type(error).__name__}: {error}"
        raise AttributedError(
            f"{where}: plugin {plugin.installed} {verb} {text}; mend the plugin, or run without it"
        ) from error


def attribute_changes(model: DiffusionModel, plugin: Plugin | None) -> DiffusionModel:
    """The model, where an error in any function that was given to `with_network` names `plugin`.

    Those of the plugins before it were attributed when those plugins answered, and stay theirs.
    """
    if plugin is None:
        return model

    def wrapped(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with attributed(plugin, f"with_network: {part}: {plugin.name}"):
                return function(*arguments)

        return call

    changes = []
    for change in model.changes:
        parts = {name: part for name, part in vars(change).items() if part is not None}
        changes.append(replace(change, **{n: wrapped(n, part) for n, part in parts.items()}))
    return replace(model, changes=tuple(changes)) if changes else model
