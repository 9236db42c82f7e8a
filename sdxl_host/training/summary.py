"""What is shown at the start and at the end of a run, and what a checkpoint records of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
from sdxl_host.planning import captions, curves
from sdxl_host.planning.data import data_rows
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.settings.declarations import TrainSettings
from sdxl_host.training.distributed import Ranks
from sdxl_host.training.skipped import SKIPPED, SkippedImages
from sdxl_host.training.state import RunState
from sdxl_host.weights.networks import weight_rows
from sdxl_host.weights.source import Source

__all__ = [
    "Fact",
    "Row",
    "ask_plugins",
    "caption_notes",
    "compiling",
    "compute_rows",
    "digest",
    "end_facts",
    "longer_prompts",
    "plugin_list",
    "plugin_rows",
    "record",
    "samples_of",
    "show_nothing",
    "start_facts",
]

Row = tuple[str, str]  # a label and its text; an empty label goes on with the row above
Fact = str | Row | curves.Quarters  # a sentence, a row, or where the run learns


class Run(Protocol):
    """What the facts at the start and at the end of a run read of its trainer."""

    config: RunConfig
    ranks: Ranks
    dataset: Text2ImageDataset
    batch_size: int
    hooks: Hooks
    model: DiffusionModel
    state: RunState
    skipped: SkippedImages | None
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
    quarters: curves.Quarters,
) -> dict[str, Any]:
    """What was learned and on what: it goes into every checkpoint."""
    answered = ("build_model", "sample_timesteps", "weight_loss", "encode_prompt")
    return {
        "preconditioning": model.preconditioning.name,
        "scheduler": model.preconditioning.scheduler_config(),
        "hooks": {hook: hooks.chain(hook) for hook in answered},
        "curves": asdict(quarters),
        "size": [dataset.target_size, dataset.target_size],
        "original_size": list(dataset.typical_size()),
        "aesthetic_score": dataset.aesthetic_score,
        "samples": samples_of(batch_size, dataset),
    }


def ask_plugins(
    asked: Hooks, model: DiffusionModel, config: RunConfig, checkpoint: Checkpoint | None
) -> tuple[curves.Quarters, list[str]]:
    """Where the run learns, without its plugins and with them; and the plugins' notes.

    asked: a copy of the run's hooks, because asking a plugin may change its state.
    """
    if checkpoint is not None:
        asked.load_state_dict(checkpoint.plugin_states(), config.train.allow_changes)
    learned = curves.quarters(*curves.curves(asked, model, config.tree))
    return learned, asked.notes(model)


def caption_notes(asked: Hooks, model: DiffusionModel, dataset: Text2ImageDataset) -> list[str]:
    """Which captions are cut off, if any; of many images every so many are looked at.

    asked: as for `ask_plugins`.
    """
    lengths = captions.caption_lengths(asked, model.encoders, captions.some_captions(dataset))
    encoder = asked.chain("encode_prompt")
    return captions.cut_note(lengths, "captions", encoder, longer_prompts(encoder), of=len(dataset))


def longer_prompts(encoder: str) -> str:
    """What keeps the tokens that `encoder`, a chain of those who encode prompts, cuts off."""
    if "lpw" in encoder:
        return "a higher --lpw_max_embeddings_multiples keeps them"
    return "--lpw True keeps them"


def plugin_rows(config: RunConfig, hooks: Hooks) -> list[Row]:
    """The selected plugins in order, and what each does to which hook."""
    names = ", ".join(p.installed.name for p in config.plugins) or "none"
    return [("plugins", names), *(("", does) for does in hooks.describe())]


def compute_rows(network: Any, settings: TrainSettings) -> list[Row]:
    """How the network will compute: the attention that is really used, and the precision."""
    device = "Ascend" if on_ascend() else "CPU"
    half = is_half(settings.ms_amp_level)
    attention = attention_in_use(network.attention_type, device, half, network.num_head_channels)
    return [("attention", attention), ("precision", precision_line(settings))]


def _update_rows(run: Run) -> list[Row]:
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
    return [("update", f"of {run.batch_size} samples: {product}")]


def digest(config: RunConfig, dataset: Text2ImageDataset, checkpoint: Checkpoint | None) -> str:
    """A hash of what must be equal on all ranks: settings, plugins, images, captions, and the
    checkpoint that is resumed."""
    text = f"{OmegaConf.to_yaml(config.tree)}{plugin_list(config)}{samples_of(0, dataset)}"
    if checkpoint is not None:
        text += (checkpoint.folder / STATE_FILE).read_text("utf-8")
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def samples_of(batch_size: int, dataset: Text2ImageDataset) -> dict[str, Any]:
    """What decides, beside the settings, which samples a step takes; the same when resumed."""
    data = [(image.name, image.text) for image in dataset.images]
    return {
        "samples of an update": batch_size,
        "images and captions": hashlib.sha256(repr(data).encode("utf-8")).hexdigest()[:12],
    }


def start_facts(
    run: Run,
    quarters: curves.Quarters,
    notes: Sequence[str],
    checkpoint: Checkpoint | None,
    changes: Sequence[str],
    source: Source | None,
    cached: str = "",
) -> list[Fact]:
    """The start of a run: plugins, objective, network, data, where it learns, and what to note.

    notes: of plugins and optimizer. changes: how the run differs from the one it resumes. source:
    the weights the run starts from, None where it begins untrained or resumes. cached: what it
    takes from a cache, if anything.
    """
    config, networks = run.config, run.state.networks
    trained = sum(parameter.size for parameter in networks.trained)
    facts: list[Fact] = [
        *plugin_rows(config, run.hooks),
        ("objective", run.model.preconditioning.name),
        ("network", f"{trained:,} parameters trained"),
        *compute_rows(networks.cell, config.train),
        *_update_rows(run),
    ]
    if source is not None:
        facts += weight_rows(source, run.model)
    elif checkpoint is None:
        untrained = "none, everything starts untrained (--weight FILE starts from one)"
        facts.append(("weights", untrained))
    facts += data_rows(run.dataset, str(run.save_path / SKIPPED))
    if cached:
        facts.append(("cache", cached))
    facts += [quarters, ("run", str(run.save_path))]
    if checkpoint is not None:
        facts.append(("resumed", f"{checkpoint.folder} at step {checkpoint.step}"))
        facts += [("changed", change) for change in changes]
        if checkpoint.step == config.data.total_step:
            facts.append(("finished", "no step is left; --total_step N with a higher N goes on"))
    notes = [*config.notices, *notes]
    if checkpoint is not None:
        notes += _version_notes(checkpoint, plugin_list(config))
    if config.train.param_fp16:
        notes += half_notes(networks.network.values(), networks.trained)
    facts += [("note", note) for note in notes]
    return facts


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


def end_facts(run: Run, seconds: float, checkpoint: Path | None, images: Path | None) -> list[Fact]:
    """The end of a run.

    seconds: that it took. checkpoint, images: the last ones written, if any.
    """
    state, facts = run.state, list[Fact]()
    if state.skipped:
        facts.append(("skipped", f"{state.skipped} updates, whose gradients were not finite"))
    if run.skipped is not None and run.skipped.count:
        broken = "1 image" if run.skipped.count == 1 else f"{run.skipped.count:,} images"
        facts.append(("set aside", f"{broken} that broke, listed in {run.skipped.path}"))
    facts += [
        f"trained to step {state.step} in {seconds:.0f} s",
        ("metrics", str(run.save_path / "metrics.jsonl")),
        ("settings", str(run.save_path / "config.yaml")),
        ("checkpoint", str(checkpoint)),
    ]
    if images is not None:
        facts.append(("images", str(images)))
    if run.is_interrupted and state.step < run.config.data.total_step:
        flag = "--resume" if run.config.train.save_optimizer else "--weight"
        facts.append(("to go on", f"sdxl-host train ... {flag} {checkpoint}"))
    return facts


def show_nothing(fact: Fact) -> None:
    """What ranks other than rank 0 do with their facts."""
