"""The flags of a command: declared as a dataclass of options, read and shown as train's are.

`--flag VALUE`, `--flag=VALUE`; a flag that is true or false may stand alone; a hyphen within a name
reads as an underscore. A flag whose type is a list may be given several times, once an item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from sdxl_host.commands.printer import definitions, paragraph
from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.settings.options import check_range, describe
from sdxl_host.settings.values import parse, refuse_empty_path, type_name, union_members

__all__ = ["Command", "flag_row", "flag_rows", "wants_help"]


@dataclass(frozen=True)
class Command:
    """What a command understands.

    name: as it is typed. about: what it does, for its help. flags: a dataclass of `option`s.
    arguments: the words it needs beside flags, in order, each with its help. rest: what the help
    calls other words, where the command understands more than these flags. notes: the last lines
    of its help.
    """

    name: str
    about: str
    flags: type
    arguments: Mapping[str, str] = field(default_factory=dict)
    rest: str = ""
    notes: str = ""

    def run(self, words: Sequence[str], function: Callable[..., int]) -> int:
        """Shows the help, or calls `function` with the flags and what stands beside them.

        function: is given an instance of `flags`, then each of `arguments` as a str; or, where the
        command has a `rest`, the list of the other words. Raises ConfigError for a flag that is
        unknown, given twice, without a value or with one that does not fit; and for a missing or
        superfluous argument.
        """
        if wants_help(words):
            print(self.help())
            return 0
        given, others = self._read(list(words))
        if self.rest:
            return function(given, others)
        return function(given, *self._arguments(others))

    def help(self) -> str:
        """How to call the command, and what each of its flags is."""
        more = [f"[{self.rest}]"] if self.rest else list(self.arguments)
        usage = ["usage: sdxl-host", self.name, *more, "[--flag VALUE ...]"]
        lines = [" ".join(usage), "", paragraph(self.about)]
        rows = definitions([*self.arguments.items(), *flag_rows(self.flags)])
        lines += ["", *rows] if rows else []
        return "\n".join([*lines, *(["", paragraph(self.notes)] if self.notes else [])])

    def _read(self, words: list[str]) -> tuple[Any, list[str]]:
        """The flags, and the words that are none of them."""
        known = {each.name: each for each in fields(self.flags)}
        hints = get_type_hints(self.flags)
        given: dict[str, Any] = {}
        others = []
        while words:
            word = words.pop(0)
            name, equals, text = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if not word.startswith("--") or (self.rest and name not in known):
                others.append(word)
                continue
            if name not in known:
                raise ConfigError(
                    f"--{name}: there is no such flag{did_you_mean(name, known)}; {self._see_help}"
                )
            value = _value(name, text if equals else None, hints[name], words)
            if get_origin(hints[name]) is list:
                value = [*given.get(name, []), value]
            elif name in given:
                raise ConfigError(f"--{name}: given twice; give it once")
            check_range(f"--{name}", value, known[name])
            given[name] = value
        return self.flags(**given), others

    def _arguments(self, words: Sequence[str]) -> Sequence[str]:
        missing = list(self.arguments)[len(words) :]
        if missing:
            raise ConfigError(f"{missing[0]}: is missing; {self._see_help}")
        for word in words[len(self.arguments) :]:
            raise ConfigError(f"{word}: not understood; {self._see_help}")
        return words

    @property
    def _see_help(self) -> str:
        return f"sdxl-host {self.name} --help shows how to call it"


def wants_help(words: Sequence[str]) -> bool:
    """Whether the words of a command ask for its help."""
    return not {"-h", "--help"}.isdisjoint(words)


def flag_row(name: str, kind: str, help: str, default: Any) -> tuple[str, str]:
    """A flag and the type of its value; its help, with its default in brackets if it has one."""
    shown = "" if default in (None, "", []) else f" [{default}]"
    return f"--{name} {_kind(kind)}", f"{help}{shown}"


def flag_rows(schema: type) -> list[tuple[str, str]]:
    """The `flag_row` of each field of a dataclass of options."""
    return [
        flag_row(row["name"], row["type"], row["help"], row.get("default"))
        for row in describe(schema)
    ]


def _kind(type_name: str) -> str:
    """What a flag's value is, without the None that stands for a flag left out."""
    return type_name.removesuffix(" | None")


def _value(name: str, text: str | None, hint: Any, words: list[str]) -> Any:
    """The value of one flag, taken from `words` where it does not stand behind a `=`."""
    kinds = get_args(hint) if get_origin(hint) is list else union_members(hint)
    follows = text is None and bool(words) and not words[0].startswith("--")
    # A switch takes the next word only where that is true or false: it may be an argument.
    if bool in kinds and text is None and not (follows and _is_truth(words[0])):
        return True
    if text is None and not follows:
        raise ConfigError(f"--{name}: needs a value ({_kind(type_name(hint))})")
    text = words.pop(0) if text is None else text
    if Path in kinds:
        refuse_empty_path(f"--{name}", text)
        return Path(text).expanduser()
    return text if str in kinds else parse(text, hint, f"--{name}")


def _is_truth(word: str) -> bool:
    try:
        parse(word, bool, word)
    except ConfigError:
        return False
    return True
