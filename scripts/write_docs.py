"""Writes what the documentation quotes: `python scripts/write_docs.py`, or --check to compare.

A page is Markdown with comments that say what stands below them, up to `<!-- end -->`:

    <!-- output: sdxl-host plugins -->      the command and what it prints
    <!-- output: the block above -->        what the Python block above it printed
    <!-- table: settings train -->          a table made from the code, see `TABLES`

Every Python block of a page is run, in order and in one namespace, unless `<!-- not run: WHY -->`
stands right above it. Commands see only the first-party plugins, or those that the comment names:
`<!-- output: sdxl-host plugins; installed: snr -->`. So the pages are the same on every machine.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sdxl_host.cli import main as command_line
from sdxl_host.config import mindone
from sdxl_host.errors import PluginError
from sdxl_host.hookspecs import HOOKS, hookimpl
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed, find, fitting, import_class
from sdxl_host.plugins.roles import implementations
from sdxl_host.settings.declarations import SCHEMAS, SETTINGS
from sdxl_host.settings.options import describe
from sdxl_host.settings.targets import TARGETS
from sdxl_host.testing.runs import only

ROOT = Path(__file__).parents[1]
FIRST_PARTY = {
    "edm": "sdxl_edm:EDM",
    "snr": "sdxl_snr:MinSNR",
    "timestep_bias": "sdxl_timestep_bias:TimestepBias",
    "lpw": "sdxl_lpw:LongPrompts",
}

_PART = re.compile(
    r"^<!-- (?P<kind>output|table): (?P<subject>.*?) -->\n(?P<old>.*?)^<!-- end -->\n"
    r"|^(?P<fence>`{3,})(?P<language>\w*)\n(?P<code>.*?)^(?P=fence)\n",
    re.MULTILINE | re.DOTALL,
)
_BEGIN = re.compile(r"^<!-- (?:output|table): ", re.MULTILINE)
_END = re.compile(r"^<!-- end -->$", re.MULTILINE)
_NOT_RUN = re.compile(r"^<!-- not run: .+ -->\n\Z", re.MULTILINE)
# What differs from one machine or one moment to the next.
_VARYING = re.compile(r"\d+(\.\d+)? ms\b")


def pages() -> list[Path]:
    """The Markdown pages whose blocks are run."""
    patterns = ("README.md", "docs/*.md", "plugins/*/README.md", "examples/plugins/*/README.md")
    return [page for pattern in patterns for page in sorted(ROOT.glob(pattern))]


# ---- a page


def rendered(page: Path, names: dict[str, Any] | None = None) -> str:
    """The page as it should be: its Python blocks are run, its outputs and tables made anew.

    An output that differs only in what varies by machine stays. names: is given what the blocks
    define. Raises what a block raises, and ValueError for a comment without its end.
    """
    text = page.read_text("utf-8")
    module = types.ModuleType(f"page_{page.parent.name}_{page.stem}".replace(".", "_"))
    said = ""

    def replaced(part: re.Match[str]) -> str:
        nonlocal said
        if part["kind"] is None:
            if part["language"] == "python" and not _NOT_RUN.search(text[: part.start()]):
                line = text.count("\n", 0, part.start("code"))
                said = _run(part["code"], module.__dict__, page, line)
            return part[0]
        if part["kind"] == "table":
            new = _table(part["subject"])
        elif part["subject"] == "the block above":
            new = _fenced(said)
        else:
            new = _fenced(_command(part["subject"]))
        new = part["old"] if _fixed(new) == _fixed(part["old"]) else new
        return f"<!-- {part['kind']}: {part['subject']} -->\n{new}<!-- end -->\n"

    with _importable(module, page.parent):
        new = _PART.sub(replaced, text)
    begun, ended = len(_BEGIN.findall(new)), len(_END.findall(new))
    if begun != ended:
        raise ValueError(f"{page}: {begun} outputs and tables begin and {ended} end; mend the page")
    if names is not None:
        names.update(module.__dict__)
    return new


def not_run(page: Path) -> list[str]:
    """The Python blocks of a page that stand below a `not run` comment."""
    text = page.read_text("utf-8")
    return [
        part["code"]
        for part in _PART.finditer(text)
        if part["language"] == "python" and _NOT_RUN.search(text[: part.start()])
    ]


def _run(code: str, namespace: dict[str, Any], page: Path, line: int) -> str:
    """What a block prints; a traceback of it names the page and the line there."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)
    return told.getvalue()


@contextlib.contextmanager
def _importable(module: types.ModuleType, folder: Path) -> Iterator[None]:
    """Blocks find their own module, as dataclasses look for it, and the package beside the page."""
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        del sys.modules[module.__name__]


def _fixed(text: str) -> str:
    return _VARYING.sub("N ms", text)


def _fenced(text: str) -> str:
    return f"```\n{text.rstrip()}\n```\n"


# ---- commands


def _command(subject: str) -> str:
    """`$ sdxl-host ...` and what it prints, errors included."""
    line, _, names = subject.partition("; installed: ")
    installed = [name.strip() for name in names.split(",")] if names else list(FIRST_PARTY)
    words = line.split()
    if words[0] != "sdxl-host":
        raise ValueError(f"{line}: is no command of sdxl-host")
    told = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"  # argparse folds its help at the terminal's width
    try:
        with (
            only(installed),
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(told),
            contextlib.suppress(SystemExit),  # argparse ends --help so
        ):
            command_line(words[1:])
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width
    return f"$ {line}\n{told.getvalue()}"


# ---- tables


def _table(subject: str) -> str:
    name, *words = subject.split()
    if name not in TABLES:
        raise ValueError(f"table {subject}: there is none of that name ({', '.join(TABLES)})")
    return _markdown(*TABLES[name](*words))


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [titles, ["---"] * len(titles), *escaped]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _may_differ() -> tuple[list[str], list[list[str]]]:
    """The settings that a resumed run may have otherwise, but for those that say which it is."""
    which = {"weight", "resume", "resume_step", "optimizer_weight", "allow_changes"}
    free = [
        one
        for one in SETTINGS.values()
        if one.may_differ and one.touches != "length" and one.flag not in which
    ]
    rows = [[f"`{setting.key}`", f"`--{setting.flag}`" if setting.flag else ""] for setting in free]
    return ["key", "flag"], rows


def _settings(section: str) -> tuple[list[str], list[list[str]]]:
    """The keys of a section of the config, and the flags that set them."""
    rows = []
    for row in describe(SCHEMAS[section]):
        key = f"{section}.{row['name']}"
        flag = f"`--{SETTINGS[key].flag}`" if SETTINGS[key].flag else ""
        rows.append([f"`{key}`", flag, *_described(row)])
    return ["key", "flag", "type", "default", "what it is"], rows


def _plugin(name: str) -> tuple[list[str], list[list[str]]]:
    """The options of a first-party plugin."""
    rows = [
        [f"`plugins.{name}.{row['name']}`", f"`--{name}_{row['name']}`", *_described(row)]
        for row in describe(plugin_class(name).Options)  # type: ignore[attr-defined]
    ]
    return ["key", "flag", "type", "default", "what it is"], rows


def _described(row: dict[str, Any]) -> list[str]:
    """Type with its range, default and help of a row of `describe`."""
    words = {"minimum": "at least", "above": "above", "maximum": "at most"}
    limits = [f"{words[key]} {row[key]:g}" for key in words if key in row]
    kind = row["type"].replace("dict[str, typing.Any]", "mapping")
    default = '""' if row["default"] == "" else str(row["default"])
    return [", ".join([kind, *limits]), f"`{default}`", row["help"]]


def _roles(hook: str) -> tuple[list[str], list[list[str]]]:
    """Who answers a hook: the host, and the first-party plugins."""
    rows = []
    if hasattr(Defaults, hook):
        rows.append(["host", "answers where no plugin claims", _summary(Defaults, hook)])
    for name in FIRST_PARTY:
        cls = plugin_class(name)
        found = {each.hook: each.role for each in implementations(_package(name), cls)}
        if hook in found:
            rows.append([f"`{name}`", found[hook], _summary(cls, hook)])
    return ["who", "does", "what"], rows


def _summary(cls: type, hook: str) -> str:
    """The first paragraph of a method's docstring."""
    text = inspect.getdoc(getattr(cls, hook)) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _overview() -> tuple[list[str], list[list[str]]]:
    """Every hook with its arguments, and what each first-party plugin does to it."""
    from sdxl_host import hookspecs

    rows = []
    for hook in HOOKS:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
        done = {row[0]: row[1] for row in _roles(hook)[1]}
        rows.append(
            [f"[`{hook}`](#{hook})", f"`{arguments}`"]
            + [done.get(f"`{name}`", "") for name in FIRST_PARTY]
        )
    return ["hook", "arguments", *(f"`{name}`" for name in FIRST_PARTY)], rows


def _targets() -> tuple[list[str], list[list[str]]]:
    """Every target: where it stands, its params with their defaults, its names in MindONE."""
    rows = []
    for target in TARGETS:
        module, _, name = target.path.partition(":")
        kept = [one for one in _parameters(module, name) if one not in target.provided]
        idle = mindone.IDLE_PARAMS.get(target.name, {})
        params = [*kept, *(f"{key} (no effect)" for key in idle)]
        cells = [f"`sdxl_host.{target.name}`", target.slot, ", ".join(params)]
        old = [f"`{name}`" for name, ours in mindone.TARGETS.items() if ours == target.name]
        rows.append([*cells, ", ".join(old)])
    return ["target", "stands for", "params", "in old configs"], rows


def _parameters(module: str, name: str) -> list[str]:
    """`name` or `name=default` of what a class takes; read, because MindSpore is slow to import."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    cls = classes[name]
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names = [argument.arg for argument in node.args.args[1:]]
            defaults = [f"={ast.unparse(default)}" for default in node.args.defaults]
            blank = [""] * (len(names) - len(defaults))
            return [a + b for a, b in zip(names, blank + defaults, strict=True)]
    bases = [base.id for base in cls.bases if isinstance(base, ast.Name) and base.id in classes]
    return _parameters(module, bases[0]) if bases else []


def _requirements() -> tuple[list[str], list[list[str]]]:
    """What pip installs with the host."""
    rows = [[f"`{one.name}`", f"`{one.specifier}`"] for one in _dependencies(ROOT)]
    return ["package", "versions"], rows


def _bounds() -> tuple[list[str], list[list[str]]]:
    """Which versions of the host the first-party plugins say they work with."""
    rows = []
    for name in FIRST_PARTY:
        needs = _dependencies(ROOT / "plugins" / f"sdxl_{name}")
        [host] = [one for one in needs if one.name == "sdxl-host"]
        rows.append([f"`{name}`", f"`{_distribution(name)}`", f"`{host}`"])
    return ["plugin", "package", "works with"], rows


def _dependencies(folder: Path) -> list[Requirement]:
    """Those of a pyproject.toml; Python 3.10 has no reader of TOML."""
    text = (folder / "pyproject.toml").read_text("utf-8")
    [listed] = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return [Requirement(line) for line in re.findall(r'^\s*"([^"]+)"', listed, re.MULTILINE)]


def _distribution(name: str) -> str:
    return f"sdxl-{name.replace('_', '-')}"


def plugin_class(name: str) -> type:
    """The class of a first-party plugin."""
    module, _, attribute = FIRST_PARTY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _package(name: str, requires: str | None = ">=0.1,<0.2", **other: Any) -> Installed:
    """A package as its metadata would declare it."""
    values = {"distribution": name.replace("_", "-"), "version": "1.0", "module": name} | other
    values["requires"] = SpecifierSet(requires) if requires else None
    return Installed(name=name, attribute="P", **values)


# ---- what is refused, each with what causes it

_MINE = _package("mine")


def _written(hook: str, method: types.FunctionType, **mark: Any) -> type:
    """A plugin class whose method `hook` is marked with @hookimpl(**mark)."""
    own = types.FunctionType(method.__code__, globals(), hook, method.__defaults__)  # not shared
    return type("Written", (), {hook: hookimpl(**mark)(own)})


def _weight(self: Any, noise: Any) -> Any:
    return noise.snr


def _adapter(self: Any) -> Any:
    weights = yield
    return weights


def _stateful(*names: str) -> type:
    return type("Written", (_written("weight_loss", _weight),), dict.fromkeys(names, _weight))


# What the class looks like, and the class.
CLASSES: dict[str, type] = {
    "`@hookimpl(tryfirst=True)`": _written("weight_loss", _weight, tryfirst=True),
    "`@hookimpl(trylast=True)`": _written("weight_loss", _weight, trylast=True),
    "`@hookimpl(optionalhook=True)`": _written("weight_loss", _weight, optionalhook=True),
    '`@hookimpl(specname="weight_loss")`': _written("weight", _weight, specname="weight_loss"),
    "`@hookimpl(hookwrapper=True)`": _written("weight_loss", _adapter, hookwrapper=True),
    "a method that is called as no hook is": _written("weigh_loss", _weight),
    "a hook's method without `@hookimpl`": type("Written", (), {"weight_loss": _adapter}),
    "no hook at all": type("Written", (), {}),
    "`def weight_loss(self, nois)`": _written("weight_loss", lambda self, nois: nois),
    "`def weight_loss(self, noise, step=0)`": _written(
        "weight_loss", lambda self, noise, step=0: noise.snr
    ),
    "a wrapper on `on_step_end`": _written("on_step_end", _adapter, wrapper=True),
    "a wrapper without `yield`": _written("weight_loss", _weight, wrapper=True),
    "a `yield` without `wrapper=True`": _written("weight_loss", _adapter),
    "`state_dict` alone": _stateful("state_dict"),
    "`load_state_dict` alone": _stateful("load_state_dict"),
}


def refusal_of_class(cls: type) -> PluginError:
    """The error that says why the host does not take a plugin class."""
    try:
        implementations(_MINE, cls)
    except PluginError as error:
        return error
    raise ValueError(f"{cls}: is not refused; mend CLASSES")


# What the package declares, and the packages that are installed, the one in question first.
_FOLDER = "site-packages/mine-1.0.dist-info"
PACKAGES: dict[str, list[Installed]] = {
    "a damaged file `METADATA`": [
        _package("mine", damage=f"the metadata in {_FOLDER} can't be read (no Name)")
    ],
    "no version of `sdxl-host`": [_package("mine", requires=None)],
    "`sdxl-host>=0.9,<1` in its dependencies": [_package("mine", requires=">=0.9,<1")],
    "an entry point named `My.Weight`": [_package("My.Weight", distribution="mine")],
    "an entry point named `train`": [_package("train", distribution="mine")],
    "two packages with an entry point `mine`": [_MINE, _package("mine", distribution="other")],
}


def refusal_of_package(packages: Sequence[Installed]) -> str:
    """Why the first of the packages can't be used beside the others."""
    reason = fitting(packages[0], packages)
    if reason is None:
        raise ValueError(f"{packages[0]}: is not refused; mend PACKAGES")
    return reason


# What goes wrong on the way to the class.
IMPORTS: dict[str, Callable[[], Any]] = {
    "a plugin that is selected and not there": lambda: find("mine", []),
    "a first-party plugin that is not there": lambda: find("snr", []),
    "a package that does not import": lambda: import_class(_package("mine", module="not_there")),
    "an entry point that names no class": lambda: import_class(_package("mine", module="os.path")),
}


def refusal_of_import(get: Callable[[], Any]) -> PluginError:
    """The error that looking for a plugin's class raises."""
    try:
        get()
    except PluginError as error:
        return error
    raise ValueError("an import is not refused; mend IMPORTS")


def _refused_classes() -> tuple[list[str], list[list[str]]]:
    rows = [[what, _code(str(refusal_of_class(cls)))] for what, cls in CLASSES.items()]
    return ["in the class", "message"], rows


def _refused_packages() -> tuple[list[str], list[list[str]]]:
    rows = [[what, _code(refusal_of_package(packages))] for what, packages in PACKAGES.items()]
    rows += [[what, _code(str(refusal_of_import(get)))] for what, get in IMPORTS.items()]
    return ["in the package", "message"], rows


def _code(text: str) -> str:
    """Text in the typeface of code, whether or not it has backticks of its own."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


TABLES: dict[str, Callable[..., tuple[list[str], list[list[str]]]]] = {
    "settings": _settings,
    "may_differ": _may_differ,
    "plugin": _plugin,
    "targets": _targets,
    "requirements": _requirements,
    "bounds": _bounds,
    "roles": _roles,
    "hooks": _overview,
    "refused-classes": _refused_classes,
    "refused-packages": _refused_packages,
}


# ---- the program


def main(arguments: Sequence[str]) -> int:
    """Writes the pages that are out of date; with --check only names them, and returns 1."""
    if list(arguments) not in ([], ["--check"]):
        print("usage: python scripts/write_docs.py [--check]", file=sys.stderr)
        return 2
    stale = []
    for page in pages():
        new = rendered(page)
        if new != page.read_text("utf-8"):
            stale.append(page)
            if not arguments:
                page.write_text(new, "utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'is out of date' if arguments else 'written'}")
    return 1 if arguments and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
