"""Checkpoints on a disk that fails: what is damaged is refused, and the earlier one is whole."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdxl_host.checkpoints.open import open_checkpoint
from sdxl_host.checkpoints.write import Contents, remove_older, save_checkpoint
from sdxl_host.errors import DataError, PluginError


def save(parent: Path, step: int, **more: Any) -> Path:
    """A small checkpoint; its frozen weights are the same at every step."""
    arrays, frozen = {"a": np.full(3, step, np.float32)}, {"a": np.zeros(100, np.float32)}
    given: dict[str, Any] = {"plugin_states": {"snr": arrays}, "plugins": [], "record": {}, **more}
    contents = Contents(step, "train: {}\n", arrays, frozen, {}, arrays, {}, **given)
    return save_checkpoint(parent, contents)


# Python 3.10's paths hold the calls of `os` by names of their own.
ACCESSOR = dict(vars(getattr(pathlib, "_NormalAccessor", object)))
CALLS = ("fsync", "link", "mkdir", "open", "rename", "replace", "rmdir", "symlink", "unlink")


def test_no_failing_call_costs_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of saving and of rotating fails once: DataError, and what is there is whole."""

    def save_alone(step: int) -> None:
        save(tmp_path, step)
        remove_older(tmp_path, 1)

    def failing(at: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def count(*arguments: Any, **options: Any) -> Any:
                calls.append(call.__name__)
                if len(calls) == at:
                    raise OSError(28, "No space left on device")
                return call(*arguments, **options)

            return count

        return counted

    originals = {name: getattr(os, name) for name in CALLS}
    save_alone(1)
    failed: list[str] = []
    calls: list[str] = []
    step, at = 2, 1
    while len(calls) >= at - 1:
        calls.clear()
        with monkeypatch.context() as patch:
            for name, call in originals.items():
                counted = failing(at)(call)
                patch.setattr(os, name, counted)
                if ACCESSOR.get(name) is call:
                    patch.setattr(pathlib._NormalAccessor, name, staticmethod(counted))
            try:
                save_alone(step)
            except DataError as error:
                failed.append(f"{calls[at - 1]}: {error}")
        assert open_checkpoint(tmp_path / "latest").step in (step - 1, step)
        for folder in tmp_path.glob("step_*"):
            open_checkpoint(folder)
        save_alone(step)
        assert {path.name for path in tmp_path.iterdir()} == {"latest", f"step_{step:08d}"}
        step, at = step + 1, at + 1
    assert all("No space left on device" in line for line in failed)
    failing_calls = {line.partition(":")[0] for line in failed}
    assert failing_calls >= {"fsync", "mkdir", "rename", "replace", "symlink", "unlink"}


def test_no_flipped_bit_of_a_state_file_goes_unseen(tmp_path: Path) -> None:
    """Its hash is in itself; only a space may become another that JSON takes for the same."""
    folder = save(tmp_path, 1)
    file = folder / "state.json"
    whole, opened = file.read_bytes(), open_checkpoint(folder)
    inner = whole.index(b'"step"'), whole.index(b'"versions"')
    positions = [*range(*inner), *range(0, len(whole), 17)]
    seen = 0
    for position in positions:
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                assert open_checkpoint(folder) == opened
                assert whole[position] in b" \n"
            except DataError:
                seen += 1
    assert seen > 7 * len(positions)


def test_shared_frozen_weights_that_are_damaged_are_written_anew_by_the_next_checkpoint(
    tmp_path: Path,
) -> None:
    """They are one file on the disk, so there is no use in trying the others that share it."""
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    file = second / "frozen.safetensors"
    status = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a failing disk does it
    third, fourth = save(tmp_path, 3), save(tmp_path, 4)
    message = (
        r"frozen\.safetensors: was changed or damaged; 2 checkpoints of the run share it, so use"
    )
    for folder in (first, second):
        with pytest.raises(DataError, match=message):
            open_checkpoint(folder)
    for folder in (third, fourth):
        assert open_checkpoint(folder)
        assert not load_file(folder / "frozen.safetensors")["a"].any()
    assert os.path.samefile(third / "frozen.safetensors", fourth / "frozen.safetensors")


@pytest.mark.parametrize("damage", ["", "{}", None])
def test_frozen_weights_whose_hash_is_lost_are_written_anew(
    tmp_path: Path, damage: str | None
) -> None:
    """What can't be compared is not trusted."""
    for step in (1, 2):
        saved = save(tmp_path, step)
        if damage is None:
            (saved / "state.json").unlink()
        elif step == 1:
            (saved / "state.json").write_text(damage)
    assert (saved / "frozen.safetensors").stat().st_nlink == 1


def test_an_exporter_that_raises_leaves_the_earlier_checkpoint_whole(tmp_path: Path) -> None:
    """A full disk is not the plugin's fault, and is reported as such."""
    save(tmp_path, 2)
    for cause, error, message in (
        (KeyError("gone"), PluginError, "export: one: mend the plugin"),
        (PermissionError(13, "Permission denied"), PluginError, "export: one: mend the plugin"),
        (OSError(28, "No space left on device"), DataError, r"can't be written \(No space left"),
    ):

        def export(folder: Path, cause: Exception = cause) -> None:
            (folder / "extra.txt").write_text("half")
            raise PluginError("export: one: mend the plugin") from cause

        with pytest.raises(error, match=message):
            save(tmp_path, 3, export=export)
        assert open_checkpoint(tmp_path / "latest").step == 2
        assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_00000002"}
