"""A config as YAML in which every value has a comment that names the layer it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from sdxl_host.config.interpolation import as_written
from sdxl_host.config.layers import Place, leaves
from sdxl_host.config.load import RunConfig

__all__ = ["commented_yaml"]


def commented_yaml(config: RunConfig) -> str:
    """The config as YAML that loads as it is, each value with its origin in a comment."""
    rows = list(_rows(as_written(config.tree), (), "", config.origins))
    # Beyond this a few long values would push all comments off the screen.
    column = min(64, max(len(text) for text, _ in rows))
    return "".join(
        f"{text.ljust(column)}  # {origin}\n" if origin else f"{text}\n" for text, origin in rows
    )


def _rows(
    node: Mapping[Any, Any], place: Place, indent: str, origins: Mapping[Place, str]
) -> Iterator[tuple[str, str]]:
    """(line, origin) for each line of a mapping; a line without a value has no origin."""
    for key, value in node.items():
        inside = (*place, str(key))
        head = f"{indent}{_scalar(key)}:"
        if isinstance(value, Mapping) and value:
            yield head, origins.get(inside, "")
            yield from _rows(value, inside, indent + "  ", origins)
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            yield head, ""
            yield from _items(value, inside, indent + "  ", origins)
        else:
            yield f"{head} {_scalar(value)}", _joined(value, inside, origins)


def _items(
    values: list[Any], place: Place, indent: str, origins: Mapping[Place, str]
) -> Iterator[tuple[str, str]]:
    for index, value in enumerate(values):
        inside = (*place, str(index))
        if isinstance(value, Mapping) and value:
            rows = _rows(value, inside, indent + "  ", origins)
            first, origin = next(rows)
            yield f"{indent}- {first[len(indent) + 2 :]}", origin
            yield from rows
        else:
            yield f"{indent}- {_scalar(value)}", _joined(value, inside, origins)


def _joined(value: Any, place: Place, origins: Mapping[Place, str]) -> str:
    return ", ".join(dict.fromkeys(origins[leaf] for leaf in leaves(value, place)))


def _scalar(value: Any) -> str:
    """A value, or a list of values, on one line; what needs quotes has them."""
    if isinstance(value, list):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    plain = not isinstance(value, str) or value.isprintable()
    text = yaml.safe_dump(
        [value],  # in a list, where fewer texts may go without quotes
        default_flow_style=True,
        default_style=None if plain else '"',
        width=float("inf"),
        allow_unicode=plain,
    )
    return text.strip()[1:-1]
