"""The environment that MindSpore finds: what is set for its CPU backend, and what it then does."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdxl_host
from sdxl_host import device as devices
from sdxl_host.commands.train import run as run_command
from sdxl_host.config.load import load
from sdxl_host.device import prepare_cpu_environment, prepare_device
from sdxl_host.errors import ConfigError

TINY = "configs/tiny.yaml"

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


def test_the_devices_memory_is_limited(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mindspore as ms

    signature, asked = inspect.signature(ms.runtime.set_memory), []
    monkeypatch.setattr(
        ms.runtime, "set_memory", lambda **given: asked.append(signature.bind(**given).arguments)
    )
    config = load(["--config", TINY, "--device_target=CPU", "--max_device_memory=59GB"])
    with pytest.raises(ConfigError, match=r"^--max_device_memory 59GB: limits an Ascend device"):
        run_command(config)
    monkeypatch.setattr(devices, "on_ascend", lambda: True)
    devices.limit_memory("")
    assert asked == []
    devices.limit_memory(config.train.max_device_memory)
    assert asked == [{"max_size": "59GB"}]
    for text in ("59", "59 GB", "59MB", "GB", "-1GB", "lots", "0GB", "0.0GB", "59GB\n"):
        message = rf"^--max_device_memory {text}: is no size above 0; write it as 59GB$"
        with pytest.raises(ConfigError, match=message):
            devices.limit_memory(text)


@pytest.mark.parametrize(
    ("device_target", "ascend", "chosen"),
    [
        ("auto", False, "CPU"),
        ("auto", True, "Ascend"),
        ("CPU", True, "CPU"),
        ("Ascend", True, "Ascend"),
        ("Ascend", False, None),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch, device_target: str, ascend: bool, chosen: str
) -> None:
    import mindspore as ms

    asked: list[str] = []
    monkeypatch.setattr(ms.hal, "is_available", lambda target: ascend and target == "Ascend")
    monkeypatch.setattr(ms, "set_device", asked.append)
    target = load([f"--device_target={device_target}"]).train.device_target
    if chosen is None:
        with pytest.raises(ConfigError, match=r"^train\.device_target: .* --device_target CPU$"):
            prepare_device(target)
    else:
        assert prepare_device(target) == chosen
    assert asked == ([chosen] if chosen else [])
