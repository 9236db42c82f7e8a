"""Everything the doctor looks at, in order, as plain data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sdxl_host.doctor import backend, machine, packages
from sdxl_host.doctor.finding import Finding

__all__ = ["Finding", "examine"]


def examine(save_path: Path, announce: Callable[[str], None]) -> Iterator[Finding]:
    """The findings, one after another; `announce` is called before what takes seconds."""
    yield packages.host()
    yield packages.python()
    required = packages.requirements()
    announce("importing the packages in a process of their own; this takes some seconds")
    # MindSpore is started below, in a process of its own.
    imported = packages.import_all([name for name in required if name != "mindspore"])
    for name, bounds in required.items():
        yield packages.package(name, bounds, imported.get(name, packages.Imported()))
    yield from packages.rivals()
    yield from machine.environment(os.environ)
    announce("starting MindSpore in a process of its own; this takes some seconds")
    report, child = backend.start()
    yield backend.mindspore(report, child)
    yield backend.device(report, child)
    needs = report.get("needs", ())
    if report.get("works") and not needs:
        cause = report.get("needs_error") or child.cause
        remedy = "mend the packages above, or pip install --force-reinstall sdxl-host"
        yield Finding("configs", "fault", f"the packaged ones can't be planned: {cause}", remedy)
    yield machine.memory(needs, report.get("device"))
    yield machine.save_folder(save_path, needs)
    yield from packages.plugins()
