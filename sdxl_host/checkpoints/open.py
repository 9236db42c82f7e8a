"""Checkpoints opened: whole and unchanged, or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from sdxl_host.checkpoints.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    EMA_FILE,
    FORMAT,
    FROZEN_FILE,
    LATEST,
    OPTIMIZER_FILE,
    STATE_FILE,
    checkpoints_by_age,
)
from sdxl_host.checkpoints.plugin_state import unpack
from sdxl_host.errors import DataError
from sdxl_host.files.arrays import FetchedArrays, read_arrays
from sdxl_host.files.tensors import open_safetensors

__all__ = [
    "Checkpoint",
    "find_latest",
    "hash_of_file",
    "hash_of_state",
    "open_checkpoint",
    "read_state",
]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are all there and unchanged.

    step: of the run, updates made or skipped. versions: of the packages it was written with.
    plugins: name, distribution and version of each. record: what was learned and on what. counts:
    of skipped updates, as `training.state.RunState` has them.
    """

    folder: Path
    step: int
    versions: dict[str, str]
    plugins: list[dict[str, str]]
    record: dict[str, Any]
    counts: dict[str, int]

    @property
    def config_file(self) -> Path:
        """The settings of the run that wrote it."""
        return self.folder / CONFIG_FILE

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What that file says, by section and key."""
        settings: Any = OmegaConf.to_container(OmegaConf.load(self.config_file))
        return settings

    @property
    def is_resumable(self) -> bool:
        """Whether it holds the optimizer's state: not where save_optimizer was False."""
        return (self.folder / OPTIMIZER_FILE).is_file()

    @property
    def has_ema(self) -> bool:
        """Whether it keeps an EMA."""
        return (self.folder / EMA_FILE).is_file()

    def ema(self) -> Mapping[str, np.ndarray]:
        """The EMA of the trained parameters by name; empty where none was kept."""
        return _stored(self.folder / EMA_FILE) if self.has_ema else {}

    def optimizer_state(self) -> Mapping[str, np.ndarray]:
        """The optimizer's state by name."""
        return _stored(self.folder / OPTIMIZER_FILE)

    def plugin_states(self) -> dict[str, Any]:
        """Each plugin's `state_dict` by the plugin's name."""
        states = {}
        for file in sorted((self.folder / "plugins").glob("*.json")):
            arrays_file = file.with_suffix(".safetensors")
            arrays = read_arrays(arrays_file) if arrays_file.is_file() else {}
            states[file.stem] = unpack(json.loads(file.read_text("utf-8")), arrays)
        return states


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, each file checked against its hash. Raises DataError."""
    state_file = folder / STATE_FILE
    if not state_file.is_file():
        raise DataError(
            f"{folder}: is no checkpoint (it has no {STATE_FILE}); give a folder that a run wrote "
            "below checkpoints/"
        )
    state = read_state(state_file)
    hashes: dict[str, str] = state["files"]
    found = Checkpoint(
        folder,
        state["step"],
        state["versions"],
        state["plugins"],
        state["record"],
        state["counts"],
    )
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file}: is missing; use an earlier checkpoint")
        if hash_of_file(file) != expected:
            remedy = "use an earlier checkpoint"
            if name == FROZEN_FILE and file.stat().st_nlink > 1:
                remedy = (
                    f"{file.stat().st_nlink} checkpoints of the run share it, so use one that does "
                    "not, or bring it back from a copy"
                )
            raise DataError(f"{file}: was changed or damaged; {remedy}")
    return found


def read_state(state_file: Path) -> dict[str, Any]:
    """What a state file says, as it was written. Raises DataError."""
    try:
        state: dict[str, Any] = json.loads(state_file.read_text("utf-8"))
        if state["format"] != FORMAT:
            writer = state.get("versions", {}).get("sdxl-host", "unknown")
            raise DataError(
                f"{state_file.parent}: has the checkpoint format {state['format']}, and this "
                f"version reads {FORMAT}; use the version that wrote it (sdxl-host {writer})"
            )
        if state.pop("sha256") != hash_of_state(state):
            raise DataError(f"{state_file}: was changed or damaged; use an earlier checkpoint")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{state_file}: is damaged; use an earlier checkpoint") from error
    return state


def _stored(file: Path) -> FetchedArrays:
    """The arrays of a file, which stay there until they are asked for."""
    tensors = open_safetensors(file)
    return FetchedArrays(tensors.shapes, tensors.read)


def find_latest(save_path: Path) -> Path:
    """The newest checkpoint of the newest run in `save_path` (or of the run `save_path` is)."""
    if not save_path.is_dir():
        raise DataError(f"--resume latest: {save_path} is not there; give --save_path of the run")
    inner = [path for path in save_path.iterdir() if path.is_dir()]
    runs = [save_path, *sorted(inner, key=_written, reverse=True)]
    for run in runs:
        parent = run / CHECKPOINTS
        if (parent / LATEST).is_dir():
            return (parent / LATEST).resolve()
        # A crash before `latest` was swapped, or the checkpoint it points to was removed by hand.
        for newest in checkpoints_by_age(parent)[:1]:
            return newest.resolve()
    raise DataError(
        f"--resume latest: no run in {save_path} has a checkpoint; give --save_path of the run"
    )


def _written(run: Path) -> tuple[int, str]:
    """When the newest checkpoint of a run was written; 0 where it has none."""
    newest = checkpoints_by_age(run / CHECKPOINTS)[:1]
    return max((f / STATE_FILE).stat().st_mtime_ns for f in newest) if newest else 0, run.name


def hash_of_state(state: Mapping[str, Any]) -> str:
    """Of what a state file says, whatever spaces it is written with."""
    return hashlib.sha256(json.dumps(state).encode("utf-8")).hexdigest()


def hash_of_file(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
