"""Law 4: a run killed at any moment and resumed is the run that was never killed.

First what a kill can leave on the disk while a checkpoint is written, all of it; then runs in
processes of their own, each killed with SIGKILL, its whole group at once.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdxl_host.checkpoints.open import find_latest, open_checkpoint
from sdxl_host.checkpoints.write import Contents, remove_older, save_checkpoint
from sdxl_host.errors import DataError
from sdxl_host.randomness import Stream, uniforms

# ---- all that a kill can leave of a checkpoint that is being written

# Every change of names goes through one of these; contents are synced by the last before their
# folder's name is changed.
CALLS = ("link", "mkdir", "remove", "rename", "replace", "rmdir", "symlink", "unlink", "fsync")
# What a checkpoint of which step is, after it is saved.
LISTED = {"latest", "step_00000002", "step_00000004"}


def save(run: Path, step: int, seed: int = 0, kept: int = 0) -> None:
    """A small checkpoint, saved and rotated as a run does it."""
    generator = np.random.default_rng([step, seed])
    arrays = {"a": generator.standard_normal(5).astype(np.float32)}
    contents = Contents(
        step, "train: {}\n", arrays, {"text": np.ones(2)}, arrays, arrays, {}, {"snr": arrays},
        [], {},
    )  # fmt: skip
    folder = save_checkpoint(run / "checkpoints", contents)
    if kept:
        remove_older(folder.parent, kept)


def listed(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Copies of a run's folder as it is just before each call that changes or syncs a name."""

    def record(run: Path, act: Callable[[], None]) -> list[Path]:
        found: list[Path] = []

        def noting(call: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*arguments: Any, **options: Any) -> Any:
                with monkeypatch.context() as outside:
                    for name in CALLS:
                        outside.setattr(os, name, originals[name])
                    copy = tmp_path / "states" / f"{len(found):03d}"
                    found.append(shutil.copytree(run, copy, symlinks=True))
                return call(*arguments, **options)

            return noted

        originals = {name: getattr(os, name) for name in CALLS}
        with monkeypatch.context() as patch:
            for name, call in originals.items():
                patch.setattr(os, name, noting(call))
            act()
        return found

    return record


def test_no_kill_while_the_first_checkpoint_is_written_leaves_half_of_one(
    states: Callable[..., list[Path]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    found = states(run, lambda: save(run, 2))
    seen: set[int | str] = set()
    for state in found:
        try:
            seen.add(open_checkpoint(find_latest(state)).step)
        except DataError as error:
            seen.add(re.sub(r"in \S+", "in it", str(error)))
        save(state, 4)
        assert open_checkpoint(find_latest(state)).step == 4
        assert listed(state) in (LISTED, LISTED - {"step_00000002"})
    none = "--resume latest: no run in it has a checkpoint; give --save_path of the run"
    assert seen == {none, 2}


@pytest.mark.parametrize("kept", [0, 1])
def test_no_kill_while_a_checkpoint_is_written_or_removed_costs_the_earlier_one(
    states: Callable[..., list[Path]], tmp_path: Path, kept: int
) -> None:
    run = tmp_path / "run"
    save(run, 1)
    save(run, 2)
    found = states(run, lambda: save(run, 4, kept=kept))
    steps = [open_checkpoint(find_latest(state)).step for state in found]
    assert steps == sorted(steps)
    assert set(steps) == {2, 4}
    for state in found:
        for whole in (state / "checkpoints").glob("step_*"):
            open_checkpoint(whole)
        save(state, 4, kept=2)
        alone = {"latest", "step_00000004"}
        assert listed(state) == LISTED or (kept and listed(state) == alone)


def test_no_kill_while_a_checkpoint_is_replaced_leaves_a_run_without_one(
    states: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """A run that goes on from step 2 comes to step 4 again, which `latest` points to."""
    run = tmp_path / "run"
    save(run, 2)
    save(run, 4)
    found = states(run, lambda: save(run, 4, seed=1))
    assert {open_checkpoint(find_latest(state)).step for state in found} == {2, 4}
    for state in found:
        # Whatever is saved next, the one that was making way is there, old or new.
        save(state, 3)
        assert listed(state) == LISTED | {"step_00000003"}
        assert open_checkpoint(state / "checkpoints" / "step_00000004").step == 4
        save(state, 4, seed=1)
        assert listed(state) == LISTED | {"step_00000003"}
        arrays = [
            load_file(place / "checkpoints/latest/network.safetensors")["a"]
            for place in (state, run)
        ]
        assert (arrays[0] == arrays[1]).all()


def test_what_is_renamed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that after a power cut no name stands for what was not written: every file and folder of
    a checkpoint is synced before it gets its name, and the name before `latest` points to it."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor: int) -> None:
        events.append(("synced", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def named(call: Callable[..., None]) -> Callable[..., None]:
        def note(source: Path, target: Path) -> None:
            events.append(("named", str(target)))
            call(source, target)

        return note

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", named(rename))
    monkeypatch.setattr(os, "replace", named(replace))
    save(tmp_path, 2)
    parent = tmp_path / "checkpoints"
    folder = parent / "step_00000002"
    place = events.index(("named", str(folder)))
    before = {path for kind, path in events[:place] if kind == "synced"}
    inside = [folder, *folder.rglob("*")]
    assert len(inside) == 10
    assert {str(parent / f".partial-{path.relative_to(parent)}") for path in inside} <= before
    assert events[place + 1 :] == [
        ("synced", str(parent)),
        ("named", str(parent / "latest")),
        ("synced", str(parent)),
    ]


def test_numbers_too_small_are_0_in_every_thread_or_in_none(device: str) -> None:
    """MindSpore tries numbers of threads at an operator's first launches and keeps the fastest, so
    which ones an array meets is chance, and two runs must not differ by it."""
    from mindspore import Tensor

    small = np.full(4096, 1e-38, np.float32)
    expected = small * np.float32(0.25)
    for _ in range(16):
        assert ((Tensor(small) * 0.25).asnumpy() == expected).all()


# ---- runs that are killed

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
EMBEDDERS = "model.params.conditioner_config.params.emb_models"
DROPOUT = 0.4
IMAGES = [f"{name}.png" for name in ("anchor", "banana", "crab", "gem_stone", "key")]
ARGUMENTS = [
    *("--config", TINY, "--save_path_with_time=False"),
    *("--plugins", "edm,snr,timestep_bias,counting"),
    *("plugins.timestep_bias.strategy=earlier", "plugins.timestep_bias.multiplier=2"),
    *("--gradient_accumulation_steps=2", "--per_batch_size=1", "--use_ema=True"),
    *(f"{EMBEDDERS}[{index}].ucg_rate={DROPOUT}" for index in (0, 1)),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.attention_resolutions=[1]"),
    *(f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"),
    f"data.dataset_config.params.only=[{','.join(IMAGES)}]",
    *("--save_ckpt_interval=2", "--max_num_ckpt=2"),
]
# A plugin with state that goes into the loss, so that one count too many or too few is seen.
COUNTING = """
import numpy as np
from sdxl_host import hookimpl

class Fake:
    def __init__(self):
        self.asked, self.seen = 0, np.zeros(3)

    @hookimpl(wrapper=True)
    def weight_loss(self):
        weights = yield
        self.asked += 1
        return weights * (1.0 + 0.1 * self.asked + self.seen.mean())

    @hookimpl
    def on_step_end(self, trainer, result):
        self.seen[result.step % 3] += result.loss
        trainer.log("asked", self.asked)

    def state_dict(self):
        return {"asked": self.asked, "seen": self.seen}

    def load_state_dict(self, state):
        self.asked, self.seen = state["asked"], state["seen"]
"""
# A process that hangs fails the test after so many seconds; nothing else depends on the clock.
_PATIENCE = 900.0


@dataclass(frozen=True)
class Kill:
    """When a process is killed: `share` of a step's time after it has told of `step` or a later
    one, or, where `share` is None, when it next writes a checkpoint; `step` 0: after it has told
    of its start."""

    step: int
    share: float | None


class Process:
    """`sdxl-host train` in a process group of its own, with what it says."""

    def __init__(self, folder: Path, total: int, python_path: str) -> None:
        self.folder = folder
        words = [*ARGUMENTS, f"--total_step={total}", "--save_path", str(folder)]
        if (folder / "checkpoints" / "latest").is_dir():
            words += ["--resume", "latest"]
        self._log = folder.with_name(f"{folder.name}.log")
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sdxl_host", "train", *words],
                env={**os.environ, "PYTHONPATH": python_path},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> None:
        """Waits for its end, which must be a good one."""
        assert self._process.wait(_PATIENCE) == 0, self.said()

    def said(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def _told(self) -> int:
        """The last step that it has told of, 0 before the first."""
        return max(
            (int(step) for step in re.findall(r"^step (\d+)/", self.said(), re.M)), default=0
        )

    def partial(self) -> list[Path]:
        """What of a checkpoint is being written."""
        return list((self.folder / "checkpoints").glob(".partial-step_*"))

    def kill(self, moment: Kill) -> None:
        """Waits for the moment; none of the group is left when this returns."""
        started = time.monotonic()
        if moment.step:
            # One that goes on from a later step than this, because the process before came so far.
            self._wait(lambda: self._told() >= moment.step)
        else:
            self._wait(lambda: "\nrun         " in self.said())
        if moment.share is None:
            while not self._is_caught_writing():
                self._signal(signal.SIGCONT)
        else:
            # The first step of a process takes the time of its start to be told.
            time.sleep(moment.share * min(2.0, time.monotonic() - started))
        self._signal(signal.SIGKILL)
        assert self._process.wait(_PATIENCE) == -signal.SIGKILL, self.said()

    def _is_caught_writing(self) -> bool:
        """Stops the process when it writes; whether it still did when it stood."""
        self._wait(lambda: bool(self.partial()))
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)
        return bool(self.partial())

    def _wait(self, is_true: Callable[[], bool]) -> None:
        end = time.monotonic() + _PATIENCE
        while not is_true():
            assert self._process.poll() is None, f"it ended before its moment: {self.said()}"
            assert time.monotonic() < end, f"its moment does not come: {self.said()}"
            time.sleep(0.001)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


@pytest.fixture
def kill_and_compare(site: Any, tmp_path: Path) -> Callable[[int, list[Kill]], None]:
    """Trains `total` steps at a stretch, and once more with a kill at each of the moments."""
    site.add("counting", source=COUNTING)

    def compare(total: int, moments: list[Kill]) -> None:
        drawn = [uniforms(42, Stream.DROPOUT, step, range(2)) for step in range(1, total + 1)]
        assert 0 < (np.ravel(drawn) < DROPOUT).sum() < 2 * total
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        Process(whole, total, site.python_path).finish()
        for moment in moments:
            process = Process(killed, total, site.python_path)
            process.kill(moment)
            assert len(process.partial()) == 1 or moment.share is not None
        Process(killed, total, site.python_path).finish()
        assert_same_run(whole, killed)

    return compare


def arrays_of(file: Path) -> dict[str, tuple[str, bytes]]:
    """Of a safetensors file: its header is in another order every time it is written."""
    return {name: (str(a.dtype), a.tobytes()) for name, a in load_file(file).items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert (other / "metrics.jsonl").read_bytes() == (one / "metrics.jsonl").read_bytes()
    assert listed(other) == listed(one)
    first, second = find_latest(one), find_latest(other)
    assert first.name == second.name
    for name in ("network", "optimizer", "ema", "frozen", "plugins/counting"):
        file = f"{name}.safetensors"
        assert arrays_of(first / file) == arrays_of(second / file), name
    state = "plugins/counting.json"
    assert (first / state).read_bytes() == (second / state).read_bytes()
    for grid in (one / "samples").iterdir():
        assert (other / "samples" / grid.name).read_bytes() == grid.read_bytes()


def moments(total: int, count: int, seed: int) -> Iterator[Kill]:
    """`count` moments over a run of `total` steps, in order; the second of every five is the
    writing of a checkpoint, the fourth of every ten the start of a process, the last its end."""
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(1, 3 * total // 4), count - 1))
    for index, step in enumerate(steps):
        if index % 5 == 1:
            yield Kill(step, None)
        else:
            yield Kill(0 if index % 10 == 3 else step, chance.uniform(0.0, 1.0))
    yield Kill(total, 0.0)


def test_two_kills_change_nothing(kill_and_compare: Callable[[int, list[Kill]], None]) -> None:
    """One of them while a checkpoint was being written."""
    kill_and_compare(6, list(moments(6, 2, seed=4)))


@pytest.mark.soak
def test_twenty_kills_change_nothing(kill_and_compare: Callable[[int, list[Kill]], None]) -> None:
    """Four of them while a checkpoint was being written."""
    kill_and_compare(40, list(moments(40, 20, seed=20)))
