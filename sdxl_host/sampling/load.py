"""What images can be drawn from: a checkpoint as it was trained, or a file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdxl_host.checkpoints.open import open_checkpoint
from sdxl_host.config.load import RunConfig, restore
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import ConfigError
from sdxl_host.models.precision import check_precision, drawing_settings, set_precision
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.sampling.pipeline import KEYS, Conditions, ImageSampler
from sdxl_host.weights.networks import build_networks, check_fit, weight_rows
from sdxl_host.weights.open import open_weight_setting

__all__ = ["restore_sampler", "weight_sampler"]


def restore_sampler(
    folder: Path, use_ema: bool | None = None, **told: Any
) -> tuple[ImageSampler, list[tuple[str, str]]]:
    """A sampler with the checkpoint's weights and hooks, and (label, text) rows that describe it.

    use_ema: draw from the EMA; None for where the checkpoint keeps one. told: fields
    of `Conditions` that differ from what the model was trained on. Raises HostError when the folder
    is no whole checkpoint, or a plugin it was trained with is not installed.
    """
    checkpoint = open_checkpoint(folder.expanduser().resolve())
    config = restore(checkpoint.config_file)
    hooks = make_hooks(config.plugins)
    model = hooks.build_model(config.tree)
    record = checkpoint.record
    trained = Conditions(
        tuple(record["size"]),
        tuple(record["original_size"]),
        aesthetic_score=record.get("aesthetic_score", Conditions.aesthetic_score),
    )
    conditions = _conditions(model, trained, told)
    if use_ema and not checkpoint.has_ema:
        raise ConfigError(
            f"--use_ema True: {folder} keeps no EMA, because it was trained without; "
            "leave the flag out"
        )
    if use_ema is None:
        use_ema = checkpoint.has_ema
    settings, notes = drawing_settings(config.train)
    build_networks(model, settings.seed, checkpoint=checkpoint, use_ema=use_ema)
    set_precision(model, settings)
    hooks.load_state_dict(checkpoint.plugin_states())
    names = ", ".join(f"{p['name']} {p['version']}" for p in checkpoint.plugins) or "none"
    rows = [
        ("checkpoint", f"{folder} (step {checkpoint.step}{', EMA' if use_ema else ''})"),
        ("plugins", names),
        ("objective", _objective(model)),
    ]
    notes += [
        f"{now.installed} is installed; trained with version {then['version']}"
        for now, then in zip(config.plugins, checkpoint.plugins, strict=True)
        if now.installed.version != then["version"]
    ]
    rows += [("note", note) for note in notes]
    return ImageSampler(hooks, model, conditions, settings.ms_mode == 1), rows


def weight_sampler(
    config: RunConfig, usual: Conditions, **told: Any
) -> tuple[ImageSampler, list[tuple[str, str]]]:
    """A sampler of the model that `config` describes with the weights `train.weight` names.

    usual: the conditions the model is trained on; told: fields of them that differ. A size that is
    told is the original size too, unless that is told as well. Raises HostError where the weights
    do not fit the model.
    """
    check_precision(config.train)
    source = open_weight_setting(config.train.weight)
    hooks = make_hooks(config.plugins)
    model = hooks.build_model(config.tree)
    if "size" in told:
        usual = replace(usual, original_size=told["size"])
    conditions = _conditions(model, usual, told)
    build_networks(model, config.train.seed, source)
    set_precision(model, config.train)
    names = ", ".join(p.installed.name for p in config.plugins) or "none"
    rows = [
        *(weight_rows(source, model) if source is not None else []),
        ("plugins", names),
        ("objective", _objective(model)),
    ]
    return ImageSampler(hooks, model, conditions, config.train.ms_mode == 1), rows


def _conditions(model: DiffusionModel, usual: Conditions, told: Mapping[str, Any]) -> Conditions:
    """`usual` with what is told. Raises ConfigError for a size that the networks can't take, and
    for what the network is not told at all."""
    conditions = replace(usual, **told)
    check_fit(model, conditions.size, "--size")
    heard = model.conditioner.size_keys
    for name in told:
        key = KEYS.get(name)
        if key is not None and key not in heard:
            raise ConfigError(
                f"--{name}: has no effect, this model has no {key} among its embedders; leave it "
                "out"
            )
    return conditions


def _objective(model: DiffusionModel) -> str:
    return f"{model.preconditioning.name}, spacing {model.sampling.spacing}"
