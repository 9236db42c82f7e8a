"""Graphs kept on the disk: a folder of their own for whatever might change them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_host.config.load import load
from sdxl_host.training import compile_cache
from sdxl_host.training.compile_cache import cache_folder, use_compile_cache

WORDS = ["--config", "tiny.yaml", "--plugins", "none"]


def folder(*words: str) -> str:
    return cache_folder(load([*WORDS, *words]))


def test_what_can_t_change_a_graph_leaves_the_folder() -> None:
    """A resumed run, elsewhere, finds its graphs again."""
    same = ["--save_path", "elsewhere", "--resume", "latest", "--max_num_ckpt", "3"]
    kept = folder("--ms_mode=0", "--compile_cache", "graphs")
    assert folder() == folder(*same)
    assert folder("--ms_mode=0") == kept


@pytest.mark.parametrize(
    "words",
    [
        ["--gradient_accumulation_steps", "2"],
        ["optim.optimizer_config.params.beta2=0.99"],
        ["optim.base_learning_rate=2e-3"],
        ["data.total_step=4"],
        ["--ms_amp_level", "O2"],
        ["--max_grad_norm", "2"],
        ["model.params.network_config.params.channel_mult=[1]"],
        ["--use_ema", "True"],
        ["data.per_batch_size=3"],
    ],
)
def test_every_setting_that_a_graph_holds_has_its_own(words: list[str]) -> None:
    """MindSpore would not see these: they are attributes and constants of Python."""
    assert folder(*words) != folder()


def test_every_number_of_workers_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over them is a constant of the graph: another number would be trained wrongly."""
    folders = {folder("--is_parallel=True")}
    for number in ("1", "2", "8"):
        monkeypatch.setenv("MS_WORKER_NUM", number)
        folders.add(folder("--is_parallel=True"))
    assert len(folders) == 4


def test_sources_and_versions_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder()
    file = tmp_path / "one.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(compile_cache, "_sources", lambda modules: [file])
    other = folder()
    file.write_text("x = 2\n")
    assert len({before, other, folder()}) == 3
    version = compile_cache.importlib_metadata.version
    monkeypatch.setattr(
        compile_cache.importlib_metadata,
        "version",
        lambda name: "9.9" if name == "mindspore" else version(name),
    )
    assert folder() not in (before, other)


def test_a_selected_plugin_s_source_counts(site, make_source) -> None:
    module = site.add("fake", source=make_source("size: int = 1"))
    config = load(["--config", "tiny.yaml", "--plugins", "fake"])
    before = cache_folder(config)
    (site.folder / f"{module}.py").write_text(make_source("size: int = 1", before="y = 3"))
    assert cache_folder(config) != before


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    use_compile_cache(load(WORDS))
    assert "MS_COMPILER_CACHE_ENABLE" not in os.environ
    config = load([*WORDS, "--ms_mode=0", "--compile_cache", str(tmp_path)])
    use_compile_cache(config)
    assert os.environ["MS_COMPILER_CACHE_ENABLE"] == "1"
    assert os.environ["MS_COMPILER_CACHE_PATH"] == str(tmp_path / cache_folder(config))


@pytest.mark.soak
def test_a_second_process_finds_the_graphs(tmp_path: Path) -> None:
    """Compiled, kept, found: three runs with equal metrics, of which the second compiles nothing
    anew (its folder is not written to)."""
    words = ["--config", "tiny.yaml", "--plugins", "edm,snr", "train.ms_mode=0"]
    words += ["--save_path_with_time", "False", "--gradient_accumulation_steps", "2"]
    metrics, graphs = [], []
    for name, cache in (("first", "graphs"), ("second", "graphs"), ("without", "")):
        given = ["--save_path", str(tmp_path / name)]
        if cache:
            given += ["--compile_cache", str(tmp_path / cache)]
        command = [sys.executable, "-m", "sdxl_host", "train", *words, *given]
        subprocess.run(command, check=True, capture_output=True, timeout=900)
        metrics.append((tmp_path / name / "metrics.jsonl").read_bytes())
        kept = (tmp_path / "graphs").rglob("*.mindir")
        graphs.append({file: file.stat().st_mtime_ns for file in kept})
    assert metrics[0] == metrics[1] == metrics[2]
    assert graphs[0]
    assert graphs[0] == graphs[1]
