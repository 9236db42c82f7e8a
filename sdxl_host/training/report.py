"""What is said at the start of a run, and what a checkpoint records of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_host import curves
from sdxl_host.assembly import make_hooks, weight_lines
from sdxl_host.config import RunConfig
from sdxl_host.device import on_ascend
from sdxl_host.models.attention import attention_in_use
from sdxl_host.training.checkpoint import Checkpoint
from sdxl_host.training.optimizer import Optimizer
from sdxl_host.training.precision import PRECISIONS, is_half
from sdxl_host.weights.source import Source

if TYPE_CHECKING:
    from sdxl_host.training.trainer import Trainer

__all__ = ["compute_lines", "plugin_lines", "plugin_list", "record", "start_lines"]


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
    }


def plugin_lines(config: RunConfig, checkpoint: Checkpoint | None) -> tuple[list[str], list[str]]:
    """Where the run learns, without its plugins and with them; and the plugins' own notes.

    Of hooks of their own: asking a plugin that keeps state must not disturb the run's.
    """
    asked = make_hooks(config)
    if checkpoint is not None:
        asked.load_state_dict(checkpoint.plugin_states())
    learned = curves.start_lines(*curves.curves(asked, config.tree))
    return learned, asked.notes(asked.build_model(config.tree))


def compute_lines(network: Any, level: str) -> list[str]:
    """How the network will compute: the attention that is really used, and the precision."""
    device = "Ascend" if on_ascend() else "CPU"
    attention = attention_in_use(
        network.attention_type, device, is_half(level), network.num_head_channels
    )
    return [f"attention   {attention}", f"precision   {level}, {PRECISIONS[level]}"]


def start_lines(
    trainer: Trainer, optimizer: Optimizer, checkpoint: Checkpoint | None, source: Source | None
) -> list[str]:
    """The block at the start of a run: plugins, objective, network, data, and what to note.

    source: the weights the run starts from, None where it begins untrained or resumes.
    """
    config, dataset = trainer.config, trainer.dataset
    trained = sum(parameter.size for parameter in trainer.parts.trained)
    lines = [
        f"plugins     {', '.join(p.installed.name for p in config.plugins) or 'none'}",
        *(f"            {line}" for line in trainer.hooks.describe()),
        f"objective   {trainer.model.preconditioning.name}",
        f"network     {trained:,} parameters trained",
        *compute_lines(trainer.parts.cell, config.train.ms_amp_level),
    ]
    if source is not None:
        lines += weight_lines(source, trainer.model)
    elif checkpoint is None:
        lines.append(
            "weights     none, everything starts untrained (--weight FILE starts from one)"
        )
    if dataset.is_demo:
        lines += [
            f"data        {len(dataset)} captioned pictures that the package carries",
            "            (Fluent Emoji 3D, MIT, Microsoft); --data_path FOLDER trains on yours",
        ]
    else:
        lines.append(f"data        {len(dataset)} captioned pictures")
    lines += trainer.curve_lines
    lines.append(f"run         {trainer.save_path}")
    if checkpoint is not None:
        lines.append(f"resumed     {checkpoint.folder} at step {checkpoint.step}")
    notes = [*config.notices, *trainer.plugin_notes, *optimizer.notes()]
    return lines + [f"note        {line}" for line in notes]
