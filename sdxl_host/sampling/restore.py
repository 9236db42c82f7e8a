"""What pictures can be drawn from: a checkpoint as it was trained, or a file of weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sdxl_host.assembly import make_hooks, make_parts, open_weight, weight_lines
from sdxl_host.config import RunConfig, restore
from sdxl_host.model import DiffusionModel
from sdxl_host.sampling.sampler import Conditions, PictureSampler
from sdxl_host.training.checkpoint import open_checkpoint
from sdxl_host.training.precision import apply_precision

__all__ = ["restore_sampler", "weight_sampler"]


def restore_sampler(folder: Path, **told: Any) -> tuple[PictureSampler, list[str]]:
    """A sampler with the checkpoint's weights and hooks, and lines that say what it is.

    told: fields of `Conditions` that differ from what the model was trained on. Raises HostError
    when the folder is no whole checkpoint, or a plugin it was trained with is not installed.
    """
    checkpoint = open_checkpoint(folder.expanduser().resolve())
    config = restore(checkpoint.config_file)
    hooks = make_hooks(config)
    model = hooks.build_model(config.tree)
    make_parts(model, config.train.seed).load(checkpoint.folder)
    apply_precision(model.network, config.train.ms_amp_level)
    hooks.load_state_dict(checkpoint.plugin_states())
    names = ", ".join(f"{p['name']} {p['version']}" for p in checkpoint.plugins) or "none"
    lines = [
        f"checkpoint  {folder} (step {checkpoint.step})",
        f"plugins     {names}",
        _objective(model),
    ]
    changed = [
        f"note        {now.installed} is installed; trained with version {then['version']}"
        for now, then in zip(config.plugins, checkpoint.plugins, strict=True)
        if now.installed.version != then["version"]
    ]
    record = checkpoint.record
    trained = Conditions(tuple(record["size"]), tuple(record["original_size"]))
    eager = config.train.ms_mode == 1
    return PictureSampler(hooks, model, replace(trained, **told), eager), lines + changed


def weight_sampler(
    config: RunConfig, size: tuple[int, int], **told: Any
) -> tuple[PictureSampler, list[str]]:
    """A sampler of the model that `config` describes with the weights `train.weight` names.

    size: (height, width) of a picture where `told` has none, told to the network as the original
    size too. Raises HostError where the weights do not fit the model.
    """
    source = open_weight(config.train.weight)
    hooks = make_hooks(config)
    model = hooks.build_model(config.tree)
    make_parts(model, config.train.seed, source)
    apply_precision(model.network, config.train.ms_amp_level)
    names = ", ".join(p.installed.name for p in config.plugins) or "none"
    lines = [
        *(weight_lines(source, model) if source is not None else []),
        f"plugins     {names}",
        _objective(model),
    ]
    size = told.get("size", size)
    conditions = replace(Conditions(size, size), **told)
    return PictureSampler(hooks, model, conditions, config.train.ms_mode == 1), lines


def _objective(model: DiffusionModel) -> str:
    return f"objective   {model.preconditioning.name}, spacing {model.sampling.spacing}"
