"""What is installed: sdxl-host itself, Python, the packages they need, and plugins.

Only the standard library is imported here, because the doctor must work where packages are missing
or broken. Packages are imported in a process of their own.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sdxl_host.doctor.finding import Finding
from sdxl_host.errors import one_line
from sdxl_host.processes import run_child, tell
from sdxl_host.version import __version__

__all__ = [
    "Imported",
    "host",
    "import_all",
    "package",
    "plugins",
    "python",
    "requirements",
    "rivals",
    "wanted",
]

PYTHON_FROM, PYTHON_BELOW = (3, 10), (3, 13)
TIMEOUT = 180.0  # seconds for importing the packages

_HOST = "sdxl-host"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?P<bounds>[^;]*?)\s*(;\s*(?P<marker>.*))?")
_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # where a module is not named as its package
_REASONS = {
    "mindspore": "sdxl-host is written for MindSpore 2.10",
    "numpy": "tensor operations of MindSpore 2.10 fail with NumPy 2",
    "omegaconf": "OmegaConf 2.3 knows no Literal fields",
    "transformers": "the tokenizer is opened as transformers 5 does it",
}
_MINDSPORES = ("mindspore", "mindspore-ascend", "mindspore-cpu", "mindspore-dev", "mindspore-gpu")


@dataclass(frozen=True)
class Imported:
    """What importing a package gave: its version and file, or the error."""

    version: str | None = None
    file: str | None = None
    error: str | None = None


def host() -> Finding:
    """sdxl-host itself."""
    seen = f"{__version__} in {Path(__file__).parents[1]}"
    installed = _version(_HOST)
    if installed == __version__:
        return Finding(_HOST, "ok", seen)
    if installed is None:
        seen += ", which pip has not installed, so the packages it needs are not known"
    else:
        seen += f", but {installed} is installed"
    remedy = "pip install -e . in the folder of its pyproject.toml, and take others off PYTHONPATH"
    return Finding(_HOST, "warning", seen, remedy)


def python() -> Finding:
    """The interpreter."""
    seen = f"{platform.python_version()} at {sys.executable}"
    if PYTHON_FROM <= sys.version_info[:2] < PYTHON_BELOW:
        return Finding("python", "ok", seen)
    seen += f"; MindSpore and sdxl-host need 3.{PYTHON_FROM[1]} to 3.{PYTHON_BELOW[1] - 1}"
    remedy = "make an environment with one of these (python3.11 -m venv NAME) and install there"
    return Finding("python", "fault", seen, remedy)


def requirements() -> dict[str, str]:
    """The bounds that our own metadata declares, by the package's name; extras left out."""
    try:
        lines = metadata.requires(_HOST) or []
    except metadata.PackageNotFoundError:
        return {}
    matches = [_REQUIREMENT.fullmatch(line) for line in sorted(lines)]
    return {
        match["name"].lower(): match["bounds"]
        for match in matches
        if match and "extra" not in (match["marker"] or "")
    }


def wanted(name: str) -> str:
    """A package with its bounds, quoted for pip."""
    return f"'{name}{requirements().get(name, '')}'"


def import_all(names: Sequence[str]) -> dict[str, Imported]:
    """Imports packages as sdxl-host would, also where one of them takes its process down."""
    found: dict[str, Imported] = {}
    left = list(names)
    while left:
        child = run_child("doctor.packages", f"report_imports({left!r})", TIMEOUT)
        found |= {record.pop("name"): Imported(**record) for record in child.records}
        left = [name for name in left if name not in found]
        if left:
            # The process ended at the first package that it did not report.
            found[left.pop(0)] = Imported(error=child.cause or "it ended Python")
    return found


def report_imports(names: Sequence[str]) -> None:
    """In a child: reports what importing each package gives."""
    # Its advice that a deep-learning framework is missing does not apply to a tokenizer.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in names:
        try:
            module: Any = importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
            if name == "transformers":
                _ = module.CLIPTokenizer  # transformers imports it on first use
        except Exception as error:
            tell(name=name, error=one_line(error))
            continue
        version = getattr(module, "__version__", None)
        file = getattr(module, "__file__", None)
        tell(name=name, version=version if isinstance(version, str) else None, file=file)


def package(name: str, bounds: str, imported: Imported) -> Finding:
    """A package that sdxl-host needs, against its bounds."""
    installed = _version(name)
    install = f"pip install '{name}{bounds}'"
    if installed is None:
        return Finding("package", "fault", f"{name} is not installed (needs {bounds})", install)
    if imported.error is not None:
        seen = f"{name} {installed} can't be imported: {imported.error}"
        again = f"pip install --force-reinstall '{name}{bounds}'"
        return Finding("package", "fault", seen, again)
    version = imported.version or installed
    seen = f"{name} {version}"
    if version != installed:
        # What pip installs is hidden by what is found first.
        seen += f" is imported from {imported.file}, though {installed} is installed"
        install = f"take the folder of {imported.file} off PYTHONPATH"
    if not _within(version, bounds):
        reason = f": {_REASONS[name]}" if name in _REASONS else ""
        return Finding("package", "fault", f"{seen}; needs {bounds}{reason}", install)
    if version != installed:
        return Finding("package", "warning", seen, install)
    return Finding("package", "ok", f"{seen} (needs {bounds})")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, UnicodeDecodeError):
        return None


def _within(version: str, bounds: str) -> bool:
    """Whether a version is within bounds; True where packaging is broken and can't compare them."""
    try:
        from packaging.specifiers import SpecifierSet
        from packaging.version import Version
    except Exception:
        return True
    try:
        return SpecifierSet(bounds).contains(Version(version), prereleases=True)
    except ValueError:  # what it says is no version
        return False


def rivals() -> Iterator[Finding]:
    """Packages that all provide MindSpore: what is imported is then a mixture of them."""
    found = {}
    for each in metadata.distributions():
        try:
            name = (each.metadata["Name"] or "").lower().replace("_", "-")
            modules = (each.read_text("top_level.txt") or "").split()
        except UnicodeDecodeError:
            continue  # damaged metadata
        if name in _MINDSPORES or "mindspore" in modules:
            found.setdefault(name, each.version)
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in sorted(found.items()))
        remedy = f"pip uninstall {' '.join(sorted(found))}, then pip install {wanted('mindspore')}"
        yield Finding("mindspore", "fault", f"{both} are installed in one folder", remedy)


def plugins() -> Iterator[Finding]:
    """Each installed plugin, by its metadata; none is imported."""
    try:
        from sdxl_host.plugins.discovery import discover, fitting

        installed = discover()
    except Exception as error:
        seen = f"can't be listed: {one_line(error)}"
        yield Finding("plugin", "fault", seen, "mend the packages above")
        return
    for each in installed:
        problem = fitting(each, installed)
        if problem is None:
            yield Finding("plugin", "ok", str(each))
        else:
            seen, _, remedy = problem.rpartition("; ")
            yield Finding("plugin", "fault", f"{each.name}: {seen}", remedy)
    if not installed:
        yield Finding("plugin", "ok", f"none is installed; pip install '{_HOST}[all]' gives four")
