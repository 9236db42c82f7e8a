"""The environment that MindSpore finds: what is set for its CPU backend, and what it then does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdxl_host
from sdxl_host.device import prepare_cpu_environment, prepare_device

NAMES = ("MS_DEV_HOST_BLOCKING_RUN", "ONEDNN_MAX_CPU_ISA")


def test_a_value_that_the_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "DEFAULT")
    monkeypatch.delenv("MS_DEV_HOST_BLOCKING_RUN")
    assert prepare_cpu_environment() == ("MS_DEV_HOST_BLOCKING_RUN",)
    assert [os.environ[name] for name in NAMES] == ["1", "DEFAULT"]


@pytest.mark.parametrize("target", ["auto", "Ascend"])
def test_an_ascend_device_gets_none_of_it(
    device: str, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    import mindspore as ms

    monkeypatch.setattr(ms.hal, "is_available", lambda target: True)
    monkeypatch.setattr(ms, "set_device", lambda target: None)
    for name in NAMES:
        monkeypatch.delenv(name)
    assert prepare_device(target) == "Ascend"
    assert not [name for name in NAMES if name in os.environ]


def test_no_convolution_of_the_demo_is_computed_by_reference_loops(tmp_path: Path) -> None:
    """oneDNN's own report of a training step and of drawing, forward and backward."""
    command = [sys.executable, "-m", "sdxl_host", "train", "--plugins", "edm,snr"]
    command += ["--total_step", "1", "--ms_mode", "1", "--save_path", str(tmp_path)]
    command += ["--sample_count", "1", "--sample_steps", "1"]
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        command,
        env={**kept, "ONEDNN_VERBOSE": "1", "PYTHONPATH": str(Path(sdxl_host.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    # onednn_verbose,primitive,exec,cpu,convolution,jit_uni:...,forward_training,...
    found = re.findall(r",convolution,([^,]+),([a-z_]+),", done.stdout)
    assert {"forward_training", "backward_data", "backward_weights"} <= {kind for _, kind in found}
    assert [way for way, _ in found if re.search(r"\bref\b", way)] == []
