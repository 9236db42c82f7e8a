"""The machine: harmful environment variables, memory, and the folder that runs are written to."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sdxl_host.doctor.finding import Finding

__all__ = ["environment", "memory", "save_folder"]

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

# (config, bytes of memory, bytes of a checkpoint), the smallest first and SDXL's last.
Needs = Sequence[tuple[str, int, int]]

# Variable, pattern of harmful values, harm.
_HARMFUL = (
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
# Of a container, in versions 2 and 1 of control groups: its limit, what it uses, the file with the
# details of that, and which detail counts copies of files.
_CONTAINER = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def environment(variables: Mapping[str, str]) -> Iterator[Finding]:
    """Environment variables that are known to do harm."""
    for name, pattern, harm in _HARMFUL:
        value = variables.get(name, "")
        if re.fullmatch(pattern, value, re.IGNORECASE):
            yield Finding("environment", "warning", f"{name}={value}: {harm}", f"unset {name}")


def memory(needs: Needs, device: str | None) -> Finding:
    """The machine's memory against what the packaged configs need."""
    total, available = _memory()
    seen = f"{_gib(total)}, {_gib(available)} of it available" if total else "of unknown size"
    if not needs:
        return Finding("memory", "ok", seen)
    (small, least, _), (large, most, _) = needs
    seen += f"; {small} needs {_gib(least)} and {large} {_gib(most)}, activations not counted"
    if device == "Ascend":
        return Finding("memory", "ok", f"{seen}, in the device's own memory")
    if total and available < least:
        return Finding("memory", "fault", seen, "end other programs, or take a larger machine")
    if total and available < most:
        remedy = f"for SDXL itself, take a larger machine; see sdxl-host plan --config {large}"
        return Finding("memory", "warning", seen, remedy)
    return Finding("memory", "ok", seen)


def _memory() -> tuple[int, int]:
    """(total, available) bytes, of the container where it has a limit; zeros where not known."""
    total, available = (1024 * _number(MEMINFO, name) for name in ("MemTotal:", "MemAvailable:"))
    for limit_file, used_file, details, copies in _CONTAINER:
        limit = _number(CGROUP / limit_file)
        if limit:
            # The system drops copies of files when memory is needed.
            used = _number(CGROUP / used_file) - _number(CGROUP / details, copies)
            total, available = min(total, limit), min(available, max(0, limit - max(0, used)))
    return total, available


def _number(file: Path, name: str = "") -> int:
    """The number after a name in a file, or else its first word; 0 where there is none."""
    try:
        words = file.read_text("ascii").split()
        word = words[words.index(name) + 1] if name else words[0]
    except (OSError, ValueError, IndexError):
        return 0
    return int(word) if word.isdigit() else 0


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def save_folder(path: Path, needs: Needs) -> Finding:
    """Where runs would be written: whether what a checkpoint uses can be made, and has room."""
    room = "make room, or give another --save_path"
    # A run makes the folder itself, so the nearest one that is there is tried.
    folder = path.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    making = "a folder"
    try:
        with tempfile.TemporaryDirectory(prefix=".sdxl-host-doctor-", dir=folder) as made:
            probe = Path(made)
            free = shutil.disk_usage(probe).free
            making = "a file"
            (probe / "file").write_bytes(b"sdxl-host")
            making = "a symbolic link"  # as `latest` is
            (probe / "latest").symlink_to("file")
            making = "a hard link"  # by which checkpoints share frozen weights
            os.link(probe / "file", probe / "link")
    except OSError as error:
        seen = f"{path}: {making} can't be made in {folder} ({error.strerror})"
        # Without hard links checkpoints are whole, and larger.
        state = "warning" if making == "a hard link" else "fault"
        remedy = "give a --save_path with room and on a file system that has these"
        return Finding("save_path", state, seen, remedy)
    seen = f"{path}: can be written, {_gib(free)} free"
    if not needs:
        return Finding("save_path", "ok", seen)
    (_, _, least), (large, _, most) = needs
    seen += f"; a checkpoint of {large} takes {_gib(most)}"
    if free < least:
        return Finding("save_path", "fault", seen, room)
    if free < most:
        return Finding("save_path", "warning", seen, f"for SDXL itself, {room}")
    return Finding("save_path", "ok", seen)
