"""`sdxl-host new-plugin`: what it writes for each hook, and what it refuses to write."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import sdxl_host
from sdxl_host.cli import main
from sdxl_host.commands import new_plugin as command
from sdxl_host.hookspecs import HOOKS
from sdxl_host.plugins.discovery import GROUP, Installed
from sdxl_host.plugins.roles import implementations
from sdxl_host.settings.options import build_options, describe
from sdxl_host.version import __version__

ROOT = Path(sdxl_host.__file__).parents[1]
TEMPLATE = ROOT / "sdxl_host" / "templates" / "plugin"
LONG = "a_name_of_thirty_characters_ab"
ROLES = {
    "build_model": "adapts",
    "sample_timesteps": "adapts",
    "weight_loss": "claims",
    "encode_prompt": "claims",
    "on_step_end": "observes",
}
# One package for each hook, and packages of all five hooks: with a name that is the template's own,
# one that is the host's class NoiseLevels but for its capital letter, and the longest there may be.
HOOKS_OF = {
    **{f"only_{hook}": [hook] for hook in HOOKS},
    **{name: list(HOOKS) for name in ("all_five", "my_plugin", "noise_levels", LONG)},
}
CLASS_OF = {"noise_levels": "NoiseLevelsPlugin", LONG: "ANameOfThirtyCharactersAb"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of `HOOKS_OF`."""
    folder = tmp_path_factory.mktemp("written")
    for name, hooks in HOOKS_OF.items():
        assert main(["new-plugin", name, "--hooks", ",".join(hooks), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def plugin_class(written: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports the class of a written package: `plugin_class(name)`."""
    imported = []

    def load(name: str) -> Any:
        monkeypatch.syspath_prepend(str(written / name))
        importlib.invalidate_caches()
        imported.append(name)
        return getattr(importlib.import_module(name), class_of(name))

    yield load
    for name in imported:
        sys.modules.pop(name, None)


def class_of(name: str) -> str:
    return CLASS_OF.get(name, "".join(word.capitalize() for word in name.split("_")))


def texts(folder: Path) -> dict[str, str]:
    """Every file of the folder, by its path in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_text("utf-8")
        for path in sorted(files)
        if not {"__pycache__", ".ruff_cache"} & set(path.parts)
    }


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that `sdxl-host new-plugin WORDS` ends with."""
    capsys.readouterr()
    assert main(["new-plugin", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("sdxl-host: error: ")


# ---- what is written


def test_the_files_are_those_of_a_package(written: Path) -> None:
    for name in HOOKS_OF:
        assert set(texts(written / name)) == {
            "README.md",
            "pyproject.toml",
            f"{name}/__init__.py",
            f"{name}/py.typed",
            f"tests/test_{name}.py",
        }
    assert sorted(path.name for path in written.iterdir()) == sorted(HOOKS_OF)


def test_every_file_of_the_template_is_written() -> None:
    assert sorted(texts(TEMPLATE)) == sorted(command._FILES)


def test_nothing_of_the_template_or_this_machine_is_left_in_them(written: Path) -> None:
    for name in set(HOOKS_OF) - {"my_plugin"}:
        for file, text in texts(written / name).items():
            where = f"{name}/{file}"
            assert not re.findall(r"my.?plugin", text, re.IGNORECASE), where
            assert not re.findall(r"^ *(# |<!-- )\[", text, re.MULTILINE), where
            for path in (ROOT, written, Path.home(), Path(sys.prefix)):
                assert str(path) not in text, where
            assert text.isascii(), where


def test_the_hooks_are_those_asked_for_and_the_host_accepts_them(plugin_class: Any) -> None:
    for name, hooks in HOOKS_OF.items():
        installed = Installed(name, name, "0.1.0", None, name, class_of(name))
        found = implementations(installed, plugin_class(name))
        assert [(one.hook, one.role) for one in found] == [(hook, ROLES[hook]) for hook in hooks]


def test_only_what_observes_keeps_a_state(plugin_class: Any) -> None:
    for name, hooks in HOOKS_OF.items():
        assert hasattr(plugin_class(name), "state_dict") == ("on_step_end" in hooks), name


def test_the_state_comes_back(plugin_class: Any) -> None:
    cls = plugin_class("only_on_step_end")
    one, other = cls(cls.Options()), cls(cls.Options())
    one.mean = 0.25
    other.load_state_dict(one.state_dict())
    assert other.mean == 0.25


def test_each_hook_brings_one_option_with_help_a_default_and_its_lines_in_the_readme(
    written: Path, plugin_class: Any
) -> None:
    told = {}
    for name, hooks in HOOKS_OF.items():
        cls = plugin_class(name)
        assert build_options(cls.Options, {}, name) == cls.Options()
        rows = describe(cls.Options)
        assert len(rows) == len(hooks)
        readme = (written / name / "README.md").read_text("utf-8")
        for row in rows:
            flag = f"--{name}_{row['name']}"
            begin = f"| `{row['name']}` | `{flag}` | `{row['default']}` | {row['help']}"
            assert begin in readme
        assert readme.count(f"`--{name}_") == len(rows)
        assert re.findall(r"^- `(\w+)`, (adapt|claim|observ)ed:", readme, re.MULTILINE) == [
            (hook, ROLES[hook].removesuffix("s").removesuffix("e")) for hook in hooks
        ]
        told[name] = {row["help"] for row in rows}
    assert told["all_five"] == set.union(*(told[f"only_{hook}"] for hook in HOOKS))


def test_the_metadata_are_those_of_a_plugin_of_this_host(written: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    for name in HOOKS_OF:
        project = tomllib.loads((written / name / "pyproject.toml").read_text("utf-8"))["project"]
        assert project["name"] == name.replace("_", "-")
        assert project["entry-points"] == {GROUP: {name: f"{name}:{class_of(name)}"}}
        host = Requirement(project["dependencies"][0])
        assert host.name == "sdxl-host"
        assert host.specifier.contains(__version__, prereleases=True)
        assert str(host.specifier) == "<0.2,>=0.1"  # raised with the host's version
        uses_numpy = "import numpy" in (written / name / name / "__init__.py").read_text("utf-8")
        assert (project["dependencies"][1:] == ["numpy"]) == uses_numpy
        (test,) = project["optional-dependencies"]["test"]
        assert Requirement(test).extras == {"all", "testing"}
        assert project["requires-python"] == host_project(tomllib)["requires-python"]


def host_project(tomllib: Any) -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.mark.parametrize(
    ("version", "bounds"),
    [
        ("0.1.0", ">=0.1,<0.2"),
        ("0.10.3", ">=0.10,<0.11"),
        ("1.4.2", ">=1.4,<1.5"),
        ("0.2.0.dev1", ">=0.2.0.dev1,<0.3"),
    ],
)
def test_the_bounds_follow_the_running_version(
    version: str, bounds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "__version__", version)
    text = command._render("ash", ["weight_loss"])["pyproject.toml"]
    requirement = Requirement(f"sdxl-host{bounds}")
    assert f'"{requirement.name}{bounds}"' in text
    assert requirement.specifier.contains(version, prereleases=True)


def tool(folder: Path, *words: str) -> str:
    """What a tool says of the folder; the test fails where it finds something to mend."""
    done = subprocess.run(
        [sys.executable, "-m", *words, "."],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ruff_finds_nothing_to_mend(written: Path) -> None:
    tool(written, "ruff", "check", "--no-cache")
    tool(written, "ruff", "format", "--no-cache", "--check")


def test_the_host_s_own_rules_of_ruff_find_nothing_either(written: Path) -> None:
    rules = ("--line-length=100", "--select=B,C4,E,F,I,PT,RUF,SIM,UP,W", "--ignore=RUF009,RUF022")
    tool(written, "ruff", "check", "--no-cache", "--isolated", *rules)


def test_the_types_are_right(written: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(written, copied)
    settings = {
        "typeCheckingMode": "basic",
        "executionEnvironments": [{"root": name, "extraPaths": [str(ROOT)]} for name in HOOKS_OF],
    }
    (copied / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    tool(copied, "basedpyright", "--pythonpath", sys.executable)


@pytest.mark.parametrize("name", ["all_five", "noise_levels"])
def test_the_tests_of_its_formulas_pass(written: Path, name: str) -> None:
    """The contract is for a package that is installed; test_install.py sees to it."""
    path = os.pathsep.join([str(written / name), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not TestContract"],
        cwd=written / name,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"\n{len(HOOKS)} passed, " in done.stdout


def test_the_order_of_the_hooks_makes_no_difference(here: Path) -> None:
    packages = []
    for index, hooks in enumerate(permutations(["on_step_end", "weight_loss", "build_model"])):
        folder = here / str(index)
        folder.mkdir()
        assert main(["new-plugin", "ash", f"--hooks={','.join(hooks)}", "--out", str(folder)]) == 0
        packages.append(texts(folder))
    assert packages.count(packages[0]) == 6


def test_a_hyphen_is_an_underscore_and_weight_loss_the_default(here: Path, written: Path) -> None:
    assert main(["new-plugin", "my-ash"]) == 0
    assert main(["new-plugin", "my_ash", "--hooks", "weight_loss", "--out", str(written)]) == 0
    ours, same = texts(here / "my_ash"), texts(written / "my_ash")
    (written / "my_ash").rename(here / "other")  # `written` is other tests' too
    assert ours == same
    assert 'name = "my-ash"' in ours["pyproject.toml"]


def test_it_says_what_it_wrote_and_what_to_do_next(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "my plugins").mkdir()
    assert main(["new-plugin", "ash", "--out", "my plugins"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "written     my plugins/ash: README.md, ash/__init__.py, ash/py.typed, pyproject.toml, "
        "tests/test_ash.py",
        "next        cd 'my plugins/ash'",
        "            pip install -e '.[test]'",
        "            pytest",
        "            sdxl-host plugins --check",
        "            sdxl-host train --config tiny.yaml --plugins ash",
    ]


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My_Weight", "My_Weight: is not a plugin name (a lower-case letter"),
        ("1st", "1st: is not a plugin name"),
        ("a__b", "a__b: is not a plugin name"),
        ("a_", "a_: is not a plugin name"),
        ("a.b", "a.b: is not a plugin name"),
        ("../ash", "../ash: is not a plugin name"),
        ("", ": is not a plugin name"),
        (LONG + "c", f"{LONG}c: is not a plugin name"),
        ("lambda", "lambda: is a word of the Python language"),
        ("on", "on: is read as True in a config"),
        ("yes", "yes: is read as True in a config"),
        ("true", "true: is read as True in a config"),
        ("off", "off: is read as False in a config"),
        ("null", "null: is read as None in a config"),
        *[
            (name, f"{name}: is a name that belongs to the host")
            for name in ("host", "train", "data", "model", "optim", "plugins", "none")
        ],
        ("ash", "ash: is a plugin already, of fake-ash 1.0"),
        ("snr", "snr: is the plugin of sdxl-snr"),
        ("timestep-bias", "timestep_bias: is the plugin of sdxl-timestep-bias"),
        ("sdxl-snr", "sdxl_snr: is the name of the package sdxl-snr, which pip would replace"),
        ("pillow", "pillow: is the name of the package pillow, which pip would replace"),
        ("json", "json: is the name of a module, which the plugin's would hide"),
        ("numpy", "numpy: is the name of the package numpy"),
        ("yaml", "yaml: is the name of a module"),
        ("tests", "tests: is the name of a module"),
    ],
)
def test_a_name_that_can_t_be_is_refused_with_the_remedy(
    site: Any, here: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    site.add("ash")
    told = refused(capsys, name)
    assert told.startswith(message)
    assert told.endswith("; choose another name for the plugin")
    assert not list(here.iterdir())


@pytest.mark.parametrize("content", [None, b"Name: \xff\n"])
def test_a_damaged_package_hides_no_taken_name(
    site: Any, here: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    for name in ("ash", "oak"):
        site.add("twig", distribution=name)
    file = site.folder / "ash-1.0.dist-info" / "METADATA"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    for name in ("ash", "oak"):
        assert refused(capsys, name).startswith(f"{name}: is the name of the package {name}")


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("weight_los", "there is no hook named weight_los (did you mean weight_loss?) (hooks: "),
        ("weight_loss,", "there is no hook named nothing (hooks: build_model, "),
        ("", "there is no hook named nothing (hooks: "),
        ("weight_loss,on_step_end, weight_loss", "weight_loss stands there twice; name each"),
    ],
)
def test_hooks_that_are_not_the_five_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], hooks: str, message: str
) -> None:
    assert refused(capsys, "ash", "--hooks", hooks).startswith(f"--hooks {hooks}: {message}")
    assert not list(here.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_is_there_is_never_overwritten(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "folder":
        (here / "ash").mkdir()
    elif kind == "file":
        (here / "ash").write_text("mine")
    else:
        (here / "ash").symlink_to("nowhere")
    told = refused(capsys, "ash")
    assert told == "ash: is there already and is never overwritten; choose another NAME or --out"
    assert [path.name for path in here.iterdir()] == ["ash"]
    assert kind != "file" or (here / "ash").read_text() == "mine"
    assert kind != "folder" or not list((here / "ash").iterdir())


def test_a_folder_that_is_not_there_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "ash", "--out", "elsewhere")
    assert told == "--out elsewhere: there is no such folder; make it, or choose another"
    assert not list(here.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_half_written(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    write_new, count = command.write_new, 0

    def fail(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == 3:
            assert list(here.iterdir())  # so far it stands aside
            assert not (here / "ash").exists()
            raise error
        write_new(path, content)

    monkeypatch.setattr(command, "write_new", fail)
    code = main(["new-plugin", "ash"])
    assert count == 3
    assert not list(here.iterdir())
    if isinstance(error, OSError):
        assert code == 2
        assert capsys.readouterr().err == (
            "sdxl-host: error: ash: can't be written (No space left on device); choose another "
            "folder with --out\n"
        )
    else:
        assert code == 130
