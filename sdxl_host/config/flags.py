"""The command line of `train`, word by word: flags, their values, and dotted overrides.

What a flag means depends on the plugins that run, so it is read in two steps: `Arguments` takes
apart what stands there, and `apply_flag` gives each flag to whom it belongs.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdxl_host.errors import ConfigError
from sdxl_host.plugins.discovery import normalize
from sdxl_host.plugins.selection import Selection
from sdxl_host.settings.options import first_line, type_name, union_members
from sdxl_host.settings.schema import FLAG_HOMES, NOT_YET, SCHEMAS, TrainSettings

__all__ = [
    "SECTIONS",
    "Arguments",
    "Flag",
    "apply_flag",
    "convert",
    "read_value",
    "refuse_empty",
    "set_key",
]

SECTIONS = ("model", "optim", "data", "train", "plugins")
_TRUTH = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
_OVERRIDE = re.compile(r"(?P<top>[A-Za-z_]\w*)[.\[][^=]*=")  # section.key=value
_PLUGIN_KEY = re.compile(r"plugins(?:\.(?P<dotted>[^.\[]+)|\[(?P<bracketed>[^\]]+)\])(?P<rest>.*)")
# A union takes a text for the first of its members that can be made of it; any word is a str.
_ORDER = (types.NoneType, bool, int, float, Literal, list, tuple, dict)

# Paths that are not given empty: an unset variable would train something else without a word.
_PATHS = {
    "train.weight": "weights",
    "train.resume": "a checkpoint folder, or `latest`",
    "train.optimizer_weight": "the optimizer's state",
    "train.save_path": "a folder",
    FLAG_HOMES["data_path"]: "a folder of images",
}


@dataclass(frozen=True)
class Flag:
    """One flag as it was written: where it goes, and its value or None where it stood bare."""

    name: str
    value: str | None


class Arguments:
    """The command line, read word by word; what a flag means is decided by `apply_flag`.

    config: the file that --config names, or "". plugins: the names --plugins gives, or None.
    overrides: (key, text) in order; a plugin's name in a key is normalized.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._place = 0
        self.overrides: list[tuple[str, str]] = []
        config = self._take("config", "a YAML file")
        if config == "":
            raise ConfigError("--config: needs a value (a YAML file)")
        self.config = config or ""
        chosen = self._take("plugins", "names with commas between, or none")
        self.plugins = None if chosen is None else _plugin_list(chosen)
        # Overrides are merged before flags, so they are taken out first, wherever they stand: a
        # bare switch may come right before one. What a flag takes as its value is no such key.
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
        self._place = 0
        seen: set[str] = set()
        while self._place < len(self._words):
            word = self._words[self._place]
            self._place += 1
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
        """The flag's value, converted to the type `hint`; the next word where it stood bare."""
        text = flag.value
        following = self._words[self._place] if self._place < len(self._words) else None
        if text is None:
            if following is None or following.startswith("--"):
                if bool in union_members(hint):  # a bare switch
                    return True
                raise ConfigError(f"--{flag.name}: needs a value ({type_name(hint)})")
            text = following
            self._place += 1
        return convert(text, hint, f"--{flag.name}")


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


# ---- values


def convert(text: str, hint: Any, where: str) -> Any:
    """`text` as a value of the type `hint`. Raises ConfigError."""
    try:
        return _first_that_fits(text, hint)
    except ValueError:
        kinds = [get_origin(member) or member for member in union_members(hint)]
        remedy = "; a list is written [a, b]" if list in kinds or tuple in kinds else ""
        remedy = "; a mapping is written {a: 1}" if dict in kinds else remedy
        remedy = "; give True or False" if kinds == [bool] else remedy
        raise ConfigError(
            f"{where} {text}: does not fit its type, {type_name(hint)}{remedy}"
        ) from None


def _first_that_fits(text: str, hint: Any) -> Any:
    for member in sorted(union_members(hint), key=_precedence):
        try:
            return _made(text, member)
        except ValueError:
            continue
    raise ValueError(text)


def _precedence(hint: Any) -> int:
    kind = get_origin(hint) or hint
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _made(text: str, hint: Any) -> Any:
    """`text` as a value of `hint`, which is no union. Raises ValueError where it is none."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return _one_of(text, {str(value): value for value in arguments})
    if kind is types.NoneType:
        return _one_of(text, {"None": None, "null": None})
    if kind is bool:
        return _one_of(text.lower(), _TRUTH)
    if kind in (int, float):
        return kind(text)
    if kind in (list, tuple):
        # Only brackets make a list: a prompt may hold commas and colons of its own.
        if text.startswith("["):
            return _read_as(list, text)
        return [_first_that_fits(text, arguments[0]) if arguments else text]
    if kind is dict:
        return _read_as(dict, text)
    return text


def _one_of(text: str, values: dict[str, Any]) -> Any:
    if text not in values:
        raise ValueError(text)
    return values[text]


def _read_as(kind: type, text: str) -> Any:
    try:
        value = read_value(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(text) from error
    if not isinstance(value, kind):
        raise ValueError(text)
    return value


def read_value(text: str) -> Any:
    """`text` as OmegaConf reads a value: to it 1e-5 is a number, to plain YAML it is a string."""
    tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    assert isinstance(tree, dict)
    return tree["value"]


def refuse_empty(key: str, text: str, said: str) -> None:
    """Raises ConfigError, beginning with `said`, for a path of the command line that is empty."""
    if key in _PATHS and not text.strip():
        raise ConfigError(
            f"{said}: is empty, as an unset variable is; give {_PATHS[key]}, or leave it out"
        )


def set_key(tree: DictConfig, key: str, value: Any, said: str) -> None:
    """Sets a dotted key, making what lies on the way. Raises ConfigError, beginning with `said`."""
    try:
        OmegaConf.update(tree, key, value, force_add=True)
    except (
        OmegaConfBaseException,
        AttributeError,
        AssertionError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(f"{said}: can't be set: {first_line(error)}") from error


# ---- whose flag


def apply_flag(tree: DictConfig, flag: Flag, selection: Selection, lines: Arguments) -> None:
    """Gives a flag to whom it belongs: the host, a selected plugin, or the one it selects."""
    hints = get_type_hints(TrainSettings)
    if flag.name in FLAG_HOMES:
        section, _, rest = FLAG_HOMES[flag.name].partition(".")
        hint = get_type_hints(SCHEMAS[section]).get(rest, str)
        _set_flag(tree, FLAG_HOMES[flag.name], flag, hint, lines)
    elif flag.name in hints:
        _set_flag(tree, f"train.{flag.name}", flag, hints[flag.name], lines)
    elif flag.name in NOT_YET:
        _refuse_unless_off(flag, lines)
    elif selection.is_plugin(flag.name):
        selection.switch(flag.name, lines.take_value(flag, bool))
    else:
        owner, field, hint = selection.owner_of(flag.name)
        selection.use(owner, f"--{flag.name}")
        _set_flag(tree, f"plugins.{owner}.{field}", flag, hint, lines)


def _set_flag(tree: DictConfig, key: str, flag: Flag, hint: Any, lines: Arguments) -> None:
    value = lines.take_value(flag, hint)
    refuse_empty(key, str(value), f"--{flag.name}")
    set_key(tree, key, value, f"--{flag.name} {value}")


def _refuse_unless_off(flag: Flag, lines: Arguments) -> None:
    allowed, what = NOT_YET[flag.name]
    hint = bool if set(allowed) & {"True", "False"} else str
    value = str(lines.take_value(flag, hint))
    if value not in allowed:
        only = f"; it can only be {' or '.join(allowed)}" if allowed else "; leave it out"
        raise ConfigError(f"--{flag.name} {value}: {what} is not part of this version{only}")
