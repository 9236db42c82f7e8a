"""`sdxl-host plugins`: what is installed, without importing any of it unless --check asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sdxl_host.commands.parser import Parser
from sdxl_host.errors import PluginError
from sdxl_host.plugins.discovery import Installed, discover, fitting

__all__ = ["plugins"]


def plugins(arguments: Sequence[str]) -> int:
    """Lists plugins as the arguments say; returns 0, or 2 when --check found one at fault."""
    parser = Parser(prog="sdxl-host plugins", description="List the installed plugins.")
    parser.add_argument("--check", action="store_true",
                        help="import each in its own process; show hooks and options")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(arguments))
    installed = discover()
    rows = [_row(plugin, installed) for plugin in installed]
    if options.check:
        for plugin, row in zip(installed, rows, strict=True):
            if row["state"] == "ok":
                row.update(_check(plugin, installed))
    print(json.dumps(rows, indent=2) if options.json else _text(rows))
    return 2 if options.check and any(row["state"] != "ok" for row in rows) else 0


def _row(plugin: Installed, installed: Sequence[Installed]) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "state": fitting(plugin, installed) or "ok",
    }


def _check(plugin: Installed, installed: Sequence[Installed]) -> dict[str, Any]:
    """What its package and an import in a process of its own show; its fault where it has one."""
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


def _text(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "no plugins are installed; pip install 'sdxl-host[all]' gives the first four"
    titles = ("name", "distribution", "version", "state")
    widths = [max(len(t), *(len(row[t]) for row in rows)) for t in titles[:-1]]
    lines = ["  ".join([*(t.ljust(w) for t, w in zip(titles, widths, strict=False)), titles[-1]])]
    for row in rows:
        cells = [row[t].ljust(w) for t, w in zip(titles, widths, strict=False)]
        lines.append("  ".join([*cells, row["state"]]))
        if "hooks" in row:
            does = ", ".join(f"{role} {hook}" for hook, role in row["hooks"].items())
            lines.append(f"    {does}; imported in {row['import_milliseconds']} ms")
            for option in row["options"]:
                lines.append(
                    f"    --{row['name']}_{option['name']} {option['type']}: {option['help']} "
                    f"[{option.get('default')}]"
                )
    return "\n".join(lines)
