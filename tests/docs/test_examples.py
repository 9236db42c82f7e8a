"""The example plugins: small, by the public interface alone, and each changes what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_host.errors import PluginError
from sdxl_host.plugins.discovery import discover, find, import_class
from sdxl_host.settings.options import describe
from sdxl_host.testing import tiny_run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
NAMES = ["debiased", "lora", "loss_aware", "rectified_flow"]
# What three steps need to show it, where that is not the default.
OPTIONS = {"loss_aware": {"warmup": 1, "bins": 2}}


@pytest.fixture(scope="module")
def plain(device: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of three steps without plugins."""
    return tiny_run(folder=tmp_path_factory.mktemp("plain")).losses


def modules(name: str) -> list[Path]:
    return sorted((EXAMPLES / name / name).glob("*.py"))


def test_there_are_the_four_of_them() -> None:
    assert sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml")) == NAMES
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"| [{name}]({name}) |" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_under_100_lines_of_code(
    name: str, code_lines: Callable[[Path], int]
) -> None:
    assert 15 <= sum(code_lines(file) for file in modules(name)) < 100


@pytest.mark.parametrize("name", NAMES)
def test_an_example_imports_only_public_names(
    name: str, hidden_imports: Callable[[Path], list[str]]
) -> None:
    assert [found for file in modules(name) for found in hidden_imports(file)] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_option_stands_in_the_readme_with_its_default(name: str) -> None:
    readme = (EXAMPLES / name / "README.md").read_text()
    options = import_class(find(name, discover())).Options  # type: ignore[attr-defined]
    for row in describe(options):
        assert f"| `{row['name']}` | `{row['default']}` |" in readme


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_and_changes_what_is_learned(
    name: str, plain: list[float], tmp_path: Path
) -> None:
    """From the first step those that weigh or draw otherwise; after it those that have to learn."""
    losses = tiny_run([name], folder=tmp_path, options=OPTIONS).losses
    first = {"loss_aware": 1, "lora": 1}.get(name, 0)
    assert len(losses) == 3
    assert losses[:first] == plain[:first]
    assert all(a != b for a, b in zip(losses[first:], plain[first:], strict=True))


@pytest.mark.parametrize(
    ("plugins", "hook"),
    [(["debiased", "snr"], "weight_loss"), (["edm", "rectified_flow"], "sample_timesteps")],
)
def test_two_that_claim_one_hook_are_refused_by_name(
    plugins: list[str], hook: str, tmp_path: Path
) -> None:
    """In either order, with the package of each and the way out."""
    packages = {"debiased": "sdxl-host-example-debiased", "snr": "sdxl-snr", "edm": "sdxl-edm"}
    packages["rectified_flow"] = "sdxl-host-example-rectified-flow"
    for number, (one, other) in enumerate((plugins, plugins[::-1])):
        with pytest.raises(PluginError) as error:
            tiny_run([one, other], folder=tmp_path / str(number))
        assert str(error.value) == (
            f"{hook} is claimed by two plugins, {one} ({packages[one]} 0.1.0) and "
            f"{other} ({packages[other]} 0.1.0); select one of them with --plugins"
        )


def test_the_four_go_together(device: str, plain: list[float], tmp_path: Path) -> None:
    losses = tiny_run(NAMES, folder=tmp_path, options=OPTIONS).losses
    assert len(losses) == 3
    assert not set(losses) & set(plain)
