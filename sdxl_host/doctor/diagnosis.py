"""What the doctor finds on this machine and in this installation, as plain data.

It must work where dependencies are missing or broken. So nothing but the standard library is
imported here, and what could crash or hang is left to `trials`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sdxl_host.doctor.trials import SDXL_CONFIG, Need, Trial, try_mindspore, try_packages
from sdxl_host.errors import one_line
from sdxl_host.processes import Child
from sdxl_host.version import __version__

__all__ = ["Finding", "examine"]

PYTHON_FROM, PYTHON_BELOW = (3, 10), (3, 13)
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
DEVICES = Path("/dev")
CANN_FOLDERS = (
    Path("/usr/local/Ascend/cann"),
    Path("/usr/local/Ascend/ascend-toolkit/latest"),
    Path(os.path.expanduser("~/Ascend/cann")),
    Path(os.path.expanduser("~/Ascend/ascend-toolkit/latest")),
)

_HOST = "sdxl-host"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?P<bounds>[^;]*?)\s*(;\s*(?P<marker>.*))?")
# Versions known to be bad, and why.
_KNOWN_BAD = {
    "mindspore": ("!=2.10.*", "it is written for MindSpore 2.10"),
    "numpy": (">=2", "tensor operations of MindSpore 2.10 fail with NumPy 2"),
    "omegaconf": ("<2.4", "OmegaConf 2.3 knows no Literal fields"),
    "transformers": ("<5", "the tokenizer is opened as transformers 5 does it"),
}
_MINDSPORES = ("mindspore", "mindspore-ascend", "mindspore-cpu", "mindspore-dev", "mindspore-gpu")
# Variable, pattern of harmful values, harm.
_SETTINGS = (
    ("MS_DEV_HOST_BLOCKING_RUN", "0", "MindSpore's main thread waits by spinning and takes a core"),
    (
        "ONEDNN_MAX_CPU_ISA",
        "DEFAULT|ALL|AVX512.*|AVX10.*",
        "opts out of AVX2, so on a CPU with AVX-512 a training step takes 10 to 25 times as long",
    ),
    (
        "MS_COMPILER_CACHE_ENABLE",
        "1",
        "a graph compiled for other code may be taken from the cache",
    ),
)
# Below CGROUP, in its versions 2 and 1: the limit, what is used, and in which field of which file
# stands how much of that holds copies of files.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
_PLAN = f"sdxl-host plan --config {SDXL_CONFIG} shows what is needed"
_FIRST = "mend MindSpore first"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, how it is, what was seen, and how to mend it."""

    name: str
    state: Literal["ok", "warning", "fault"]
    seen: str
    remedy: str = ""


def examine(save_path: Path, announce: Callable[[str], None]) -> Iterator[Finding]:
    """The findings, one after another; `announce` is told before what takes seconds."""
    yield host()
    yield python()
    required = requirements()
    announce("importing the packages in a process of their own; this takes some seconds")
    trials = try_packages(list(required))
    for name, bounds in required.items():
        yield package(name, bounds, trials[name])
    yield from rivals()
    yield from environment(os.environ)
    announce("starting MindSpore in a process of its own; this takes some seconds")
    told, child = try_mindspore()
    yield mindspore(told, child)
    yield device(told, child)
    if "attention" in told:
        yield attention(told["attention"])
    needs = [Need(*numbers) for numbers in told.get("needs", ())]
    if told.get("operation") == "right" and not needs:
        yield unplanned(told, child)
    yield processors()
    yield memory(needs, told.get("device"))
    yield from save_folder(save_path, needs)
    yield temporary_folder()
    yield from plugins()


# ---- versions


def host() -> Finding:
    """sdxl-host itself."""
    seen = f"{__version__} in {Path(__file__).parents[1]}"
    recorded = _version(_HOST)
    if recorded is None:
        return Finding(
            _HOST,
            "warning",
            f"{seen}, which is not installed, so what it depends on is not known",
            "pip install -e . in the folder of its pyproject.toml",
        )
    if recorded != __version__:
        return Finding(
            _HOST,
            "warning",
            f"{seen}, but {recorded} is installed",
            f"pip install --upgrade {_HOST}, or pip install -e . in its checkout; see that "
            "PYTHONPATH names no other",
        )
    return Finding(_HOST, "ok", seen)


def python() -> Finding:
    """The interpreter."""
    seen = f"{platform.python_version()} at {sys.executable}"
    if PYTHON_FROM <= sys.version_info[:2] < PYTHON_BELOW:
        return Finding("python", "ok", seen)
    low, high = PYTHON_FROM[1], PYTHON_BELOW[1] - 1
    return Finding(
        "python",
        "fault",
        f"{seen}; MindSpore and sdxl-host need 3.{low} to 3.{high}",
        "make an environment with one of these (python3.11 -m venv NAME) and install there",
    )


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


def package(name: str, bounds: str, trial: Trial) -> Finding:
    """A package that sdxl-host depends on, against the bounds it declares."""
    recorded = _version(name)
    install = f"pip install '{name}{bounds}'"
    again = f"pip install --force-reinstall '{name}{bounds}'"
    if trial.error is not None and recorded is None:
        seen = f"{name} is not installed (needs {bounds})"
        return Finding("package", "fault", seen, install)
    version = trial.version or recorded
    seen = f"{name} {version or 'of unknown version'}"
    if trial.version and recorded and trial.version != recorded:
        seen = f"{name} {trial.version} (installed is {recorded})"
    stray = None if trial.file is None else _stray(name, Path(trial.file))
    if stray:
        seen += f" from {stray}"
        # What pip would install would be shadowed too.
        install = again = f"take {stray} off PYTHONPATH, or what shadows {name} out of it"
    if trial.error is not None:
        return Finding("package", "fault", f"{seen} can't be imported: {trial.error}", again)
    if recorded is None:
        seen += " can be imported, but is not installed"
        return Finding("package", "fault", seen, install)
    fits, why = _judge(name, version, bounds)
    if not fits:
        return Finding("package", "fault", f"{seen}; needs {bounds}{why}", install)
    if stray:
        return Finding("package", "warning", f"{seen}, not from its own package", install)
    return Finding("package", "ok", f"{seen} (needs {bounds}){why}")


def _wanted(name: str) -> str:
    """A package with its bounds, as pip takes it."""
    return f"'{name}{requirements().get(name, '')}'"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, UnicodeDecodeError):
        return None


def _judge(name: str, version: str | None, bounds: str) -> tuple[bool, str]:
    """Whether a version is within its bounds, and what is to be added to that."""
    try:
        from packaging.specifiers import SpecifierSet
        from packaging.version import Version
    except Exception:
        return True, ", not compared: packaging can't be imported"
    try:
        number = Version(version or "")
    except ValueError:
        return False, ", and that is no version"
    if SpecifierSet(bounds).contains(number, prereleases=True):
        return True, ""
    bad, why = _KNOWN_BAD.get(name, ("", ""))
    known = why and SpecifierSet(bad).contains(number, prereleases=True)
    return False, f": {why}" if known else ""


def _stray(name: str, file: Path) -> str | None:
    """The folder that a package is imported from, where that is not its own place."""
    file = file.resolve()
    places = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")}
    if any(file.is_relative_to(place) for place in places):
        return None
    for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if entry and file.is_relative_to(Path(entry).resolve()):
            return entry
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    if distribution.read_text("direct_url.json"):
        return None  # an editable install lies where its author put it
    place = Path(str(distribution.locate_file(""))).resolve()
    return None if file.is_relative_to(place) else str(file.parent)


def rivals() -> Iterator[Finding]:
    """Packages that all provide MindSpore: what is imported is then a mixture of them."""
    found = {}
    for each in metadata.distributions():
        try:
            name = (each.metadata["Name"] or "").lower().replace("_", "-")
            modules = (each.read_text("top_level.txt") or "").split()
        except UnicodeDecodeError as error:
            folder = getattr(each, "_path", None) or each.locate_file("")
            seen = f"the metadata in {folder} can't be read: {one_line(error)}"
            yield Finding(
                "package", "warning", seen, "delete this folder, or install the package again"
            )
            continue
        if name in _MINDSPORES or "mindspore" in modules:
            found.setdefault(name, each.version)
    if len(found) > 1:
        yield Finding(
            "mindspore",
            "fault",
            f"{' and '.join(f'{n} {v}' for n, v in sorted(found.items()))} are both installed, in "
            "one folder",
            f"pip uninstall {' '.join(sorted(found))}, then pip install {_wanted('mindspore')}",
        )


def environment(variables: Mapping[str, str]) -> Iterator[Finding]:
    """Settings of the environment that are known to do harm."""
    for name, pattern, harm in _SETTINGS:
        value = variables.get(name, "")
        if re.fullmatch(pattern, value, re.IGNORECASE):
            yield Finding("environment", "warning", f"{name}={value}: {harm}", f"unset {name}")


# ---- MindSpore


def mindspore(told: dict[str, Any], child: Child) -> Finding:
    """MindSpore, by an operation it ran."""
    if told.get("operation") == "right":
        backends = " and ".join(told["backends"])
        return Finding(
            "mindspore",
            "ok",
            f"{told['version']}, build {told['build']}, for {backends}: 1 operation ran on "
            f"{told['device']}",
        )
    seen = told.get("error") or f"the process of 1 operation {_past(child.cause)}"
    again = f"pip install --force-reinstall {_wanted('mindspore')} {_wanted('numpy')}"
    return Finding("mindspore", "fault", seen, told.get("remedy") or again)


def _past(cause: str) -> str:
    return f"gave {cause}" if cause.startswith("no answer") else cause or "said nothing"


def device(told: dict[str, Any], child: Child) -> Finding:
    """Where a run would compute, and why not on Ascend."""
    chosen = told.get("device")
    if chosen == "Ascend":
        return Finding("device", "ok", f"Ascend; {_cann()}")
    here = f"{chosen}; " if chosen else "not known, as MindSpore does not start; "
    if not any(DEVICES.glob("davinci[0-9]*")):
        seen = f"{here}no Ascend device in {DEVICES}; {_cann()}"
        return Finding("device", "ok" if chosen else "warning", seen, "" if chosen else _FIRST)
    script = _set_env()
    seen = f"{here}there is an Ascend device in {DEVICES}, which MindSpore does not take; {_cann()}"
    if child.last:
        seen += f"; it says: {child.last}"
    remedy = (
        f"source {script}, and see that MindSpore {told.get('version', '2.10')} supports this CANN"
        if script
        else "install CANN and source its set_env.sh"
    )
    return Finding("device", "warning", seen, remedy)


def _cann() -> str:
    home = os.environ.get("ASCEND_HOME_PATH", "")
    folder = Path(home) if home else next((f for f in CANN_FOLDERS if f.is_dir()), None)
    if folder is None:
        return "no CANN"
    file = folder / "compiler" / "version.info"  # which MindSpore itself reads
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    numbers = [line.partition("=")[2] for line in lines if line.startswith("Version=")]
    loaded = "" if home else ", whose set_env.sh was not sourced"
    return f"CANN {numbers[0] if numbers else 'of unknown version'} at {folder}{loaded}"


def _set_env() -> Path | None:
    """The script that sets CANN's environment."""
    home = os.environ.get("ASCEND_HOME_PATH")
    folders = [*([Path(home)] if home else []), *CANN_FOLDERS]
    scripts = (place / "set_env.sh" for f in folders for place in (f, f.parent))
    return next((script for script in scripts if script.is_file()), None)


def attention(by_level: dict[str, str]) -> Finding:
    """What self-attention runs as at each precision."""
    levels: dict[str, list[str]] = {}
    for level, used in by_level.items():
        levels.setdefault(used, []).append(level)
    seen = "; ".join(f"{' and '.join(names)}: {used}" for used, names in levels.items())
    return Finding("attention", "ok", seen)


def unplanned(told: dict[str, Any], child: Child) -> Finding:
    """The packaged configs, where MindSpore works and yet they can't be planned."""
    return Finding(
        "configs",
        "fault",
        f"the packaged ones can't be planned: {told.get('needs_error') or child.cause}",
        f"mend the packages above, or pip install --force-reinstall {_HOST}",
    )


# ---- the machine


def processors() -> Finding:
    """Processors that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seen = f"{count} that this process may use, of {os.cpu_count()}"
    share = _numbers(CGROUP / "cpu.max")
    if len(share) == 2:
        seen += f"; limited to the time of {share[0] / share[1]:g}"
    return Finding("processors", "ok", seen)


def memory(needs: Sequence[Need], chosen: str | None) -> Finding:
    """The machine's memory against what the packaged configs need."""
    total, available = _memory()
    seen = f"{_gib(total)}, {_gib(available)} of it available" if total else "of unknown size"
    if not needs:
        return Finding("memory", "ok", seen)
    small, large = needs
    seen += (
        f"; {small.config} needs {_gib(small.memory)} and {large.config} {_gib(large.memory)}, "
        f"activations not counted"
    )
    if chosen == "Ascend":
        seen += ", in the device's own memory"
    elif total and available < small.memory:
        return Finding("memory", "fault", seen, "end other programs, or take a larger machine")
    elif total and available < large.memory:
        remedy = f"for SDXL itself, take a machine with more; {_PLAN}"
        return Finding("memory", "warning", seen, remedy)
    return Finding("memory", "ok", seen)


def _memory() -> tuple[int, int]:
    """(total, available) bytes, of the container where it has a limit; zeros where not known."""
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text("ascii").splitlines())
        total, available = (
            1024 * int(fields[key].split()[0]) for key in ("MemTotal", "MemAvailable")
        )
    except (OSError, KeyError, ValueError):
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return 0, 0
        total = available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for names in _MEMORY_FILES:
        limit, used = (_numbers(CGROUP / name) for name in names[:2])
        if limit:
            # Copies of files are given up for who needs the memory.
            cached = _field(CGROUP / names[2], names[3])
            total = min([total, *limit])
            available = min(available, max(0, limit[0] - max(0, sum(used) - cached)))
    return total, available


def _numbers(file: Path) -> list[int]:
    """The numbers in a file of the control group; none where it is not there or sets no limit."""
    try:
        words = file.read_text("ascii").split()
    except OSError:
        return []
    return [int(word) for word in words] if all(word.isdigit() for word in words) else []


def _field(file: Path, name: str) -> int:
    """The number behind a name in a file of the control group; 0 where it is not there."""
    try:
        lines = [line.split() for line in file.read_text("ascii").splitlines()]
    except OSError:
        return 0
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


# ---- folders


def save_folder(path: Path, needs: Sequence[Need]) -> Iterator[Finding]:
    """Where runs would be written: access, space, and the links that checkpoints use."""
    # The folder itself is made by a run; what is tried is the nearest one that is there.
    folder = path.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        yield Finding(
            "save_path", "fault", f"{path}: {folder} is no folder", "give another --save_path"
        )
        return
    try:
        probe = Path(tempfile.mkdtemp(prefix=".sdxl-host-doctor-", dir=folder))
    except OSError as error:
        seen = f"{path}: can't be written ({error.strerror})"
        yield Finding("save_path", "fault", seen, "give another --save_path, or mend its rights")
        return
    try:
        yield _space(path, folder, probe, needs)
        yield _links(probe)
    finally:
        shutil.rmtree(probe)


def _space(path: Path, folder: Path, probe: Path, needs: Sequence[Need]) -> Finding:
    from sdxl_host.files.atomic import sync, write_new

    free = shutil.disk_usage(folder).free
    seen = f"{path}: can be written, {_gib(free)} free"
    try:
        write_new(probe / "file", b"sdxl-host")
        sync(probe)
    except OSError as error:
        seen = f"{path}: a file can't be written ({error.strerror}), {_gib(free)} free"
        return Finding("save_path", "fault", seen, "make room, or give another --save_path")
    if not needs:
        return Finding("save_path", "ok", seen)
    small, large = needs
    seen += f"; a checkpoint of {large.config} takes {_gib(large.checkpoint)}"
    if free < small.checkpoint:
        return Finding("save_path", "fault", seen, "make room, or give another --save_path")
    if free < large.checkpoint:
        remedy = "for SDXL itself, make room or give another --save_path"
        return Finding("save_path", "warning", seen, remedy)
    return Finding("save_path", "ok", seen)


def _links(probe: Path) -> Finding:
    another = "give a --save_path on another file system"
    try:
        (probe / "latest.new").symlink_to("target", target_is_directory=True)
        os.replace(probe / "latest.new", probe / "latest")
    except OSError as error:
        seen = f"no symbolic links there ({error.strerror}), and `latest` is one"
        return Finding("links", "fault", seen, another)
    try:
        (probe / "first").touch()
        os.link(probe / "first", probe / "second")
    except OSError as error:
        seen = f"no hard links there ({error.strerror}): each checkpoint has its own frozen weights"
        return Finding("links", "warning", seen, another)
    return Finding("links", "ok", "hard and symbolic links work there, as checkpoints use them")


def temporary_folder() -> Finding:
    """Where MindSpore and others keep what they need for a while."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "file").write_bytes(b"sdxl-host")
            place = Path(folder).parent
            seen = f"{place}: can be written, {_gib(shutil.disk_usage(place).free)} free"
    except OSError as error:
        seen = f"no folder can be written ({error.strerror})"
        return Finding("temporary", "fault", seen, "set TMPDIR to a folder that can be written")
    return Finding("temporary", "ok", seen)


# ---- plugins


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
