"""Values and their declared types: what a YAML file gives, and what a word of the command line is.

A YAML value is taken as it is: 1 is no truth value, "5" no number. A word of the command line is
read for the type that is declared, because a shell has taken its quotes off.
"""

from __future__ import annotations

import collections.abc
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from sdxl_host.errors import ConfigError

__all__ = [
    "coerce",
    "first_infinite",
    "parse",
    "parse_yaml",
    "refuse_empty_path",
    "type_name",
    "union_members",
]

_TRUTH = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
# A number or a truth value that someone has put in quotes.
_LOOKS_PLAIN = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false|yes|no|on|off", re.IGNORECASE)
# A word is read as the first of these that it can be; a str can be any word.
_READ_FIRST = (types.NoneType, bool, int, float, Literal, list, tuple, dict)


def coerce(value: Any, hint: Any, subject: str) -> Any:
    """A value of a YAML file where the type `hint` is declared; whole numbers fit a float.

    Raises ConfigError, beginning with `subject`, for a value of another type. Where the type is
    none that a config can hold, any value fits.
    """
    try:
        return _coerced(value, hint)
    except ValueError:
        raise ConfigError(
            f"{subject}: {value!r} does not fit its type, {type_name(hint)}{_remedy(value, hint)}"
        ) from None


def parse(text: str, hint: Any, subject: str) -> Any:
    """A word of the command line as a value of the type `hint`.

    Raises ConfigError, beginning with `subject` and the word, where it is none.
    """
    try:
        return _parsed(text, hint)
    except ValueError:
        kinds = [typing.get_origin(member) or member for member in union_members(hint)]
        remedy = "; a list is written [a, b]" if list in kinds or tuple in kinds else ""
        remedy = "; a mapping is written {a: 1}" if dict in kinds else remedy
        remedy = "; give True or False" if kinds == [bool] else remedy
        raise ConfigError(
            f"{subject} {text}: does not fit its type, {type_name(hint)}{remedy}"
        ) from None


def parse_yaml(text: str) -> Any:
    """A word of the command line as the YAML of a config file would have it. Raises ValueError."""
    # Plugins import this module by way of `option`, and shall not wait for OmegaConf.
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        # OmegaConf reads 1e-5 as a number; to plain YAML it is a string.
        tree = OmegaConf.from_dotlist([f"value={text}"])
        return OmegaConf.to_container(tree, resolve=False)["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error


def refuse_empty_path(subject: str, text: str, what: str = "a path") -> None:
    """Raises ConfigError for a path without a name, with which something else would be done.

    what: what should be given instead.
    """
    if not text.strip():
        raise ConfigError(
            f"{subject}: is empty, as an unset variable is; give {what}, or leave it out"
        )


def type_name(hint: Any) -> str:
    """A type hint as a user would call it: `int`, `float | None`, `one of a, b`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if arguments and typing.get_origin(hint) not in (list, dict, tuple):
        return " | ".join(type_name(part) for part in arguments)
    if hint is types.NoneType:
        return "None"
    return getattr(hint, "__name__", str(hint)) if not arguments else str(hint)


def union_members(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have: those of a union, else the one there is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def first_infinite(value: Any) -> float | None:
    """The first number in a value, or in a list of them, that is not finite."""
    if isinstance(value, list | tuple):
        return next((n for n in map(first_infinite, value) if n is not None), None)
    return value if isinstance(value, float) and not math.isfinite(value) else None


# ---- a YAML value


def _coerced(value: Any, hint: Any) -> Any:
    """The value as `hint` has it. Raises ValueError where it does not fit."""
    members = union_members(hint)
    if len(members) > 1:
        # A whole number stays one where both int and float may stand.
        for member in sorted(members, key=lambda member: member is float):
            try:
                return _coerced(value, member)
            except ValueError:
                continue
        raise ValueError(value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if origin in (list, tuple, collections.abc.Sequence):
        _require(isinstance(value, list | tuple), value)
        hints = arguments[:1] * len(value)
        if origin is tuple and arguments[-1] is not Ellipsis:
            hints = arguments
        return type(value)(_coerced(v, each) for v, each in zip(value, hints, strict=True))
    if origin in (dict, collections.abc.Mapping):
        _require(isinstance(value, Mapping), value)
        return {key: _coerced(inner, arguments[1]) for key, inner in value.items()}
    _require(_is_one(value, hint, origin, arguments), value)
    return value


def _is_one(value: Any, hint: Any, origin: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a value that holds no others is of the type; to Python, True is an int and 1."""
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, float, str, types.NoneType):
        return isinstance(value, hint)
    return True


def _require(is_so: bool, value: Any) -> None:
    if not is_so:
        raise ValueError(value)


def _remedy(value: Any, hint: Any) -> str:
    if str in union_members(hint) and isinstance(value, bool | int | float):
        return f'; put it in quotes, "{value}"'
    if isinstance(value, str) and _LOOKS_PLAIN.fullmatch(value):
        return "; remove the quotes"
    return ""


# ---- a word of the command line


def _parsed(text: str, hint: Any) -> Any:
    for member in sorted(union_members(hint), key=_precedence):
        try:
            return _parsed_as(text, member)
        except ValueError:
            continue
    raise ValueError(text)


def _precedence(hint: Any) -> int:
    kind = typing.get_origin(hint) or hint
    return _READ_FIRST.index(kind) if kind in _READ_FIRST else len(_READ_FIRST)


def _parsed_as(text: str, hint: Any) -> Any:
    """`text` as a value of `hint`, which is no union. Raises ValueError where it is none."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return _one_of(text, {str(value): value for value in arguments})
    if kind is types.NoneType:
        return _one_of(text, {"None": None, "null": None})
    if kind is bool:
        return _one_of(text.lower(), _TRUTH)
    if kind in (int, float):
        return kind(text)
    # Only brackets make a list: a prompt may hold commas and colons of its own.
    if kind in (list, tuple) and not text.startswith("["):
        return [_parsed(text, arguments[0]) if arguments else text]
    if kind in (list, tuple, dict):
        value = parse_yaml(text)
        _require(isinstance(value, dict if kind is dict else list), text)
        return value
    return text


def _one_of(text: str, values: Mapping[str, Any]) -> Any:
    _require(text in values, text)
    return values[text]
