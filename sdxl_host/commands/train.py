"""`sdxl-host train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sdxl_host.config.load import RunConfig, load
from sdxl_host.settings.schema import FLAGS, UNBUILT
from sdxl_host.settings.values import type_name

__all__ = ["train"]


def train(arguments: Sequence[str]) -> int:
    """Trains as the arguments say; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(_help())
        return 0
    return run(load(arguments))


def run(config: RunConfig) -> int:
    """Trains as `config` says, saying on standard output what is done; returns the exit code."""
    from sdxl_host.device import limit_memory, prepare_device
    from sdxl_host.training.compile_cache import use_compile_cache

    use_compile_cache(config)
    prepare_device(config.train.device_target)
    limit_memory(config.train.max_device_memory)
    from sdxl_host.training.build import make_trainer
    from sdxl_host.training.distributed import join

    return make_trainer(config, _say, join(config.train.is_parallel)).run()


def _say(line: str) -> None:
    """Prints a line at once, to whoever is there to read it."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # The reader has gone, as `tee` does at Ctrl-C; the run has a checkpoint to save yet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help() -> str:
    from sdxl_host.plugins.discovery import discover

    flags = [
        ("config", "FILE", "a YAML file, yours or a packaged one"),
        ("plugins", "A,B", "plugins of this run, in order; none for no plugin"),
        *((s.flag, type_name(s.type), f"{s.help} [{s.default}]") for s in FLAGS.values()),
    ]
    names = ", ".join(sorted({plugin.name for plugin in discover()})) or "none"
    lines = [
        "usage: sdxl-host train [--flag VALUE ...] [section.key=value ...]",
        "",
        "With no --config, trains a small model on images that the package carries.",
        "",
        *(f"  --{name:<28}{kind:<26}{text}" for name, kind, text in flags),
        "",
        f"Plugins installed: {names}. An option of a plugin is a flag too, --snr_gamma 5.0, and",
        "selects it; sdxl-host plugins --check lists them.",
        f"Not part of this version, and refused: {', '.join('--' + name for name in UNBUILT)}.",
    ]
    return "\n".join(lines)
