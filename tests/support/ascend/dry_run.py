"""Runs programs with the stand-ins, and reads from their log what MindSpore's backend did."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.ascend.build import build

__all__ = ["DryRun", "dry_run", "run_program"]

ROOT = Path(__file__).parents[3]
_KERNEL = re.compile(r"\] (\w+) select (\w+) kernel")
_PEAK = re.compile(r"Used peak memory usage \(without fragments\): (\d+)M")


@dataclass(frozen=True)
class DryRun:
    """What one command did.

    printed: its standard output and error, without MindSpore's log. log: that. calls: of operators,
    each its name and arguments. kernels: of each operator the kind of kernel that was selected.
    exit_code: None where it did not end.
    """

    printed: str
    log: str
    calls: list[dict[str, Any]]
    kernels: dict[str, str]
    exit_code: int | None

    @property
    def on_the_host(self) -> list[str]:
        """The lines of the log that say that an operator is computed by the host's CPU."""
        return [line for line in self.log.splitlines() if "should backoff" in line]


def dry_run(
    folder: Path, commands: Sequence[Sequence[str]], **environment: str
) -> tuple[list[DryRun], str]:
    """What each command of sdxl-host does on a simulated 910B, one after the other in one process,
    and the end of all that was printed, for the message of a test that fails."""
    listed = folder / "commands.json"
    listed.write_text(json.dumps([list(words) for words in commands]))
    program = [str(Path(__file__).with_name("commands.py")), str(listed)]
    printed, calls = run_program(folder, program, **environment)
    parts = _parts(printed.splitlines(), len(commands))
    of_calls = _parts(calls, len(commands))
    runs = [_read(lines, said) for lines, said in zip(parts, of_calls, strict=True)]
    return runs, printed[-3000:]


def run_program(folder: Path, words: Sequence[str], **environment: str) -> tuple[str, list[str]]:
    """Runs a Python program in `folder` with the stand-ins.

    Returns all that it printed, and the lines of the file of calls.
    """
    home = build(ROOT / "build" / "ascend")
    library = home / "lib64"
    calls = folder / "calls.jsonl"
    paths = [*sys.path, str(home / "python")]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    given = {
        **inherited,
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
        "LD_LIBRARY_PATH": os.pathsep.join(
            filter(None, [str(library), os.environ.get("LD_LIBRARY_PATH")])
        ),
        "LD_PRELOAD": str(library / "preload.so"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CANN_STUB_CALLS": str(calls),
        # 1 compiles, selects kernels and plans memory, and runs without a device.
        "MS_SIMULATION_LEVEL": "1",
        "RANK_SIZE": "1",
        "RANK_ID": "0",
        # Warnings, and of the device's part also which kernels it selects.
        "GLOG_v": "2",
        "MS_SUBMODULE_LOG_v": "{DEVICE:1}",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", *words],
        cwd=folder,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=1500,
        check=False,
    )
    return done.stdout, calls.read_text().splitlines() if calls.exists() else []


def _parts(lines: Sequence[str], count: int) -> list[list[str]]:
    """The lines after each `COMMAND n`."""
    found: list[list[str]] = [[] for _ in range(count)]
    into: list[str] = []
    for line in lines:
        if re.fullmatch(r"COMMAND \d+", line):
            into = found[int(line.split()[1])]
        else:
            into.append(line)
    return found


def _read(lines: Sequence[str], calls: Sequence[str]) -> DryRun:
    logged = [line for line in lines if re.match(r"\[(DEBUG|INFO|WARNING|ERROR|CRITICAL)\]", line)]
    log = "\n".join(logged)
    printed = "\n".join(line for line in lines if line not in set(logged))
    ended = re.search(r"^EXIT (\d+)$", printed, re.MULTILINE)
    return DryRun(
        printed,
        log,
        [json.loads(line) for line in calls],
        dict(_KERNEL.findall(log)),
        int(ended[1]) if ended else None,
    )
