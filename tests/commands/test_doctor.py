"""`sdxl-host doctor`: the findings as text and as JSON, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdxl_host.cli import main
from sdxl_host.commands import doctor as command
from sdxl_host.doctor.finding import Finding

OK = Finding("device", "ok", "CPU")
WARNING = Finding("memory", "warning", "little", "buy some")
FAULT = Finding("package", "fault", "numpy 2", "pip install 'numpy<2'")


def stub(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> list[Path]:
    """Makes `examine` find these; returns the list of paths that it is asked about."""
    asked: list[Path] = []

    def examine(save_path, announce):
        asked.append(save_path)
        announce("starting")
        yield from findings

    monkeypatch.setattr(command, "examine", examine)
    return asked


@pytest.mark.parametrize(
    ("findings", "code", "summary"),
    [
        ([OK], 0, "nothing is at fault"),
        ([OK, WARNING], 0, "1 warning"),
        ([FAULT, WARNING, FAULT, OK], 2, "2 faults, 1 warning"),
    ],
)
def test_the_exit_code_and_the_last_line(monkeypatch, capsys, findings, code, summary) -> None:
    stub(monkeypatch, *findings)
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines()[-1] == f"doctor      {summary}"
    assert main(["doctor", "--json"]) == code


def test_the_text_is_a_line_a_finding_and_its_remedy_below(monkeypatch, capsys) -> None:
    asked = stub(monkeypatch, OK, FAULT)
    assert main(["doctor", "--save_path", "~/x"]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "looking     starting",
        "device      CPU",
        "package     fault: numpy 2",
        "              pip install 'numpy<2'",
        "doctor      1 fault",
    ]
    assert asked == [Path("~/x").expanduser()]


def test_json_is_the_findings_and_nothing_else(monkeypatch, capsys) -> None:
    asked = stub(monkeypatch, OK, FAULT)
    assert main(["doctor", "--json"]) == 2
    first, second = json.loads(capsys.readouterr().out)
    assert first == {"name": "device", "state": "ok", "seen": "CPU", "remedy": ""}
    assert Finding(**second) == FAULT
    assert asked == [Path("runs")]
