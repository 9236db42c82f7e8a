"""Compares tensors with the expected ones; one error names all that do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sdxl_host.errors import DataError

if TYPE_CHECKING:
    from sdxl_host.weights.source import Source

__all__ = ["compare", "compare_shapes"]

Shapes = Mapping[str, tuple[int, ...]]

_REMEDY = "use weights of the model that the config describes"


def compare(expected: Shapes, source: Source, remedy: str = _REMEDY) -> None:
    """Raises DataError unless the source holds exactly the expected tensors."""
    compare_shapes(expected, source.shapes, source.description, remedy)


def compare_shapes(expected: Shapes, found: Shapes, source: str, remedy: str = _REMEDY) -> None:
    """Raises DataError unless both have the same names and shapes.

    One error names every tensor that is missing, unexpected or misshapen; a part that is missing
    or unexpected as a whole is named once, with the number of its tensors.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {tuple(found[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        f"{problem} {', '.join(names)}"
        for problem, names in (
            ("lacks", _summary(missing, [name for name in expected if name in found])),
            ("holds weights that the model does not have:", _summary(unknown, expected)),
            ("holds weights of another shape:", misshapen),
        )
        if names
    ]
    if problems:
        raise DataError(f"{source}: {'; '.join(problems)}; {remedy}")


def _summary(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The names, but `all 517 of conditioner.embedders.1.` for a part that has none of `others`.

    A part is all names that begin with the same words up to a dot; the largest parts are named.
    """
    shared = {prefix for name in others for prefix in _prefixes(name)}
    parts: dict[str, list[str]] = {}
    for name in names:
        part = next((p for p in _prefixes(name) if p not in shared), name)
        parts.setdefault(part, []).append(name)
    return [
        f"all {len(inside):,} of {part}" if len(inside) > 1 else inside[0]
        for part, inside in parts.items()
    ]


def _prefixes(name: str) -> list[str]:
    """`a.b.c` -> `a.`, `a.b.`: the parts that a tensor belongs to, the largest first."""
    words = name.split(".")
    return [".".join(words[:count]) + "." for count in range(1, len(words))]
