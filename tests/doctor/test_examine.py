"""The doctor's whole examination, here and in an installation in ruins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdxl_host
from sdxl_host.doctor import backend, packages
from sdxl_host.doctor.examine import examine
from sdxl_host.doctor.finding import Finding
from sdxl_host.processes import Child

HOST = str(Path(sdxl_host.__file__).parents[1])


def python(words: list[str], path: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with `path` as its PYTHONPATH, in `folder`."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(("report", "end"), [({"needs_error": "gone"}, ""), ({}, "gone")])
def test_configs_that_cannot_be_planned(tmp_path, monkeypatch, report, end) -> None:
    """MindSpore works, and yet planning fails or ends its process."""
    works = {"works": True, "version": "2.10.0", "device": "CPU", **report}
    monkeypatch.setattr(packages, "import_all", lambda names: {})
    monkeypatch.setattr(backend, "start", lambda: (works, Child([], end, "")))
    found = {each.name: each for each in examine(tmp_path, lambda text: None)}
    assert found["configs"].state == "fault"
    assert found["configs"].seen.endswith("can't be planned: gone")
    assert found["configs"].remedy.startswith("mend the packages above")
    assert found["memory"].state == found["save_path"].state == "ok"


RUN = (
    "import sys; from sdxl_host.cli import main; code = main(['doctor', '--save_path', 'runs']); "
    "print({'mindspore', 'numpy', 'transformers', 'omegaconf'} & set(sys.modules)); sys.exit(code)"
)


def test_this_machine(tmp_path: Path) -> None:
    """A real operation runs in the child, and nothing heavy is imported here."""
    done = python(["-c", RUN], HOST, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, imported = done.stdout.splitlines()
    assert imported == "set()"
    rows = {line[:12].strip(): line[12:] for line in lines}
    assert "1 operation ran on" in rows["mindspore"]
    assert re.search(r"default\.yaml needs 0\.08 GiB and .*910b\.yaml 41\.62 GiB", rows["memory"])
    assert "takes 32.05 GiB" in rows["save_path"]
    for name in ("sdxl-host", "python", "package", "device", "plugin"):
        assert rows[name]
    # What takes seconds is said before it is done.
    words = [line.split()[0] for line in lines]
    starts = [index for index, word in enumerate(words) if word == "looking"]
    assert [words[index + 1] for index in starts] == ["package", "mindspore"]
    assert list(tmp_path.iterdir()) == []


def test_an_installation_in_ruins(fakes, monkeypatch) -> None:
    """Every dependency is broken: each is a finding, none a traceback, and help still helps."""
    fakes.module("numpy", "__version__ = '2.1.0'")
    for name in ("mindspore", "omegaconf", "transformers", "packaging", "pluggy", "yaml"):
        fakes.module(name, f"raise ImportError('no {name}')")
    fakes.module("importlib_metadata", "raise RuntimeError('torn')")
    fakes.package("mindspore-ascend", "2.6.0")
    monkeypatch.setenv("MS_DEV_HOST_BLOCKING_RUN", "0")
    path = os.pathsep.join([str(fakes.folder), HOST])
    done = python(["-m", "sdxl_host", "doctor", "--json"], path, fakes.folder)
    assert (done.returncode, done.stderr) == (2, "")
    found = [Finding(**row) for row in json.loads(done.stdout)]
    at_fault = {finding.seen.split()[0] for finding in found if finding.state == "fault"}
    assert {"omegaconf", "transformers", "packaging", "pluggy", "pyyaml"} <= at_fault
    seen = "\n".join(finding.seen for finding in found)
    assert "can't be imported: ImportError: no omegaconf" in seen
    assert "numpy 2.1.0 is imported from" in seen
    assert "can't be listed: RuntimeError: torn" in seen
    twice, start = [finding for finding in found if finding.name == "mindspore"]
    assert "mindspore-ascend 2.6.0" in twice.seen
    assert (twice.state, start.state) == ("fault", "fault")
    names = {finding.name for finding in found}
    assert {"environment", "device", "memory", "save_path"} <= names
    for finding in found:
        assert bool(finding.remedy) == (finding.state != "ok")
    helped = python(["-m", "sdxl_host", "--help"], path, fakes.folder)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.startswith("usage: sdxl-host COMMAND")
