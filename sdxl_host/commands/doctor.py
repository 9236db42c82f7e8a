"""`sdxl-host doctor`: this machine and installation, and how to mend what is at fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sdxl_host.commands.parser import Parser
from sdxl_host.doctor.examine import Finding, examine

__all__ = ["doctor"]

_WIDTH = 12


def doctor(arguments: Sequence[str]) -> int:
    """Shows what is found; returns 0, or 2 when something is at fault."""
    parser = Parser(
        prog="sdxl-host doctor",
        description="Look at this machine and installation, and say what to mend.",
    )
    parser.add_argument("--save_path", type=Path, default=Path("runs"), metavar="DIR",
                        help="folder that runs would be written to [%(default)s]")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(arguments))
    save_path = options.save_path.expanduser()
    if options.json:
        found = list(examine(save_path, announce=lambda text: None))
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        found = []
        for finding in examine(save_path, announce=lambda text: _say("looking", text)):
            found.append(finding)
            _show(finding)
        _say("doctor", _summary(found))
    return 2 if any(finding.state == "fault" for finding in found) else 0


def _say(word: str, text: str) -> None:
    # Flushed, because some of what follows takes seconds.
    print(f"{word:<{_WIDTH}}{text}", flush=True)


def _show(finding: Finding) -> None:
    state = "" if finding.state == "ok" else f"{finding.state}: "
    _say(finding.name, state + finding.seen)
    if finding.remedy:
        _say("", f"  {finding.remedy}")


def _summary(found: Sequence[Finding]) -> str:
    counts = {state: sum(f.state == state for f in found) for state in ("fault", "warning")}
    words = [f"{n} {state}{'s' if n > 1 else ''}" for state, n in counts.items() if n]
    return ", ".join(words) or "nothing is at fault"
