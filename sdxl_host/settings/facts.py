"""What a setting declares of itself, at its field; every table of settings is derived from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from sdxl_host.settings.options import make_field

__all__ = ["Needs", "Setting", "Touches", "setting", "settings_of"]

Touches = Literal["numbers", "graph", "length", "start", "display", "speed"]
_EQUAL_ON_RESUME = ("numbers", "graph")


@dataclass(frozen=True)
class Needs:
    """What a setting needs beside it to have an effect.

    met: whether the section, an instance of its dataclass, has it. otherwise: why the setting has
    no effect where it has not. remedy: what to do where the setting was meant; with a remedy it is
    refused on the command line, and without one it is only named.
    """

    met: Callable[[Any], bool]
    otherwise: str
    remedy: str = ""


@dataclass(frozen=True)
class Setting:
    """One setting and its facts.

    key: where it stands in a config, "train.seed". flag: the flag of `train` that sets it, or "".
    touches: what it changes. "numbers": what is learned. "graph": how a step is compiled and run,
    and so how its numbers are rounded. "length": how long the run is. "start": how it starts, and
    where. "display": what is shown and kept of it. "speed": how fast it is.
    path: what it is a path of, or "". needs: what it needs beside it, if anything. for_drawing:
    whether `sdxl-host sample` heeds it too.
    """

    key: str
    type: Any
    default: Any
    help: str
    touches: Touches
    flag: str = ""
    path: str = ""
    needs: Needs | None = None
    for_drawing: bool = False

    @property
    def may_differ(self) -> bool:
        """Whether a resumed run may have another value than it had before."""
        return self.touches not in _EQUAL_ON_RESUME


def setting(
    default: Any,
    *,
    help: str,
    touches: Touches,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    flag: bool | None = None,
    path: str | None = None,
    needs: Needs | None = None,
    for_drawing: bool | None = None,
) -> Any:
    """A dataclass field that is a setting; see `option` for its range and `Setting` for the rest.

    flag: whether a flag of the field's name sets it; unless given, those of `train` have one.
    """
    facts: dict[str, Any] = {"help": help, "minimum": minimum, "maximum": maximum, "above": above}
    facts |= {"touches": touches, "flag": flag, "path": path, "needs": needs}
    facts |= {"for_drawing": for_drawing}
    return make_field(default, facts)


def settings_of(section: str, schema: type) -> Iterator[Setting]:
    """The settings that the fields of a section's dataclass declare, in order."""
    hints = get_type_hints(schema)
    kept = {field.name for field in dataclasses.fields(Setting)}
    for field in dataclasses.fields(schema):
        if "touches" not in field.metadata:
            raise TypeError(f"{schema.__name__}.{field.name}: must be declared by `setting`")
        facts = {name: fact for name, fact in field.metadata.items() if name in kept}
        has_flag = facts.pop("flag", section == "train")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Setting(
            key=f"{section}.{field.name}",
            type=hints[field.name],
            default=default,
            flag=field.name if has_flag else "",
            **facts,
        )
