"""`sdxl-host plan`: what a run would be, without training and without a weight in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_host.commands.data_facts import data_facts
from sdxl_host.commands.flags import Command
from sdxl_host.commands.printer import columns, details, show, tenth_lines
from sdxl_host.errors import DataError
from sdxl_host.settings.options import option

if TYPE_CHECKING:
    from sdxl_host.config.load import RunConfig
    from sdxl_host.data.dataset import Text2ImageDataset
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.planning.curves import Curve
    from sdxl_host.planning.memory import Part
    from sdxl_host.plugins.hooks import Hooks
    from sdxl_host.training.summary import Fact
    from sdxl_host.weights.source import Source

__all__ = ["plan"]

_OUT = "plan"
_FILES = CONFIG_FILE, CURVES_FILE, IMAGE_FILE = "config.yaml", "curves.csv", "curves.png"
_NAMED = 5  # captions that are cut off, by name


@dataclass
class Flags:
    """The flags of `sdxl-host plan`."""

    out: Path | None = option(
        None,
        help=f"folder for {CONFIG_FILE}, {CURVES_FILE} and {IMAGE_FILE}; one that holds any of "
        f"them is refused [{_OUT}, or the first of {_OUT}-2, {_OUT}-3, ... that is not there]",
    )


_COMMAND = Command(
    "plan",
    "Shows what sdxl-host train would do with the same arguments, without training and without a "
    "weight in memory: the resolved config and where each value came from, what plugins change, "
    "which timesteps are drawn and what they weigh, images, captions and what is wrong with them, "
    "parameters, and an estimate of memory.",
    Flags,
    rest="arguments of sdxl-host train",
    notes="sdxl-host train --help lists the other arguments.",
)


def plan(arguments: Sequence[str]) -> int:
    """Shows what training with these arguments would be; returns the exit code."""
    return _COMMAND.run(arguments, _plan)


def _plan(flags: Flags, words: list[str]) -> int:
    folder = _folder(flags.out)

    from sdxl_host.config.load import load
    from sdxl_host.config.provenance import commented_yaml

    config = load(words)
    text = commented_yaml(config)

    from sdxl_host.device import prepare_device

    device = prepare_device(config.train.device_target)
    facts, before, after = _look(config, device)
    show(text, *facts)
    _write(folder, text, before, after, config)
    show(("written", ", ".join(str(folder / name) for name in _FILES)))
    return 0


def _folder(folder: Path | None) -> Path:
    """The folder to write to; nothing in it is overwritten."""
    if folder is None:
        folder, number = Path(_OUT), 2
        while folder.exists():
            folder, number = Path(f"{_OUT}-{number}"), number + 1
        return folder
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder}: is not a folder; give one, or a new name")
    for name in _FILES:
        if (folder / name).exists():
            raise DataError(f"--out {folder}: already holds {name}; remove it, or give another one")
    return folder


def _write(folder: Path, text: str, before: Curve, after: Curve, config: RunConfig) -> None:
    from sdxl_host.files.atomic import write_file
    from sdxl_host.planning.chart import draw_curves
    from sdxl_host.sampling.grid import to_png

    names = ", ".join(p.installed.name for p in config.plugins) or "none"
    image = draw_curves(before, after, f"plugins: {names}")
    try:
        write_file(folder / CONFIG_FILE, text.encode("utf-8"))
        write_file(folder / CURVES_FILE, _csv(before, after).encode("utf-8"))
        write_file(folder / IMAGE_FILE, to_png(image))
    except OSError as error:
        raise DataError(
            f"--out {folder}: can't be written ({error.strerror}); give another folder"
        ) from error


def _csv(before: Curve, after: Curve) -> str:
    """All the numbers of both curves, one timestep a line."""
    rows = ["timestep,sigma,p_before,w_before,share_before,p_after,w_after,share_after"]
    columns = (after.sigma, before.p, before.w, before.share, after.p, after.w, after.share)
    for timestep, numbers in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        rows.append(",".join([str(timestep), *(f"{number:.9g}" for number in numbers)]))
    return "\n".join(rows) + "\n"


# ---- what is found


def _look(config: RunConfig, device: str) -> tuple[list[Fact], Curve, Curve]:
    """What is shown below the config, and the curves without plugins and with them."""
    from sdxl_host.caching.keys import check_cacheable
    from sdxl_host.planning.curves import curves, quarters, tenths
    from sdxl_host.planning.memory import model_parts
    from sdxl_host.plugins.hooks import make_hooks
    from sdxl_host.training import data_sink
    from sdxl_host.training.data_check import check_data
    from sdxl_host.training.resume import find_checkpoint
    from sdxl_host.training.summary import compute_rows, plugin_rows, samples_of
    from sdxl_host.weights.networks import check_fit, size_step, weight_rows
    from sdxl_host.weights.open import open_weight_setting

    dataset, optimizer_notes = _other_sections(config)
    hooks = make_hooks(config.plugins)
    model = hooks.build_model(config.tree)
    size = (dataset.target_size, dataset.target_size)
    check_fit(model, size, "data.dataset_config.params.target_size")
    check_data(dataset, config, size_step(model), show)
    # Of one device: how many there will be is not known here.
    update = config.data.per_batch_size * config.train.gradient_accumulation_steps
    checkpoint, _ = find_checkpoint(config, samples_of(update, dataset), update)
    source = open_weight_setting(config.train.weight) if checkpoint is None else None

    if checkpoint is not None:
        hooks.load_state_dict(checkpoint.plugin_states(), config.train.allow_changes)
    before, after = curves(hooks, model, config.tree)
    check_cacheable(config, hooks, dataset)
    if config.train.data_sink:
        data_sink.check(config, hooks, model, checkpoint.step if checkpoint else 0)
    parts = model_parts(model)
    facts: list[Fact] = [
        *data_facts(dataset),
        "",
        *plugin_rows(config, hooks),
        ("objective", model.preconditioning.name),
        *compute_rows(model.network, config.train),
        ("device", device),
    ]
    if source is not None:
        _check_fit(parts, source)
        facts += weight_rows(source, model)
    if checkpoint is not None:
        facts.append(("resumes", f"{checkpoint.folder} at step {checkpoint.step}"))
    notes = [*config.notices, *hooks.notes(model), *optimizer_notes]
    facts += [("note", note) for note in notes]
    facts += ["", quarters(before, after), "", *tenth_lines(tenths(before, after)), ""]
    facts += [*_caption_facts(hooks, model, dataset), "", *_memory_facts(parts), ""]
    return facts, before, after


def _other_sections(config: RunConfig) -> tuple[Text2ImageDataset, list[str]]:
    """The dataset, and the optimizer's notes. Raises HostError for what is wrong with either."""
    from sdxl_host.data.dataset import make_dataset
    from sdxl_host.training.optimizer import configured

    dataset = make_dataset(config.data)
    optimizer, _ = configured(config.optim, config.data.total_step)
    return dataset, optimizer.notes()


def _check_fit(parts: Sequence[Part], source: Source) -> None:
    """Raises DataError where the weights' names and shapes are not the model's."""
    from sdxl_host.weights.compare import compare_shapes

    expected = {name: shape for part in parts for name, shape in part.shapes.items()}
    found = {n: shape for n, shape in source.shapes.items() if not n.endswith(".position_ids")}
    compare_shapes(expected, found, source.description)


def _caption_facts(hooks: Hooks, model: DiffusionModel, dataset: Text2ImageDataset) -> list[Fact]:
    from sdxl_host.planning.captions import caption_lengths

    lengths = caption_lengths(hooks, model.encoders, dataset.all_captions())
    longest = max(lengths, key=lambda length: length.tokens)
    cut = sorted((each for each in lengths if each.lost), key=lambda each: -each.lost)
    whose = " of the images that the package carries" if dataset.is_demo else ""
    encoder = hooks.chain("encode_prompt")
    rows = [("longest", f"{longest.tokens} tokens ({longest.name})")]
    for each in cut[:_NAMED]:
        rows.append(("cut off", f"{each.name}: {each.lost} of {each.tokens} tokens lost"))
    if len(cut) > _NAMED:
        rows.append(("", f"and {len(cut) - _NAMED} more that lose less or as much"))
    return [
        (
            "captions",
            f"{len(cut) or 'none'} of {len(lengths)}{whose} cut off; encoded by {encoder}",
        ),
        *details(rows),
    ]


def _memory_facts(parts: Sequence[Part]) -> list[Fact]:
    from sdxl_host.planning.memory import memory

    counts = [
        (part.name, f"{part.count:,}", f"{part.trained:,} trained" if part.trained else "frozen")
        for part in parts
    ]
    kinds = memory(parts)
    sizes = [(what, _gib(size), formula) for what, formula, size in kinds]
    together = ("together", _gib(sum(size for _, _, size in kinds)), "")
    return [
        "parameters",
        *columns(counts, "<>", indent=2),
        ("memory", "of one device, estimated; activations come on top and are not"),
        *columns([*sizes, together], "<>", indent=2),
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
