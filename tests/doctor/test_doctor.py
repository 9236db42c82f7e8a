"""`sdxl-host doctor`: each fault, injected, is found and comes with its remedy."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

import sdxl_host
from sdxl_host.cli import main
from sdxl_host.commands import doctor as command
from sdxl_host.doctor import diagnosis, trials
from sdxl_host.doctor.diagnosis import Finding
from sdxl_host.doctor.trials import Need, Trial
from sdxl_host.processes import Child
from sdxl_host.version import __version__

ROOT = Path(__file__).parents[2]
HOST = str(Path(sdxl_host.__file__).parents[1])
GIB = 2**30
NEEDS = [Need("small.yaml", GIB, GIB // 2), Need("large.yaml", 40 * GIB, 30 * GIB)]
WELL = Child([], "", "")


class Fakes:
    """A folder that stands before everything else on the import path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str, source: str) -> str:
        """Writes a module and returns its file."""
        file = self.folder / f"{name}.py"
        file.write_text(source, "utf-8")
        return str(file)

    def package(self, name: str, version: str, top_level: str = "", url: str = "") -> None:
        """Writes the metadata of a distribution."""
        information = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8"
        )
        (information / "top_level.txt").write_text(top_level, "utf-8")
        if url:
            (information / "direct_url.json").write_text(url, "utf-8")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """What is written here is found first, by this process and by its children."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return Fakes(folder)


# ---- versions


def test_the_host_is_told_with_its_folder() -> None:
    finding = diagnosis.host()
    assert (finding.name, finding.state, finding.remedy) == ("sdxl-host", "ok", "")
    assert finding.seen == f"{__version__} in {Path(sdxl_host.__file__).parent}"


def test_a_host_that_is_not_what_pip_installed(fakes: Fakes) -> None:
    fakes.package("sdxl-host", "0.0.1")
    finding = diagnosis.host()
    assert finding.state == "warning"
    assert "but 0.0.1 is installed" in finding.seen
    assert "pip install --upgrade sdxl-host" in finding.remedy


def none_installed(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_a_host_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", none_installed)
    monkeypatch.setattr(metadata, "requires", none_installed)
    finding = diagnosis.host()
    assert finding.state == "warning"
    assert "is not installed" in finding.seen
    assert finding.remedy.startswith("pip install -e .")
    assert diagnosis.requirements() == {}


def test_the_interpreter_is_within_what_our_package_declares() -> None:
    """The bounds stand here a second time, because metadata may be what is broken."""
    (low, high) = (f"{a}.{b}" for a, b in (diagnosis.PYTHON_FROM, diagnosis.PYTHON_BELOW))
    assert f'requires-python = ">={low},<{high}"' in (ROOT / "pyproject.toml").read_text()
    assert diagnosis.python().state == "ok"


@pytest.mark.parametrize("bounds", [((3, 8), (3, 10)), ((3, 99), (3, 101))])
def test_another_interpreter_is_a_fault(monkeypatch: pytest.MonkeyPatch, bounds) -> None:
    monkeypatch.setattr(diagnosis, "PYTHON_FROM", bounds[0])
    monkeypatch.setattr(diagnosis, "PYTHON_BELOW", bounds[1])
    finding = diagnosis.python()
    assert finding.state == "fault"
    assert f"need 3.{bounds[0][1]} to 3.{bounds[1][1] - 1}" in finding.seen
    assert "python3.11 -m venv" in finding.remedy


def test_what_is_required_comes_from_our_own_metadata() -> None:
    required = diagnosis.requirements()
    assert required["numpy"] == "<2,>=1.26"
    assert required["mindspore"] == "<2.11,>=2.10"
    assert {"omegaconf", "transformers", "safetensors", "pluggy", "pillow"} <= set(required)
    assert not [name for name in required if name.startswith("sdxl-")]  # the extras


@pytest.mark.parametrize(
    ("name", "version", "why"),
    [
        ("numpy", "2.1.0", "tensor operations of MindSpore 2.10 fail with NumPy 2"),
        ("omegaconf", "2.3.0", "OmegaConf 2.3 knows no Literal fields"),
        ("transformers", "4.57.1", "the tokenizer is opened as transformers 5 does it"),
        ("mindspore", "2.6.0", "it is written for MindSpore 2.10"),
        ("mindspore", "2.11.0", "it is written for MindSpore 2.10"),
        ("pluggy", "1.0.0", ""),
    ],
)
def test_a_version_out_of_bounds_is_a_fault(fakes: Fakes, name: str, version: str, why: str):
    fakes.package(name, version)
    bounds = diagnosis.requirements()[name]
    finding = diagnosis.package(name, bounds, Trial(version, fakes.module(name, "")))
    told = f"{name} {version}; needs {bounds}" + (f": {why}" if why else "")
    assert finding == Finding("package", "fault", told, f"pip install '{name}{bounds}'")


def test_a_version_within_bounds_is_fine(fakes: Fakes) -> None:
    fakes.package("numpy", "1.26.9")
    finding = diagnosis.package("numpy", "<2,>=1.26", Trial("1.26.9", fakes.module("numpy", "")))
    assert finding == Finding("package", "ok", "numpy 1.26.9 (needs <2,>=1.26)")


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", none_installed)
    finding = diagnosis.package("safetensors", ">=0.4.3", Trial(error="No module"))
    assert finding == Finding(
        "package",
        "fault",
        "safetensors is not installed (needs >=0.4.3)",
        "pip install 'safetensors>=0.4.3'",
    )


def test_a_package_that_pip_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints record versions from metadata, so its absence would stop a run."""
    monkeypatch.setattr(metadata, "version", none_installed)
    finding = diagnosis.package("numpy", "<2", Trial("1.26.4"))
    assert (finding.state, finding.remedy) == ("fault", "pip install 'numpy<2'")
    assert "can be imported, but is not installed" in finding.seen


def test_a_package_that_is_there_and_broken(fakes: Fakes) -> None:
    fakes.package("pluggy", "1.7.0")
    finding = diagnosis.package("pluggy", "<2", Trial(error="SyntaxError: bad"))
    assert finding == Finding(
        "package",
        "fault",
        "pluggy 1.7.0 can't be imported: SyntaxError: bad",
        "pip install --force-reinstall 'pluggy<2'",
    )


def test_what_is_imported_counts_where_metadata_says_another_version(fakes: Fakes) -> None:
    fakes.package("numpy", "1.26.4")
    finding = diagnosis.package("numpy", "<2", Trial("2.1.0", fakes.module("numpy", "")))
    assert finding.state == "fault"
    assert finding.seen.startswith("numpy 2.1.0 (installed is 1.26.4); needs <2")


def test_a_version_that_is_none(fakes: Fakes) -> None:
    finding = diagnosis.package("numpy", "<2", Trial("newest"))
    assert finding.state == "fault"
    assert "and that is no version" in finding.seen


def test_without_packaging_versions_are_not_compared(fakes: Fakes, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    finding = diagnosis.package("numpy", "<2", Trial("2.1.0"))
    assert finding.state == "ok"
    assert finding.seen.endswith("not compared: packaging can't be imported")


def test_a_package_that_PYTHONPATH_shadows(fakes: Fakes, monkeypatch) -> None:
    file = fakes.module("numpy", "")
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{fakes.folder}")
    finding = diagnosis.package("numpy", "<2", Trial("1.26.4", file))
    assert finding.state == "warning"
    assert f"from {fakes.folder}, not from its own package" in finding.seen
    assert finding.remedy.startswith(f"take {fakes.folder} off PYTHONPATH")
    # pip would not mend it, whatever the shadow's version is, or if it is broken.
    for trial in (Trial("2.1.0", file), Trial(None, file, "ImportError: x")):
        worse = diagnosis.package("numpy", "<2", trial)
        assert (worse.state, worse.remedy) == ("fault", finding.remedy)


def test_a_package_that_comes_with_its_metadata_from_PYTHONPATH(fakes: Fakes, monkeypatch) -> None:
    fakes.package("numpy", "1.26.4")
    monkeypatch.setenv("PYTHONPATH", str(fakes.folder))
    finding = diagnosis.package("numpy", "<2", Trial("1.26.4", fakes.module("numpy", "")))
    assert (finding.state, finding.name) == ("warning", "package")


def test_an_environment_within_a_folder_of_PYTHONPATH(fakes: Fakes, monkeypatch) -> None:
    """As of a project that has its environment in a folder of its own."""
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(fakes.folder / ".venv" / key))
    monkeypatch.setenv("PYTHONPATH", str(fakes.folder))
    for key in ("purelib", "platlib"):
        file = fakes.folder / ".venv" / key / "numpy" / "__init__.py"
        assert diagnosis.package("numpy", "<2", Trial("1.26.4", str(file))).state == "ok"


def test_a_file_in_the_way_without_PYTHONPATH(fakes: Fakes, monkeypatch) -> None:
    """A numpy.py in the folder one is in; the distribution is the real one."""
    monkeypatch.chdir(fakes.folder)
    finding = diagnosis.package("numpy", "<2", Trial("1.26.4", fakes.module("numpy", "")))
    assert finding.state == "warning"
    assert f"from {fakes.folder}, " in finding.seen


def test_an_editable_package_lies_where_its_author_put_it(fakes: Fakes, tmp_path: Path) -> None:
    fakes.package("pluggy", "1.7.0", url='{"dir_info": {"editable": true}}')
    finding = diagnosis.package("pluggy", "<2", Trial("1.7.0", str(tmp_path / "src/pluggy.py")))
    assert finding.state == "ok"


def test_one_mindspore_is_no_rival(fakes: Fakes) -> None:
    fakes.package("mindspore-lite", "2.3.0", top_level="mindspore_lite\n")
    assert list(diagnosis.rivals()) == []


@pytest.mark.parametrize(
    ("name", "top_level"), [("mindspore-ascend", ""), ("made-at-home", "other\nmindspore\n")]
)
def test_two_packages_that_provide_mindspore(fakes: Fakes, name: str, top_level: str) -> None:
    fakes.package(name, "1.8.1", top_level)
    fakes.package("mindspore", "2.10.0")
    (finding,) = diagnosis.rivals()
    assert (finding.name, finding.state) == ("mindspore", "fault")
    assert f"{name} 1.8.1" in finding.seen
    assert "mindspore 2.10.0" in finding.seen
    both = " ".join(sorted([name, "mindspore"]))
    assert finding.remedy == (f"pip uninstall {both}, then pip install 'mindspore<2.11,>=2.10'")


def test_a_package_whose_metadata_are_damaged_hides_no_rival(fakes: Fakes) -> None:
    fakes.package("mindspore", "2.10.0")
    fakes.package("mindspore-ascend", "2.6.0")
    fakes.package("torn", "1.0")
    folder = fakes.folder / "torn-1.0.dist-info"
    (folder / "METADATA").write_bytes(b"Name: \xff\n")
    damaged, twice = sorted(diagnosis.rivals(), key=lambda finding: finding.state, reverse=True)
    assert (damaged.name, damaged.state) == ("package", "warning")
    assert damaged.seen.startswith(f"the metadata in {folder} can't be read: UnicodeDecodeError")
    assert damaged.remedy == "delete this folder, or install the package again"
    assert (twice.name, twice.state) == ("mindspore", "fault")
    assert diagnosis._version("torn") is None


def test_settings_of_the_environment_that_do_harm() -> None:
    harmless = {"MS_DEV_HOST_BLOCKING_RUN": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert list(diagnosis.environment(harmless)) == []
    harmful = {
        "MS_DEV_HOST_BLOCKING_RUN": "0",
        "ONEDNN_MAX_CPU_ISA": "DEFAULT",
        "MS_COMPILER_CACHE_ENABLE": "1",
    }
    found = list(diagnosis.environment(harmful))
    assert [finding.state for finding in found] == ["warning"] * 3
    assert "takes a core" in found[0].seen
    assert [finding.remedy for finding in found] == [f"unset {name}" for name in harmful]


# ---- packages


def test_each_package_is_tried_whatever_the_one_before_it_does(fakes: Fakes) -> None:
    fakes.module("one", "__version__ = '1.5'")
    fakes.module("two_b", "raise ImportError('libtwo.so: gone\\nmore')")
    fakes.module("three", "import os, sys; print('torn', file=sys.stderr); os.abort()")
    fakes.module("four", "raise SystemExit(0)")
    fakes.module("five", "__version__ = (5, 1)")
    found = trials.try_packages(["one", "two-b", "three", "four", "five", "none-such"])
    assert found["one"] == Trial("1.5", str(fakes.folder / "one.py"))
    assert found["two-b"].error == "ImportError: libtwo.so: gone"
    assert found["two-b"].file == str(fakes.folder / "two_b.py")
    assert found["three"].error is not None
    assert found["three"].error.startswith("ended by SIGABRT")
    assert found["four"].error == "ended without a word"
    assert found["five"] == Trial(None, str(fakes.folder / "five.py"))
    assert found["none-such"].error == "ModuleNotFoundError: No module named 'none_such'"


def test_mindspore_is_only_looked_for_among_the_packages(fakes: Fakes) -> None:
    file = fakes.module("mindspore", "raise ImportError")
    assert trials.try_packages(["mindspore"]) == {"mindspore": Trial(None, file)}


# ---- MindSpore

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


def told_of(fakes: Fakes, source: str) -> Finding:
    fakes.module("mindspore", source)
    finding = diagnosis.mindspore(*trials.try_mindspore())
    assert (finding.name, finding.state) == ("mindspore", "fault")
    return finding


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("raise ImportError('libx.so: gone')", "ImportError: libx.so: gone"),
        ("import nothing_such", "ModuleNotFoundError: No module named 'nothing_such'"),
        ("", "AttributeError: module 'mindspore' has no attribute"),
        ("import os; os.abort()", "the process of 1 operation ended by SIGABRT"),
        (
            "import sys, os; print('no kernel', file=sys.stderr, flush=True); os._exit(4)",
            "the process of 1 operation ended with exit code 4, saying: no kernel",
        ),
        ("raise SystemExit", "the process of 1 operation said nothing"),
        (MINDSPORE.format(body="raise RuntimeError('bad')"), "1 operation failed: RuntimeError: b"),
        (MINDSPORE.format(body="return self"), "1 operation gave a wrong result"),
        (MINDSPORE.format(body="os.abort()"), "the process of 1 operation ended by SIGABRT"),
    ],
)
def test_a_mindspore_that_does_not_work(fakes: Fakes, source: str, seen: str) -> None:
    finding = told_of(fakes, source)
    assert finding.seen.startswith(seen)
    assert finding.remedy == (
        "pip install --force-reinstall 'mindspore<2.11,>=2.10' 'numpy<2,>=1.26'"
    )


def test_mindspore_with_numpy_2(fakes: Fakes) -> None:
    fakes.module("numpy", "__version__ = '2.3.1'")
    finding = told_of(fakes, MINDSPORE.format(body="return self"))
    assert finding.seen == "numpy 2.3.1 does not work with MindSpore (tensor operations fail)"
    assert finding.remedy == "pip install 'numpy<2'"


def test_a_mindspore_that_hangs(fakes: Fakes, monkeypatch) -> None:
    monkeypatch.setattr(trials, "TIMEOUT", 1.5)
    finding = told_of(fakes, "import time; time.sleep(600)")
    assert finding.seen.startswith("the process of 1 operation gave no answer within 1.5 s")


def test_a_mindspore_that_works_and_configs_that_do_not_plan(fakes: Fakes) -> None:
    right = MINDSPORE.format(body="return self").replace("[1, 1]", "[2, 3]")
    fakes.module("mindspore", right)
    told, child = trials.try_mindspore()
    finding = diagnosis.mindspore(told, child)
    assert finding.state == "ok"
    assert finding.seen == "2.10.0, build unknown, for CPU: 1 operation ran on CPU"
    planless = diagnosis.unplanned(told, child)
    assert (planless.name, planless.state) == ("configs", "fault")
    assert "can't be planned: ImportError: cannot import name 'nn' from 'mindsp" in planless.seen
    assert "pip install --force-reinstall sdxl-host" in planless.remedy


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of files, without a device, CANN, memory or limits."""
    for name in ("dev", "cgroup"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(diagnosis, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(diagnosis, "CANN_FOLDERS", (tmp_path / "ascend" / "latest",))
    monkeypatch.setattr(diagnosis, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(diagnosis, "CGROUP", tmp_path / "cgroup")
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    return tmp_path


def install_cann(folder: Path, version: str = "8.5.0") -> Path:
    (folder / "compiler").mkdir(parents=True)
    (folder / "compiler" / "version.info").write_text(f"x=1\nVersion={version}\n")
    (folder.parent / "set_env.sh").touch()
    return folder


def test_no_ascend_is_no_fault(machine: Path) -> None:
    seen = f"CPU; no Ascend device in {machine / 'dev'}; no CANN"
    assert diagnosis.device({"device": "CPU"}, WELL) == Finding("device", "ok", seen)


def test_an_ascend_is_told_with_its_cann(machine: Path, monkeypatch) -> None:
    folder = install_cann(machine / "own")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(folder))
    seen = f"Ascend; CANN 8.5.0 at {folder}"
    assert diagnosis.device({"device": "Ascend"}, WELL) == Finding("device", "ok", seen)


def test_an_ascend_that_is_not_taken_for_want_of_cann(machine: Path) -> None:
    (machine / "dev" / "davinci0").touch()
    finding = diagnosis.device({"device": "CPU"}, Child([], "", "dlopen failed"))
    assert finding.state == "warning"
    assert "which MindSpore does not take; no CANN; it says: dlopen failed" in finding.seen
    assert finding.remedy == "install CANN and source its set_env.sh"


def test_an_ascend_that_is_not_taken_with_cann_there(machine: Path) -> None:
    (machine / "dev" / "davinci7").touch()
    folder = install_cann(machine / "ascend" / "latest", "7.0.1")
    finding = diagnosis.device({"device": "CPU", "version": "2.10.0"}, WELL)
    assert f"CANN 7.0.1 at {folder}, whose set_env.sh was not sourced" in finding.seen
    script = machine / "ascend" / "set_env.sh"
    assert finding.remedy == f"source {script}, and see that MindSpore 2.10.0 supports this CANN"


def test_the_device_of_a_mindspore_that_does_not_start(machine: Path) -> None:
    (machine / "dev" / "davinci_manager").touch()  # there with the driver, device or not
    finding = diagnosis.device({}, WELL)
    assert finding.state == "warning"
    assert finding.seen.startswith("not known, as MindSpore does not start; no Ascend device")
    assert finding.remedy == "mend MindSpore first"


def test_attention_is_told_for_each_precision() -> None:
    same = diagnosis.attention({"O0": "plain", "O2": "plain"})
    assert same == Finding("attention", "ok", "O0 and O2: plain")
    assert diagnosis.attention({"O0": "plain", "O2": "fused"}).seen == "O0: plain; O2: fused"


def test_attention_in_use_is_what_the_models_say(device: str) -> None:
    assert "needs an Ascend device" in trials.attention_by_level("CPU")["O2"]
    on_ascend = trials.attention_by_level("Ascend")
    assert "needs float16 or bfloat16" in on_ascend["O0"]
    assert on_ascend["O2"] == "flash-attention"


# ---- the machine


def set_memory(machine: Path, total: int, available: int) -> None:
    text = f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\n"
    (machine / "meminfo").write_text(text)


@pytest.mark.parametrize(
    ("available", "chosen", "state", "remedy"),
    [
        (50 * GIB, "CPU", "ok", ""),
        (39 * GIB, "CPU", "warning", "for SDXL itself, take a machine with more; sdxl-host plan"),
        (GIB // 2, "CPU", "fault", "end other programs"),
        (GIB // 2, "Ascend", "ok", ""),
    ],
)
def test_memory_against_what_configs_need(machine: Path, available, chosen, state, remedy) -> None:
    set_memory(machine, 64 * GIB, available)
    finding = diagnosis.memory(NEEDS, chosen)
    assert finding.state == state
    assert finding.remedy.startswith(remedy)
    assert bool(finding.remedy) == bool(remedy)
    assert finding.seen.startswith(f"64.00 GiB, {available / GIB:.2f} GiB of it available; small.")
    assert "large.yaml 40.00 GiB" in finding.seen


def test_memory_where_needs_are_not_known(machine: Path) -> None:
    set_memory(machine, GIB, GIB // 2)
    seen = "1.00 GiB, 0.50 GiB of it available"
    assert diagnosis.memory([], None) == Finding("memory", "ok", seen)


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_has_its_own_memory(machine: Path, file: str) -> None:
    set_memory(machine, 64 * GIB, 60 * GIB)
    limit = machine / "cgroup" / file
    limit.parent.mkdir(exist_ok=True)
    limit.write_text(f"{8 * GIB}\n")
    assert diagnosis.memory(NEEDS, "CPU").seen.startswith("8.00 GiB, 8.00 GiB of it available")
    limit.write_text("max\n")
    assert diagnosis.memory(NEEDS, "CPU").seen.startswith("64.00 GiB, 60.00 GiB of it available")


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cached"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_what_a_container_uses_is_not_available(
    machine: Path, folder: str, limit: str, used: str, cached: str
) -> None:
    """Copies of files are, as they give way."""
    set_memory(machine, 64 * GIB, 60 * GIB)
    place = machine / "cgroup" / folder
    place.mkdir(exist_ok=True)
    (place / limit).write_text(f"{8 * GIB}\n")
    (place / used).write_text(f"{5 * GIB}\n")
    assert diagnosis.memory(NEEDS, "CPU").seen.startswith("8.00 GiB, 3.00 GiB of it available")
    (place / "memory.stat").write_text(f"anon {4 * GIB}\n{cached} {GIB}\n")
    assert diagnosis.memory(NEEDS, "CPU").seen.startswith("8.00 GiB, 4.00 GiB of it available")
    set_memory(machine, 64 * GIB, 2 * GIB)
    assert diagnosis.memory(NEEDS, "CPU").seen.startswith("8.00 GiB, 2.00 GiB of it available")
    (place / limit).write_text("4096\n")
    assert "0.00 GiB of it available" in diagnosis.memory(NEEDS, "CPU").seen


def test_memory_without_proc(machine: Path, monkeypatch) -> None:
    pages = {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert diagnosis.memory(NEEDS, "CPU").seen.startswith("4.00 GiB")
    monkeypatch.delattr(os, "sysconf")
    finding = diagnosis.memory(NEEDS, "CPU")
    assert (finding.state, finding.seen[:15]) == ("ok", "of unknown size")


def test_processors_and_the_share_of_them(machine: Path) -> None:
    assert diagnosis.processors().seen.endswith(f"of {os.cpu_count()}")
    (machine / "cgroup" / "cpu.max").write_text("150000 100000\n")
    assert diagnosis.processors().seen.endswith("; limited to the time of 1.5")
    (machine / "cgroup" / "cpu.max").write_text("max 100000\n")
    assert "limited" not in diagnosis.processors().seen


# ---- folders


def fail(*words: object, **options: object) -> None:
    raise OSError(errno.EPERM, "not allowed")


def saved_in(path: Path, needs: list[Need] | None = None) -> dict[str, Finding]:
    found = diagnosis.save_folder(path, NEEDS if needs is None else needs)
    return {finding.name: finding for finding in found}


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize(
    ("free", "state", "remedy"),
    [
        (50 * GIB, "ok", ""),
        (29 * GIB, "warning", "for SDXL itself, make room or give another --save_path"),
        (GIB // 4, "fault", "make room, or give another --save_path"),
    ],
)
def test_a_folder_that_can_be_written_and_its_space(tmp_path, monkeypatch, free, state, remedy):
    """Nothing is left behind, and the folder itself is not made."""
    set_free(monkeypatch, free)
    found = saved_in(tmp_path / "not" / "there")
    assert found["save_path"].state == state
    assert found["save_path"].remedy == remedy
    assert f"can be written, {free / GIB:.2f} GiB free; a check" in found["save_path"].seen
    assert "of large.yaml takes 30.00 GiB" in found["save_path"].seen
    assert found["links"].state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_the_space_of_a_folder_where_needs_are_not_known(tmp_path: Path) -> None:
    finding = saved_in(tmp_path, [])["save_path"]
    assert finding.state == "ok"
    assert finding.seen.endswith("GiB free")


@pytest.mark.parametrize("below", ["", "runs/deeper"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    found = saved_in(tmp_path / "file" / below)
    assert list(found) == ["save_path"]
    assert found["save_path"].state == "fault"
    assert found["save_path"].seen.endswith(f"{tmp_path / 'file'} is no folder")
    assert found["save_path"].remedy == "give another --save_path"


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    assert saved_in(tmp_path / "runs")["save_path"].state == "fault"


def test_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    found = saved_in(tmp_path)
    assert list(found) == ["save_path"]
    assert found["save_path"].state == "fault"
    assert "can't be written (not allowed)" in found["save_path"].seen
    assert "mend its rights" in found["save_path"].remedy


def test_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sdxl_host.files.atomic.write_new", fail)
    finding = saved_in(tmp_path)["save_path"]
    assert finding.state == "fault"
    assert "a file can't be written (not allowed)" in finding.seen
    assert finding.remedy.startswith("make room")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch) -> None:
    """Checkpoints then copy what they would share."""
    monkeypatch.setattr(os, "link", fail)
    finding = saved_in(tmp_path)["links"]
    assert finding.state == "warning"
    assert "no hard links there (not allowed)" in finding.seen
    assert finding.remedy == "give a --save_path on another file system"


def test_a_disk_without_symbolic_links(tmp_path: Path, monkeypatch) -> None:
    """The link `latest` could not be made."""
    monkeypatch.setattr(Path, "symlink_to", fail)
    finding = saved_in(tmp_path)["links"]
    assert (finding.name, finding.state) == ("links", "fault")
    assert "no symbolic links there (not allowed)" in finding.seen
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    finding = diagnosis.temporary_folder()
    assert finding.state == "ok"
    assert finding.seen.startswith(f"{tmp_path}: can be written, ")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    finding = diagnosis.temporary_folder()
    assert (finding.name, finding.state) == ("temporary", "fault")
    assert finding.remedy == "set TMPDIR to a folder that can be written"


# ---- plugins


def test_plugins_are_told_by_their_metadata_alone(site) -> None:
    module = site.add("ash", source="raise RuntimeError('imported')")
    site.add("oak", requires="sdxl-host>=99")
    ash, oak = diagnosis.plugins()
    assert ash == Finding("plugin", "ok", "ash (fake-ash 1.0)")
    assert oak.state == "fault"
    assert oak.seen.startswith("oak: fake-oak 1.0 needs sdxl-host>=99, and this is")
    assert oak.remedy == "pip install --upgrade fake-oak sdxl-host"
    assert module not in sys.modules


def test_no_plugins(site) -> None:
    (finding,) = diagnosis.plugins()
    assert finding.state == "ok"
    assert "pip install 'sdxl-host[all]'" in finding.seen


def test_plugins_that_cannot_be_listed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sdxl_host.plugins.discovery", None)
    (finding,) = diagnosis.plugins()
    assert (finding.state, finding.remedy) == ("fault", "mend the packages above")
    assert finding.seen.startswith("can't be listed: ModuleNotFoundError: ")


def test_plugins_whose_listing_fails(monkeypatch) -> None:
    monkeypatch.setattr("sdxl_host.plugins.discovery.discover", lambda: 1 // 0)
    (finding,) = diagnosis.plugins()
    assert finding.seen.startswith("can't be listed: ZeroDivisionError: ")


# ---- the command

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


def test_words_that_are_not_its_own(capsys) -> None:
    assert main(["doctor", "--jsn"]) == 2
    assert "sdxl-host doctor --help tells how to call it" in capsys.readouterr().err


# ---- whole runs


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
    assert "O0" in rows["attention"]
    assert re.search(r"default\.yaml needs 0\.08 GiB and .*910b\.yaml 41\.62 GiB", rows["memory"])
    assert "takes 32.05 GiB" in rows["save_path"]
    for name in ("sdxl-host", "python", "package", "device", "processors", "links", "temporary"):
        assert rows[name]
    # What takes seconds is said before it is done.
    words = [line.split()[0] for line in lines]
    starts = [index for index, word in enumerate(words) if word == "looking"]
    assert [words[index + 1] for index in starts] == ["package", "mindspore"]
    assert list(tmp_path.iterdir()) == []


def test_an_installation_in_ruins(fakes: Fakes, monkeypatch) -> None:
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
    assert "numpy 2.1.0 (installed is 1.26" in seen
    assert "can't be listed: RuntimeError: torn" in seen
    twice, start = [finding for finding in found if finding.name == "mindspore"]
    assert "mindspore-ascend 2.6.0" in twice.seen
    assert (twice.state, start.state) == ("fault", "fault")
    names = {finding.name for finding in found}
    assert {"environment", "device", "memory", "save_path", "links", "temporary"} <= names
    for finding in found:
        assert bool(finding.remedy) == (finding.state != "ok")
    helped = python(["-m", "sdxl_host", "--help"], path, fakes.folder)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.startswith("usage: sdxl-host COMMAND")
