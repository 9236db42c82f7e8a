"""`sdxl-host plan`: what a run would be, without training and without a weight in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_host.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sdxl_host.config.load import RunConfig
    from sdxl_host.data.dataset import Text2ImageDataset
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.planning.curves import Curve
    from sdxl_host.planning.memory import Part
    from sdxl_host.plugins.hooks import Hooks
    from sdxl_host.weights.source import Source

__all__ = ["plan"]

_OUT = "plan"
_FILES = CONFIG_FILE, CURVES_FILE, IMAGE_FILE = "config.yaml", "curves.csv", "curves.png"
_NAMED = 5  # captions that are cut off, by name
_HELP = f"""\
usage: sdxl-host plan [arguments of sdxl-host train] [--out DIR]

Shows what sdxl-host train would do with the same arguments, without training and without a weight
in memory: the resolved config and where each value came from, what plugins change, which timesteps
are drawn and what they weigh, captions that are too long, parameters, and an estimate of memory.

  --out DIR   folder for {CONFIG_FILE}, {CURVES_FILE} and {IMAGE_FILE}; one that holds any of
              them is refused [{_OUT}, or the first of {_OUT}-2, {_OUT}-3, ... that is not there]

sdxl-host train --help lists the other arguments."""


def plan(arguments: Sequence[str]) -> int:
    """Shows what training with these arguments would be; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        return 0
    words, given = _take_out(arguments)
    folder = _folder(given)

    from sdxl_host.config.load import load
    from sdxl_host.config.provenance import commented_yaml

    config = load(words)
    text = commented_yaml(config)

    from sdxl_host.device import prepare_device

    device = prepare_device(config.train.device_target)
    lines, before, after = _look(config, device)
    print(text)
    for line in lines:
        print(line)
    _write(folder, text, before, after, config)
    print(f"written     {', '.join(str(folder / name) for name in _FILES)}")
    return 0


def _take_out(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without --out, and its value."""
    words: list[str] = []
    given: str | None = None
    rest = iter(arguments)
    for word in rest:
        if word != "--out" and not word.startswith("--out="):
            words.append(word)
            continue
        if given is not None:
            raise ConfigError("--out: given twice; give it once")
        given = word.partition("=")[2] if "=" in word else next(rest, "")
        if not given or given.startswith("--"):
            raise ConfigError("--out: needs a value (a folder)")
    return words, given


def _folder(given: str | None) -> Path:
    """The folder to write to; nothing in it is overwritten."""
    if given is None:
        folder, number = Path(_OUT), 2
        while folder.exists():
            folder, number = Path(f"{_OUT}-{number}"), number + 1
        return folder
    folder = Path(given).expanduser()
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


def _look(config: RunConfig, device: str) -> tuple[list[str], Curve, Curve]:
    """The lines below the config, and the curves without plugins and with them."""
    from sdxl_host.planning.curves import curves, start_lines, table_lines
    from sdxl_host.planning.memory import model_parts
    from sdxl_host.plugins.hooks import make_hooks
    from sdxl_host.training.resume import find_checkpoint
    from sdxl_host.training.summary import samples_of
    from sdxl_host.weights.networks import check_fit, weight_lines
    from sdxl_host.weights.open import open_weight_setting

    dataset, optimizer_notes = _other_sections(config)
    # Of one device: how many there will be is not known here.
    update = config.data.per_batch_size * config.train.gradient_accumulation_steps
    checkpoint, _ = find_checkpoint(config, samples_of(update, dataset))
    source = open_weight_setting(config.train.weight) if checkpoint is None else None

    hooks = make_hooks(config.plugins)
    model = hooks.build_model(config.tree)
    if checkpoint is not None:
        hooks.load_state_dict(checkpoint.plugin_states(), config.train.allow_changes)
    before, after = curves(hooks, model, config.tree)
    size = (dataset.target_size, dataset.target_size)
    check_fit(model, size, "data.dataset_config.params.target_size")
    parts = model_parts(model)
    lines = _objective_lines(config, hooks, model, device)
    if source is not None:
        _check_fit(parts, source)
        lines += weight_lines(source, model)
    if checkpoint is not None:
        lines.append(f"resumes     {checkpoint.folder} at step {checkpoint.step}")
    notes = [*config.notices, *hooks.notes(model), *optimizer_notes]
    lines += [f"note        {line}" for line in notes]
    lines += ["", *start_lines(before, after), "", *table_lines(before, after), ""]
    lines += [*_caption_lines(hooks, model, dataset), "", *_memory_lines(parts), ""]
    return lines, before, after


def _other_sections(config: RunConfig) -> tuple[Text2ImageDataset, list[str]]:
    """The dataset, and what the optimizer has to say; what is wrong with either is told."""
    from omegaconf import OmegaConf

    from sdxl_host.settings.targets import build
    from sdxl_host.training.optimizer import configured

    node = OmegaConf.to_container(config.tree.data.dataset_config)
    dataset = build(node, "dataset", "data.dataset_config")
    optimizer, _ = configured(config.optim, config.data.total_step)
    return dataset, optimizer.notes()


def _objective_lines(
    config: RunConfig, hooks: Hooks, model: DiffusionModel, device: str
) -> list[str]:
    from sdxl_host.training.summary import compute_lines

    return [
        f"plugins     {', '.join(p.installed.name for p in config.plugins) or 'none'}",
        *(f"            {line}" for line in hooks.describe()),
        f"objective   {model.preconditioning.name}",
        *compute_lines(model.network, config.train),
        f"device      {device}",
    ]


def _check_fit(parts: Sequence[Part], source: Source) -> None:
    """Raises DataError where the weights' names and shapes are not the model's."""
    from sdxl_host.weights.compare import compare_shapes

    expected = {name: shape for part in parts for name, shape in part.shapes.items()}
    found = {n: shape for n, shape in source.shapes.items() if not n.endswith(".position_ids")}
    compare_shapes(expected, found, source.description)


def _caption_lines(hooks: Hooks, model: DiffusionModel, dataset: Text2ImageDataset) -> list[str]:
    from sdxl_host.planning.captions import caption_lengths

    lengths = caption_lengths(hooks, model.encoders, dataset.images)
    longest = max(lengths, key=lambda length: length.tokens)
    cut = sorted((each for each in lengths if each.lost), key=lambda each: -each.lost)
    whose = " of the images that the package carries" if dataset.is_demo else ""
    lines = [
        f"captions    {len(cut) or 'none'} of {len(lengths)}{whose} cut off; "
        f"encoded by {hooks.chain('encode_prompt')}",
        f"  longest   {longest.tokens} tokens ({longest.name})",
    ]
    for each in cut[:_NAMED]:
        lines.append(f"  cut off   {each.name}: {each.lost} of {each.tokens} tokens lost")
    if len(cut) > _NAMED:
        lines.append(f"            and {len(cut) - _NAMED} more that lose less or as much")
    return lines


def _memory_lines(parts: Sequence[Part]) -> list[str]:
    from sdxl_host.planning.memory import memory

    rows = memory(parts)
    lines = ["parameters"]
    for part in parts:
        state = "frozen" if not part.trained else f"{part.trained:,} trained"
        lines.append(f"  {part.name:<16}{part.count:>13,}  {state}")
    lines.append("memory      of one device, estimated; activations come on top and are not")
    lines += [f"  {what:<10}{_gib(size)}  {formula}" for what, formula, size in rows]
    return [*lines, f"  {'together':<10}{_gib(sum(size for _, _, size in rows))}"]


def _gib(size: int) -> str:
    return f"{size / 2**30:8.2f} GiB"
