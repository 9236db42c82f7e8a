r"""The syntax of prompt weights: which characters of a prompt weigh how much.

    (x)     1.1         ((x))   1.21        (x:1.3)  1.3        [x]   1 / 1.1
    \( \) \[ \] \\      the character itself            BREAK   starts another chunk

It is the convention of AUTOMATIC1111's web UI, and kohya's scripts read it too: a bracket that is
never closed reaches to the end, one that was never opened is text, and nested weights multiply.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TypeAlias

__all__ = ["Run", "parse_weights"]

Run: TypeAlias = tuple[str, float]

_OPENED_BY = {")": "(", "]": "["}
_FACTOR = {"(": 1.1, "[": 1 / 1.1}
_SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<opening>[(\[])"
    r"|:\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<closing>[)\]])"
    r"|(?P<text>.)",
    re.DOTALL,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse_weights(prompt: str) -> list[list[Run]]:
    """The prompt's sections, parted by BREAK, each a list of (text, weight).

    Neighbours of one weight are one run: "(un)(broken)" is [[("unbroken", 1.1)]].
    """
    text, weights = _strip_syntax(prompt)
    sections, start = [], 0
    for separator in _BREAK.finditer(text):
        sections.append(_runs(text, weights, start, separator.start()))
        start = separator.end()
    sections.append(_runs(text, weights, start, len(text)))
    return sections


def _strip_syntax(prompt: str) -> tuple[str, list[float]]:
    """The prompt without its syntax, and a weight for each character that is left."""
    text = ""
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _SYNTAX.finditer(prompt):
        kind = match.lastgroup or "text"
        content = match[kind]
        if kind == "opening":
            opened[content].append(len(text))
        elif kind == "number" and opened["("]:
            close("(", float(content))
        elif kind == "closing" and opened[_OPENED_BY[content]]:
            close(_OPENED_BY[content], _FACTOR[_OPENED_BY[content]])
        else:
            literal = content if kind == "escaped" else match[0]
            text += literal
            weights += [1.0] * len(literal)
    for bracket, starts in opened.items():
        while starts:
            close(bracket, _FACTOR[bracket])
    return text, weights


def _runs(text: str, weights: list[float], start: int, end: int) -> list[Run]:
    positions = groupby(range(start, end), key=lambda position: weights[position])
    return [("".join(text[p] for p in group), weight) for weight, group in positions]
