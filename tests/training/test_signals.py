"""Ctrl-C and SIGTERM: the step in hand is finished and saved, a second one ends at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load
from sdxl_host.training.signals import Interruption

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
ARGUMENTS = [
    *("--config", TINY, "--plugins=waiting", "--save_path_with_time=False", "--per_batch_size=1"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"),
    "data.dataset_config.params.only=[anchor.png,banana.png,crab.png]",
]
# In its third step it waits, where the environment says so, until a file is there.
WAITING = """
import os, pathlib, time
from sdxl_host import hookimpl

class Fake:
    @hookimpl(wrapper=True)
    def weight_loss(self, step):
        weights = yield
        if step == 3 and "WAITING" in os.environ:
            folder = pathlib.Path(os.environ["WAITING"])
            (folder / "waits").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        return weights
"""
# A process that hangs fails the test after so many seconds; nothing else depends on the clock.
_PATIENCE = 900.0
_SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def handlers() -> Iterator[Callable[[], list[Any]]]:
    """What stands for the two signals; put back after the test."""

    def now() -> list[Any]:
        return [signal.getsignal(number) for number in _SIGNALS]

    before = now()
    yield now
    for number, handler in zip(_SIGNALS, before, strict=True):
        signal.signal(number, handler)


# ---- the signals themselves


@pytest.mark.parametrize("number", _SIGNALS)
def test_the_first_signal_is_noted_and_the_second_has_its_own_effect(
    number: signal.Signals, handlers: Callable[[], list[Any]]
) -> None:
    before, said = handlers(), []
    with Interruption(said.append) as interruption:
        assert (interruption.number, interruption.name) == (None, "")
        assert handlers() != before
        signal.raise_signal(number)
        assert (interruption.number, interruption.name) == (number, number.name)
        assert said == [
            f"{number.name}: the step in hand is finished and saved; once more ends at once"
        ]
        assert handlers() == [signal.SIG_DFL] * 2
    assert handlers() == before


def test_without_a_signal_nothing_is_said_and_the_handlers_come_back(
    handlers: Callable[[], list[Any]],
) -> None:
    before, said = handlers(), []
    with pytest.raises(ZeroDivisionError), Interruption(said.append) as interruption:
        raise ZeroDivisionError
    assert (interruption.number, said) == (None, [])
    assert handlers() == before


def test_a_thread_that_takes_no_signals_changes_nothing(
    handlers: Callable[[], list[Any]],
) -> None:
    before, inside = handlers(), []

    def run() -> None:
        with Interruption(inside.append):
            inside.extend(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == before


@pytest.mark.parametrize("number", _SIGNALS)
def test_a_signal_that_is_ignored_stays_so(
    number: signal.Signals, handlers: Callable[[], list[Any]]
) -> None:
    """A shell starts `sdxl-host train &` in a script so; Ctrl-C is then for something else."""
    said: list[str] = []
    signal.signal(number, signal.SIG_IGN)
    before = handlers()
    with Interruption(said.append) as interruption:
        signal.raise_signal(number)
        assert (interruption.number, said) == (None, [])
        (other,) = {*_SIGNALS} - {number}
        signal.raise_signal(other)
        assert interruption.number == other
        assert signal.getsignal(number) is signal.SIG_IGN  # and so it stays
    assert handlers() == before


def test_a_signal_in_the_midst_of_a_line_is_noted_all_the_same(
    handlers: Callable[[], list[Any]],
) -> None:
    """Python refuses to print while it prints."""

    def say(line: str) -> None:
        raise RuntimeError("reentrant call")

    with Interruption(say) as interruption:
        signal.raise_signal(signal.SIGTERM)
    assert interruption.number == signal.SIGTERM


# ---- runs


@pytest.fixture
def train(site: Any, device: str, tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Trains in this process; its exit code and what it says.

    signalled: the signal that comes while the lines of step 2 are written.
    """
    from sdxl_host.training.build import make_trainer

    site.add("waiting", source=WAITING)

    def run(
        folder: str, *words: str, signalled: signal.Signals | None = None
    ) -> tuple[int, list[str]]:
        said: list[str] = []

        def say(fact: Any) -> None:
            said.extend(lines_of(fact))
            if signalled is not None and said[-1].startswith("step 2/"):
                signal.raise_signal(signalled)

        arguments = [*ARGUMENTS, "--save_path", str(tmp_path / folder), "--total_step=5", *words]
        return make_trainer(load(arguments), say).run(), said

    return run


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name in ("network", "optimizer"):
        first, second = (
            load_file(folder / "checkpoints" / "latest" / f"{name}.safetensors")
            for folder in (one, other)
        )
        assert first.keys() == second.keys()
        assert all(first[key].tobytes() == second[key].tobytes() for key in first), name


def test_an_interrupted_run_saves_its_step_and_goes_on_as_if_nothing_had_been(
    train: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """The step in hand is the one that begins while the signal comes: 3."""
    code, said = train("stopped", signalled=signal.SIGTERM)
    stopped, latest = tmp_path / "stopped", tmp_path / "stopped/checkpoints/step_00000003"
    assert code == 128 + signal.SIGTERM
    assert (stopped / "checkpoints" / "latest").resolve() == latest
    assert [path.name for path in latest.parent.glob("step_*")] == [latest.name]
    assert steps(stopped) == [1, 2, 3]
    assert not (stopped / "samples").exists()
    at = said.index("SIGTERM: the step in hand is finished and saved; once more ends at once")
    after = "\n".join(said[at:])
    assert "stopped after step 3: interrupted by SIGTERM" in after
    assert f"--resume {latest}" in after

    assert train("stopped", "--resume", "latest")[0] == 0
    assert train("whole")[0] == 0
    assert_same_run(tmp_path / "whole", stopped)
    assert (stopped / "samples" / "step_00000005.png").is_file()


def started(site: Any, folder: Path, log: Path, **how: Any) -> subprocess.Popen[str]:
    """`sdxl-host train` in a process of its own, once it waits in its third step."""
    folder.mkdir()
    words = [*ARGUMENTS, "--total_step=5", "--save_ckpt_interval=2", "--save_path", str(folder)]
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdxl_host", "train", *words],
            env={**os.environ, "PYTHONPATH": site.python_path, "WAITING": str(folder)},
            stderr=errors,
            text=True,
            **how,
        )
    _wait(process, (folder / "waits").exists, log)
    return process


def _wait(process: subprocess.Popen[str], is_true: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not is_true():
        assert process.poll() is None, log.read_text("utf-8")
        assert time.monotonic() < end, log.read_text("utf-8")
        time.sleep(0.01)


def test_ctrl_c_saves_even_where_nobody_reads_any_more(
    train: Callable[..., tuple[int, list[str]]], site: Any, tmp_path: Path
) -> None:
    """As in `sdxl-host train | tee log`: Ctrl-C ends `tee` too, and the next line has no reader."""
    folder, log = tmp_path / "stopped", tmp_path / "log"
    process = started(site, folder, log, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    (folder / "go").touch()
    assert process.wait(_PATIENCE) == 128 + signal.SIGINT, log.read_text("utf-8")
    assert log.read_text("utf-8") == ""
    assert (folder / "checkpoints" / "latest").resolve().name == "step_00000003"
    assert not (folder / "samples").exists()

    assert train("stopped", "--resume", "latest", "--save_ckpt_interval=2")[0] == 0
    assert train("whole")[0] == 0
    assert_same_run(tmp_path / "whole", folder)


def test_a_second_signal_ends_at_once(site: Any, tmp_path: Path) -> None:
    """In the midst of the step, which is not saved; the earlier checkpoint is as it was."""
    site.add("waiting", source=WAITING)
    folder, log, said = tmp_path / "stopped", tmp_path / "log", tmp_path / "said"
    with open(said, "w", encoding="utf-8") as output:
        process = started(site, folder, log, stdout=output)
    process.send_signal(signal.SIGTERM)
    _wait(process, lambda: "once more ends at once" in said.read_text("utf-8"), log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(_PATIENCE) == -signal.SIGTERM
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert steps(folder) == [1, 2]
