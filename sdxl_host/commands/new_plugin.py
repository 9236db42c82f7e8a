"""`sdxl-host new-plugin`: a package that installs, trains and passes its own tests as written.

Its files are those of templates/plugin, which is such a package itself, with an example for each
hook. A line `# [weight_loss]` there (in Markdown, in a comment) begins what is for that hook, up to
the next such line or `# [end]`; the rest is for every plugin.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import keyword
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

from sdxl_host.commands.flags import Command
from sdxl_host.commands.printer import show
from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.files.atomic import new_folder, write_new
from sdxl_host.hookspecs import HOOKS
from sdxl_host.plugins.discovery import (
    KNOWN_DISTRIBUTIONS,
    RESERVED_NAMES,
    discover,
    normalize,
    package_names,
)
from sdxl_host.settings.options import option
from sdxl_host.version import __version__

__all__ = ["new_plugin"]

_TEMPLATE = Path(__file__).parents[1] / "templates" / "plugin"
# Named one by one, because an installed package has compiled files beside them.
_FILES = (
    "README.md",
    "pyproject.toml",
    "my_plugin/__init__.py",
    "my_plugin/py.typed",
    "tests/test_my_plugin.py",
)
_MODULE, _DISTRIBUTION, _CLASS = "my_plugin", "my-plugin", "MyPlugin"  # as in the template
_BOUNDS = "sdxl-host>=0.1,<0.2"

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST = 30  # with a longer name the template's lines would not fit 100 columns
_MARK = re.compile(r" *(?:# \[(?P<code>[a-z_ ]+)\]|<!-- \[(?P<markdown>[a-z_ ]+)\] -->)\n")
_WIDTH = 100


@dataclass
class Flags:
    """The flags of `sdxl-host new-plugin`."""

    hooks: str = option("weight_loss", help="hooks that it implements, with commas between")
    out: Path = option(Path(), help="folder in which the folder NAME is made")


_COMMAND = Command(
    "new-plugin",
    "Writes the package of a new plugin, with an example for each hook, its tests and a README.",
    Flags,
    arguments={"NAME": "as in --plugins NAME; letters, digits and underscores"},
    notes=f"hooks: {', '.join(HOOKS)}",
)


def new_plugin(arguments: Sequence[str]) -> int:
    """Writes the package that the arguments ask for; returns the exit code."""
    return _COMMAND.run(arguments, _new_plugin)


def _new_plugin(flags: Flags, name: str) -> int:
    hooks = _hooks(flags.hooks)
    name = normalize(name)
    _check(name, _misnamed(name))
    target = _target(flags.out, name)
    _check(name, _taken(name))
    files = _render(name, hooks)
    _write(target, files)
    steps = (
        f"cd {shlex.quote(str(target))}",
        "pip install -e '.[test]'",
        "pytest",
        "sdxl-host plugins --check",
        f"sdxl-host train --config tiny.yaml --plugins {name}",
    )
    show(("written", f"{target}: {', '.join(files)}"), ("next", steps[0]))
    show(*(("", step) for step in steps[1:]))
    return 0


# ---- what is asked for


def _hooks(text: str) -> list[str]:
    """The hooks of `--hooks`, in the order of `HOOKS`. Raises ConfigError."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in HOOKS:
            raise ConfigError(
                f"--hooks {text}: there is no hook named {word or 'nothing'}"
                f"{did_you_mean(word, HOOKS)} (hooks: {', '.join(HOOKS)})"
            )
        if words.count(word) > 1:
            raise ConfigError(f"--hooks {text}: {word} stands there twice; name each hook once")
    return [hook for hook in HOOKS if hook in words]


def _target(out: Path, name: str) -> Path:
    """The folder to make. Raises ConfigError where it can't be made, or is there."""
    target = out / name
    if not out.is_dir():
        raise ConfigError(f"--out {out}: there is no such folder; make it, or choose another")
    if os.path.lexists(target):
        raise ConfigError(
            f"{target}: is there already and is never overwritten; choose another NAME or --out"
        )
    return target


def _check(name: str, fault: str | None) -> None:
    """Raises ConfigError for a name with a fault."""
    if fault:
        raise ConfigError(f"{name}: {fault}; choose another name for the plugin")


def _misnamed(name: str) -> str | None:
    """Why no plugin is called `name`, or None."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        return (
            "is not a plugin name (a lower-case letter, then letters, digits and single "
            f"underscores, {_LONGEST} at most)"
        )
    if keyword.iskeyword(name):
        return "is a word of the Python language"
    if yaml.safe_load(name) != name:
        return f"is read as {yaml.safe_load(name)} in a config"
    return "is a name that belongs to the host" if name in RESERVED_NAMES else None


def _taken(name: str) -> str | None:
    """What a new plugin called `name` would be confused with or would hide, or None."""
    for plugin in discover():
        if plugin.name == name:
            return f"is a plugin already, of {plugin.distribution} {plugin.version}"
    if name in KNOWN_DISTRIBUTIONS:
        return f"is the plugin of {KNOWN_DISTRIBUTIONS[name]}"
    distribution = canonicalize_name(name)
    if distribution in package_names() or distribution in KNOWN_DISTRIBUTIONS.values():
        return f"is the name of the package {distribution}, which pip would replace"
    # The folder `tests` stands beside the module.
    if name == "tests" or importlib.util.find_spec(name) is not None:
        return "is the name of a module, which the plugin's would hide"
    return None


# ---- what is written


def _render(name: str, hooks: Sequence[str]) -> dict[str, str]:
    """The text of each file of the package, by its path in it."""
    kept = {
        file: _for_hooks((_TEMPLATE / file).read_text("utf-8"), hooks) for file in sorted(_FILES)
    }
    replaced = {
        _MODULE: name,
        _DISTRIBUTION: name.replace("_", "-"),
        _CLASS: _class_name(name, kept.values()),
        _BOUNDS: f"sdxl-host{_bounds(__version__)}",
    }
    files = {}
    for file, text in kept.items():
        if file.endswith(".py"):
            text = _without_idle_imports(text)
        files[_replace(file, replaced)] = _replace(text, replaced)
    return files


def _for_hooks(text: str, hooks: Sequence[str]) -> str:
    """The template's text without what is for other hooks, and without the marks."""
    kept, wanted = [], True
    for line in text.splitlines(keepends=True):
        mark = _MARK.fullmatch(line)
        if mark:
            words = (mark["code"] or mark["markdown"]).split()
            wanted = words == ["end"] or not set(words).isdisjoint(hooks)
        elif wanted:
            kept.append(line)
    return "".join(kept).rstrip("\n") + "\n" * bool(kept)


def _replace(text: str, replaced: Mapping[str, str]) -> str:
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text


def _class_name(name: str, texts: Iterable[str]) -> str:
    """`my_weight` -> MyWeight; with `Plugin` behind it where the files use that name already."""
    camel = "".join(word.capitalize() for word in name.split("_"))
    taken = {word for text in texts for word in re.findall(r"\b[A-Z]\w*", text)} - {_CLASS}
    return f"{camel}Plugin" if camel in taken or hasattr(builtins, camel) else camel


def _bounds(version: str) -> str:
    """The versions of the host that a plugin written with this one is for: `>=0.1,<0.2`."""
    own = Version(version)
    # 0.2.0.dev1 comes before 0.2.
    lowest = version if own.is_prerelease else f"{own.major}.{own.minor}"
    return f">={lowest},<{own.major}.{own.minor + 1}"


def _without_idle_imports(source: str) -> str:
    """The Python source without imports of names that it does not use."""
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = source.splitlines()
    for node in reversed(imports):
        names = [ast.unparse(one) for one in node.names if (one.asname or one.name) in used]
        if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            lines[node.lineno - 1 : node.end_lineno] = _import_lines(node, names)
    # Where a whole group has gone, the blank line above it goes too.
    return re.sub(r"\n{3,}(?=from |import )", "\n\n", "\n".join(lines) + "\n")


def _import_lines(node: ast.Import | ast.ImportFrom, names: Sequence[str]) -> list[str]:
    """The lines of the import statement for these of its names."""
    if not names:
        return []
    if isinstance(node, ast.Import):
        return [f"import {name}" for name in names]
    line = f"from {node.module} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return [line]
    return [f"from {node.module} import (", *(f"    {name}," for name in names), ")"]


def _write(target: Path, files: Mapping[str, str]) -> None:
    """Makes the folder `target` with the files, or nothing. Raises ConfigError."""
    try:
        with new_folder(target) as folder:
            for file, text in files.items():
                path = folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                write_new(path, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{target}: can't be written ({error.strerror}); choose another folder with --out"
        ) from error
