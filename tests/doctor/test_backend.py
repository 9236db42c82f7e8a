"""MindSpore and the device: whatever happens in the child, there is a finding and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_host.doctor import backend
from sdxl_host.doctor.finding import Finding
from sdxl_host.processes import Child

WELL = Child([], "", "")

MINDSPORE = """
import os, sys, types
PYNATIVE_MODE, float32, __version__ = 1, None, "2.10.0"
hal = types.SimpleNamespace(is_available=lambda name: False)
set_device = set_context = lambda *words, **options: None
class Tensor:
    def __init__(self, *words):
        pass
    def __add__(self, other):
        {body}
    def asnumpy(self):
        import numpy
        return numpy.float32([1, 1])
"""


def find_fault(fakes, source: str) -> Finding:
    """The finding about a MindSpore of this source."""
    fakes.module("mindspore", source)
    finding = backend.mindspore(*backend.start())
    assert (finding.name, finding.state) == ("mindspore", "fault")
    return finding


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("raise ImportError('libx.so: gone')", "ImportError: libx.so: gone"),
        ("", "AttributeError: module 'mindspore' has no attribute"),
        ("import sys, os; print('no kernel', file=sys.stderr, flush=True); os._exit(4)",
         "1 operation did not end well: ended with exit code 4, saying: no kernel"),
        ("raise SystemExit", "1 operation did not end well: no result"),
        (MINDSPORE.format(body="raise RuntimeError('bad')"), "RuntimeError: bad"),
        (MINDSPORE.format(body="return self"), "[1, 2] + 1 gave [1.0, 1.0]"),
        (MINDSPORE.format(body="os.abort()"), "1 operation did not end well: ended by SIGABRT"),
    ],
)  # fmt: skip
def test_a_mindspore_that_does_not_work(fakes, source: str, seen: str) -> None:
    finding = find_fault(fakes, source)
    assert finding.seen.startswith(seen)
    assert finding.remedy == (
        "pip install --force-reinstall 'mindspore<2.11,>=2.10' 'numpy<2,>=1.26'"
    )


def test_mindspore_with_numpy_2(fakes) -> None:
    fakes.module("numpy", "__version__ = '2.3.1'")
    finding = find_fault(fakes, MINDSPORE.format(body="return self"))
    assert finding.seen.startswith("numpy 2.3.1 does not work with MindSpore")
    assert finding.remedy == "pip install 'numpy<2'"


def test_a_mindspore_that_hangs(fakes, monkeypatch) -> None:
    monkeypatch.setattr(backend, "TIMEOUT", 1.5)
    assert "no answer within 1.5 s" in find_fault(fakes, "import time; time.sleep(600)").seen


def test_a_mindspore_that_works_and_configs_that_cannot_be_planned(fakes) -> None:
    right = MINDSPORE.format(body="return self").replace("[1, 1]", "[2, 3]")
    fakes.module("mindspore", right)
    report, child = backend.start()
    finding = backend.mindspore(report, child)
    assert finding == Finding("mindspore", "ok", "2.10.0: 1 operation ran on CPU")
    assert "mindspore.nn" in report["needs_error"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for device files and CANN, where neither is yet."""
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(backend, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(backend, "CANN_FOLDERS", (tmp_path / "ascend" / "latest",))
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    return tmp_path


def install_cann(folder: Path, version: str) -> Path:
    (folder / "compiler").mkdir(parents=True)
    (folder / "compiler" / "version.info").write_text(f"x=1\nVersion={version}\n")
    return folder


def test_no_ascend_is_no_fault(machine: Path) -> None:
    (machine / "dev" / "davinci_manager").touch()  # there with the driver, device or not
    finding = backend.device({"device": "CPU"}, WELL)
    assert (finding.state, finding.remedy) == ("ok", "")
    assert finding.seen == f"CPU; no CANN, no Ascend device in {machine / 'dev'}"


def test_an_ascend_and_its_cann(machine: Path, monkeypatch) -> None:
    folder = install_cann(machine / "mine", "8.5.0")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(folder))
    seen = f"Ascend; CANN 8.5.0 at {folder}"
    assert backend.device({"device": "Ascend"}, WELL) == Finding("device", "ok", seen)


def test_an_ascend_that_mindspore_does_not_use(machine: Path) -> None:
    (machine / "dev" / "davinci7").touch()
    finding = backend.device({"device": "CPU"}, Child([], "", "dlopen failed"))
    assert finding.state == "warning"
    assert finding.seen.startswith("CPU; no CANN; MindSpore does not use the Ascend device")
    assert finding.seen.endswith("dlopen failed")
    assert finding.remedy.startswith("install CANN, source its set_env.sh")
    folder = install_cann(machine / "ascend" / "latest", "7.0.1")
    finding = backend.device({"device": "CPU"}, WELL)
    assert f"CANN 7.0.1 at {folder}, whose set_env.sh was not sourced" in finding.seen


def test_the_device_of_a_mindspore_that_does_not_start(machine: Path) -> None:
    finding = backend.device({}, WELL)
    assert (finding.state, finding.remedy) == ("warning", "mend MindSpore first")
    assert finding.seen.startswith("not known, as MindSpore does not start")
