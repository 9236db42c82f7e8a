"""What the tests of the testing kit share: a plugin to install, and what a check finds in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdxl_host
from sdxl_host.errors import PluginError
from sdxl_host.testing.subject import Subject

HOST = Path(sdxl_host.__file__).parent
HEAD = """
from dataclasses import dataclass, field, replace
import numpy as np
from sdxl_host import (
    DiscreteDistribution, NoiseDistribution, Preconditioning, SamplingDefaults, encode_truncated,
    hookimpl, option,
)
"""


@pytest.fixture(scope="session")
def head() -> str:
    """What the modules of plugins begin with."""
    return HEAD


@pytest.fixture
def subject(site: Any, tmp_path: Path) -> Callable[..., Subject]:
    """Installs a plugin `oak` whose module ends with the given source."""

    def install(source: str, **options: Any) -> Subject:
        site.add("oak", source=HEAD + source)
        return Subject("oak", tmp_path / "contract", options, steps=2)

    return install


@pytest.fixture(scope="session")
def fault() -> Callable[..., str]:
    """Calls a check and gives what it finds: one line, the plugin first and a remedy last."""

    def found_by(check: Callable[..., Any], *arguments: Any) -> str:
        with pytest.raises(PluginError) as found:
            check(*arguments)
        text = str(found.value)
        assert re.match(r"plugin oak\b|\w+: .*plugin oak\b", text)
        assert ";" in text
        return text

    return found_by


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs code in a process of its own, which must end well, and gives what it prints."""
    return run_in_process


def run_in_process(code: str, path: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path or str(HOST.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
