"""The errors a user can mend. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ConfigError",
    "DataError",
    "HostError",
    "PluginError",
    "did_you_mean",
    "in_brief",
    "one_line",
]


class HostError(Exception):
    """Something the user can mend: the message names the subject first and the remedy last."""


class ConfigError(HostError):
    """A config key, flag or value that cannot be used."""


class DataError(HostError):
    """An image, caption, weight or checkpoint file that cannot be used."""


class PluginError(HostError):
    """A plugin that is missing, broken, in conflict or at fault; plugins may raise it too."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """' (did you mean X?)' for the candidate nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def in_brief(faults: Sequence[str], most: int) -> str:
    """`a; b; and 3 more`: the first `most` of them, and how many there are besides."""
    left = len(faults) - most
    return "; ".join(faults[:most]) + (f"; and {left} more" if left > 0 else "")


def one_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
