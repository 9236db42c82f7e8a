"""`sdxl-host convert`: weights from one file format to another."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_host.commands.parser import Parser
from sdxl_host.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sdxl_host.weights.architecture import Architecture

__all__ = ["convert"]

_SINGLE_FILE = ".safetensors"
_NEVER_WRITTEN = (".ckpt", ".bin", ".pt", ".pth")


def convert(arguments: Sequence[str]) -> int:
    """Converts as the arguments say; returns the exit code."""
    parser = Parser(
        prog="sdxl-host convert", description="Write weights in another format or precision."
    )
    parser.add_argument("source", metavar="SRC",
                        help="a .safetensors file, a diffusers folder, a MindSpore .ckpt or a "
                             "checkpoint folder; of several, A,B, the later replaces")  # fmt: skip
    parser.add_argument("target", type=Path, metavar="DST",
                        help="NAME.safetensors: a single file; else diffusers folder")  # fmt: skip
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"),
                        help="precision of the weights [each as it is in SRC]")  # fmt: skip
    parser.add_argument("--head_width", type=int, metavar="N",
                        help="of an attention head, where SRC does not say it [64]")  # fmt: skip
    parser.add_argument("--last-weights", action="store_true",
                        help="of a checkpoint that keeps an EMA, the weights of its last "
                             "step instead")  # fmt: skip
    parser.add_argument("--allow-unmarked-objective", action="store_true",
                        help="write a single file even where other programs can't tell what the "
                             "network predicts")  # fmt: skip
    options = parser.parse_args(list(arguments))
    if options.head_width is not None and options.head_width < 1:
        raise ConfigError(f"--head_width {options.head_width}: must be at least 1")
    paths = [Path(word).expanduser() for word in options.source.split(",") if word]
    if not paths:
        raise ConfigError("SRC: is empty; sdxl-host convert --help tells how to call it")
    target: Path = options.target.expanduser()
    _check_name(target)
    _run(paths, target, options)
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


def _run(paths: Sequence[Path], target: Path, options: argparse.Namespace) -> None:
    dtype, head_width = options.dtype, options.head_width
    unmarked = options.allow_unmarked_objective
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

    if options.last_weights and not any((path / EMA_FILE).is_file() for path in paths):
        raise ConfigError(
            "--last-weights: SRC keeps no EMA, so its weights are those of the last "
            "step; leave the flag out"
        )
    source = open_all(paths, use_ema=not options.last_weights)
    print(f"source      {source.description}")
    for note in source.notes:
        print(f"note        {note}")
    stated = source.architecture
    architecture = complete(stated, source.shapes, head_width=head_width or 64)
    if head_width is not None and stated is not None and _same_heads(stated, architecture):
        raise ConfigError(
            f"--head_width {head_width}: {source.description} says itself how wide its heads are; "
            "leave the flag out"
        )
    predicted = objective(source.metadata)
    numbers = sum(math.prod(shape) for shape in source.shapes.values())
    stored = ", ".join(sorted(set(source.dtypes.values())))
    print(f"weights     {len(source.shapes):,} tensors, {numbers:,} numbers ({stored})")
    print(f"objective   {predicted}", flush=True)
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
    print(f"written     {target} ({size / 1e9:.2f} GB{f', {dtype}' if dtype else ''})")


def _same_heads(one: Architecture, other: Architecture) -> bool:
    """Of the parts with heads of some width; the autoencoder's attention has one head."""
    return (one.unet, one.encoders) == (other.unet, other.encoders)


def _refuse_unmarked(target: Path, trained_for: str, is_single: bool, allowed: bool) -> None:
    """Raises DataError: other programs would take the network for an ordinary SDXL."""
    if is_single and allowed:
        print(f"note        no other program can tell that it was trained for {trained_for}")
        return
    remedy = (
        "--allow-unmarked-objective writes it for sdxl-host alone"
        if is_single
        else "write a single file with --allow-unmarked-objective, for sdxl-host alone"
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

    said = 0

    def tell(done: int, total: int) -> None:
        nonlocal said
        tenths = 10 * done // total
        if tenths > said:
            said = tenths
            print(f"progress    {10 * tenths:3d}% ({done / 1e9:.2f} GB)", flush=True)

    return tell
