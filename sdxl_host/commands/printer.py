"""How commands print: labels, tables and help are aligned here and nowhere else.

The modules below give facts: a sentence (a str), a row (label, text), where an empty label goes on
with the row above, or numbers in a dataclass of `sdxl_host.planning.curves`.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_host.planning.curves import Quarters, Tenth

__all__ = ["columns", "definitions", "details", "lines_of", "paragraph", "show", "tenth_lines"]

_LABEL = 12  # columns of a label, and of the empty space before a line that goes on
_INDENT = 2  # of a detail's label, which is as much narrower
_WIDTH = 100  # of a line of help
_HELP = 32  # where the help of a flag begins
_BAR = 24  # characters of the longest bar


def show(*facts: Any) -> None:
    """Prints facts, each at once, because what follows one may take long."""
    for line in (line for fact in facts for line in lines_of(fact)):
        try:
            print(line, flush=True)
        except BrokenPipeError:
            # The reader has gone, as `tee` does at Ctrl-C; a run still has a checkpoint to save.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def lines_of(fact: Any) -> list[str]:
    """The lines that a fact is printed as: a sentence, a (label, text) row, or `Quarters`."""
    if isinstance(fact, str):
        return [fact]
    if isinstance(fact, tuple):
        label, text = fact
        return [f"{label:<{_LABEL - 1}} {text}".rstrip()]
    return _quarter_lines(fact)


def details(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Rows that belong to the one above: their labels are indented, their texts are not."""
    return [line for label, text in rows for line in lines_of((" " * _INDENT + label, text))]


def columns(rows: Sequence[Sequence[str]], alignment: str, indent: int = 0) -> list[str]:
    """The lines of a table. alignment: `<`, `>` or `^` for each column; one more column, the last,
    is not padded. indent: the empty columns before each line."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(alignment))]
    lines = []
    for row in rows:
        padded = (f"{c:{side}{w}}" for c, side, w in zip(row, alignment, widths, strict=False))
        lines.append(" " * indent + "  ".join([*padded, *row[len(widths) :]]).rstrip())
    return lines


def paragraph(text: str) -> str:
    """The text of a help, wrapped."""
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def definitions(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Terms with their explanations beside them, wrapped; below a term that is too long."""
    found = []
    for term, text in rows:
        wrapped = textwrap.wrap(text, _WIDTH - _HELP, break_on_hyphens=False)
        first = f"  {term}"
        if len(first) > _HELP - 2:
            found.append(first)
            first = ""
        for line in wrapped:
            found.append(f"{first:<{_HELP}}{line}")
            first = ""
    return found


# ---- curves


def _quarter_lines(quarters: Quarters) -> list[str]:
    """What a run learns in each quarter, without plugins and, where they differ, with them."""
    title = "quarters of the timesteps, clean to noisy"
    if quarters.is_changed:
        title += "; without plugins -> with them"
    rows = [
        ("draws p", [_percent(parts) for parts in quarters.draws]),
        ("p*w", [_percent(parts) for parts in quarters.shares]),
        ("mean w", [f"{mean:.3f}" for mean in quarters.mean_weights]),
    ]
    sides = 2 if quarters.is_changed else 1
    texts = ((label, "  ->  ".join(both[:sides])) for label, both in rows)
    return [*lines_of(("curves", title)), *details(texts)]


def tenth_lines(tenths: Sequence[Tenth]) -> list[str]:
    """The table of `tenths`, with bars of p * w: `#` with plugins, `|` without them."""
    # At least 1e-300, for a loss whose every weight is 0.
    longest = max(*(share for each in tenths for share in each.share), 1e-300)
    rows = [["timesteps", "sigma", "draws p, %", "weight w", "p*w, %", ""]]
    for each in tenths:
        before, after = (round(_BAR * share / longest) for share in each.share)
        bar = list("#" * after + " " * (before + 1 - after))
        bar[before] = "|"
        rows.append(
            [
                f"{each.first}-{each.last}",
                f"{each.sigma[0]:.3g}-{each.sigma[1]:.3g}",
                " -> ".join(f"{100 * draws:5.1f}" for draws in each.draws),
                " -> ".join(f"{_short(weight):>7}" for weight in each.weight),
                " -> ".join(f"{100 * share:5.1f}" for share in each.share),
                "".join(bar),
            ]
        )
    return columns(rows, "<<^^^")


def _percent(parts: Sequence[float]) -> str:
    return " ".join(f"{100 * part:5.1f}" for part in parts) + " %"


def _short(number: float) -> str:
    return f"{number:.3f}" if 0.001 <= number < 1000 or number == 0 else f"{number:.2g}"
