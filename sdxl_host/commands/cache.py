"""`sdxl-host cache`: makes what a training reads from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdxl_host.commands.flags import Command

__all__ = ["cache"]


@dataclass
class Flags:
    """`sdxl-host cache` has no flags of its own."""


_COMMAND = Command(
    "cache",
    "Makes the latents of the images and the embeddings of the captions that sdxl-host train reads "
    "with the same arguments and --cache_latent True --cache_text_embedding True, as far as "
    "--cache_path does not hold them yet. The same as sdxl-host train --task cache.",
    Flags,
    rest="arguments of sdxl-host train",
    notes="With one of the two switches, only that part is made. sdxl-host train --help lists the "
    "arguments.",
)


def cache(arguments: Sequence[str]) -> int:
    """Makes what the cache lacks for a training with these arguments; returns the exit code."""
    return _COMMAND.run(arguments, _cache)


def _cache(flags: Flags, words: list[str]) -> int:
    from sdxl_host.commands.train import train

    return train(["--task", "cache", *words])
