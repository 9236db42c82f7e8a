"""What is printed at the start and at the end of a run, and what a checkpoint records of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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
from sdxl_host.training.distributed import Ranks
from sdxl_host.training.state import RunState
from sdxl_host.weights.networks import weight_lines
from sdxl_host.weights.source import Source

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


class Run(Protocol):
    """What the lines at the start and at the end of a run read of its trainer."""

    config: RunConfig
    ranks: Ranks
    dataset: Text2ImageDataset
    batch_size: int
    hooks: Hooks
    model: DiffusionModel
    state: RunState
    is_interrupted: bool

    @property
    def save_path(self) -> Path: ...


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


def record(
    model: DiffusionModel,
    hooks: Hooks,
    dataset: Text2ImageDataset,
    batch_size: int,
    curve_lines: Sequence[str],
) -> dict[str, Any]:
    """What was learned and on what: it goes into every checkpoint."""
    answered = ("build_model", "sample_timesteps", "weight_loss", "encode_prompt")
    return {
        "preconditioning": model.preconditioning.name,
        "scheduler": model.preconditioning.scheduler_config(),
        "hooks": {hook: hooks.chain(hook) for hook in answered},
        "curves": list(curve_lines),
        "size": [dataset.target_size, dataset.target_size],
        "original_size": list(dataset.typical_size()),
        "aesthetic_score": dataset.aesthetic_score,
        "samples": samples_of(batch_size, dataset),
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


def _batch_lines(run: Run) -> list[str]:
    """How an update's samples come together, where it is not one batch of one device."""
    data, settings = run.config.data, run.config.train
    parts = [
        (data.per_batch_size, "a batch"),
        (settings.gradient_accumulation_steps, "batches accumulated"),
        (run.ranks.world_size, "ranks"),
    ]
    if run.batch_size == data.per_batch_size:
        return []
    product = " x ".join(f"{count} {what}" for count, what in parts if count > 1)
    return [f"update      of {run.batch_size} samples: {product}"]


def digest(config: RunConfig, dataset: Text2ImageDataset, checkpoint: Checkpoint | None) -> str:
    """A hash of what must be equal on all ranks: settings, plugins, images, captions, and the
    checkpoint that is resumed."""
    text = f"{OmegaConf.to_yaml(config.tree)}{plugin_list(config)}{samples_of(0, dataset)}"
    if checkpoint is not None:
        text += (checkpoint.folder / STATE_FILE).read_text("utf-8")
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def samples_of(batch_size: int, dataset: Text2ImageDataset) -> dict[str, Any]:
    """What decides, beside the settings, which samples a step takes; the same when resumed."""
    data = [(image.name, image.caption) for image in dataset.images]
    return {
        "samples of an update": batch_size,
        "images and captions": hashlib.sha256(repr(data).encode("utf-8")).hexdigest()[:12],
    }


def start_lines(
    run: Run,
    curve_lines: Sequence[str],
    notes: Sequence[str],
    checkpoint: Checkpoint | None,
    changes: Sequence[str],
    source: Source | None,
) -> list[str]:
    """The block at the start of a run: plugins, objective, network, data, and what to note.

    curve_lines: where the run learns. notes: of plugins and optimizer. changes: how the run differs
    from the one it resumes. source: the weights the run starts from, None where it begins untrained
    or resumes.
    """
    config, dataset, networks = run.config, run.dataset, run.state.networks
    trained = sum(parameter.size for parameter in networks.trained)
    lines = [
        f"plugins     {', '.join(p.installed.name for p in config.plugins) or 'none'}",
        *(f"            {line}" for line in run.hooks.describe()),
        f"objective   {run.model.preconditioning.name}",
        f"network     {trained:,} parameters trained",
        *compute_lines(networks.cell, config.train),
        *_batch_lines(run),
    ]
    if source is not None:
        lines += weight_lines(source, run.model)
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
    lines += curve_lines
    lines.append(f"run         {run.save_path}")
    if checkpoint is not None:
        lines.append(f"resumed     {checkpoint.folder} at step {checkpoint.step}")
        lines += [f"changed     {line}" for line in changes]
        if checkpoint.step == config.data.total_step:
            lines.append("finished    no step is left; --total_step N with a higher N goes on")
    notes = [*config.notices, *notes]
    if checkpoint is not None:
        notes += _version_notes(checkpoint, plugin_list(config))
    if config.train.param_fp16:
        notes += half_notes(networks.network.values(), networks.trained)
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
    """What is printed before the first step is compiled; cache: the folder of graphs, if any."""
    takes = "this takes up to a minute, on Ascend at full size many, once"
    kept = f", unless {cache} has it" if cache else ""
    return f"compiling the training step{kept}; {takes}"


def end_lines(run: Run, seconds: float, checkpoint: Path | None, images: Path | None) -> list[str]:
    """The block at the end of a run.

    seconds: that it took. checkpoint, images: the last ones written, if any.
    """
    state, lines = run.state, []
    if state.skipped:
        lines.append(f"skipped     {state.skipped} updates, whose gradients were not finite")
    lines += [
        f"trained to step {state.step} in {seconds:.0f} s",
        f"metrics     {run.save_path / 'metrics.jsonl'}",
        f"settings    {run.save_path / 'config.yaml'}",
        f"checkpoint  {checkpoint}",
    ]
    if images is not None:
        lines.append(f"images      {images}")
    if run.is_interrupted and state.step < run.config.data.total_step:
        flag = "--resume" if run.config.train.save_optimizer else "--weight"
        lines.append(f"to go on    sdxl-host train ... {flag} {checkpoint}")
    return lines
