"""Checkpoints: a folder each, complete or not there.

A folder is written under another name, synced, and renamed; `latest` is swapped afterwards. A
crash at any moment leaves the earlier ones whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import importlib_metadata
import numpy as np
from omegaconf import OmegaConf

from sdxl_host.disk import sync, sync_tree, write_new
from sdxl_host.errors import DataError, PluginError
from sdxl_host.training.arrays import FetchedArrays
from sdxl_host.training.state import pack, unpack
from sdxl_host.version import __version__
from sdxl_host.weights import files
from sdxl_host.weights.tensors import open_safetensors

__all__ = [
    "Checkpoint",
    "Contents",
    "checkpoint_folder",
    "find_latest",
    "open_checkpoint",
    "package_versions",
    "remove_older",
    "save_checkpoint",
]

FORMAT = 2
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
NETWORK_FILE = "network.safetensors"
FROZEN_FILE = "frozen.safetensors"
AVERAGES_FILE = "ema.safetensors"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
OPTIMIZER_FILE = "optimizer.safetensors"
_LATEST = "latest"
_PARTIAL = ".partial-"
_OLD = ".old-"
_GONE = ".gone-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are all there and unchanged.

    step: of the run, updates made or skipped. versions: of the packages it was written with.
    plugins: name, distribution and version of each. record: what was learned and on what. counts:
    of skipped updates, as `FiniteGuard` keeps them.
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
    def has_averages(self) -> bool:
        """Whether it keeps moving averages."""
        return (self.folder / AVERAGES_FILE).is_file()

    def averages(self) -> Mapping[str, np.ndarray]:
        """The moving averages of the trained parameters by name; empty where none were kept."""
        return _stored(self.folder / AVERAGES_FILE) if self.has_averages else {}

    def optimizer_state(self) -> Mapping[str, np.ndarray]:
        """The optimizer's state by name."""
        return _stored(self.folder / OPTIMIZER_FILE)

    def plugin_states(self) -> dict[str, Any]:
        """Each plugin's `state_dict` by the plugin's name."""
        states = {}
        for file in sorted((self.folder / "plugins").glob("*.json")):
            arrays_file = file.with_suffix(".safetensors")
            arrays = files.read(arrays_file) if arrays_file.is_file() else {}
            states[file.stem] = unpack(json.loads(file.read_text("utf-8")), arrays)
        return states


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint, its arrays by name; one mapping of them is read after the other.

    config: YAML text. network, frozen: all weights. averages: of the trained ones; empty for none.
    optimizer: its state, or None for a checkpoint that can't be resumed. The rest as `Checkpoint`
    has it; export: called with the new folder, to add files of its own.
    """

    step: int
    config: str
    network: Mapping[str, np.ndarray]
    frozen: Mapping[str, np.ndarray]
    averages: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray] | None
    counts: Mapping[str, int]
    plugin_states: Mapping[str, Any]
    plugins: list[dict[str, str]]
    record: Mapping[str, Any]
    export: Callable[[Path], None] | None = None


def checkpoint_folder(parent: Path, step: int) -> Path:
    """`parent/step_NNNNNNNN`: where the checkpoint of a step is, or would be."""
    return parent / f"step_{step:08d}"


def save_checkpoint(parent: Path, contents: Contents) -> Path:
    """Writes the `checkpoint_folder` and points `latest` at it; returns the folder.

    Raises DataError when the disk refuses.
    """
    record = json.dumps(contents.record)
    metadata = {"format": "sdxl-host", "step": str(contents.step), "record": record}
    folder = checkpoint_folder(parent, contents.step)
    partial = parent / f"{_PARTIAL}{folder.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(parent)
        partial.mkdir()
        files.write(partial / NETWORK_FILE, contents.network, metadata)
        known = {FROZEN_FILE: _write_frozen(parent, partial / FROZEN_FILE, contents.frozen)}
        if contents.averages:
            files.write(partial / AVERAGES_FILE, contents.averages, metadata)
        if contents.optimizer is not None:
            files.write(partial / OPTIMIZER_FILE, contents.optimizer, {})
        write_new(partial / CONFIG_FILE, contents.config.encode("utf-8"))
        (partial / "plugins").mkdir()
        for name, state in contents.plugin_states.items():
            _write_plugin_state(partial / "plugins", name, state)
        if contents.export is not None:
            _export(contents.export, partial)
        write_new(partial / STATE_FILE, _described(partial, contents, known).encode("utf-8"))
        sync_tree(partial)
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


def remove_older(parent: Path, kept: int) -> None:
    """Removes all checkpoints but the `kept` newest, by when they were written; never the one that
    `latest` points to. A crash half-way leaves no half of one. Raises DataError."""
    latest = (parent / _LATEST).resolve().name
    by_age = sorted(_by_age(parent), key=lambda folder: folder.name != latest)
    for folder in reversed(by_age[kept:]):
        gone = parent / f"{_GONE}{folder.name}"
        try:
            os.rename(folder, gone)
            shutil.rmtree(gone)
        except OSError as error:
            raise DataError(
                f"{folder}: can't be removed ({error.strerror or error}), as --max_num_ckpt {kept} "
                "asks; look at its permissions"
            ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, each file checked against its hash. Raises DataError."""
    state_file = folder / STATE_FILE
    if not state_file.is_file():
        raise DataError(
            f"{folder}: is no checkpoint (it has no {STATE_FILE}); give a folder that a run wrote "
            "below checkpoints/"
        )
    state = _read_state(state_file)
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
        if _hash(file) != expected:
            remedy = "use an earlier checkpoint"
            if name == FROZEN_FILE and file.stat().st_nlink > 1:
                remedy = (
                    f"{file.stat().st_nlink} checkpoints of the run share it, so use one that does "
                    "not, or bring it back from a copy"
                )
            raise DataError(f"{file}: was changed or damaged; {remedy}")
    return found


def _read_state(state_file: Path) -> dict[str, Any]:
    """What a state file says, as it was written. Raises DataError."""
    try:
        state: dict[str, Any] = json.loads(state_file.read_text("utf-8"))
        if state["format"] != FORMAT:
            writer = state.get("versions", {}).get("sdxl-host", "unknown")
            raise DataError(
                f"{state_file.parent}: has the checkpoint format {state['format']}, and this "
                f"version reads {FORMAT}; use the version that wrote it (sdxl-host {writer})"
            )
        if state.pop("sha256") != _hash_of(state):
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
        if (parent / _LATEST).is_dir():
            return (parent / _LATEST).resolve()
        # A crash before `latest` was swapped, or the checkpoint it points to was removed by hand.
        for newest in _by_age(parent)[:1]:
            return newest.resolve()
    raise DataError(
        f"--resume latest: no run in {save_path} has a checkpoint; give --save_path of the run"
    )


def _written(run: Path) -> tuple[int, str]:
    """When the newest checkpoint of a run was written; 0 where it has none."""
    newest = _by_age(run / CHECKPOINTS)[:1]
    return max((f / STATE_FILE).stat().st_mtime_ns for f in newest) if newest else 0, run.name


def _by_age(parent: Path) -> list[Path]:
    """The checkpoints in `parent`, the one that was written last first."""
    whole = [folder for folder in parent.glob("step_*") if (folder / STATE_FILE).is_file()]
    return sorted(whole, key=lambda f: (f / STATE_FILE).stat().st_mtime_ns, reverse=True)


# ---- writing


def _export(export: Callable[[Path], None], folder: Path) -> None:
    """Lets plugins add files of their own, and syncs those."""
    before = set(folder.rglob("*"))
    try:
        export(folder)
    except PluginError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            raise cause from None  # which is no fault of the plugin's
        raise
    for file in set(folder.rglob("*")) - before:
        sync(file)


def _write_frozen(parent: Path, file: Path, frozen: Mapping[str, np.ndarray]) -> str:
    """Frozen weights never change, so the checkpoints of a run share one file on the disk, as long
    as that is what was written; returns its hash."""
    earlier = (parent / _LATEST).resolve()
    try:
        expected: str = _read_state(earlier / STATE_FILE)["files"][FROZEN_FILE]
        os.link(earlier / FROZEN_FILE, file)
        if _hash(file) == expected:
            return expected
    except (OSError, DataError):
        pass  # no earlier one, none that is whole, or a disk without hard links
    file.unlink(missing_ok=True)
    files.write(file, frozen, {"format": "sdxl-host"})
    return _hash(file)


def _write_plugin_state(folder: Path, name: str, state: Any) -> None:
    arrays: dict[str, np.ndarray] = {}
    try:
        packed = pack(state, arrays)
    except TypeError as error:
        raise PluginError(f"plugin {name}: state_dict: {error}; mend the plugin") from error
    write_new(folder / f"{name}.json", json.dumps(packed, indent=1).encode("utf-8"))
    if arrays:
        files.write(folder / f"{name}.safetensors", arrays, {})


def package_versions() -> dict[str, str]:
    """Of the packages that a run's numbers come from, by name."""
    packages = ("mindspore", "numpy", "safetensors")
    versions = {"sdxl-host": __version__, "python": platform.python_version()}
    return versions | {name: importlib_metadata.version(name) for name in packages}


def _described(folder: Path, contents: Contents, known: Mapping[str, str]) -> str:
    """The text of the state file; known: hashes of files that have been read already."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    state = {
        "format": FORMAT,
        "step": contents.step,
        "versions": package_versions(),
        "plugins": contents.plugins,
        "record": dict(contents.record),
        "counts": dict(contents.counts),
        "files": {name: known.get(name) or _hash(folder / name) for name in names},
    }
    return json.dumps({**state, "sha256": _hash_of(state)}, indent=1) + "\n"


def _hash_of(state: Mapping[str, Any]) -> str:
    """Of what a state file says, whatever spaces it is written with."""
    return hashlib.sha256(json.dumps(state).encode("utf-8")).hexdigest()


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
    for kind in (_PARTIAL, _GONE):
        for leftover in parent.glob(f"{kind}step_*"):
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
    sync(folder.parent)


def _point_latest(parent: Path, folder: Path) -> None:
    link = parent / f"{_PARTIAL}{_LATEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    os.replace(link, parent / _LATEST)
    sync(parent)
