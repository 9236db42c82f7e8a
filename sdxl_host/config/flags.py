"""The command line of `train`, word by word: flags, their values, and dotted overrides.

What a flag means depends on the plugins that run, so it is read in two steps: `Arguments` takes
the line apart, and `apply_flag` gives each flag to whom it belongs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_host.config.layers import OVERRIDE, Layers
from sdxl_host.config.mindone import OLD_FLAGS
from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.plugins.discovery import normalize
from sdxl_host.plugins.selection_and_order import Selection
from sdxl_host.settings.declarations import FLAGS, SETTINGS
from sdxl_host.settings.facts import Setting
from sdxl_host.settings.options import first_line
from sdxl_host.settings.values import (
    parse,
    parse_yaml,
    refuse_empty_path,
    type_name,
    union_members,
)

__all__ = ["SECTIONS", "Arguments", "Flag", "apply_flag", "apply_override"]

SECTIONS = ("model", "optim", "data", "train", "plugins")
_OVERRIDE = re.compile(r"(?P<top>[A-Za-z_]\w*)[.\[][^=]*=")  # section.key=value
_PLUGIN_KEY = re.compile(r"plugins(?:\.(?P<dotted>[^.\[]+)|\[(?P<bracketed>[^\]]+)\])(?P<rest>.*)")


@dataclass(frozen=True)
class Flag:
    """One flag as it was written: its name, and its value or None where it stood alone."""

    name: str
    value: str | None


class Arguments:
    """The command line, read word by word; what a flag means is decided by `apply_flag`.

    config: the file that --config names, or "". plugins: the names --plugins gives, or None.
    overrides: (key, text) in order; a plugin's name in a key is normalized.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._next = 0
        self.overrides: list[tuple[str, str]] = []
        config = self._take("config", "a YAML file")
        if config == "":
            raise ConfigError("--config: needs a value (a YAML file)")
        self.config = config or ""
        chosen = self._take("plugins", "names with commas between, or none")
        self.plugins = None if chosen is None else _plugin_list(chosen)
        # Overrides are merged before flags, so they are taken out first, wherever they stand: a
        # switch without a value may come right before one. A word in the place of a flag's value is
        # an override only if it begins with a section.
        kept = []
        for index, word in enumerate(self._words):
            before = self._words[index - 1] if index else ""
            may_be_value = before.startswith("--") and "=" not in before
            match = _OVERRIDE.match(word)
            if match and (match.group("top") in SECTIONS or not may_be_value):
                key, _, text = word.partition("=")
                self.overrides.append((_normalized_key(key), text))
            else:
                kept.append(word)
        self._words = kept

    def _take(self, name: str, what: str) -> str | None:
        """Removes `--name VALUE` or `--name=VALUE` and gives the value; `what` it should be."""
        found: str | None = None
        index = 0
        while index < len(self._words):
            word = self._words[index]
            if word != f"--{name}" and not word.startswith(f"--{name}="):
                index += 1
                continue
            if found is not None:
                raise ConfigError(f"--{name}: given twice; give it once")
            del self._words[index]
            if "=" in word:
                found = word.partition("=")[2]
            elif index < len(self._words) and not self._words[index].startswith("--"):
                found = self._words.pop(index)
            else:
                raise ConfigError(f"--{name}: needs a value ({what})")
        return found

    def flags(self) -> Iterator[Flag]:
        """The flags in order; `take_value` moves on past the value that one turns out to have."""
        self._next = 0
        seen: set[str] = set()
        while self._next < len(self._words):
            word = self._words[self._next]
            self._next += 1
            if not word.startswith("--"):
                raise ConfigError(
                    f"{word}: not understood; settings are --flag VALUE or section.key=value"
                )
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in seen:
                raise ConfigError(f"--{name}: given twice; give it once")
            seen.add(name)
            yield Flag(name, value if equals else None)

    def take_value(self, flag: Flag, hint: Any) -> Any:
        """The flag's value, converted to the type `hint`; the next word where it stood alone."""
        text = flag.value
        following = self._words[self._next] if self._next < len(self._words) else None
        if text is None:
            is_switch = bool in union_members(hint)
            # An override behind a switch is not its value.
            if following is None or following.startswith("--") or (is_switch and "=" in following):
                if is_switch:  # alone
                    return True
                raise ConfigError(f"--{flag.name}: needs a value ({type_name(hint)})")
            text = following
            self._next += 1
        return parse(text, hint, f"--{flag.name}")


def _plugin_list(text: str) -> list[str]:
    names = [normalize(name) for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return []
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--plugins {text}: {name} is given twice; name each plugin once")
    if not names or "none" in names:
        raise ConfigError(f"--plugins {text!r}: give plugin names with commas between, or none")
    return names


def _normalized_key(key: str) -> str:
    """The key of an override with a plugin's name as it is compared: plugins.a-b.c, plugins.a_b.c
    and plugins[a_b].c are one."""
    match = _PLUGIN_KEY.fullmatch(key)
    if not match:
        return key
    return f"plugins.{normalize(match['dotted'] or match['bracketed'])}{match['rest']}"


# ---- whose key, whose flag


def apply_override(layers: Layers, key: str, text: str) -> None:
    """Sets `section.key=text`. Raises ConfigError where the section or the text is none."""
    top = re.split(r"[.\[]", key, maxsplit=1)[0]
    if top not in SECTIONS:
        raise ConfigError(
            f"{key}: there is no such section{did_you_mean(top, SECTIONS)} "
            f"(sections: {', '.join(SECTIONS)})"
        )
    _refuse_empty(SETTINGS.get(key), text, key)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text}: can't be set: {first_line(error)}") from error
    if layers.tree.get(top) is None:
        layers.tree[top] = {}
    layers.set(key, value, OVERRIDE, f"{key}={text}")


def apply_flag(layers: Layers, flag: Flag, selection: Selection, line: Arguments) -> None:
    """Gives a flag to whom it belongs: the host, a selected plugin, or the one it selects."""
    name = f"--{flag.name}"
    setting = FLAGS.get(flag.name)
    if setting is not None:
        value = line.take_value(flag, setting.type)
        _refuse_empty(setting, str(value), name)
        layers.set(setting.key, value, name, f"{name} {value}")
    elif selection.is_plugin(flag.name):
        selection.switch(flag.name, line.take_value(flag, bool))
        layers.select(flag.name, name)
    else:
        owner = selection.owner_of(flag.name)
        if owner is None:
            raise _unknown(flag.name, selection)
        plugin, option, hint = owner
        selection.use(plugin, name)
        value = line.take_value(flag, hint)
        layers.set(f"plugins.{plugin}.{option}", value, name, f"{name} {value}")


def _refuse_empty(setting: Setting | None, text: str, subject: str) -> None:
    """An unset variable gives an empty path, with which something else would be trained."""
    if setting is not None and setting.path:
        refuse_empty_path(subject, text, setting.path)


def _unknown(flag: str, selection: Selection) -> ConfigError:
    if flag in OLD_FLAGS:
        return ConfigError(f"--{flag}: was a flag of the old trainer; {OLD_FLAGS[flag]}")
    known = [*FLAGS, "plugins", "config", *selection.flags_like(flag)]
    return ConfigError(
        f"--{flag}: there is no such flag{did_you_mean(flag, known)}; "
        "sdxl-host train --help lists them"
    )
