"""metrics.jsonl on the disk: after a power cut a checkpoint has its lines beside it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from sdxl_host.config.load import load
from sdxl_host.errors import DataError
from sdxl_host.training.build import make_trainer
from sdxl_host.training.observers import Checkpoints, Metrics
from sdxl_host.training.trainer import Trainer

NETWORK = "model.params.network_config.params"
WORDS = [
    *("--config", "tiny.yaml", "--plugins=none", "--guidance_scale=1"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.attention_resolutions=[]"),
    *(f"{NETWORK}.transformer_depth=[1]", "--save_path_with_time=False"),
]


def train(folder: Path, *words: str) -> Trainer:
    return make_trainer(load([*WORDS, f"--save_path={folder}", *words]), say=lambda line: None)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What is on the disk for certain: the bytes that a file had when it was last synced, and of a
    folder its names."""
    found: dict[str, bytes] = {}
    fsync = os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        names = "\n".join(sorted(p.name for p in path.iterdir())) if path.is_dir() else None
        found[str(path)] = path.read_bytes() if names is None else names.encode()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return found


def test_a_checkpoint_s_lines_are_on_the_disk_before_it_is(
    device: str, synced: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the step that is saved, here 3, has no line of its own."""
    seen: list[list[int]] = []
    save = Checkpoints.save

    def noting(checkpoints: Checkpoints) -> Path:
        lines = synced[str(tmp_path / "metrics.jsonl")].decode().splitlines()
        seen.append([json.loads(line)["step"] for line in lines])
        return save(checkpoints)

    monkeypatch.setattr(Checkpoints, "save", noting)
    train(tmp_path, "--total_step=4", "--log_interval=2", "--save_ckpt_interval=3").run()
    assert seen == [[2], [2, 4]]


def test_lines_that_are_kept_are_on_the_disk_before_the_others_are_gone(
    synced: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    kept = b"".join(file.read_bytes().splitlines(keepends=True)[:3])
    replace = os.replace

    def noting(source: Path, target: Path) -> None:
        assert synced[str(source)] == kept
        replace(source, target)

    monkeypatch.setattr(os, "replace", noting)
    with Metrics(file, 1, 1, resumed_step=3, total=9):
        pass
    assert file.read_bytes() == kept
    assert synced[str(tmp_path)] == b"metrics.jsonl"


def test_a_disk_that_does_not_take_the_lines_ends_the_run(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint gets a name then."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path / "metrics.jsonl"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    trainer = make_trainer(
        load([*WORDS, "--total_step=1", f"--save_path={tmp_path}"]), lambda line: None
    )
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DataError, match=r"metrics\.jsonl: can't be written \(Input/output error\)"):
        trainer.run()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("interval", "kept"), [(1, 5), (2, 4), (3, 3), (5, 5), (7, 0)])
def test_the_last_line_of_a_shorter_run_is_not_in_a_longer_one(
    tmp_path: Path, interval: int, kept: int
) -> None:
    """Which writes it only where it is due."""
    file = tmp_path / "metrics.jsonl"
    steps = [step for step in range(1, 7) if step % interval == 0 or step == 5]
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    with Metrics(file, interval, 1, resumed_step=5, total=9):
        pass
    left = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert left == [step for step in range(1, 6) if step % interval == 0]
    assert max([0, *left]) == kept
