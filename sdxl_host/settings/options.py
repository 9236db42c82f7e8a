"""Options as dataclass fields: declared once, they give config keys, flags, help and checks."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.settings.values import coerce, type_name

__all__ = ["build_options", "check_range", "describe", "first_line", "make_field", "option"]


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
    return make_field(default, {"help": help, **limits})


def make_field(default: Any, facts: Mapping[str, Any]) -> Any:
    """A dataclass field with what is declared of it in its metadata; None is nothing declared."""
    metadata = {name: fact for name, fact in facts.items() if fact is not None}
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
    # Plugins import this module for `option`, and shall not wait for OmegaConf.
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
        # OmegaConf alone would turn 1 into True, 5 into "5" and "1.5" into 1.5.
        fitting = coerce(value, hints[key], f"{where}.{key}")
        try:
            section[key] = fitting
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{where}.{key}: {value!r} does not fit its type, {type_name(hints[key])} "
                f"({first_line(error)})"
            ) from error
    try:
        built = OmegaConf.to_object(section)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error
    except (TypeError, ValueError) as error:  # raised by the dataclass's own __post_init__
        raise ConfigError(f"{where}: {error}") from error
    for name, field in fields.items():
        check_range(f"{where}.{name}", getattr(built, name), field)
    return built


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that libraries add below; its kind if it is mute."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _bounds(field: dataclasses.Field[Any]) -> dict[str, float]:
    return {
        key: field.metadata[key] for key in ("minimum", "maximum", "above") if key in field.metadata
    }


def check_range(where: str, value: Any, field: dataclasses.Field[Any]) -> None:
    """Raises ConfigError for a number, or one in a list, that its field's bounds leave out."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_range(f"{where}[{index}]", item, field)
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
