"""`sdxl-host plugins`: what is installed, without importing any of it unless --check asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_host.commands.flags import Command
from sdxl_host.commands.printer import columns, show
from sdxl_host.errors import PluginError
from sdxl_host.plugins.discovery import Installed, discover, fitting
from sdxl_host.settings.options import option

__all__ = ["plugins"]


@dataclass
class Flags:
    """The flags of `sdxl-host plugins`."""

    check: bool = option(False, help="import each in its own process; show hooks and options")
    json: bool = option(False, help="print JSON")


_COMMAND = Command("plugins", "Lists the installed plugins.", Flags)


def plugins(arguments: Sequence[str]) -> int:
    """Lists plugins as the arguments say; returns 0, or 2 when --check found one at fault."""
    return _COMMAND.run(arguments, _plugins)


def _plugins(flags: Flags) -> int:
    installed = discover()
    rows = [_row(plugin, installed) for plugin in installed]
    if flags.check:
        for plugin, row in zip(installed, rows, strict=True):
            if row["state"] == "ok":
                row.update(_check(plugin, installed))
    if flags.json:
        print(json.dumps(rows, indent=2))
    else:
        show(*_lines(rows))
    return 2 if flags.check and any(row["state"] != "ok" for row in rows) else 0


def _row(plugin: Installed, installed: Sequence[Installed]) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "state": fitting(plugin, installed) or "ok",
    }


def _check(plugin: Installed, installed: Sequence[Installed]) -> dict[str, Any]:
    """What the package and an import in a separate process show; the fault where there is one."""
    from sdxl_host.plugins.inspection import check_metadata, inspect_alone

    try:
        check_metadata(plugin, installed)
        report = inspect_alone(plugin)
    except PluginError as error:
        return {"state": str(error)}
    return {
        "hooks": report.hooks,
        "options": report.options,
        "import_milliseconds": round(report.import_seconds * 1000, 1),
    }


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table, and below each plugin that was imported what it does and its options."""
    if not rows:
        return ["no plugins are installed; pip install 'sdxl-host[all]' gives the first four"]
    titles = ("name", "distribution", "version", "state")
    head, *table = columns([titles, *([row[title] for title in titles] for row in rows)], "<<<")
    lines = [head]
    for line, row in zip(table, rows, strict=True):
        lines.append(line)
        if "hooks" in row:
            does = ", ".join(f"{role} {hook}" for hook, role in row["hooks"].items())
            lines.append(f"    {does}; imported in {row['import_milliseconds']} ms")
            for one in row["options"]:
                flag = f"--{row['name']}_{one['name']} {one['type']}"
                lines.append(f"    {flag}: {one['help']} [{one.get('default')}]")
    return lines
