"""Compiled graphs kept on the disk, so that the next start of the same run compiles nothing.

MindSpore does not see that a Python attribute has changed since a graph was kept: it would compute
with the old one. So each folder of graphs belongs to one set of settings, workers, sources and
versions.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import importlib_metadata
from omegaconf import OmegaConf

from sdxl_host.config.load import RunConfig

__all__ = ["cache_folder", "use_compile_cache"]

# What a graph can't depend on, of the section `train`.
_NO_MATTER = (
    "save_path",
    "save_path_with_time",
    "resume",
    "resume_step",
    "optimizer_weight",
    "weight",
    "allow_changes",
    "compile_cache",
    "save_ckpt_interval",
    "max_num_ckpt",
    "log_interval",
)


def use_compile_cache(config: RunConfig) -> None:
    """Lets MindSpore keep graphs below `train.compile_cache`, if it is set; before its import."""
    if not config.train.compile_cache:
        return
    folder = Path(config.train.compile_cache).expanduser().resolve() / cache_folder(config)
    os.environ["MS_COMPILER_CACHE_ENABLE"] = "1"
    os.environ["MS_COMPILER_CACHE_PATH"] = str(folder)


def cache_folder(config: RunConfig) -> str:
    """A name that differs wherever a graph might: by settings, workers, sources and versions."""
    tree = config.tree.copy()
    OmegaConf.set_readonly(tree, False)
    for name in _NO_MATTER:
        del tree.train[name]
    digest = hashlib.sha256(OmegaConf.to_yaml(tree).encode("utf-8"))
    # The step divides by their number and exchanges with them.
    workers = os.environ.get("MS_WORKER_NUM", "") if config.train.is_parallel else ""
    digest.update(f"{workers} workers".encode())
    modules = ["sdxl_host", *(plugin.installed.module for plugin in config.plugins)]
    for file in _sources(modules):
        digest.update(file.read_bytes())
    versions = [importlib_metadata.version(name) for name in ("mindspore", "numpy")]
    digest.update(repr((versions, sys.version)).encode("utf-8"))
    return digest.hexdigest()[:16]


def _sources(modules: Iterable[str]) -> Iterable[Path]:
    """Every Python file of the modules' packages, in an order that is always the same."""
    for module in modules:
        found = sys.modules[module.partition(".")[0]].__file__
        if found is None:
            continue
        file = Path(found)
        yield from sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
