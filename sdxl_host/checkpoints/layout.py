"""What the folders and files of checkpoints are called."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CHECKPOINTS",
    "CONFIG_FILE",
    "EMA_FILE",
    "FORMAT",
    "FROZEN_FILE",
    "GONE",
    "LATEST",
    "NETWORK_FILE",
    "OLD",
    "OPTIMIZER_FILE",
    "PARTIAL",
    "STATE_FILE",
    "checkpoint_folder",
    "checkpoints_by_age",
]


FORMAT = 2
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
NETWORK_FILE = "network.safetensors"
FROZEN_FILE = "frozen.safetensors"
EMA_FILE = "ema.safetensors"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
OPTIMIZER_FILE = "optimizer.safetensors"
LATEST = "latest"
PARTIAL = ".partial-"
OLD = ".old-"
GONE = ".gone-"


def checkpoint_folder(parent: Path, step: int) -> Path:
    """`parent/step_NNNNNNNN`: where the checkpoint of a step is, or would be."""
    return parent / f"step_{step:08d}"


def checkpoints_by_age(parent: Path) -> list[Path]:
    """The checkpoints in `parent`, the one that was written last first."""
    whole = [folder for folder in parent.glob("step_*") if (folder / STATE_FILE).is_file()]
    return sorted(whole, key=lambda f: (f / STATE_FILE).stat().st_mtime_ns, reverse=True)
