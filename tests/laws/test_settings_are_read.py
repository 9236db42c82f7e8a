"""Law 10: every setting has an effect. That a run reads each is shown here; what the effects are is
in tests/training/test_effects.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sdxl_host.commands.train import run
from sdxl_host.config.load import load
from sdxl_host.settings.declarations import SCHEMAS, SETTINGS

NETWORK = "model.params.network_config.params"
SMALLER = [f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"]


class Reads:
    """A section of the settings that notes which of them are read."""

    def __init__(self, section: Any, name: str, seen: set[str]) -> None:
        self._section, self._name, self._seen = section, name, seen

    def __getattr__(self, setting: str) -> Any:
        self._seen.add(f"{self._name}.{setting}")
        return getattr(self._section, setting)


# What such a run need not read, and where else it has its effect.
UNREAD = {
    "data.dataset_config": "its node in the tree is built, as the tests of the dataset show",
    "data.dataset_config.params.data_path": "it is a parameter of the dataset",
    "data.python_multiprocessing": "only False is accepted",
    "train.allow_changes": "a resumed run reads it: see test_effects.py",
    "train.cache_dtype": "a run from the cache reads it: see test_cache_task.py",
    "train.cache_path": "a run from the cache reads it: see test_cache_task.py",
    "train.task": "the command reads it: see test_cache_task.py",
    "train.sink_size": "the data sink reads it: see test_data_sink.py",
    "train.sink_queue_size": "the data sink reads it: see test_effects.py",
}


def test_a_run_reads_every_setting(device: str, tmp_path: Path) -> None:
    """A setting that nothing reads is a promise that nothing keeps."""
    config = load([
        "--config", "tiny.yaml", "--plugins=none", *SMALLER, "--total_step=1", "--use_ema",
        "--clip_grad", f"--save_path={tmp_path}",
    ])  # fmt: skip
    seen: set[str] = set()
    sections = {name: Reads(getattr(config, name), name, seen) for name in SCHEMAS}
    run(replace(config, **sections))
    assert set(SETTINGS) - seen <= set(UNREAD)
