"""What is set aside of a source, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdxl_host.data.captioned import Captioned

__all__ = ["Listing", "Problem"]


@dataclass(frozen=True, slots=True)
class Problem:
    """An image or a caption that no step gets.

    kind: what is wrong, in words that many share, such as "an image without a caption". name: its
    path inside the source. detail: what is wrong with this one, or "".
    """

    kind: str
    name: str
    detail: str = ""


@dataclass
class Listing:
    """What a source holds.

    images: sorted by name. problems: what is set aside. notes: what a user should know of the rest,
    a sentence each.
    """

    images: list[Captioned]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
