"""Checkpoints written: a folder each, complete or not there.

A folder is written under another name, synced, and renamed; `latest` is swapped afterwards. A
crash at any moment leaves the earlier ones whole.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import importlib_metadata
import numpy as np

from sdxl_host.checkpoints.layout import (
    CONFIG_FILE,
    EMA_FILE,
    FORMAT,
    FROZEN_FILE,
    GONE,
    LATEST,
    NETWORK_FILE,
    OLD,
    OPTIMIZER_FILE,
    PARTIAL,
    STATE_FILE,
    checkpoint_folder,
    checkpoints_by_age,
)
from sdxl_host.checkpoints.open import hash_of_file, hash_of_state, read_state
from sdxl_host.checkpoints.plugin_state import pack
from sdxl_host.errors import DataError, PluginError
from sdxl_host.files.arrays import write_arrays
from sdxl_host.files.atomic import sync, sync_tree, write_new
from sdxl_host.version import __version__

__all__ = ["Contents", "package_versions", "remove_older", "save_checkpoint"]


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint, its arrays by name; one mapping of them is read after the other.

    config: YAML text. network, frozen: all weights. ema: of the trained ones; empty for none.
    optimizer: its state, or None for a checkpoint that can't be resumed. The rest as `Checkpoint`
    has it; export: called with the new folder, to add files of its own.
    """

    step: int
    config: str
    network: Mapping[str, np.ndarray]
    frozen: Mapping[str, np.ndarray]
    ema: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray] | None
    counts: Mapping[str, int]
    plugin_states: Mapping[str, Any]
    plugins: list[dict[str, str]]
    record: Mapping[str, Any]
    export: Callable[[Path], None] | None = None


def save_checkpoint(parent: Path, contents: Contents) -> Path:
    """Writes the `checkpoint_folder` and points `latest` at it; returns the folder.

    Raises DataError when the disk refuses.
    """
    record = json.dumps(contents.record)
    metadata = {"format": "sdxl-host", "step": str(contents.step), "record": record}
    folder = checkpoint_folder(parent, contents.step)
    partial = parent / f"{PARTIAL}{folder.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(parent)
        partial.mkdir()
        write_arrays(partial / NETWORK_FILE, contents.network, metadata)
        known = {FROZEN_FILE: _write_frozen(parent, partial / FROZEN_FILE, contents.frozen)}
        if contents.ema:
            write_arrays(partial / EMA_FILE, contents.ema, metadata)
        if contents.optimizer is not None:
            write_arrays(partial / OPTIMIZER_FILE, contents.optimizer, {})
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
    latest = (parent / LATEST).resolve().name
    by_age = sorted(checkpoints_by_age(parent), key=lambda folder: folder.name != latest)
    for folder in reversed(by_age[kept:]):
        gone = parent / f"{GONE}{folder.name}"
        try:
            os.rename(folder, gone)
            shutil.rmtree(gone)
        except OSError as error:
            raise DataError(
                f"{folder}: can't be removed ({error.strerror or error}), as --max_num_ckpt {kept} "
                "asks; look at its permissions"
            ) from error


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
    earlier = (parent / LATEST).resolve()
    try:
        expected: str = read_state(earlier / STATE_FILE)["files"][FROZEN_FILE]
        os.link(earlier / FROZEN_FILE, file)
        if hash_of_file(file) == expected:
            return expected
    except (OSError, DataError):
        pass  # no earlier one, none that is whole, or a disk without hard links
    file.unlink(missing_ok=True)
    write_arrays(file, frozen, {"format": "sdxl-host"})
    return hash_of_file(file)


def _write_plugin_state(folder: Path, name: str, state: Any) -> None:
    arrays: dict[str, np.ndarray] = {}
    try:
        packed = pack(state, arrays)
    except TypeError as error:
        raise PluginError(f"plugin {name}: state_dict: {error}; mend the plugin") from error
    write_new(folder / f"{name}.json", json.dumps(packed, indent=1).encode("utf-8"))
    if arrays:
        write_arrays(folder / f"{name}.safetensors", arrays, {})


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
        "files": {name: known.get(name) or hash_of_file(folder / name) for name in names},
    }
    return json.dumps({**state, "sha256": hash_of_state(state)}, indent=1) + "\n"


def _clear_leftovers(parent: Path) -> None:
    """Removes what a crash left half-written; a checkpoint that was making way for a new one of
    its step comes back where the new one did not arrive."""
    for old in parent.glob(f"{OLD}step_*"):
        folder = parent / old.name.removeprefix(OLD)
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, folder)
    for kind in (PARTIAL, GONE):
        for leftover in parent.glob(f"{kind}step_*"):
            shutil.rmtree(leftover)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Renames; a checkpoint of the same step, left by a run this one continues, makes way."""
    if folder.exists():
        old = folder.with_name(f"{OLD}{folder.name}")
        os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old)
    else:
        os.rename(partial, folder)
    sync(folder.parent)


def _point_latest(parent: Path, folder: Path) -> None:
    link = parent / f"{PARTIAL}{LATEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    os.replace(link, parent / LATEST)
    sync(parent)
