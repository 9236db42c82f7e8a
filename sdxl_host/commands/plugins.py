"""`sdxl-host plugins`: what is installed, without importing any of it unless --check asks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from sdxl_host.commands.parser import Parser
from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.plugins import Installed, discover, fitting

__all__ = ["plugins"]

_CHILD = "--check-one"


def plugins(arguments: Sequence[str]) -> int:
    """Lists plugins as the arguments say; returns 0, or 2 when --check found one at fault."""
    if list(arguments[:1]) == [_CHILD]:
        print(json.dumps(_inspect(*arguments[1:])))
        return 0
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
                row.update(_check(plugin))
    print(json.dumps(rows, indent=2) if options.json else _text(rows))
    return 2 if options.check and any(row["state"] != "ok" for row in rows) else 0


def _row(plugin: Installed, installed: Sequence[Installed]) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "state": fitting(plugin, installed) or "ok",
    }


def _check(plugin: Installed) -> dict[str, Any]:
    """What importing the plugin in a process of its own shows."""
    command = [
        sys.executable,
        "-m",
        "sdxl_host",
        "plugins",
        _CHILD,
        plugin.name,
        plugin.distribution,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    told = (done.stderr or done.stdout).strip().splitlines()
    reason = told[-1].removeprefix("sdxl-host: error: ") if told else "no output"
    return {"state": reason if done.returncode == 2 else f"broken: {reason}"}


def _inspect(name: str, distribution: str) -> dict[str, Any]:
    """In the child: imports the plugin and says what it finds."""
    from dataclasses import is_dataclass

    from sdxl_host.hooks import implementations
    from sdxl_host.options import describe
    from sdxl_host.plugins import timed_import

    matches = [p for p in discover() if p.name == name and p.distribution == distribution]
    if not matches:
        raise ConfigError(f"plugin {name}: is not installed")
    plugin = matches[0]
    cls, seconds = timed_import(plugin)
    heavy = sorted({"mindspore", "torch", "transformers"} & set(sys.modules))
    if heavy:
        raise PluginError(
            f"plugin {plugin}: importing it imports {', '.join(heavy)}; import them inside the "
            "methods that use them"
        )
    schema = getattr(cls, "Options", None)
    return {
        "hooks": {i.hook: i.role for i in implementations(plugin, cls)},
        "options": describe(schema) if schema is not None and is_dataclass(schema) else [],
        "import_milliseconds": round(seconds * 1000, 1),
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
