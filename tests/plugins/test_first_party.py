"""What the four plugins' packages have in common: metadata, licence, and what they import."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_host import testing
from sdxl_host.plugins.discovery import GROUP, Installed, fitting
from sdxl_host.plugins.roles import implementations
from sdxl_host.settings.options import describe

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"
FOLDERS = sorted(PLUGINS.glob("sdxl_*"))
NAMES = ["edm", "lpw", "snr", "timestep_bias"]
ROLES = {
    "edm": ["adapts build_model", "claims sample_timesteps"],
    "lpw": ["claims encode_prompt", "observes on_step_end"],
    "snr": ["claims weight_loss"],
    "timestep_bias": ["adapts sample_timesteps", "adapts weight_loss"],
}


def metadata(folder: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((folder / "pyproject.toml").read_text())


def plugin_class(name: str) -> type:
    folder = next(folder for folder in FOLDERS if folder.name == f"sdxl_{name}")
    module, _, attribute = metadata(folder)["project"]["entry-points"][GROUP][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def test_there_are_the_four_of_them() -> None:
    assert [folder.name for folder in FOLDERS] == [f"sdxl_{name}" for name in NAMES]


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_metadata_agree_with_the_contract(folder: Path) -> None:
    project = metadata(folder)["project"]
    name = folder.name.removeprefix("sdxl_")
    assert project["name"] == folder.name.replace("_", "-")
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert project["requires-python"] == ">=3.10,<3.13"
    assert project["dependencies"][0] == "sdxl-host>=0.1,<0.2"
    assert list(project["entry-points"][GROUP]) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_the_host_accepts_the_class_of_the_entry_point(name: str) -> None:
    from packaging.specifiers import SpecifierSet

    cls = plugin_class(name)
    module = f"sdxl_{name}"
    installed = Installed(name, module, "0.1.0", SpecifierSet(">=0.1,<0.2"), module, cls.__name__)
    assert fitting(installed, [installed]) is None
    roles = [f"{role.role} {role.hook}" for role in implementations(installed, cls)]
    assert roles == ROLES[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_default_and_help_and_stands_in_the_readme(
    name: str,
) -> None:
    readme = (PLUGINS / f"sdxl_{name}" / "README.md").read_text()
    for row in describe(plugin_class(name).Options):  # type: ignore[attr-defined]
        assert row["help"]
        assert "default" in row
        assert f"| `{row['name']}` | `{row['default']}` |" in readme


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_only_public_names_of_the_host_are_imported(
    folder: Path, hidden_imports: Callable[..., list[str]]
) -> None:
    for path in sorted((folder / folder.name).glob("*.py")):
        assert hidden_imports(path) == []


TESTED = [*FOLDERS, *sorted(ROOT.glob("examples/plugins/*/")), ROOT / "sdxl_host/templates/plugin"]


@pytest.mark.parametrize("folder", TESTED, ids=lambda folder: folder.name)
def test_a_plugins_tests_import_public_names_alone(
    folder: Path, hidden_imports: Callable[..., list[str]]
) -> None:
    """Those of `sdxl_host` and of `sdxl_host.testing`, as the tests of any other plugin must."""
    files = sorted((folder / "tests").glob("*.py"))
    assert files
    for path in files:
        assert hidden_imports(path, testing) == [], path


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_a_plugin_stays_small_enough_to_copy(
    folder: Path, code_lines: Callable[[Path], int]
) -> None:
    files = [p for p in (folder / folder.name).glob("*.py") if p.name != "targets.py"]
    lines = sum(code_lines(file) for file in files)
    assert 15 <= lines <= (300 if folder.name == "sdxl_lpw" else 150)


def test_all_four_go_together() -> None:
    """edm's draws are biased, and snr's weight is corrected for it."""
    values = {"strategy": "later", "multiplier": 2.0, "importance_correction": True}
    chosen = [("edm", {}), ("snr", {}), ("timestep_bias", values), ("lpw", {})]
    classes = [(plugin_class(name), options) for name, options in chosen]
    hooks = testing.tiny_hooks(*(cls(testing.make_options(cls, o)) for cls, o in classes))
    assert hooks.chain("sample_timesteps") == "edm -> timestep_bias"
    assert hooks.chain("weight_loss") == "snr -> timestep_bias"
    assert hooks.chain("encode_prompt") == "lpw"

    schedule, distribution = hooks.build_model().schedule, hooks.sample_timesteps(step=1)
    assert hooks.sample_timesteps(step=2) is distribution
    assert 1 - distribution.cdf(schedule.edges[750]) == pytest.approx(0.0293, abs=5e-5)

    weights = hooks.weight_loss(hooks.noise_at(np.array([0.1, 1.0, 20.0])))
    total = distribution.expect(lambda s: 1 / np.where(s >= schedule.edges[750], 2.0, 1.0))
    ratio = np.array([1.0, 1.0, 2.0]) * total  # E_q[1 / w] = 1 / Z
    np.testing.assert_allclose(weights, np.array([5.0, 1.0, 1 / 400]) / ratio, rtol=1e-4)
