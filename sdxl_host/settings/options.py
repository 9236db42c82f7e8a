"""Options as dataclass fields: declared once, they give config keys, flags, help and checks."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from sdxl_host.errors import ConfigError, did_you_mean

__all__ = [
    "build_options",
    "describe",
    "first_line",
    "fits",
    "option",
    "type_name",
    "union_members",
]

# A number or a truth value, which someone has put in quotes.
_LOOKS_PLAIN = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false|yes|no|on|off", re.IGNORECASE)


def option(
    default: Any,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its help text and range.

    Args:
        default: its value when neither config nor flag sets it; lists are copied for each use.
        help: one line, shown by `--help` and `sdxl-host plugins --check`.
        minimum, maximum: inclusive bounds. above: an exclusive lower bound.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above}
    metadata = {"help": help, **{key: limit for key, limit in limits.items() if limit is not None}}
    if isinstance(default, list | dict):
        copied = type(default)
        return dataclasses.field(default_factory=lambda: copied(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def describe(options: type) -> list[dict[str, Any]]:
    """One dict a field of the dataclass `options`: name, type, default, help and its bounds."""
    hints = typing.get_type_hints(options)
    rows = []
    for field in dataclasses.fields(options):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        row = {"name": field.name, "type": type_name(hints[field.name])}
        if default is not dataclasses.MISSING:
            row["default"] = default
        rows.append({**row, "help": field.metadata.get("help", ""), **_bounds(field)})
    return rows


def build_options(options: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of the dataclass `options` from `values`, checked.

    `where` is the config section ("plugins.snr") and begins every message. Raises ConfigError
    for an unknown key, a value of the wrong type, not finite or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    fields = {field.name: field for field in dataclasses.fields(options)}
    hints = typing.get_type_hints(options)
    for key in values:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise ConfigError(
                f"{where}.{key}: there is no such option{did_you_mean(str(key), fields)} "
                f"(options of {where}: {known})"
            )
    section = OmegaConf.structured(options)
    for key, value in values.items():
        wrong = f"{where}.{key}: {value!r} does not fit its type, {type_name(hints[key])}"
        # OmegaConf would turn 1 into True, 5 into "5" and "1.5" into 1.5; here only the type itself
        # will do.
        if not fits(value, hints[key]):
            raise ConfigError(wrong + _remedy(value, hints[key]))
        try:
            section[key] = _with_floats(hints[key], value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{wrong} ({first_line(error)})") from error
    try:
        built = OmegaConf.to_object(section)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error
    except (TypeError, ValueError) as error:  # raised by the dataclass's own __post_init__
        raise ConfigError(f"{where}: {error}") from error
    for name, field in fields.items():
        _check_range(f"{where}.{name}", getattr(built, name), field)
    return built


def type_name(hint: Any) -> str:
    """A type hint as a user would say it: `int`, `float | None`, `one of a, b`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if arguments and typing.get_origin(hint) not in (list, dict, tuple):
        return " | ".join(type_name(part) for part in arguments)
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint)) if not arguments else str(hint)


def union_members(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have: those of a union, else the one there is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from a YAML file may stand where `hint` is declared, as it is.

    A whole number fits a float. Of types that are not listed here, anything fits.
    """
    members = union_members(hint)
    if len(members) > 1:
        return any(fits(value, member) for member in members)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:  # 1 == True, but neither stands for the other
        return any(value == one and type(value) is type(one) for one in arguments)
    if hint is type(None):
        return value is None
    if hint is float:
        is_whole = type(value) is int and abs(value) <= sys.float_info.max
        return isinstance(value, float) or is_whole
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin in (list, tuple, collections.abc.Sequence):
        return isinstance(value, list | tuple) and _items_fit(value, origin, arguments)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, Mapping) and all(fits(v, arguments[1]) for v in value.values())
    return True


def _items_fit(values: Any, origin: Any, hints: tuple[Any, ...]) -> bool:
    if origin is tuple and hints[-1] is not Ellipsis:
        pairs = zip(values, hints, strict=False)
        return len(values) == len(hints) and all(fits(value, hint) for value, hint in pairs)
    return all(fits(value, hints[0]) for value in values)


def _remedy(value: Any, hint: Any) -> str:
    if str in union_members(hint) and isinstance(value, bool | int | float):
        return f'; put it in quotes, "{value}"'
    if isinstance(value, str) and _LOOKS_PLAIN.fullmatch(value):
        return "; remove the quotes"
    return ""


def _with_floats(hint: Any, value: Any) -> Any:
    """The value with whole numbers made floats where floats are meant: 2 for 2.0."""
    members = union_members(hint)
    if type(value) is int and float in members and int not in members:
        return float(value)
    for member in members:
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if isinstance(value, list) and origin is list:
            return [_with_floats(arguments[0], item) for item in value]
        if isinstance(value, dict) and origin is dict:
            return {key: _with_floats(arguments[1], item) for key, item in value.items()}
    return value


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that libraries add below; its kind if it is mute."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _bounds(field: dataclasses.Field[Any]) -> dict[str, float]:
    return {
        key: field.metadata[key] for key in ("minimum", "maximum", "above") if key in field.metadata
    }


def _check_range(where: str, value: Any, field: dataclasses.Field[Any]) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_range(f"{where}[{index}]", item, field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is not a finite number")
    bounds = _bounds(field)
    if "minimum" in bounds and value < bounds["minimum"]:
        raise ConfigError(
            f"{where}: {value} is out of range; it must be at least {bounds['minimum']}"
        )
    if "maximum" in bounds and value > bounds["maximum"]:
        raise ConfigError(
            f"{where}: {value} is out of range; it must be at most {bounds['maximum']}"
        )
    if "above" in bounds and value <= bounds["above"]:
        raise ConfigError(f"{where}: {value} is out of range; it must be above {bounds['above']}")
