"""A run's folder: a new one or that of a resumed run, locked while it trains, with its settings."""

from __future__ import annotations

import fcntl
import time
import weakref
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf

from sdxl_host.checkpoints.layout import CHECKPOINTS, OPTIMIZER_FILE
from sdxl_host.checkpoints.open import Checkpoint
from sdxl_host.config.load import RunConfig
from sdxl_host.errors import DataError
from sdxl_host.files.atomic import open_no_follow, write_file
from sdxl_host.training.distributed import Ranks

__all__ = ["RunFolder", "settings_text", "started_from"]


# Held by the run that is at work in a folder. It stays there, empty: to remove it would let two
# runs hold a lock each.
_LOCK = ".lock"


# What a new run would write over. Where a run was at work, its lock stands beside them.
_WRITTEN = ("config.yaml", "metrics.jsonl")


class RunFolder:
    """A run's folder with its settings in it; a resumed run goes on in the folder it began in.

    path: the same on every rank. settings: as YAML, for checkpoints too. Until it is closed no
    other run may use the folder.
    """

    def __init__(self, config: RunConfig, checkpoint: Checkpoint | None, ranks: Ranks) -> None:
        self._lock: IO[bytes] | None = None
        self.settings = settings_text(config, started_from(config, checkpoint))
        path = self._make(config, checkpoint) if ranks.is_main_process else Path()
        self.path = Path(ranks.texts(str(path))[0])

    def _make(self, config: RunConfig, checkpoint: Checkpoint | None) -> Path:
        if checkpoint is not None:
            folder = checkpoint.folder.parent.parent
        else:
            folder = Path(config.train.save_path).expanduser()
            if config.train.save_path_with_time:
                folder = _timed(folder)
            else:
                _refuse_used(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Not truncated and not followed where it is a link: it is only there to be locked.
            self._lock = open(folder / _LOCK, "ab", opener=open_no_follow)  # noqa: SIM115 - see close
            weakref.finalize(self, self._lock.close)  # where a run never comes so far
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_file(folder / "config.yaml", self.settings.encode("utf-8"))
        except BlockingIOError as error:
            raise DataError(
                f"{folder}: another run is at work in it; wait until it ends, or choose another "
                "--save_path"
            ) from error
        except OSError as error:
            raise DataError(
                f"{folder}: can't be written ({error.strerror}); choose another --save_path"
            ) from error
        return folder

    def close(self) -> None:
        """Lets other runs use the folder; the system does it too when the process ends."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _refuse_used(folder: Path) -> None:
    """Raises DataError where a new run would write over what is kept in its folder."""
    checkpoints = sorted(folder.glob(f"{CHECKPOINTS}/step_*"))
    if checkpoints:
        last = checkpoints[-1]
        more = "or continue it with --resume latest"
        if not (last / OPTIMIZER_FILE).is_file():
            more = f"with --weight {last} to start from its weights"
        raise DataError(f"{folder}: already holds a run; choose another --save_path, {more}")
    # A run that was killed before its first checkpoint begins again.
    if (folder / _LOCK).exists():
        return
    for name in _WRITTEN:
        if (folder / name).is_file():
            raise DataError(
                f"{folder / name}: a new run would write over it; choose another --save_path, or "
                "move it away"
            )


def started_from(config: RunConfig, checkpoint: Checkpoint | None) -> str:
    """`train.weight` of the run, or of the one it continues: what it began with."""
    if checkpoint is None:
        return config.train.weight
    return checkpoint.settings["train"]["weight"]


def settings_text(config: RunConfig, weight: str) -> str:
    """The settings as YAML; loading it repeats the run, from its beginning and from `weight`."""
    tree = config.tree.copy()
    OmegaConf.set_readonly(tree, False)
    beginning = {"weight": weight, "resume": "", "resume_step": 0, "optimizer_weight": ""}
    tree.train.update(beginning, allow_changes=False)
    return OmegaConf.to_yaml(tree)


def _timed(parent: Path) -> Path:
    """`parent/YYYY.MM.DD-HH.MM.SS`, one that is not there yet."""
    stamp = time.strftime("%Y.%m.%d-%H.%M.%S")
    folder, number = parent / stamp, 2
    while folder.exists():
        folder, number = parent / f"{stamp}-{number}", number + 1
    return folder
