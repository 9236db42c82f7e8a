"""Which checkpoints stay, and which of those that stayed is the newest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdxl_host.checkpoints.open import find_latest, open_checkpoint
from sdxl_host.checkpoints.write import Contents, remove_older, save_checkpoint
from sdxl_host.config.load import load
from sdxl_host.errors import DataError

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
ARGUMENTS = [
    *("--config", TINY, "--plugins=none", "--save_path_with_time=False", "--per_batch_size=1"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"),
    "data.dataset_config.params.only=[anchor.png,banana.png,crab.png]",
]


def save(parent: Path, *steps: int) -> Path:
    """Small checkpoints in this order, each a second after the one before; the last one's."""
    for step in steps:
        arrays = {"a": np.full(3, step, np.float32)}
        contents = Contents(step, "train: {}\n", arrays, arrays, {}, arrays, {}, {}, [], {})
        folder = save_checkpoint(parent, contents)
        written(folder, 1000 + len(list(parent.glob("step_*"))))
    return folder


def written(folder: Path, time: float) -> None:
    """Makes the checkpoint one that was written then."""
    os.utime(folder / "state.json", (time, time))


def steps(parent: Path) -> list[int]:
    return sorted(open_checkpoint(folder).step for folder in parent.glob("step_*"))


# ---- what is removed


@pytest.mark.parametrize(
    ("kept", "left"), [(1, [3]), (2, [3, 9]), (3, [3, 7, 9]), (4, [3, 5, 7, 9]), (9, [3, 5, 7, 9])]
)
def test_the_newest_stay_by_when_they_were_written(
    tmp_path: Path, kept: int, left: list[int]
) -> None:
    """A run that went on from an earlier step wrote step 3 after 9."""
    save(tmp_path, 5, 7, 9, 3)
    remove_older(tmp_path, kept)
    assert steps(tmp_path) == left
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[:5] != "step_") == ["latest"]
    assert open_checkpoint(tmp_path / "latest").step == 3


@pytest.mark.parametrize("relative", [False, True])
def test_the_latest_stays_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    """A clock that was set back makes the last checkpoint the oldest."""
    save(tmp_path / "run", 1, 2, 3)
    written(tmp_path / "run" / "step_00000003", 1)
    monkeypatch.chdir(tmp_path)
    remove_older(Path("run") if relative else tmp_path / "run", 1)
    assert steps(tmp_path / "run") == [3]


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    remove_older(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "notes.txt",
        "step_00000002",
        "step_notes",
    ]


def test_a_removal_that_fails_half_way_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, all that is called a checkpoint is one, and the next one saved clears it away."""
    save(tmp_path, 1, 2, 3, 4)

    def fail(folder: Path) -> None:
        (folder / "network.safetensors").unlink()
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        message = (
            r"step_00000001: can't be removed \(Operation not permitted\), as --max_num_ckpt 2"
        )
        with pytest.raises(DataError, match=message):
            remove_older(tmp_path, 2)
    assert steps(tmp_path) == [2, 3, 4]
    save(tmp_path, 5)
    remove_older(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000005",
    ]


def test_a_checkpoint_that_stays_shares_its_frozen_weights_with_none_that_is_gone(
    tmp_path: Path,
) -> None:
    """They are one file on the disk; removing some of its names must leave it."""
    save(tmp_path, 1, 2, 3)
    remove_older(tmp_path, 1)
    assert load_file(tmp_path / "latest" / "frozen.safetensors")["a"].tolist() == [1, 1, 1]
    assert (tmp_path / "latest" / "frozen.safetensors").stat().st_nlink == 1


# ---- the newest of those that are there


@pytest.mark.parametrize("link", ["gone", "step_00000009"])
def test_without_its_latest_a_run_goes_on_from_the_last_one_written(
    tmp_path: Path, link: str
) -> None:
    """Rather than from another run: a crash, or a user, took what `latest` points to."""
    save(tmp_path / "1" / "checkpoints", 8)
    parent = tmp_path / "2" / "checkpoints"
    save(parent, 5, 9, 3, 4)
    shutil.rmtree(parent / "step_00000004")
    shutil.rmtree(parent / "step_00000009")
    (parent / "latest").unlink()
    if link != "gone":
        (parent / "latest").symlink_to(link)
    assert open_checkpoint(find_latest(tmp_path)).step == 3


# ---- runs


@pytest.fixture(scope="module")
def train(device: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains in this process, into the folder of a name; gives it."""
    from sdxl_host.training.build import make_trainer

    parent = tmp_path_factory.mktemp("runs")

    def run(name: str, *words: str) -> Path:
        folder = parent / name
        make_trainer(load([*ARGUMENTS, "--save_path", str(folder), *words]), [].append).run()
        return folder

    return run


def test_a_run_that_went_back_rotates_and_ends_as_it_did(train: Callable[..., Path]) -> None:
    """From step 1 of 5, with the checkpoints of its first way through still there."""
    run = train("run", "--total_step=5", "--save_ckpt_interval=1")
    before = (
        (run / "metrics.jsonl").read_bytes(),
        load_file(run / "checkpoints" / "latest" / "network.safetensors"),
    )
    first = run / "checkpoints" / "step_00000001"
    train(
        "run", "--total_step=5", "--save_ckpt_interval=2", "--max_num_ckpt=2", f"--resume={first}"
    )
    assert steps(run / "checkpoints") == [4, 5]
    assert open_checkpoint(find_latest(run)).step == 5
    assert (run / "metrics.jsonl").read_bytes() == before[0]
    after = load_file(run / "checkpoints" / "latest" / "network.safetensors")
    assert all((after[name] == array).all() for name, array in before[1].items())

    # Of what stayed, each is enough to go on from.
    older = run / "checkpoints" / "step_00000004"
    train("run", "--total_step=5", "--max_num_ckpt=1", f"--resume={older}")
    assert steps(run / "checkpoints") == [5]
    assert (run / "metrics.jsonl").read_bytes() == before[0]
