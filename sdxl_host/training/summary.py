"""What is said at the start of a run, and what a checkpoint records of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from sdxl_host.checkpoints.layout import STATE_FILE
from sdxl_host.checkpoints.open import Checkpoint
from sdxl_host.checkpoints.write import package_versions
from sdxl_host.config.load import RunConfig
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.device import on_ascend
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.models.attention import attention_in_use
from sdxl_host.models.precision import half_notes, is_half, precision_line
from sdxl_host.planning import curves
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.settings.schema import TrainSettings
from sdxl_host.training.optimizer import Optimizer
from sdxl_host.weights.networks import weight_lines
from sdxl_host.weights.source import Source

if TYPE_CHECKING:
    from sdxl_host.training.trainer import Trainer

__all__ = [
    "compiling",
    "compute_lines",
    "digest",
    "end_lines",
    "plugin_lines",
    "plugin_list",
    "record",
    "samples_of",
    "start_lines",
]


def plugin_list(config: RunConfig) -> list[dict[str, str]]:
    """Name, distribution and version of each selected plugin."""
    return [
        {
            "name": p.installed.name,
            "distribution": p.installed.distribution,
            "version": p.installed.version,
        }
        for p in config.plugins
    ]


def record(trainer: Trainer) -> dict[str, Any]:
    """What was learned and on what: it goes into every checkpoint."""
    hooks = ("build_model", "sample_timesteps", "weight_loss", "encode_prompt")
    return {
        "preconditioning": trainer.model.preconditioning.name,
        "scheduler": trainer.model.preconditioning.scheduler_config(),
        "hooks": {hook: trainer.hooks.chain(hook) for hook in hooks},
        "curves": trainer.curve_lines,
        "size": [trainer.dataset.target_size, trainer.dataset.target_size],
        "original_size": list(trainer.dataset.typical_size()),
        "aesthetic_score": trainer.dataset.aesthetic_score,
        "samples": samples_of(trainer.batch_size, trainer.dataset),
    }


def plugin_lines(
    asked: Hooks, model: DiffusionModel, config: RunConfig, checkpoint: Checkpoint | None
) -> tuple[list[str], list[str]]:
    """Where the run learns, without its plugins and with them; and the plugins' own notes.

    asked: a copy of the run's hooks, because asking a plugin may change its state.
    """
    if checkpoint is not None:
        asked.load_state_dict(checkpoint.plugin_states(), config.train.allow_changes)
    learned = curves.start_lines(*curves.curves(asked, model, config.tree))
    return learned, asked.notes(model)


def compute_lines(network: Any, settings: TrainSettings) -> list[str]:
    """How the network will compute: the attention that is really used, and the precision."""
    device = "Ascend" if on_ascend() else "CPU"
    half = is_half(settings.ms_amp_level)
    attention = attention_in_use(network.attention_type, device, half, network.num_head_channels)
    return [f"attention   {attention}", f"precision   {precision_line(settings)}"]


def _batch_lines(trainer: Trainer) -> list[str]:
    """How an update's samples come together, where it is not one batch of one device."""
    data, settings, workers = trainer.config.data, trainer.config.train, trainer.workers
    parts = [
        (data.per_batch_size, "a batch"),
        (settings.gradient_accumulation_steps, "batches accumulated"),
        (workers.count, "workers"),
    ]
    if trainer.batch_size == data.per_batch_size:
        return []
    told = " x ".join(f"{count} {what}" for count, what in parts if count > 1)
    return [f"update      of {trainer.batch_size} samples: {told}"]


def digest(config: RunConfig, dataset: Text2ImageDataset, checkpoint: Checkpoint | None) -> str:
    """Of what every worker of a run must have the same: settings, plugins, images, captions, and
    the checkpoint that it resumes."""
    told = f"{OmegaConf.to_yaml(config.tree)}{plugin_list(config)}{samples_of(0, dataset)}"
    if checkpoint is not None:
        told += (checkpoint.folder / STATE_FILE).read_text("utf-8")
    return hashlib.sha256(told.encode("utf-8")).hexdigest()


def samples_of(batch_size: int, dataset: Text2ImageDataset) -> dict[str, Any]:
    """What decides, beside the settings, which samples a step takes; the same when resumed."""
    data = [(image.name, image.caption) for image in dataset.images]
    return {
        "samples of an update": batch_size,
        "images and captions": hashlib.sha256(repr(data).encode("utf-8")).hexdigest()[:12],
    }


def start_lines(
    trainer: Trainer,
    optimizer: Optimizer,
    checkpoint: Checkpoint | None,
    changes: Sequence[str],
    source: Source | None,
) -> list[str]:
    """The block at the start of a run: plugins, objective, network, data, and what to note.

    changes: how the run differs from the one it resumes. source: the weights the run starts from,
    None where it begins untrained or resumes.
    """
    config, dataset = trainer.config, trainer.dataset
    trained = sum(parameter.size for parameter in trainer.parts.trained)
    lines = [
        f"plugins     {', '.join(p.installed.name for p in config.plugins) or 'none'}",
        *(f"            {line}" for line in trainer.hooks.describe()),
        f"objective   {trainer.model.preconditioning.name}",
        f"network     {trained:,} parameters trained",
        *compute_lines(trainer.parts.cell, config.train),
        *_batch_lines(trainer),
    ]
    if source is not None:
        lines += weight_lines(source, trainer.model)
    elif checkpoint is None:
        lines.append(
            "weights     none, everything starts untrained (--weight FILE starts from one)"
        )
    if dataset.is_demo:
        lines += [
            f"data        {len(dataset)} captioned images that the package carries",
            "            (Fluent Emoji 3D, MIT, Microsoft); --data_path FOLDER trains on yours",
        ]
    else:
        lines.append(f"data        {len(dataset)} captioned images")
    lines += trainer.curve_lines
    lines.append(f"run         {trainer.save_path}")
    if checkpoint is not None:
        lines.append(f"resumed     {checkpoint.folder} at step {checkpoint.step}")
        lines += [f"changed     {line}" for line in changes]
        if checkpoint.step == trainer.total_steps:
            lines.append("finished    no step is left; --total_step N with a higher N goes on")
    notes = [*config.notices, *trainer.plugin_notes, *optimizer.notes()]
    if checkpoint is not None:
        notes += _version_notes(checkpoint, plugin_list(config))
    if config.train.param_fp16:
        notes += half_notes(trainer.parts.network.values(), trainer.parts.trained)
    return lines + [f"note        {line}" for line in notes]


def _version_notes(checkpoint: Checkpoint, plugins: Sequence[Mapping[str, str]]) -> list[str]:
    """The packages that are not as they were when the checkpoint was written."""
    here = package_versions()
    pairs = [(n, checkpoint.versions[n], here[n]) for n in here if n in checkpoint.versions]
    before = {plugin["name"]: plugin for plugin in checkpoint.plugins}
    for now in plugins:
        then = before.get(now["name"], now)
        if then["distribution"] == now["distribution"]:
            pairs.append((now["name"], then["version"], now["version"]))
        else:
            pairs.append(
                (now["name"], *(f"{p['distribution']} {p['version']}" for p in (then, now)))
            )
    return [f"{name} {there} there and {here} here" for name, there, here in pairs if there != here]


def compiling(cache: str) -> str:
    """What is said before the first step is compiled; cache: where graphs are kept, if they are."""
    takes = "this takes up to a minute, on Ascend at full size many, once"
    kept = f", unless {cache} has it" if cache else ""
    return f"compiling the training step{kept}; {takes}"


def end_lines(
    trainer: Trainer, seconds: float, checkpoint: Path | None, images: Path | None
) -> list[str]:
    """The block at the end of a run.

    seconds: that it took. checkpoint, images: the last ones written, if any.
    """
    lines = [
        *trainer.guard.lines(),
        f"trained to step {trainer.step} in {seconds:.0f} s",
        f"metrics     {trainer.save_path / 'metrics.jsonl'}",
        f"settings    {trainer.save_path / 'config.yaml'}",
        f"checkpoint  {checkpoint}",
    ]
    if images is not None:
        lines.append(f"images      {images}")
    if trainer.is_interrupted and trainer.step < trainer.total_steps:
        flag = "--resume" if trainer.config.train.save_optimizer else "--weight"
        lines.append(f"to go on    sdxl-host train ... {flag} {checkpoint}")
    return lines
