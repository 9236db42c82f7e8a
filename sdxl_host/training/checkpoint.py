"""Checkpoints: a folder each, complete or not there.

A folder is written under another name, synced, and renamed; `latest` is swapped afterwards. A
crash at any moment leaves the earlier ones whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import importlib_metadata
import numpy as np

from sdxl_host.assembly import FROZEN_FILE, NETWORK_FILE
from sdxl_host.disk import sync_folder, write_new
from sdxl_host.errors import DataError, PluginError
from sdxl_host.training.state import pack, unpack
from sdxl_host.version import __version__
from sdxl_host.weights import files

__all__ = ["Checkpoint", "find_latest", "open_checkpoint", "save_checkpoint"]

FORMAT = 1
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
OPTIMIZER_FILE = "optimizer.safetensors"
_LATEST = "latest"
_PARTIAL = ".partial-"
_OLD = ".old-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are all there and unchanged.

    step: updates made. versions: of the packages it was written with. plugins: name, distribution
    and version of each. record: what was learned and on what, as `Trainer.record` makes it.
    """

    folder: Path
    step: int
    versions: dict[str, str]
    plugins: list[dict[str, str]]
    record: dict[str, Any]

    @property
    def config_file(self) -> Path:
        """The settings of the run that wrote it."""
        return self.folder / CONFIG_FILE

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """The optimizer's state by name."""
        return files.read(self.folder / OPTIMIZER_FILE)

    def plugin_states(self) -> dict[str, Any]:
        """Each plugin's `state_dict` by the plugin's name."""
        states = {}
        for file in sorted((self.folder / "plugins").glob("*.json")):
            arrays_file = file.with_suffix(".safetensors")
            arrays = files.read(arrays_file) if arrays_file.is_file() else {}
            states[file.stem] = unpack(json.loads(file.read_text("utf-8")), arrays)
        return states


def save_checkpoint(
    parent: Path,
    step: int,
    config: str,
    network: Mapping[str, np.ndarray],
    frozen: Mapping[str, np.ndarray],
    optimizer: Mapping[str, np.ndarray],
    plugin_states: Mapping[str, Any],
    plugins: list[dict[str, str]],
    record: Mapping[str, Any],
    export: Any = None,
) -> Path:
    """Writes `parent/step_NNNNNNNN` and points `latest` at it; returns the folder.

    config: YAML text. export: called with the new folder, to add files of its own. Raises
    DataError when the disk refuses.
    """
    folder = parent / f"step_{step:08d}"
    partial = parent / f"{_PARTIAL}{folder.name}"
    metadata = {"format": "sdxl-host", "step": str(step), "record": json.dumps(record)}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(parent)
        partial.mkdir()
        files.write(partial / NETWORK_FILE, network, metadata)
        _write_frozen(parent, partial / FROZEN_FILE, frozen)
        files.write(partial / OPTIMIZER_FILE, optimizer, {})
        write_new(partial / CONFIG_FILE, config.encode("utf-8"))
        (partial / "plugins").mkdir()
        for name, state in plugin_states.items():
            _write_plugin_state(partial / "plugins", name, state)
        if export is not None:
            export(partial)
        write_new(partial / STATE_FILE, _described(partial, step, plugins, record).encode("utf-8"))
        sync_folder(partial)
        _put_in_place(partial, folder)
        _point_latest(parent, folder)
    except OSError as error:
        raise DataError(
            f"{folder}: the checkpoint can't be written ({error.strerror or error}); earlier "
            "checkpoints are whole; free some space or choose another --save_path"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # renamed already where all went well
    return folder


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, each file checked against its hash. Raises DataError."""
    state_file = folder / STATE_FILE
    if not state_file.is_file():
        raise DataError(
            f"{folder}: is no checkpoint (it has no {STATE_FILE}); give a folder that a run wrote "
            "below checkpoints/"
        )
    try:
        state = json.loads(state_file.read_text("utf-8"))
        if state["format"] != FORMAT:
            writer = state.get("versions", {}).get("sdxl-host", "unknown")
            raise DataError(
                f"{folder}: has the checkpoint format {state['format']}, and this version reads "
                f"{FORMAT}; use the version that wrote it (sdxl-host {writer})"
            )
        hashes: dict[str, str] = state["files"]
        found = Checkpoint(
            folder, state["step"], state["versions"], state["plugins"], state["record"]
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{state_file}: is damaged; use an earlier checkpoint") from error
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file}: is missing; use an earlier checkpoint")
        if _hash(file) != expected:
            raise DataError(f"{file}: was changed or damaged; use an earlier checkpoint")
    return found


def find_latest(save_path: Path) -> Path:
    """The newest checkpoint of the newest run in `save_path` (or of the run `save_path` is)."""
    if not save_path.is_dir():
        raise DataError(f"--resume latest: {save_path} is not there; give --save_path of the run")
    runs = [save_path, *sorted((p for p in save_path.iterdir() if p.is_dir()), reverse=True)]
    for run in runs:
        latest = run / "checkpoints" / _LATEST
        if latest.is_dir():
            return latest.resolve()
    raise DataError(
        f"--resume latest: no run in {save_path} has a checkpoint; give --save_path of the run"
    )


# ---- writing


def _write_frozen(parent: Path, file: Path, frozen: Mapping[str, np.ndarray]) -> None:
    """Frozen weights never change, so every checkpoint of a run shares one file on the disk."""
    earlier = parent / _LATEST / FROZEN_FILE
    if earlier.is_file():
        try:
            os.link(earlier.resolve(), file)
            return
        except OSError:
            pass  # a disk without hard links gets a copy
    files.write(file, frozen, {"format": "sdxl-host"})


def _write_plugin_state(folder: Path, name: str, state: Any) -> None:
    arrays: dict[str, np.ndarray] = {}
    try:
        packed = pack(state, arrays)
    except TypeError as error:
        raise PluginError(f"plugin {name}: state_dict: {error}; mend the plugin") from error
    write_new(folder / f"{name}.json", json.dumps(packed, indent=1).encode("utf-8"))
    if arrays:
        files.write(folder / f"{name}.safetensors", arrays, {})


def _described(
    folder: Path, step: int, plugins: list[dict[str, str]], record: Mapping[str, Any]
) -> str:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    packages = ("mindspore", "numpy", "safetensors")
    versions = {"sdxl-host": __version__, "python": platform.python_version()}
    versions |= {name: importlib_metadata.version(name) for name in packages}
    state = {
        "format": FORMAT,
        "step": step,
        "versions": versions,
        "plugins": plugins,
        "record": dict(record),
        "files": {name: _hash(folder / name) for name in names},
    }
    return json.dumps(state, indent=1) + "\n"


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _clear_leftovers(parent: Path) -> None:
    """Removes what a crash left half-written; a checkpoint that was making way for a new one of
    its step comes back where the new one did not arrive."""
    for old in parent.glob(f"{_OLD}step_*"):
        place = parent / old.name.removeprefix(_OLD)
        if place.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, place)
    for leftover in parent.glob(f"{_PARTIAL}step_*"):
        shutil.rmtree(leftover)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Renames; a checkpoint of the same step, left by a run this one continues, makes way."""
    if folder.exists():
        old = folder.with_name(f"{_OLD}{folder.name}")
        os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old)
    else:
        os.rename(partial, folder)
    sync_folder(folder.parent)


def _point_latest(parent: Path, folder: Path) -> None:
    link = parent / f"{_PARTIAL}{_LATEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    os.replace(link, parent / _LATEST)
    sync_folder(parent)
