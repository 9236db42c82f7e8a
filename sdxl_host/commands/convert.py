"""`sdxl-host convert`: weights from one file format to another."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdxl_host.commands.flags import Command
from sdxl_host.commands.printer import show
from sdxl_host.errors import ConfigError, DataError
from sdxl_host.settings.options import option

if TYPE_CHECKING:
    from sdxl_host.weights.architecture import Architecture

__all__ = ["convert"]

_SINGLE_FILE = ".safetensors"
_NEVER_WRITTEN = (".ckpt", ".bin", ".pt", ".pth")


@dataclass
class Flags:
    """The flags of `sdxl-host convert`."""

    dtype: Literal["fp16", "bf16", "fp32"] | None = option(
        None, help="precision of the weights [each as it is in SRC]"
    )
    head_width: int | None = option(
        None, help="of an attention head, where SRC does not state it [64]", minimum=1
    )
    last_weights: bool = option(
        False,
        help="of a checkpoint that keeps an EMA, the weights of its last step instead",
    )
    allow_unmarked_objective: bool = option(
        False,
        help="write a single file even where other programs can't tell what the network predicts",
    )


_COMMAND = Command(
    "convert",
    "Writes weights in another format or precision.",
    Flags,
    arguments={
        "SRC": "a .safetensors file, a diffusers folder, a MindSpore .ckpt or a checkpoint folder; "
        "of several, A,B, the later replaces",
        "DST": "NAME.safetensors: a single file; else diffusers folder",
    },
)


def convert(arguments: Sequence[str]) -> int:
    """Converts as the arguments say; returns the exit code."""
    return _COMMAND.run(arguments, _convert)


def _convert(flags: Flags, source: str, target: str) -> int:
    paths = [Path(word).expanduser() for word in source.split(",") if word]
    if not paths:
        raise ConfigError("SRC: is empty; give a file or folder of weights")
    file_or_folder = Path(target).expanduser()
    _check_name(file_or_folder)
    _run(paths, file_or_folder, flags)
    return 0


def _check_name(target: Path) -> None:
    """Raises ConfigError for what is meant as a file of a kind that is not written: it would become
    a folder of that name. Any other ending may be a part of a folder's name, as in model-v1.5."""
    _, dot, end = target.name.rpartition(".")
    ending = dot + end
    if ending.lower() in _NEVER_WRITTEN:
        raise ConfigError(
            f"{target}: {ending} files are not written; give NAME{_SINGLE_FILE}, or a folder's name"
        )
    is_near = dot and get_close_matches(ending.lower(), [_SINGLE_FILE], cutoff=0.85)
    if is_near and target.suffix != _SINGLE_FILE:
        raise ConfigError(
            f"{target}: is not NAME{_SINGLE_FILE}, as a single file must be; give that, or a "
            "folder's name"
        )


def _run(paths: Sequence[Path], target: Path, flags: Flags) -> None:
    dtype, head_width, unmarked = flags.dtype, flags.head_width, flags.allow_unmarked_objective
    from sdxl_host.device import prepare_device

    prepare_device("CPU")
    from sdxl_host.checkpoints.layout import EMA_FILE
    from sdxl_host.weights.export import write_diffusers, write_single_file
    from sdxl_host.weights.metadata import (
        SDXL_SCALE_FACTOR,
        described,
        markers,
        objective,
        scale_factor,
        scheduler_config,
    )
    from sdxl_host.weights.open import open_all
    from sdxl_host.weights.shapes import complete

    if flags.last_weights and not any((path / EMA_FILE).is_file() for path in paths):
        raise ConfigError(
            "--last_weights: SRC keeps no EMA, so its weights are those of the last "
            "step; leave the flag out"
        )
    source = open_all(paths, use_ema=not flags.last_weights)
    show(("source", source.description), *(("note", note) for note in source.notes))
    stated = source.architecture
    architecture = complete(stated, source.shapes, head_width=head_width or 64)
    if head_width is not None and stated is not None and _same_heads(stated, architecture):
        raise ConfigError(
            f"--head_width {head_width}: {source.description} states how wide its heads are; "
            "leave the flag out"
        )
    predicted = objective(source.metadata)
    numbers = sum(math.prod(shape) for shape in source.shapes.values())
    stored = ", ".join(sorted(set(source.dtypes.values())))
    show(
        ("weights", f"{len(source.shapes):,} tensors, {numbers:,} numbers ({stored})"),
        ("objective", predicted),
    )
    is_single = target.suffix == _SINGLE_FILE
    scale = scale_factor(source.metadata)
    scheduler = scheduler_config(source.metadata)
    is_marked = predicted in ("eps", "v") or (scheduler is not None and not is_single)
    if not is_marked:
        _refuse_unmarked(target, f"the objective {predicted}", is_single, unmarked)
    if is_single and scale != SDXL_SCALE_FACTOR:
        _refuse_unmarked(target, f"latents scaled by {scale}", is_single, unmarked)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    metadata = described(source.metadata, architecture, target.stem, date)
    progress = _progress()
    if is_single:
        write_single_file(
            target, source, architecture, dtype, metadata, markers(source.metadata), progress
        )
    else:
        write_diffusers(
            target,
            source,
            architecture,
            dtype,
            prediction_type="v_prediction" if predicted == "v" else "epsilon",
            zero_terminal_snr="ztsnr" in source.metadata,
            scheduler=scheduler,
            scale_factor=scale,
            metadata=metadata,
            progress=progress,
        )
    size = sum(p.stat().st_size for p in [target, *target.rglob("*")] if p.is_file())
    show(("written", f"{target} ({size / 1e9:.2f} GB{f', {dtype}' if dtype else ''})"))


def _same_heads(one: Architecture, other: Architecture) -> bool:
    """Of the parts with heads of some width; the autoencoder's attention has one head."""
    return (one.unet, one.encoders) == (other.unet, other.encoders)


def _refuse_unmarked(target: Path, trained_for: str, is_single: bool, allowed: bool) -> None:
    """Raises DataError: other programs would take the network for an ordinary SDXL."""
    if is_single and allowed:
        show(("note", f"no other program can tell that it was trained for {trained_for}"))
        return
    remedy = (
        "--allow_unmarked_objective writes it for sdxl-host alone"
        if is_single
        else "write a single file with --allow_unmarked_objective, for sdxl-host alone"
    )
    raise DataError(
        f"{target}: the network was trained for {trained_for}, which the format can't say, so "
        f"other programs would draw noise; {remedy}"
    )


def _progress() -> Callable[[int, int], None]:
    """A bar on a terminal; elsewhere a line at each tenth."""
    if sys.stdout.isatty():
        from tqdm import tqdm

        bar = tqdm(unit="B", unit_scale=True, desc="writing", file=sys.stdout)

        def draw(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return draw

    shown = 0

    def print_tenths(done: int, total: int) -> None:
        nonlocal shown
        tenths = 10 * done // total
        if tenths > shown:
            shown = tenths
            show(("progress", f"{10 * tenths:3d}% ({done / 1e9:.2f} GB)"))

    return print_tenths
