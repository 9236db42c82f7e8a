"""Interpolation between keys, `${section.key}`: allowed; resolvers, `${name:...}`, are not.

A resolver is a function that a value calls, and a config may run no code. Values are looked at as
they are written, before OmegaConf follows any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdxl_host.errors import ConfigError
from sdxl_host.settings.options import first_line

__all__ = ["as_written", "refuse_resolvers", "resolve"]


def as_written(tree: Any) -> Any:
    """A part of the tree as plain dicts and lists, its interpolations as the text they are."""
    return OmegaConf.to_container(tree, resolve=False) if OmegaConf.is_config(tree) else tree


def refuse_resolvers(node: Any, key: str = "") -> None:
    """Raises ConfigError for a text below `node` that calls a resolver; `key` is the node's."""
    for place, value in _strings(node, key):
        if _calls_resolver(value):
            raise ConfigError(
                f"{place}: {value!r} calls a resolver, which a config may not; write the value, or "
                "refer to another key as ${section.key}"
            )


def resolve(tree: DictConfig) -> None:
    """Fills in the interpolations, after which no text may look like one."""
    refuse_resolvers(as_written(tree))
    try:
        OmegaConf.resolve(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    # Two texts put together can make a call that neither of them is.
    for key, value in _strings(as_written(tree)):
        if "${" in value:
            raise ConfigError(
                f"{key}: {value!r} would be filled in once more, which a config may not; write the "
                "value"
            )


def _calls_resolver(text: str) -> bool:
    """Whether a colon stands inside ${...}; the name before it may be made of ${...} as well."""
    depth = 0
    for part in re.findall(r"\$\{|[}:]", text):
        if part == ":" and depth:
            return True
        depth = depth + 1 if part == "${" else max(0, depth - (part == "}"))
    return False


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _strings(value, f"{key}[{index}]")
