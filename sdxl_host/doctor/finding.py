"""What every check of the doctor gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, how it is, what was seen, and how to mend it."""

    name: str
    state: Literal["ok", "warning", "fault"]
    seen: str
    remedy: str = ""
