"""The checkpoint that a run goes on from, if any, and how its settings differ from the run's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from sdxl_host.checkpoints.layout import CHECKPOINTS, OPTIMIZER_FILE, STATE_FILE
from sdxl_host.checkpoints.open import Checkpoint, find_latest, open_checkpoint
from sdxl_host.config.load import RunConfig
from sdxl_host.errors import ConfigError, DataError, in_brief
from sdxl_host.settings.declarations import SCHEMAS, SETTINGS, TrainSettings
from sdxl_host.settings.options import describe
from sdxl_host.training.optimizer import configured
from sdxl_host.training.run_folder import started_from

__all__ = ["find_checkpoint", "resumed_folder"]


def find_checkpoint(
    config: RunConfig, samples: Mapping[str, Any], batch_size: int
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, or None, and how its settings differ from this run's.

    samples: what decides which samples a step takes, as the checkpoint's record has it. batch_size:
    samples of an update.
    `train.resume` names it; so does `train.weight` where `train.resume_step` or
    `train.optimizer_weight` say that it is more than weights. Raises HostError for one that can't
    be resumed, and, unless `train.allow_changes`, for one of another run.
    """
    settings = config.train
    folder = _named_folder(settings)
    if folder is None:
        return None, []
    checkpoint = open_checkpoint(folder.expanduser().resolve())
    if not checkpoint.is_resumable:
        raise DataError(
            f"{checkpoint.folder}: holds weights alone (it was saved with --save_optimizer False), "
            f"so it can't be resumed; start a new run from it with --weight {checkpoint.folder}"
        )
    if checkpoint.folder.parent.name != CHECKPOINTS:
        raise DataError(
            f"{checkpoint.folder}: lies in no run's folder {CHECKPOINTS}, where a run could go on; "
            f"put it into one, or start a new run from it with --weight {checkpoint.folder}"
        )
    if checkpoint.step > config.data.total_step:
        raise ConfigError(
            f"data.total_step: is {config.data.total_step}, and {checkpoint.step} steps are "
            f"already made; set it higher than {checkpoint.step} to go on"
        )
    if settings.resume_step and settings.resume_step != checkpoint.step:
        raise ConfigError(
            f"--resume_step {settings.resume_step}: {checkpoint.folder} is of step "
            f"{checkpoint.step}; give that, or leave the flag out"
        )
    started = started_from(config, checkpoint)
    if settings.resume and settings.weight and _paths(settings.weight) != _paths(started):
        raise ConfigError(
            f"--resume {settings.resume} and --weight {settings.weight} contradict each other: the "
            f"run began with {started or 'untrained weights'}; leave --weight out"
        )
    saved, mine = _saved_settings(checkpoint, config), OmegaConf.to_container(config.tree)
    differences = [
        *_differences(saved, mine, config),
        *_differences_of_length(saved, config, batch_size),
    ]
    there: Mapping[str, Any] = checkpoint.record["samples"]
    differences += [
        f"{what} {'is' if isinstance(here, int) else 'are'} {there[what]!r} there and {here!r} here"
        for what, here in samples.items()
        if there[what] != here
    ]
    if differences and not settings.allow_changes:
        raise ConfigError(
            f"--resume {checkpoint.folder}: its settings differ from this run's: "
            f"{in_brief(differences, 5)}; go on with those of the checkpoint by --config "
            f"{checkpoint.config_file}, or with these by --allow_changes True"
        )
    return checkpoint, differences


def resumed_folder(settings: TrainSettings) -> Path | None:
    """The folder of the run that the settings continue, or None. Raises ConfigError where they
    name two checkpoints."""
    folder = _named_folder(settings)
    return None if folder is None else folder.expanduser().resolve().parent.parent


def _named_folder(settings: TrainSettings) -> Path | None:
    """The folder that the settings continue from. Raises ConfigError where they name two."""
    continues = settings.resume_step > 0 or bool(settings.optimizer_weight)
    if settings.resume:
        if settings.optimizer_weight:
            raise ConfigError(
                f"--optimizer_weight {settings.optimizer_weight}: has no use beside --resume; "
                "leave it out, because the checkpoint holds it"
            )
        if settings.resume == "latest":
            return find_latest(Path(settings.save_path).expanduser())
        return Path(settings.resume)
    if not continues:
        return None
    flag = f"--resume_step {settings.resume_step}"
    if settings.optimizer_weight:
        flag = f"--optimizer_weight {settings.optimizer_weight}"
    folder = Path(settings.weight).expanduser() if settings.weight else None
    if folder is None or not (folder / STATE_FILE).is_file():
        raise ConfigError(
            f"{flag}: continues a checkpoint folder of this program, and --weight "
            f"{settings.weight or '(nothing)'} is none; give --weight RUN/checkpoints/step_N, or "
            "leave the flag out to start a new run from the weights"
        )
    optimizer = Path(settings.optimizer_weight).expanduser()
    if settings.optimizer_weight and optimizer.resolve() not in (
        folder.resolve(),
        (folder / OPTIMIZER_FILE).resolve(),
    ):
        raise ConfigError(
            f"{flag}: is not that of --weight {settings.weight}; leave it out, because a "
            "checkpoint folder holds it"
        )
    return folder


def _paths(weight: str) -> list[Path]:
    """The files and folders that `train.weight` names, resolved."""
    return [Path(path.strip()).expanduser().resolve() for path in weight.split(",") if path.strip()]


def _differences(saved: Any, mine: Any, config: RunConfig, key: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(mine, dict):
        for name in [*saved, *(name for name in mine if name not in saved)]:
            inside = f"{key}.{name}" if key else str(name)
            yield from _differences(saved.get(name), mine.get(name), config, inside)
        if key == "plugins" and list(saved) != list(mine):
            yield f"plugins in the order {', '.join(saved)} there and {', '.join(mine)} here"
    elif saved != mine and not _may_differ(key, config):
        yield f"{key} is {saved!r} there and {mine!r} here"


def _may_differ(key: str, config: RunConfig) -> bool:
    """Whether a resumed run may have another value than it had before: the setting says so, or it
    has no effect. Where it had one before, the setting that it needs differs, and that is named."""
    setting = SETTINGS.get(key)
    if setting is None:
        return False
    section = getattr(config, key.partition(".")[0])
    return setting.may_differ or (setting.needs is not None and not setting.needs.met(section))


def _saved_settings(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """The checkpoint's settings; what was no setting yet when it was written has its default, which
    it would have too if they were loaded today."""
    saved = copy.deepcopy(checkpoint.settings)
    sections = [(saved[name], schema) for name, schema in SCHEMAS.items()]
    sections += [
        (saved["plugins"][plugin.installed.name], type(plugin.options))
        for plugin in config.plugins
        if plugin.options is not None and plugin.installed.name in saved["plugins"]
    ]
    for section, schema in sections:
        for row in describe(schema):
            if "default" in row:
                section.setdefault(row["name"], row["default"])
    return saved


def _differences_of_length(
    saved: Mapping[str, Any], config: RunConfig, batch_size: int
) -> Iterator[str]:
    """Where the run has another length: the first update whose numbers that changes.

    batch_size: samples of an update, by which `scale_lr` multiplies the learning rate.
    """
    there, here = saved["data"]["total_step"], config.data.total_step
    optim = OmegaConf.to_container(config.tree.optim)
    # Where more of it differs, that is named, and there is no saying what the length has changed.
    if there == here or saved["optim"] != optim:
        return
    tables = []
    for total in (there, here):
        optimizer, rates = configured(
            config.optim, total, batch_size if config.train.scale_lr else 1
        )
        tables.append(optimizer.table(rates)[: min(there, here)])
    changed = np.abs(tables[0] - tables[1])
    if changed.any():
        update = int(changed[:, 0].argmax())
        first, second = (f"{table[update, 0]:.6g}" for table in tables)
        yield (
            f"data.total_step is {there} there and {here} here, so that the learning rate of "
            f"update {update + 1} is {first} there and {second} here"
        )
