"""Where a run begins: its folder, and the checkpoint it goes on from, if any."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sdxl_host.config import RunConfig
from sdxl_host.errors import ConfigError, DataError
from sdxl_host.training.checkpoint import Checkpoint, find_latest, open_checkpoint

__all__ = ["find_checkpoint", "make_folder", "settings_text"]

# A resumed run must be the same run; only its length and what is shown of it may change.
_MAY_DIFFER = (
    "data.total_step",
    "data.num_parallel_workers",
    "train.resume",
    "train.save_path",
    "train.save_path_with_time",
    "train.save_ckpt_interval",
    "train.sample_interval",
    "train.sample_prompts",
    "train.sample_count",
    "train.sample_steps",
    "train.guidance_scale",
    "train.negative_prompt",
    "train.sampler",
    "train.spacing",
)


def find_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that `train.resume` names, or None; refused if it is of another run."""
    resume = config.train.resume
    if not resume:
        return None
    if config.train.weight:
        raise ConfigError("--resume and --weight contradict each other; give one of them")
    folder = Path(resume)
    if resume == "latest":
        folder = find_latest(Path(config.train.save_path).expanduser())
    checkpoint = open_checkpoint(folder.expanduser().resolve())
    saved = OmegaConf.to_container(OmegaConf.load(checkpoint.config_file))
    differences = list(_differences(saved, OmegaConf.to_container(config.tree)))
    if differences:
        raise ConfigError(
            f"--resume {checkpoint.folder}: its settings differ from this run's: "
            f"{'; '.join(differences[:5])}; start from them with --config {checkpoint.config_file}"
        )
    return checkpoint


def make_folder(config: RunConfig, checkpoint: Checkpoint | None) -> Path:
    """The run's folder, with its settings in it; a resumed run goes on in its own."""
    if checkpoint is not None:
        folder = checkpoint.folder.parent.parent
    else:
        folder = Path(config.train.save_path).expanduser()
        if config.train.save_path_with_time:
            folder = _timed(folder)
        elif (folder / "checkpoints").exists():
            raise DataError(
                f"{folder}: already holds a run; choose another --save_path, or continue it "
                "with --resume latest"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".config.yaml.partial"
        aside.write_text(settings_text(config), "utf-8")
        os.replace(aside, folder / "config.yaml")
    except OSError as error:
        raise DataError(
            f"{folder}: can't be written ({error.strerror}); choose another --save_path"
        ) from error
    return folder


def settings_text(config: RunConfig) -> str:
    """The settings as YAML; loading it repeats the run, from its beginning."""
    tree = config.tree.copy()
    OmegaConf.set_readonly(tree, False)
    tree.train.resume = ""
    return OmegaConf.to_yaml(tree)


def _differences(saved: Any, mine: Any, key: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(mine, dict):
        for name in [*saved, *(name for name in mine if name not in saved)]:
            inside = f"{key}.{name}" if key else str(name)
            yield from _differences(saved.get(name), mine.get(name), inside)
        if key == "plugins" and list(saved) != list(mine):
            yield f"plugins in the order {', '.join(saved)} there and {', '.join(mine)} here"
    elif saved != mine and key not in _MAY_DIFFER:
        yield f"{key} is {saved!r} there and {mine!r} here"


def _timed(parent: Path) -> Path:
    """`parent/YYYY.MM.DD-HH.MM.SS`, one that is not there yet."""
    stamp = time.strftime("%Y.%m.%d-%H.%M.%S")
    folder, number = parent / stamp, 2
    while folder.exists():
        folder, number = parent / f"{stamp}-{number}", number + 1
    return folder
