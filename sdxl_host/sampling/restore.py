"""A checkpoint as it was trained: its plugins, their options, its weights."""

from __future__ import annotations

from pathlib import Path

from sdxl_host.assembly import make_hooks, make_parts
from sdxl_host.config import restore
from sdxl_host.sampling.sampler import PictureSampler
from sdxl_host.training.checkpoint import open_checkpoint

__all__ = ["restore_sampler"]


def restore_sampler(folder: Path) -> tuple[PictureSampler, list[str]]:
    """A sampler with the checkpoint's weights and hooks, and lines that say what it is.

    Raises HostError when the folder is no whole checkpoint, or a plugin it was trained with is
    not installed.
    """
    checkpoint = open_checkpoint(folder.expanduser().resolve())
    config = restore(checkpoint.config_file)
    hooks = make_hooks(config)
    model = hooks.build_model(config.tree)
    make_parts(model, config.train.seed).load(checkpoint.folder)
    hooks.load_state_dict(checkpoint.plugin_states())
    names = ", ".join(f"{p['name']} {p['version']}" for p in checkpoint.plugins) or "none"
    lines = [
        f"checkpoint  {folder} (step {checkpoint.step})",
        f"plugins     {names}",
        f"objective   {model.preconditioning.name}, spacing {model.sampling.spacing}",
    ]
    changed = [
        f"note        {now.installed} is installed; trained with version {then['version']}"
        for now, then in zip(config.plugins, checkpoint.plugins, strict=True)
        if now.installed.version != then["version"]
    ]
    record = checkpoint.record
    size, original = tuple(record["size"]), tuple(record["original_size"])
    eager = config.train.ms_mode == 1
    return PictureSampler(hooks, model, size, original, eager), lines + changed
