"""The ranks that share a run: one process for each device, of which rank 0 writes all files.

Data parallel: every rank calls the hooks for the whole global batch and computes its part of
it. What the ranks must know of each other is exchanged here; gradients, in the step.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from sdxl_host.errors import ConfigError

__all__ = ["Ranks", "join"]

# Bytes of a text that can be exchanged: a digest, or a path.
_LONGEST = 1024


class Ranks:
    """This process among those that share a run. rank: its number, from 0 to world_size - 1."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all must call it."""
        if self.world_size == 1:
            return flag
        return bool(_collect("AllReduce", np.float32([flag]))[0] > 0)

    def texts(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks; all must call it. At most 1024 bytes."""
        if self.world_size == 1:
            return [text]
        padded = np.zeros((1, _LONGEST), np.float32)  # zeros at the end stand for nothing
        codes = np.frombuffer(text.encode("utf-8"), np.uint8)
        if codes.size > _LONGEST:
            raise ConfigError(
                f"{text}: is too long to exchange between {self.world_size} ranks; shorten the path"
            )
        padded[0, : codes.size] = codes
        rows = _collect("AllGather", padded).astype(np.uint8)
        return [row[row > 0].tobytes().decode("utf-8") for row in rows]

    def check_equal(self, digest: str, what: str) -> None:
        """Raises ConfigError, naming the ranks, where a rank's digest is not that of rank 0."""
        digests = self.texts(digest)
        others = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise ConfigError(
                f"rank {', '.join(others)} has other {what} than rank 0; start every rank with the "
                "same command and the same packages"
            )


def join(is_parallel: bool) -> Ranks:
    """This process among the ranks of its run. After `prepare_device`. Raises ConfigError.

    is_parallel: whether there are others, started by `msrun`, which says so in the environment. A
    launch by a rank table alone, or by MPI, is not served.
    """
    started = os.environ.get("MS_WORKER_NUM", "")
    # The scheduler is started by the same command; it stays in `init` until the ranks are done.
    is_started = started.isdecimal() and os.environ.get("MS_ROLE") in ("MS_WORKER", "MS_SCHED")
    if is_parallel and not is_started:
        raise ConfigError(
            "--is_parallel True: msrun has not started this process; call it by msrun "
            '--worker_num=N --local_worker_num=N --join=True "$(command -v sdxl-host)" train ..., '
            "as docs/distributed.md shows, or leave the flag out"
        )
    if not is_parallel:
        if is_started and int(started) > 1:
            raise ConfigError(
                f"msrun has started {started} processes, and each would train on its own; use "
                "--is_parallel True"
            )
        return Ranks()
    from mindspore import communication

    communication.init()
    return Ranks(communication.get_rank(), communication.get_group_size())


def _collect(operator: str, array: np.ndarray) -> np.ndarray:
    """What one of MindSpore's collective operators makes of every rank's array."""
    from mindspore import Tensor, ops

    collected: Any = getattr(ops, operator)()(Tensor(array))
    return collected.asnumpy()
