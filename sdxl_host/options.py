"""Options as dataclass fields: declared once, they give config keys, flags, help and checks."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from sdxl_host.errors import ConfigError, did_you_mean

__all__ = ["build_options", "describe", "option"]

# What OmegaConf can hold in a typed field and a flag can spell.
_SIMPLE = (bool, int, float, str)


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
    for key, value in values.items():
        _refuse_quiet_conversions(f"{where}.{key}", hints[key], value)
    section = OmegaConf.structured(options)
    for key, value in values.items():
        try:
            section[key] = float(value) if _takes_float(hints[key], value) else value
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{where}.{key}: {value!r} does not fit its type, {type_name(hints[key])} "
                f"({reason})"
            ) from error
    try:
        built = OmegaConf.to_object(section)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
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


def _refuse_quiet_conversions(where: str, hint: Any, value: Any) -> None:
    """OmegaConf turns 1 into True and True into "True"; here only the type itself will do."""
    allowed = set(typing.get_args(hint) or (hint,))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    wrong = (
        (isinstance(value, bool) and not allowed & {bool, Any} and allowed & set(_SIMPLE))
        or (is_number and allowed <= {bool, type(None)})
        or (isinstance(value, float) and int in allowed and float not in allowed)
    )
    if wrong:
        raise ConfigError(f"{where}: {value!r} does not fit its type, {type_name(hint)}")


def _takes_float(hint: Any, value: Any) -> bool:
    """Whether a whole number stands where a float is meant: 2 for 2.0."""
    allowed = set(typing.get_args(hint) or (hint,))
    return type(value) is int and float in allowed and int not in allowed


def _bounds(field: dataclasses.Field[Any]) -> dict[str, float]:
    return {
        key: field.metadata[key] for key in ("minimum", "maximum", "above") if key in field.metadata
    }


def _check_range(where: str, value: Any, field: dataclasses.Field[Any]) -> None:
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
