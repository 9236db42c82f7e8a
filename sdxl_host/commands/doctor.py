"""`sdxl-host doctor`: this machine and installation, and how to mend what is at fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sdxl_host.commands.flags import Command
from sdxl_host.commands.printer import show
from sdxl_host.doctor.examine import Finding, examine
from sdxl_host.settings.options import option

__all__ = ["doctor"]


@dataclass
class Flags:
    """The flags of `sdxl-host doctor`."""

    save_path: Path = option(Path("runs"), help="folder that runs would be written to")
    json: bool = option(False, help="print JSON")


_COMMAND = Command(
    "doctor", "Looks at this machine and installation, and says what to mend.", Flags
)


def doctor(arguments: Sequence[str]) -> int:
    """Shows what is found; returns 0, or 2 when something is at fault."""
    return _COMMAND.run(arguments, _doctor)


def _doctor(flags: Flags) -> int:
    if flags.json:
        found = list(examine(flags.save_path, announce=lambda text: None))
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        found = []
        for finding in examine(flags.save_path, announce=lambda text: show(("looking", text))):
            found.append(finding)
            _show(finding)
        show(("doctor", _summary(found)))
    return 2 if any(finding.state == "fault" for finding in found) else 0


def _show(finding: Finding) -> None:
    state = "" if finding.state == "ok" else f"{finding.state}: "
    show((finding.name, state + finding.seen))
    if finding.remedy:
        show(("", f"  {finding.remedy}"))


def _summary(found: Sequence[Finding]) -> str:
    counts = {state: sum(f.state == state for f in found) for state in ("fault", "warning")}
    words = [f"{n} {state}{'s' if n > 1 else ''}" for state, n in counts.items() if n]
    return ", ".join(words) or "nothing is at fault"
