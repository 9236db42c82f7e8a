"""What is installed: each fault, injected, is found and comes with its remedy."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

import sdxl_host
from sdxl_host.doctor import packages
from sdxl_host.doctor.finding import Finding
from sdxl_host.doctor.packages import Imported
from sdxl_host.version import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip has installed nothing."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(metadata, "requires", missing)


def test_the_host_and_its_folder() -> None:
    finding = packages.host()
    assert (finding.name, finding.state, finding.remedy) == ("sdxl-host", "ok", "")
    assert finding.seen == f"{__version__} in {Path(sdxl_host.__file__).parent}"


def test_a_host_that_is_not_what_pip_installed(fakes) -> None:
    fakes.package("sdxl-host", "0.0.1")
    finding = packages.host()
    assert (finding.state, "but 0.0.1 is installed" in finding.seen) == ("warning", True)
    assert "PYTHONPATH" in finding.remedy


def test_a_host_that_is_not_installed(nothing_installed) -> None:
    finding = packages.host()
    assert (finding.state, "pip has not installed" in finding.seen) == ("warning", True)
    assert finding.remedy.startswith("pip install -e .")
    assert packages.requirements() == {}


def test_the_interpreter_is_within_what_our_package_declares() -> None:
    """The bounds stand here a second time, because metadata may be what is broken."""
    low, high = (f"{a}.{b}" for a, b in (packages.PYTHON_FROM, packages.PYTHON_BELOW))
    assert f'requires-python = ">={low},<{high}"' in (ROOT / "pyproject.toml").read_text()
    assert packages.python().state == "ok"


@pytest.mark.parametrize("bounds", [((3, 8), (3, 10)), ((3, 99), (3, 101))])
def test_another_interpreter_is_a_fault(monkeypatch: pytest.MonkeyPatch, bounds) -> None:
    monkeypatch.setattr(packages, "PYTHON_FROM", bounds[0])
    monkeypatch.setattr(packages, "PYTHON_BELOW", bounds[1])
    finding = packages.python()
    assert finding.state == "fault"
    assert f"need 3.{bounds[0][1]} to 3.{bounds[1][1] - 1}" in finding.seen
    assert "python3.11 -m venv" in finding.remedy


def test_what_is_required_comes_from_our_own_metadata() -> None:
    required = packages.requirements()
    assert required["numpy"] == "<2,>=1.26"
    assert {"mindspore", "omegaconf", "transformers", "pluggy", "pillow"} <= set(required)
    assert not [name for name in required if name.startswith("sdxl-")]  # the extras


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("numpy", "2.1.0", "NumPy 2"),
        ("mindspore", "2.6.0", "MindSpore 2.10"),
        ("pluggy", "1.0.0", ""),
        ("pluggy", "newest", ""),
    ],
)
def test_a_version_out_of_bounds(fakes, name: str, version: str, reason: str) -> None:
    fakes.package(name, version)
    bounds = packages.requirements()[name]
    finding = packages.package(name, bounds, Imported(version))
    assert (finding.name, finding.state) == ("package", "fault")
    assert finding.seen.startswith(f"{name} {version}; needs {bounds}")
    assert reason in finding.seen
    assert finding.remedy == f"pip install '{name}{bounds}'"


def test_a_version_within_bounds(fakes) -> None:
    fakes.package("numpy", "1.26.9")
    finding = packages.package("numpy", "<2,>=1.26", Imported())
    assert finding == Finding("package", "ok", "numpy 1.26.9 (needs <2,>=1.26)")


def test_a_package_that_is_missing(nothing_installed) -> None:
    finding = packages.package("safetensors", ">=0.4.3", Imported(error="No module"))
    assert (finding.state, finding.remedy) == ("fault", "pip install 'safetensors>=0.4.3'")
    assert "safetensors is not installed" in finding.seen


def test_a_package_that_is_there_and_broken(fakes) -> None:
    fakes.package("pluggy", "1.7.0")
    finding = packages.package("pluggy", "<2", Imported(error="SyntaxError: bad"))
    assert finding.state == "fault"
    assert finding.seen == "pluggy 1.7.0 can't be imported: SyntaxError: bad"
    assert finding.remedy == "pip install --force-reinstall 'pluggy<2'"


@pytest.mark.parametrize(("imported", "state"), [("2.1.0", "fault"), ("1.26.0", "warning")])
def test_a_package_that_another_hides(fakes, imported: str, state: str) -> None:
    """What is imported counts, and pip would not mend it."""
    fakes.package("numpy", "1.26.4")
    finding = packages.package("numpy", "<2", Imported(imported, "/elsewhere/numpy.py"))
    assert finding.state == state
    assert finding.seen.startswith(f"numpy {imported} is imported from /elsewhere/numpy.py")
    assert "1.26.4 is installed" in finding.seen
    assert "off PYTHONPATH" in finding.remedy


def test_without_packaging_versions_are_not_compared(fakes, monkeypatch) -> None:
    fakes.package("numpy", "2.1.0")
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    assert packages.package("numpy", "<2", Imported("2.1.0")).state == "ok"


@pytest.mark.parametrize(
    ("name", "top_level"), [("mindspore-ascend", ""), ("made-at-home", "other\nmindspore\n")]
)
def test_two_packages_that_provide_mindspore(fakes, name: str, top_level: str) -> None:
    """Damaged metadata of another package do not hide them."""
    fakes.package("mindspore", "2.10.0")
    assert list(packages.rivals()) == []
    fakes.package("torn", "1.0")
    (fakes.folder / "torn-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\n")
    fakes.package(name, "1.8.1", top_level)
    (finding,) = packages.rivals()
    assert (finding.name, finding.state) == ("mindspore", "fault")
    assert f"{name} 1.8.1" in finding.seen
    assert "mindspore 2.10.0" in finding.seen
    both = " ".join(sorted([name, "mindspore"]))
    assert finding.remedy == f"pip uninstall {both}, then pip install 'mindspore<2.11,>=2.10'"
    assert packages._version("torn") is None


def test_each_package_is_imported_whatever_the_one_before_it_does(fakes) -> None:
    fakes.module("one", "__version__ = '1.5'")
    fakes.module("two_b", "raise ImportError('libtwo.so: gone\\nmore')")
    fakes.module("three", "import os, sys; print('torn', file=sys.stderr); os.abort()")
    fakes.module("four", "raise SystemExit(0)")
    fakes.module("five", "__version__ = (5, 1)")
    found = packages.import_all(["one", "two-b", "three", "four", "five", "none-such"])
    assert found["one"] == Imported("1.5", str(fakes.folder / "one.py"))
    assert found["two-b"].error == "ImportError: libtwo.so: gone"
    assert (found["three"].error or "").startswith("ended by SIGABRT, saying: torn")
    assert found["four"].error == "it ended Python"
    assert found["five"] == Imported(None, str(fakes.folder / "five.py"))
    assert found["none-such"].error == "ModuleNotFoundError: No module named 'none_such'"


def test_plugins_are_listed_by_their_metadata_alone(site) -> None:
    (finding,) = packages.plugins()
    assert (finding.state, "pip install 'sdxl-host[all]'" in finding.seen) == ("ok", True)
    module = site.add("ash", source="raise RuntimeError('imported')")
    site.add("oak", requires="sdxl-host>=99")
    ash, oak = packages.plugins()
    assert ash == Finding("plugin", "ok", "ash (fake-ash 1.0)")
    assert oak.state == "fault"
    assert oak.seen.startswith("oak: fake-oak 1.0 needs sdxl-host>=99")
    assert oak.remedy == "pip install --upgrade fake-oak sdxl-host"
    assert module not in sys.modules


def test_plugins_that_cannot_be_listed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sdxl_host.plugins.discovery", None)
    (finding,) = packages.plugins()
    assert (finding.state, finding.remedy) == ("fault", "mend the packages above")
    assert finding.seen.startswith("can't be listed: ModuleNotFoundError: ")
