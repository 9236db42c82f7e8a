"""What pytest learns from sdxl-host: fixtures for the tests of plugins, and a few lines at the end.

It is a plugin of pytest wherever sdxl-host is installed, so importing it imports nothing more, and
a test run that uses none of it is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sdxl_host import DiffusionModel, NoiseLevels, TextEncoders
    from sdxl_host.testing.run_checks import Runs
    from sdxl_host.testing.runs import TinyRun

__all__ = [
    "contract_plain_run",
    "contract_runs",
    "noise_levels",
    "tiny",
    "tiny_encoders",
    "tiny_model",
]

pytest.register_assert_rewrite("sdxl_host.testing.contract")


@pytest.fixture
def tiny_model() -> DiffusionModel:
    """SDXL's own objective with fake encoders and no network: numpy only."""
    from sdxl_host.testing import parts

    return parts.tiny_model()


@pytest.fixture
def tiny_encoders() -> TextEncoders:
    """Two fake text encoders, numpy only."""
    from sdxl_host.testing import parts

    return parts.tiny_encoders()


@pytest.fixture
def noise_levels() -> NoiseLevels:
    """161 noise levels from SNR 1e4 down to 1e-4."""
    from sdxl_host.testing import parts

    return parts.noise_levels()


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TinyRun]:
    """`tiny_run` with a new folder for each run: `tiny(["my_weight"], steps=2)`."""
    from sdxl_host.testing.runs import tiny_run

    made: list[TinyRun] = []

    def run(*arguments: object, **named: object) -> TinyRun:
        named.setdefault("folder", tmp_path / f"tiny-{len(made)}")
        made.append(tiny_run(*arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    return run


# ---- of PluginContract


@pytest.fixture(scope="class")
def contract_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The plugin that a subclass of PluginContract names, with the runs its tests share."""
    from sdxl_host.testing.run_checks import Runs
    from sdxl_host.testing.subject import Subject

    contract: Any = request.cls
    if not contract.plugin:
        pytest.fail(
            f'{contract.__name__}: names no plugin; write plugin = "the entry point\'s name"',
            pytrace=False,
        )
    if contract.steps < 2:
        pytest.fail(
            f"{contract.__name__}: steps is {contract.steps}; write at least 2, because a run is "
            "resumed in the middle",
            pytrace=False,
        )
    folder = tmp_path_factory.mktemp("contract")
    return Runs(Subject(contract.plugin, folder, contract.options, contract.steps))


@pytest.fixture(scope="session")
def contract_plain_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A short run without plugins, for all contracts of a session."""
    from sdxl_host.testing.run_checks import plain_run

    return plain_run(tmp_path_factory.mktemp("plain"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each plugin under contract costs."""
    lines = [
        str(value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "sdxl_host_cost"
    ]
    if lines:
        terminalreporter.write_sep("-", "what the plugins cost")
        for line in lines:
            terminalreporter.write_line(line)
