"""Where each value of a resolved config came from: the layers of `config`, one by one.

`config.load` merges the layers and forgets them. Here each is read again by itself, with the same
functions, for the keys that it sets; of two layers the later counts, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sdxl_host.config.flags import SECTIONS, Arguments, apply_flag, read_value, set_key
from sdxl_host.config.load import (
    DEFAULT_CONFIG,
    RunConfig,
    find_config,
    packaged_configs,
    read_yaml,
)
from sdxl_host.config.plugin_targets import adopt
from sdxl_host.plugins.discovery import normalize
from sdxl_host.plugins.selection import Selection
from sdxl_host.settings.targets import is_known

__all__ = ["commented_yaml", "origins"]

Place = tuple[str, ...]
DEFAULT = "default"


def origins(arguments: Sequence[str], config: RunConfig) -> dict[Place, str]:
    """The origin of every leaf of `config.tree`, and of the entries below `plugins`.

    arguments: those that `config` was loaded from. A place is a tuple of keys and of indices as
    text, an origin a few words: "default", the name of the file, "override", "--seed", "default of
    snr", or the targets in the file that a plugin took as its options.
    """
    lines = Arguments(arguments)
    file = find_config(lines.config) if lines.config else packaged_configs() / DEFAULT_CONFIG
    tree = read_yaml(file)
    tree.plugins = _named(tree.get("plugins"))
    for section in SECTIONS:
        if tree.get(section) is None:
            tree[section] = {}
    found = dict.fromkeys(_leaves(_plain(tree), ()), file.name)
    found.update({("plugins", name): file.name for name in tree.plugins})
    for key, text in lines.overrides:
        value = read_value(text)
        found.update(dict.fromkeys(_leaves(value, _place(key)), "override"))
        set_key(tree, key, value, key)
        if key.startswith("plugins."):
            found.setdefault(tuple(_place(key)[:2]), "override")

    selection = Selection(list(tree.plugins), lines.plugins)
    for name in lines.plugins or ():
        found.setdefault(("plugins", name), "--plugins")
    _add_targets(found, tree, selection, lines)
    for flag in lines.flags():
        alone = OmegaConf.create({section: {} for section in SECTIONS})
        apply_flag(alone, flag, selection, lines)
        found.update(dict.fromkeys(_leaves(_plain(alone), ()), f"--{flag.name}"))
        used = [flag.name] if selection.is_plugin(flag.name) else list(alone.plugins)
        for name in used:
            found.setdefault(("plugins", name), f"--{flag.name}")

    complete: dict[Place, str] = {}
    for place in _leaves(_plain(config.tree), ()):
        section, *inside = place
        of_plugin = section == "plugins" and len(inside) > 1
        default = f"{DEFAULT} of {inside[0]}" if of_plugin else DEFAULT
        complete[place] = found.get(place, default)
    for name in config.tree.plugins:
        complete[("plugins", name)] = found[("plugins", name)]
    return complete


def _add_targets(
    found: dict[Place, str], tree: DictConfig, selection: Selection, lines: Arguments
) -> None:
    """The options that plugins make of targets in the model section, which are taken out of it."""
    targets = {name.rpartition(".")[2] for name in _targets(_plain(tree.model))}
    adopt(tree, selection, {key for key, _ in lines.overrides})
    origin = f"target {', '.join(sorted(targets))}"
    for place in _leaves(_plain(tree.plugins), ("plugins",)):
        found.setdefault(place, origin)
        found.setdefault(place[:2], origin)


# ---- YAML


def commented_yaml(config: RunConfig, known: Mapping[Place, str]) -> str:
    """The config as YAML that loads as it is, each value with its origin in a comment.

    known: what `origins` gave for it.
    """
    rows = list(_rows(_plain(config.tree), (), "", known))
    # Beyond this a few long values would push all comments off the screen.
    column = min(64, max(len(text) for text, _ in rows))
    return "".join(
        f"{text.ljust(column)}  # {origin}\n" if origin else f"{text}\n" for text, origin in rows
    )


def _rows(
    node: Mapping[Any, Any], place: Place, indent: str, known: Mapping[Place, str]
) -> Iterator[tuple[str, str]]:
    """(line, origin) for each line of a mapping; a line without a value has no origin."""
    for key, value in node.items():
        inside = (*place, str(key))
        head = f"{indent}{_scalar(key)}:"
        if isinstance(value, Mapping) and value:
            yield head, known.get(inside, "")
            yield from _rows(value, inside, indent + "  ", known)
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            yield head, ""
            yield from _items(value, inside, indent + "  ", known)
        else:
            yield f"{head} {_scalar(value)}", _joined(value, inside, known)


def _items(
    values: list[Any], place: Place, indent: str, known: Mapping[Place, str]
) -> Iterator[tuple[str, str]]:
    for index, value in enumerate(values):
        inside = (*place, str(index))
        if isinstance(value, Mapping) and value:
            rows = _rows(value, inside, indent + "  ", known)
            first, origin = next(rows)
            yield f"{indent}- {first[len(indent) + 2 :]}", origin
            yield from rows
        else:
            yield f"{indent}- {_scalar(value)}", _joined(value, inside, known)


def _joined(value: Any, place: Place, known: Mapping[Place, str]) -> str:
    return ", ".join(dict.fromkeys(known[leaf] for leaf in _leaves(value, place)))


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


# ---- places


def _leaves(value: Any, place: Place) -> Iterator[Place]:
    """The places of all values that hold no others; an empty mapping or list is one."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*place, str(key)))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*place, str(index)))
    else:
        yield place


def _place(key: str) -> Place:
    """`data.transforms[0].size` -> ("data", "transforms", "0", "size")."""
    return tuple(re.findall(r"[^.\[\]]+", key))


def _plain(tree: Any) -> Any:
    return OmegaConf.to_container(tree, resolve=False) if OmegaConf.is_config(tree) else tree


def _named(plugins: Any) -> dict[str, Any]:
    """The file's `plugins` under the names that are compared."""
    plain: Mapping[Any, Any] = _plain(plugins) or {}
    return {normalize(str(name)): options or {} for name, options in plain.items()}


def _targets(node: Any) -> Iterator[str]:
    """The targets below a node that the host itself does not serve."""
    if isinstance(node, Mapping):
        if "target" in node and not is_known(str(node["target"])):
            yield str(node["target"])
        for inner in node.values():
            yield from _targets(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _targets(inner)
