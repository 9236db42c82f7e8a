"""Environment variables, memory and the folder of runs, each against what would harm a run."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from sdxl_host.doctor import machine as checks
from sdxl_host.doctor.finding import Finding

GIB = 2**30
NEEDS = [("small.yaml", GIB, GIB // 2), ("large.yaml", 40 * GIB, 30 * GIB)]


@pytest.mark.parametrize(
    ("name", "harmless", "harmful"),
    [
        ("MS_DEV_HOST_BLOCKING_RUN", "1", "0"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "default"),
        ("ONEDNN_MAX_CPU_ISA", "SSE41", "AVX512_CORE_AMX"),
        ("MS_COMPILER_CACHE_ENABLE", "0", "1"),
    ],
)
def test_harmful_environment_variables(name: str, harmless: str, harmful: str) -> None:
    assert list(checks.environment({name: harmless})) == []
    (finding,) = checks.environment({name: harmful})
    assert (finding.state, finding.remedy) == ("warning", f"unset {name}")
    assert finding.seen.startswith(f"{name}={harmful}: ")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of files, whose memory and limits are not known."""
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(checks, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(checks, "CGROUP", tmp_path / "cgroup")
    return tmp_path


def set_memory(machine: Path, total: int, available: int) -> None:
    text = f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\n"
    (machine / "meminfo").write_text(text)


@pytest.mark.parametrize(
    ("available", "device", "state", "remedy"),
    [
        (50 * GIB, "CPU", "ok", ""),
        (39 * GIB, "CPU", "warning", "for SDXL itself, take a larger machine"),
        (GIB // 2, "CPU", "fault", "end other programs"),
        (GIB // 2, "Ascend", "ok", ""),
    ],
)
def test_memory_against_what_configs_need(machine: Path, available, device, state, remedy) -> None:
    set_memory(machine, 64 * GIB, available)
    finding = checks.memory(NEEDS, device)
    assert (finding.state, bool(finding.remedy)) == (state, bool(remedy))
    assert finding.remedy.startswith(remedy)
    assert finding.seen.startswith(f"64.00 GiB, {available / GIB:.2f} GiB of it available; small.")
    assert "large.yaml 40.00 GiB" in finding.seen


def test_memory_where_less_is_known(machine: Path) -> None:
    assert checks.memory(NEEDS, "CPU").state == "ok"
    assert checks.memory(NEEDS, "CPU").seen.startswith("of unknown size; small.yaml")
    set_memory(machine, GIB, GIB // 2)
    seen = "1.00 GiB, 0.50 GiB of it available"
    assert checks.memory([], None) == Finding("memory", "ok", seen)


@pytest.mark.parametrize(
    ("folder", "limit", "used", "copies"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_memory_of_a_container(machine: Path, folder, limit, used, copies) -> None:
    """What it uses is not available, but for copies of files, which the system drops."""

    def seen() -> str:
        return checks.memory(NEEDS, "CPU").seen.partition(" of it")[0]

    set_memory(machine, 64 * GIB, 60 * GIB)
    place = machine / "cgroup" / folder
    place.mkdir(exist_ok=True)
    (place / limit).write_text("max\n")
    assert seen() == "64.00 GiB, 60.00 GiB"
    (place / limit).write_text(f"{8 * GIB}\n")
    assert seen() == "8.00 GiB, 8.00 GiB"
    (place / used).write_text(f"{5 * GIB}\n")
    assert seen() == "8.00 GiB, 3.00 GiB"
    (place / "memory.stat").write_text(f"anon {4 * GIB}\n{copies} {GIB}\n")
    assert seen() == "8.00 GiB, 4.00 GiB"
    (place / "memory.stat").write_text(f"{copies} {6 * GIB}\n")
    assert seen() == "8.00 GiB, 8.00 GiB"
    set_memory(machine, 64 * GIB, 2 * GIB)
    assert seen() == "8.00 GiB, 2.00 GiB"
    (place / limit).write_text("4096\n")
    (place / "memory.stat").unlink()
    assert seen() == "0.00 GiB, 0.00 GiB"


@pytest.mark.parametrize(
    ("free", "state", "remedy"),
    [
        (50 * GIB, "ok", ""),
        (29 * GIB, "warning", "for SDXL itself, make room, or give another --save_path"),
        (GIB // 4, "fault", "make room, or give another --save_path"),
    ],
)
def test_a_folder_and_its_space(tmp_path, monkeypatch, free, state, remedy) -> None:
    """Nothing is left behind, and the folder itself is not made."""
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    finding = checks.save_folder(tmp_path / "not" / "there", NEEDS)
    assert (finding.state, finding.remedy) == (state, remedy)
    assert f"can be written, {free / GIB:.2f} GiB free" in finding.seen
    assert "of large.yaml takes 30.00 GiB" in finding.seen
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_needs_are_not_known(tmp_path: Path) -> None:
    finding = checks.save_folder(tmp_path, [])
    assert (finding.state, finding.seen.endswith("GiB free")) == ("ok", True)


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path in ("file", "file/runs", "link"):
        finding = checks.save_folder(tmp_path / path, NEEDS)
        assert (finding.name, finding.state) == ("save_path", "fault")
        assert f"a folder can't be made in {tmp_path / path.split('/')[0]} (" in finding.seen


@pytest.mark.parametrize(
    ("owner", "name", "what", "state"),
    [
        (os, "mkdir", "a folder", "fault"),
        (Path, "write_bytes", "a file", "fault"),
        (Path, "symlink_to", "a symbolic link", "fault"),
        (os, "link", "a hard link", "warning"),
    ],
)
def test_a_file_system_that_refuses(tmp_path, monkeypatch, owner, name, what, state) -> None:
    def refuse(*words: object, **options: object) -> None:
        raise OSError(errno.EPERM, "not allowed")

    monkeypatch.setattr(owner, name, refuse)
    finding = checks.save_folder(tmp_path, NEEDS)
    assert (finding.state, "--save_path" in finding.remedy) == (state, True)
    assert f"{what} can't be made in {tmp_path} (not allowed)" in finding.seen
    assert list(tmp_path.iterdir()) == []
