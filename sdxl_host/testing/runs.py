"""Runs of seconds of configs/tiny.yaml: eager, in this process, with the plugins named alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import importlib_metadata

from sdxl_host.config import plugin_targets
from sdxl_host.config.load import RunConfig, load
from sdxl_host.config.yaml_files import find_config, read_yaml
from sdxl_host.plugins import discovery
from sdxl_host.plugins.discovery import normalize

if TYPE_CHECKING:
    import numpy as np

    from sdxl_host.training.summary import Fact
    from sdxl_host.training.trainer import Trainer

__all__ = ["TinyRun", "only", "tiny_config", "tiny_run", "train_tiny"]

TINY = "tiny.yaml"
SEED = 42


@dataclass(frozen=True)
class TinyRun:
    """What a run left.

    losses: of each step in metrics.jsonl. metrics: that file. checkpoint: the last one's folder.
    save_path: the run's folder. lines: what the run showed at its start, on its way and at its end,
    as "note: TEXT", without the curves.
    """

    losses: list[float]
    metrics: bytes
    checkpoint: Path
    save_path: Path
    lines: tuple[str, ...]

    def weights(self) -> dict[str, np.ndarray]:
        """The network's parameters in the last checkpoint, by name."""
        from sdxl_host.files.arrays import read_arrays

        return read_arrays(self.checkpoint / "network.safetensors")

    def network(self, precision: str = "O0") -> tuple[Any, dict[str, Any]]:
        """The network of the last checkpoint with what plugins changed in it, a MindSpore cell, and
        its parameters by name. precision: that it computes with, as of --ms_amp_level."""
        from sdxl_host.models.precision import apply_precision
        from sdxl_host.sampling.load import restore_sampler
        from sdxl_host.weights.names import single_file_parameters

        network = restore_sampler(self.checkpoint)[0].model.network
        apply_precision(network, precision)
        return network, single_file_parameters(network, "model.diffusion_model.")


@contextmanager
def only(names: Sequence[str]) -> Iterator[None]:
    """Discovery sees the plugins `names`, where they are installed, and no other."""
    seen = {normalize(name) for name in names}
    everything = importlib_metadata.entry_points

    def entry_points(**selection: Any) -> importlib_metadata.EntryPoints:
        found = everything(**selection)
        known = everything(group=discovery.GROUP)
        packages = {_package(entry) for entry in known if normalize(entry.name) in seen}
        return importlib_metadata.EntryPoints(
            entry
            for entry in found
            if (entry.group != discovery.GROUP or normalize(entry.name) in seen)
            and (entry.group != plugin_targets.GROUP or _package(entry) in packages)
        )

    importlib_metadata.entry_points = entry_points
    try:
        yield
    finally:
        importlib_metadata.entry_points = everything


def _package(entry: importlib_metadata.EntryPoint) -> str:
    return discovery.package_name(entry.dist) if entry.dist else ""


def tiny_config(
    plugins: Sequence[str],
    *,
    folder: Path,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    flags: Sequence[str] = (),
    visible: Sequence[str] | None = None,
) -> RunConfig:
    """The settings of a tiny run; `tiny_run` says what the arguments mean. No MindSpore.

    flags: arguments as for `sdxl-host train`.
    """
    given = options or {}
    tree = read_yaml(find_config(TINY))
    tree.plugins = {name: dict(given.get(name, {})) for name in plugins}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TINY
    file.write_text(_yaml(tree), "utf-8")
    fixed = ["--save_path", str(folder / "run"), "--save_path_with_time", "False"]
    with only(plugins if visible is None else visible):
        return load(["--config", str(file), *fixed, *flags])


def _yaml(tree: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(tree)


def tiny_run(
    plugins: Sequence[str] = (),
    *,
    folder: Path,
    steps: int = 3,
    seed: int = SEED,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    resume: Path | None = None,
    save_every: int = 1000,
    flags: Sequence[str] = (),
    prepare: Callable[[Trainer], None] | None = None,
) -> TinyRun:
    """Trains configs/tiny.yaml for `steps` updates on the CPU, eagerly, in this process.

    Discovery sees the plugins of the run and no others, whatever is installed.

    Args:
        plugins: names, in the order of --plugins. options: of each, by its name.
        folder: an empty folder; the run is written to `folder/run`.
        resume: a checkpoint's folder; its run is copied into `folder` first and goes on there, so
            that the one it came from stays as it is.
        save_every: steps between checkpoints; the last step always has one.
        flags: further arguments as for `sdxl-host train`, such as KEY=VALUE.
        prepare: called with the trainer before its first step.

    Raises HostError as `sdxl-host train` does.
    """
    return train_tiny(
        plugins,
        folder=folder,
        steps=steps,
        seed=seed,
        options=options,
        resume=resume,
        save_every=save_every,
        flags=flags,
        prepare=prepare,
    )


def train_tiny(
    plugins: Sequence[str],
    *,
    folder: Path,
    steps: int,
    seed: int = SEED,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    resume: Path | None = None,
    save_every: int = 1000,
    flags: Sequence[str] = (),
    prepare: Callable[[Trainer], None] | None = None,
    visible: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> TinyRun:
    """`tiny_run`, with what the checks need besides.

    visible: names that discovery sees, where that shall differ from `plugins`. without: the
    trainer's observers to leave out, of Grids and Checkpoints, by the names of their classes.
    """
    _device()
    own = ["--total_step", str(steps), "--seed", str(seed), "--guidance_scale", "1"]
    own += ["--save_ckpt_interval", str(save_every)]
    if resume is not None:
        run = resume.resolve().parent.parent
        shutil.copytree(run, folder / "run", symlinks=True)
        own += ["--resume", str(folder / "run" / resume.resolve().relative_to(run))]
    given = [*own, *flags]
    config = tiny_config(plugins, folder=folder, options=options, flags=given, visible=visible)
    from sdxl_host.training.build import make_trainer

    lines: list[str] = []
    trainer = make_trainer(config, lambda fact: lines.extend(_lines(fact)))
    trainer.observers = [o for o in trainer.observers if type(o).__name__ not in without]
    if prepare is not None:
        prepare(trainer)
    trainer.run()
    metrics = (trainer.save_path / "metrics.jsonl").read_bytes()
    return TinyRun(
        losses=[json.loads(line)["loss"] for line in metrics.splitlines()],
        metrics=metrics,
        checkpoint=(trainer.save_path / "checkpoints" / "latest").resolve(),
        save_path=trainer.save_path,
        lines=tuple(lines),
    )


def _lines(fact: Fact) -> list[str]:
    """A sentence as it is, and a row as `label: text`."""
    if isinstance(fact, str):
        return [fact]
    return [": ".join(filter(None, fact))] if isinstance(fact, tuple) else []


@cache
def _device() -> str:
    from sdxl_host.device import prepare_device

    return prepare_device("CPU")
