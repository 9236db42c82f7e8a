"""Python in a process of its own: how it ended is told, and nothing of it stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sdxl_host import processes


def run(call: str, seconds: float = 60.0) -> processes.Child:
    return processes.run_child("processes", call, seconds)


@pytest.mark.parametrize(
    ("call", "end", "last"),
    [
        ("os.abort()", "ended by SIGABRT", ""),
        ("sys.exit(3)", "ended with exit code 3", ""),
        ("sys.exit('first\\nlast \\n\\n')", "ended with exit code 1", "last"),
        ("os", "", ""),
    ],
)
def test_how_a_process_ended_is_told(call: str, end: str, last: str) -> None:
    child = run(call)
    assert (child.end, child.last, child.is_late) == (end, last, False)


def has_ended(process: int) -> bool:
    """Also where it waits for its parent to see it."""
    try:
        return Path(f"/proc/{process}/stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("wait", [True, False])
def test_what_a_process_started_ends_with_it(wait: bool) -> None:
    """Whether it hangs or ends well; its own child holds what it writes to."""
    sleep = "sdxl_host.processes.subprocess.Popen(['sleep', '600'])"
    start = f"tell(process=(child := {sleep}).pid)"
    call = f"{start}; child.wait()" if wait else start
    child = run(call, 10.0 if wait else 60.0)
    assert child.end == ("no answer within 10 s" if wait else "")
    assert child.is_late == wait
    (record,) = child.records
    end = time.monotonic() + 60
    while not has_ended(record["process"]):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_interrupt_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(self: processes.subprocess.Popen[bytes], _: float | None = None) -> int:
        if not started:
            started.append(self.pid)
            raise KeyboardInterrupt
        return wait(self)

    wait = processes.subprocess.Popen.wait
    monkeypatch.setattr(processes.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("subprocess.run(['sleep', '600'])")
    assert has_ended(started[0])


def test_it_reads_nothing_of_ours() -> None:
    """Asked for more, it would take the words of who calls the program."""
    reading, writing = os.pipe()
    os.write(writing, b"words")
    os.close(writing)
    kept = os.dup(0)
    os.dup2(reading, 0)
    try:
        child = run("tell(read=sys.stdin.read())")
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(reading)
    assert child.records == [{"read": ""}]


def test_it_has_our_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the folder it starts in."""
    (tmp_path / "json.py").write_text("raise RuntimeError('not the one')", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes.sys, "path", [place for place in processes.sys.path if place])
    child = run("tell(path=sys.path)")
    assert (child.end, child.records) == ("", [{"path": processes.sys.path}])


def test_only_whole_lines_of_our_own_are_read() -> None:
    mark = processes._MARK
    text = f'noise\n{mark}{{"a": 1}}\n {mark}x\n{mark}{{"b'
    assert run(f"sys.stdout.write({text!r})").records == [{"a": 1}]


def test_what_is_told_reaches_us_whatever_is_done_to_standard_output() -> None:
    replaced = "sys.stdout.write('no end'); sys.stdout = None"
    call = f"{replaced}; sdxl_host.processes.tell(kind=sys.__class__)"
    assert run(call).records == [{"kind": "<class 'module'>"}]


def test_without_files_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert run("tell(a=1)").records == [{"a": 1}]
