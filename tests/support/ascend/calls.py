"""The calls of operators, held against what CANN's published sources say that the 910B takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["TAKEN", "attentions", "problems", "tensors"]

# The most channels of a head that the fused attention takes.
_MOST_CHANNELS = 768

Call = Mapping[str, Any]


def _read_table() -> dict[str, frozenset[str]]:
    lines = (Path(__file__).parent / "types_910b.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return {name: frozenset(types.split()) for name, types in rows}


# Of each operator the types that its tensors may have on the 910B.
TAKEN = _read_table()


def tensors(call: Call) -> Iterator[Mapping[str, Any]]:
    """The tensors among a call's arguments, those in lists too: `t` is the type, and `shape`."""
    for argument in call["args"]:
        if isinstance(argument, dict):
            yield from (one for one in (argument, *argument.get("list", ())) if "t" in one)


def problems(calls: Iterable[Call]) -> list[str]:
    """A line for each kind of call that the 910B does not take, or whose operator no table has."""
    found: Counter[str] = Counter()
    for call in calls:
        name = call["op"]
        taken = TAKEN.get(name)
        if taken is None:
            found[f"{name} is not in the table"] += 1
            continue
        for tensor in tensors(call):
            if tensor["t"] not in taken:
                found[f"{name} does not take {tensor['t']} {tensor['shape']}"] += 1
        if name.startswith("aclnnFlashAttentionScore"):
            channels, rest = divmod(next(tensors(call))["shape"][-1], heads(call))
            if rest or channels > _MOST_CHANNELS:
                found[f"{name} does not take heads of {channels} channels"] += 1
    return [f"{text} ({count} calls)" for text, count in found.items()]


def attentions(calls: Iterable[Call]) -> Counter[tuple[str, tuple[int, ...], int]]:
    """Of each call of the fused attention: the type and shape of the query, and the heads."""
    found: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    for call in calls:
        if call["op"] == "aclnnFlashAttentionScore":
            query = next(tensors(call))
            found[query["t"], tuple(query["shape"]), heads(call)] += 1
    return found


def heads(call: Call) -> int:
    """The heads of a call of the fused attention: its first plain number of that size."""
    return next(a for a in call["args"] if isinstance(a, int) and 0 < a < 1 << 30)
