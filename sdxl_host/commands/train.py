"""`sdxl-host train`."""

from __future__ import annotations

from collections.abc import Sequence

from sdxl_host.commands.flags import flag_row, wants_help
from sdxl_host.commands.printer import definitions, paragraph, show
from sdxl_host.config.load import RunConfig, load
from sdxl_host.settings.declarations import FLAGS
from sdxl_host.settings.values import type_name

__all__ = ["train"]


def train(arguments: Sequence[str]) -> int:
    """Trains as the arguments say; returns the exit code."""
    if wants_help(arguments):
        print(_help())
        return 0
    return run(load(arguments))


def run(config: RunConfig) -> int:
    """Trains as `config` says and prints what is done; returns the exit code."""
    from sdxl_host.device import limit_memory, prepare_device

    prepare_device(config.train.device_target)
    limit_memory(config.train.max_device_memory)
    from sdxl_host.training.distributed import join

    if config.train.task == "cache":
        from sdxl_host.training.cache_task import make_cache

        return make_cache(config, show, join(config.train.is_parallel))
    from sdxl_host.training.build import make_trainer

    return make_trainer(config, show, join(config.train.is_parallel)).run()


def _help() -> str:
    from sdxl_host.plugins.discovery import discover

    flags = [
        ("--config FILE", "a YAML file, yours or a packaged one"),
        ("--plugins A,B", "plugins of this run, in order; none for no plugin"),
        *(flag_row(s.flag, type_name(s.type), s.help, s.default) for s in FLAGS.values()),
    ]
    names = ", ".join(sorted({plugin.name for plugin in discover()})) or "none"
    lines = [
        "usage: sdxl-host train [--flag VALUE ...] [section.key=value ...]",
        "",
        "With no --config, trains a small model on images that the package carries.",
        "",
        *definitions(flags),
        "",
        paragraph(
            f"Plugins installed: {names}. An option of a plugin is a flag too, --snr_gamma 5.0, "
            "and selects it; sdxl-host plugins --check lists them."
        ),
    ]
    return "\n".join(lines)
