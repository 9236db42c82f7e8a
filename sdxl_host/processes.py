"""Python in a process of its own, where code that crashes, hangs or ends Python hurts no one else.

It must work where dependencies are missing or broken, so it imports nothing but the standard
library.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["Child", "run_child", "tell"]

_MARK = "sdxl-host finds "  # what begins a child's line that is meant for its parent


@dataclass(frozen=True)
class Child:
    """How a process went.

    records: what it reported. end: how it ended where that was not well, else "". last: the last
    line it wrote to standard error. is_late: it was ended because it took too long.
    """

    records: Sequence[dict[str, Any]]
    end: str
    last: str
    is_late: bool = False

    @property
    def cause(self) -> str:
        """How it ended, with the last line it wrote."""
        return f"{self.end}, saying: {self.last}" if self.last else self.end


def run_child(
    module: str, call: str, seconds: float, variables: Mapping[str, str] | None = None
) -> Child:
    """Runs the expression `call` of the names of `sdxl_host.<module>` in a process.

    It has our own import path and no standard input. What it has started ends with it, and that is
    after `seconds` at the latest. variables: of its environment, besides our own.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"import sdxl_host.{module}\nsdxl_host.{module}.{call}"
    )
    is_late = False
    # Files, because who reads a pipe waits for all that hold its other end.
    with _file() as out, _file() as err:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(variables or {})},
            start_new_session=True,  # so that what it starts itself ends with it
        )
        try:
            end = _ending(process.wait(seconds))
        except subprocess.TimeoutExpired:
            end, is_late = f"no answer within {seconds:g} s", True
        finally:
            with suppress(ProcessLookupError):  # where nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output, errors = _text(out), _text(err)
    # Whole lines only: a process may end within one.
    records = [json.loads(line) for line in re.findall(f"^{_MARK}(.*)\n", output, re.MULTILINE)]
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return Child(records, end, lines[-1] if lines else "", is_late)


def _file() -> IO[bytes]:
    """A file without a name; in memory where that can be, as no disk may be fit to write."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("child"), "w+b")
    return tempfile.TemporaryFile()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}" if code else ""
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def tell(**record: Any) -> None:
    """In a child: reports to the parent. What JSON does not know is sent as its text."""
    # Not sys.stdout, which other code may have replaced.
    print(f"\n{_MARK}{json.dumps(record, default=str)}", file=sys.__stdout__, flush=True)
