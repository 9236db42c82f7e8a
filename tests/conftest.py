"""Shared fixtures: the device, and fake plugin packages in a folder of their own."""

from __future__ import annotations

import ast
import atexit
import contextlib
import importlib
import importlib.util
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import tokenize
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import importlib_metadata
import numpy as np
import pytest
from packaging.requirements import Requirement

import sdxl_host
from sdxl_host.device import prepare_cpu_environment

# Test modules import MindSpore before the device fixture can set these: wait without spinning,
# compute convolutions with AVX2, and say only what is an error. Nothing in a test may ask a hub for
# files.
prepare_cpu_environment()
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What is remembered of images goes where no run of the user sees it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sdxl-host-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Where tests run beside each other each process has a core of its own: MindSpore's threads wait for
# work by spinning, and those of two processes on the same cores make both take twice the time.
if (_WORKER := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    _CORES = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # where it is not allowed, tests take longer
        os.sched_setaffinity(0, {_CORES[int(_WORKER.removeprefix("gw")) % len(_CORES)]})

_COUNTER = itertools.count()
GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]
PACKAGES = (".", *sorted(f"plugins/{p.name}" for p in (ROOT / "plugins").glob("sdxl_*")))

PLUGIN_SOURCE = """
from sdxl_host import hookimpl

{before}

class Fake:
    {options}

    def __init__(self, options=None):
        self.options = options

    @hookimpl
    def on_step_end(self):
        pass
"""


class Site:
    """A folder that stands for site-packages, with fake plugin distributions in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def add(
        self,
        name: str,
        options: str = "",
        *,
        source: str | None = None,
        distribution: str | None = None,
        version: str = "1.0",
        requires: str = "sdxl-host>=0.1,<0.2",
        targets: Sequence[str] | Mapping[str, str] = (),
        has_plugin: bool = True,
    ) -> str:
        """Installs a plugin called `name` and returns its module's name.

        targets: names it declares as targets, all of them served by the module's `targets`, or by
        what each is mapped to. has_plugin: whether the package has the plugin, or targets alone.
        options: lines of a dataclass body, such as `size: int = 3`. source: the whole module
        instead, whose class is `Fake`.
        """
        distribution = distribution or f"fake-{name.replace('_', '-')}"
        module = f"fake_{name.replace('-', '_')}_{next(_COUNTER)}"
        if source is None:
            source = plugin_source(options)
        (self.folder / f"{module}.py").write_text(source, "utf-8")
        served = targets if isinstance(targets, Mapping) else dict.fromkeys(targets, "targets")
        information = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        information.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
            + (f"Requires-Dist: {requires}\n" if requires else ""),
            "utf-8",
        )
        information.joinpath("entry_points.txt").write_text(
            (f"[sdxl_host.plugins]\n{name} = {module}:Fake\n" if has_plugin else "")
            + "[sdxl_host.targets]\n"
            + "".join(f"{target} = {module}:{served[target]}\n" for target in served),
            "utf-8",
        )
        self.modules.append(module)
        importlib.invalidate_caches()
        return module

    @property
    def python_path(self) -> str:
        """PYTHONPATH for a process that shall see the host and these distributions."""
        host = Path(sdxl_host.__file__).parents[1]
        return os.pathsep.join([str(self.folder), str(host), *filter(None, [_outer_path()])])


def pytest_itemcollected(item: pytest.Item) -> None:
    """Whatever compares with golden arrays is run by `make parity` too."""
    if "golden" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.parity)


@pytest.fixture(scope="session")
def device() -> str:
    """MindSpore, imported and set to the CPU once for all tests that run it."""
    from sdxl_host.device import prepare_device

    return prepare_device("CPU")


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels of the host and of the four plugins."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(folder), *PACKAGES], cwd=ROOT, check=True, timeout=300
    )
    return folder


@pytest.fixture(scope="session")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with `sdxl-host[edm,snr]` from the wheels.

    What the host declares that it needs is linked into it rather than installed, because MindSpore
    is gigabytes; pip compares their versions with the bounds. Nothing else is there.
    Whoever installs more into it removes that again. Of the processes that `make test` shares the
    files among, each would make its own, so one file alone uses it.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for source in needed_by("sdxl-host"):
        if not (packages / source.name).exists():
            (packages / source.name).symlink_to(source)
    programs = folder / "bin"
    command = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--no-index"]
    subprocess.run(
        [*command, "--find-links", str(dist), "sdxl-host[edm,snr]"], check=True, timeout=900
    )
    return programs


def needed_by(name: str) -> set[Path]:
    """What the packages that `name` needs, directly or not, have put into site-packages."""
    found: set[Path] = set()
    seen, left = {name}, [name]
    while left:
        for line in importlib_metadata.requires(left.pop()) or []:
            needed = Requirement(line)
            if needed.name in seen or (needed.marker and not needed.marker.evaluate({"extra": ""})):
                continue
            seen.add(needed.name)
            left.append(needed.name)
            for file in importlib_metadata.files(needed.name) or []:
                if file.parts[0] not in ("..", "__pycache__"):
                    found.add(Path(str(file.locate())).parents[len(file.parts) - 1] / file.parts[0])
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection or look-up of a host fails the test."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a connection was opened: {arguments}")

    for owner, name in (
        (socket.socket, "connect"),
        (socket.socket, "connect_ex"),
        (socket, "getaddrinfo"),
    ):
        monkeypatch.setattr(owner, name, refuse)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden arrays: the stored ones, or those that `make parity` has just made."""
    return Path(os.environ.get("SDXL_HOST_GOLDEN", GOLDEN))


@pytest.fixture(scope="session")
def deterministic() -> ModuleType:
    """tests/golden/deterministic.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("deterministic", GOLDEN / "deterministic.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fill(device: str, deterministic: ModuleType) -> Callable[..., dict]:
    """Gives a cell the golden files' weights: `fill(cell, prefix)`.

    Returns its parameters by their names in the single file, each of which begins with `prefix`.
    """
    from sdxl_host.weights.load import load
    from sdxl_host.weights.names import single_file_parameters
    from sdxl_host.weights.source import Source

    def fill_cell(cell, prefix: str) -> dict:
        parameters = single_file_parameters(cell, prefix)
        shapes = {n: tuple(p.shape) for n, p in parameters.items()}
        load(parameters, Source(shapes, {}, lambda n: deterministic.weight(n, shapes[n])))
        return parameters

    return fill_cell


@pytest.fixture(scope="session")
def small_model(device: str, deterministic: ModuleType) -> SimpleNamespace:
    """SDXL's structure, small: `architecture`, and `arrays`, weights by their names in the single
    file, float32 but for the int64 `position_ids`."""
    from sdxl_host.weights.architecture import Architecture, Encoder
    from sdxl_host.weights.shapes import expected_shapes

    architecture = Architecture(
        unet={
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "transformer_depth": [0, 1],
            "num_head_channels": 8,
            "context_dim": 48,
            "adm_in_channels": 128,
        },
        autoencoder={
            "embed_dim": 4,
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        },
        encoders=(Encoder("clip", 16, 2, 2), Encoder("open_clip", 32, 2, 4)),
    )
    shapes = expected_shapes(architecture)
    arrays = {
        name: np.arange(77, dtype=np.int64)[None]
        if name.endswith("position_ids")
        else deterministic.weight(name, shape)
        for name, shape in shapes.items()
    }
    return SimpleNamespace(architecture=architecture, arrays=arrays)


def plugin_source(options: str = "", before: str = "") -> str:
    """A module with the plugin class `Fake`; `before` stands above it."""
    if options:
        body = "\n".join(f"    {line.strip()}" for line in options.strip().splitlines())
        before = (
            "from dataclasses import dataclass, field\nfrom typing import Any, Literal, Optional\n"
            f"from sdxl_host import option\n{before}\n@dataclass\nclass Options:\n{body}\n"
        )
    return PLUGIN_SOURCE.format(before=before, options="Options = Options" if options else "pass")


def _outer_path() -> str:
    return os.environ.get("PYTHONPATH", "")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A `Site` whose distributions are the only plugins this process sees."""
    folder = tmp_path / "site"
    folder.mkdir()
    found = Site(folder)

    def entry_points(**selection: str) -> importlib_metadata.EntryPoints:
        distributions = importlib_metadata.distributions(path=[str(folder)])
        points = (point for one in distributions for point in one.entry_points)
        return importlib_metadata.EntryPoints(points).select(**selection)

    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(importlib_metadata, "entry_points", entry_points)
    yield found
    for module in found.modules:
        sys.modules.pop(module, None)


def count_code_lines(file: Path) -> int:
    """Lines of a module that hold code, not a docstring, a comment or nothing."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            documented |= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with open(file, "rb") as stream:
        tokens = [t for t in tokenize.tokenize(stream.readline) if t.type not in blank and t.string]
    held = {line for t in tokens[1:] for line in range(t.start[0], t.end[0] + 1)}
    return len(held - documented)


def find_hidden_imports(file: Path, *modules: ModuleType) -> list[str]:
    """What a file imports of the host that is not public: `import sdxl_host`, a module of it, or a
    name that it does not list. modules: those it may import listed names from, besides."""
    public = {module.__name__: module.__all__ for module in (sdxl_host, *modules)}
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] == "sdxl_host"]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [alias.name for alias in node.names]
            if module.partition(".")[0] == "sdxl_host":
                found += [f"{module}.{n}" for n in names if n not in public.get(module, ())]
    return found


@pytest.fixture(scope="session")
def code_lines() -> Callable[[Path], int]:
    """`count_code_lines`, for a limit on a plugin's size."""
    return count_code_lines


@pytest.fixture(scope="session")
def hidden_imports() -> Callable[..., list[str]]:
    """`find_hidden_imports`, of which a plugin and its tests have none."""
    return find_hidden_imports


@pytest.fixture
def make_source():
    """`plugin_source`, for tests that need a module of their own."""
    return plugin_source
