"""The devices that share a run: one process each, of which rank 0 writes what is written.

Data parallel: every worker calls the hooks for the whole global batch and takes its own share of
it. What they need to agree on is exchanged here; gradients are in the step.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from sdxl_host.errors import ConfigError

__all__ = ["Workers", "join"]

# Characters of a text that can be exchanged: a digest, or a path.
_LONGEST = 1024


class Workers:
    """rank: of this process, from 0. count: how many there are."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    @property
    def is_main_process(self) -> bool:
        """Whether this worker writes files and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker; all must call it."""
        if self.count == 1:
            return flag
        return bool(_collected("AllReduce", np.float32([flag]))[0] > 0)

    def texts(self, text: str) -> list[str]:
        """Every worker's text, by rank; all must call it. At most 1024 bytes."""
        if self.count == 1:
            return [text]
        own = np.zeros((1, _LONGEST), np.float32)  # zeros at the end stand for nothing
        codes = np.frombuffer(text.encode("utf-8"), np.uint8)
        if codes.size > _LONGEST:
            raise ConfigError(f"{text}: is too long for {self.count} workers; shorten the path")
        own[0, : codes.size] = codes
        rows = _collected("AllGather", own).astype(np.uint8)
        return [row[row > 0].tobytes().decode("utf-8") for row in rows]

    def agree(self, digest: str, what: str) -> None:
        """Raises ConfigError, naming the ranks, where a worker's digest is not rank 0's."""
        digests = self.texts(digest)
        others = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise ConfigError(
                f"rank {', '.join(others)} has other {what} than rank 0; start every rank with the "
                "same command and the same packages"
            )


def join(is_parallel: bool) -> Workers:
    """This process among its workers. After `prepare_device`. Raises ConfigError.

    is_parallel: whether there are others, started by `msrun`, which says so in the environment. A
    launch by a rank table alone, or by MPI, is not served.
    """
    told = os.environ.get("MS_WORKER_NUM", "")
    # The scheduler is started by the same command; it stays in `init` until the workers are done.
    is_started = told.isdecimal() and os.environ.get("MS_ROLE") in ("MS_WORKER", "MS_SCHED")
    if is_parallel and not is_started:
        raise ConfigError(
            "--is_parallel True: msrun has not started this process; call it by msrun "
            '--worker_num=N --local_worker_num=N --join=True "$(command -v sdxl-host)" train ..., '
            "as docs/distributed.md shows, or leave the flag out"
        )
    if not is_parallel:
        if is_started and int(told) > 1:
            raise ConfigError(
                f"{told} workers were started, and each would train on its own; use "
                "--is_parallel True"
            )
        return Workers()
    from mindspore import communication

    communication.init()
    return Workers(communication.get_rank(), communication.get_group_size())


def _collected(operator: str, array: np.ndarray) -> np.ndarray:
    """What one of MindSpore's collective operators makes of every worker's array."""
    from mindspore import Tensor, ops

    collected: Any = getattr(ops, operator)()(Tensor(array))
    return collected.asnumpy()
