"""Graphs kept on the disk: found again by what they are made of, and never for another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.graph import api as graph_api
from safetensors.numpy import load_file

from sdxl_host.config.load import load
from sdxl_host.training import compile_cache
from sdxl_host.training.build import make_trainer
from sdxl_host.training.compile_cache import CompileCache

pytestmark = pytest.mark.usefixtures("device")


class Line(nn.Cell):
    """factor * x + weight, and a second method."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.weight = Parameter(Tensor(np.full(3, 10.0, np.float32)), name="weight")

    def construct(self, x):
        return self.factor * x + self.weight

    def difference(self, x):
        return self.factor * x - self.weight


ONES = Tensor(np.ones(3, np.float32))
ROWS = Tensor(np.ones((2, 3), np.float32))


def written(folder: Path) -> dict[str, int]:
    """When each graph was written, by its name."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.mindir")}


def test_graphs_are_found_in_another_order_and_for_no_other_shape_method_or_constant(
    tmp_path: Path,
) -> None:
    """MindSpore itself would take them by their order."""
    first, line = CompileCache(tmp_path), Line(2.0)
    whole, difference = first.compiled(line.construct), first.compiled(line.difference)
    assert whole(ONES).asnumpy().tolist() == [12.0] * 3
    assert whole(ROWS).asnumpy().tolist() == [[12.0] * 3] * 2
    assert difference(ONES).asnumpy().tolist() == [-8.0] * 3
    assert whole(ONES).asnumpy().tolist() == [12.0] * 3  # compiled already
    kept = written(tmp_path)
    assert len(kept) == 3

    second, line = CompileCache(tmp_path), Line(2.0)
    line.weight.set_data(Tensor(np.zeros(3, np.float32)))
    whole, difference = second.compiled(line.construct), second.compiled(line.difference)
    assert difference(ONES).asnumpy().tolist() == [2.0] * 3
    assert whole(ROWS).asnumpy().tolist() == [[2.0] * 3] * 2
    assert whole(ONES).asnumpy().tolist() == [2.0] * 3
    assert written(tmp_path) == kept
    assert difference(ROWS).asnumpy().tolist() == [[2.0] * 3] * 2
    assert len(written(tmp_path)) == 4

    for line, options, level in (
        (Line(3.0), {}, "O0"),
        (Line(2.0), {}, "O1"),
        (Line(2.0), {"ranks": 2}, "O0"),
    ):
        before = len(written(tmp_path))
        cache = CompileCache(tmp_path, **options)
        expected = [10.0 + line.factor] * 3
        assert cache.compiled(line.construct, level)(ONES).asnumpy().tolist() == expected
        assert len(written(tmp_path)) == before + 1


def test_a_damaged_graph_is_compiled_anew_and_replaced(tmp_path: Path) -> None:
    CompileCache(tmp_path).compiled(Line(4.0).construct)(ONES)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        cache = CompileCache(tmp_path)
        assert cache.compiled(Line(4.0).construct)(ONES).asnumpy().tolist() == [14.0] * 3
        assert file.stat().st_size > 0.9 * len(whole)
        kept = written(tmp_path)
    assert cache.compiled(Line(4.0).construct)(ONES).asnumpy().tolist() == [14.0] * 3
    assert written(tmp_path) == kept


def test_without_a_folder_nothing_is_kept_and_the_environment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MS_COMPILER_CACHE_ENABLE", raising=False)
    monkeypatch.setenv("MS_COMPILER_CACHE_PATH", "elsewhere")
    before = dict(os.environ)
    for folder in (None, tmp_path):
        cache = CompileCache(folder)
        assert cache.compiled(Line(5.0).construct)(ONES).asnumpy().tolist() == [15.0] * 3
        assert len(written(tmp_path)) == (folder is not None)
        assert dict(os.environ) == before


class Opaque:
    __slots__ = ()

    def __new__(cls) -> Opaque:
        return super().__new__(cls)


def test_what_can_t_be_kept_is_named_and_computed(tmp_path: Path) -> None:
    """A cell that holds what no digest covers; a folder that can't be written to."""
    shown: list[Any] = []
    line: Any = Line(6.0)
    line.more = Opaque()
    cache = CompileCache(tmp_path, say=shown.append)
    assert cache.compiled(line.construct)(ONES).asnumpy().tolist() == [16.0] * 3
    (tmp_path / "file").write_text("")
    cache = CompileCache(tmp_path / "file", say=shown.append)
    assert cache.compiled(Line(6.0).construct)(ONES).asnumpy().tolist() == [16.0] * 3
    (first, second) = (text for label, text in shown if label == "note")
    assert "Opaque" in first
    assert "file" in second
    assert all("--compile_cache" in text for text in (first, second))


def test_the_chip_counts_and_is_asked_for_only_with_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(compile_cache, "graph_digest", lambda *given: found.append(given) or "a")
    for chip in ("ascend910", "ascend910b"):
        monkeypatch.setattr(compile_cache, "ascend_generation", lambda chip=chip: chip)
        monkeypatch.setattr(compile_cache.ms, "jit", lambda method, jit_level: method)
        CompileCache(tmp_path).compiled(Line(2.0).construct)(ONES)
    assert found[0][-1] != found[1][-1]
    monkeypatch.delattr(compile_cache, "ascend_generation")
    CompileCache(None).compiled(Line(2.0).construct)(ONES)


@pytest.mark.parametrize("broken", ["graph", "temporary folder"])
def test_a_graph_that_can_t_be_read_is_compiled_anew(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it may have been copied by then."""
    CompileCache(tmp_path).compiled(Line(9.0).construct)(ONES)

    def copyfile(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise PermissionError(f"no {broken}")

    def folder(rank: int) -> None:
        raise PermissionError(f"no {broken}")

    if broken == "graph":
        monkeypatch.setattr(compile_cache.shutil, "copyfile", copyfile)
    else:
        monkeypatch.setattr(compile_cache, "_process_folder", folder)
    shown: list[Any] = []
    cache = CompileCache(tmp_path, say=shown.append)
    assert cache.compiled(Line(9.0).construct)(ONES).asnumpy().tolist() == [19.0] * 3
    ((label, text),) = shown
    assert label == "note"
    assert f"no {broken}" in text


def test_a_graph_that_is_not_taken_is_there_for_no_other(tmp_path: Path) -> None:
    """As where an error ends a call before MindSpore compiles anything."""
    CompileCache(tmp_path).compiled(Line(7.0).construct)(ONES)
    (file,) = tmp_path.iterdir()
    folder = compile_cache._process_folder(0)
    with pytest.raises(ZeroDivisionError), folder.compiling(file):
        raise ZeroDivisionError
    cache = CompileCache(tmp_path)
    assert cache.compiled(Line(8.0).construct)(ONES).asnumpy().tolist() == [18.0] * 3
    assert len(written(tmp_path)) == 2


def test_what_is_compiled_beside_it_shifts_the_names_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the user has set MindSpore's own variable."""

    def again() -> dict[str, int]:
        line = Line(9.0)
        assert (
            CompileCache(tmp_path).compiled(line.construct)(ONES).asnumpy().tolist() == [19.0] * 3
        )
        return written(tmp_path)

    again()
    with monkeypatch.context() as patch:
        patch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
        # MindSpore would read the main file, which a test's process may not have.
        patch.setattr(graph_api, "entry_script_path", None, raising=False)
        assert ms.jit(Line(9.5).construct)(ONES).asnumpy().tolist() == [19.5] * 3
    kept = again()
    assert len(kept) == 1
    assert again() == kept


def test_a_rank_s_graph_has_its_role_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MindSpore reads and writes `MS_WORKERcompile_cache_0.mindir` where msrun has started it."""
    folder, graph = compile_cache._ProcessFolder(1), tmp_path / "graph"
    graph.write_bytes(b"graph")
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")

    def place(number: int) -> Path:
        root = Path(os.environ["MS_COMPILER_CACHE_PATH"])
        return root / "rank_1" / "graph_cache" / f"MS_WORKERcompile_cache_{number}.mindir"

    with folder.compiling(graph) as new:
        assert place(0).read_bytes() == b"graph"
    assert new == []
    with folder.compiling(None) as new:
        place(1).write_bytes(b"another")
    assert new == [b"another"]
    with folder.compiling(graph):
        assert place(2).read_bytes() == b"graph"
        left = place(3)
    left.write_bytes(b"of another compilation")
    with folder.compiling(None):
        assert not left.exists()


# ---- whole runs

NETWORK = "model.params.network_config.params"
WORDS = [
    f"{NETWORK}.channel_mult=[1]",
    *("--config", "tiny.yaml", "--save_path_with_time", "False", "train.ms_mode=0"),
    *("--sample_steps", "2", "--sample_count", "1", "--guidance_scale", "1"),
]
DEPTH = f"{NETWORK}.transformer_depth"
FIRST = [f"{DEPTH}=[1]", "--plugins", "edm,snr", "--total_step", "2"]
# Other numbers of plugins and of the optimizer, another length, and images in between.
OTHER_NUMBERS = [
    f"{DEPTH}=[1]",
    *("--plugins", "edm,snr", "--snr_gamma", "1.5", "--edm_p_mean", "-0.4"),
    *("optim.base_learning_rate=3e-3", "optim.optimizer_config.params.beta2=0.9"),
    *("--total_step", "3", "--sample_interval", "1"),
]
# Another network twice over, and a longer context.
OTHER_GRAPHS = [
    *("--plugins", "edm,lpw,lora", "--lpw_max_embeddings_multiples", "2", "--total_step", "2"),
    f"{DEPTH}=[2]",
]


def run(folder: Path, words: list[str], graphs: Path | None) -> dict[str, bytes]:
    """A run in this process; its metrics and weights."""
    given = [*WORDS, *words, "--save_path", str(folder)]
    given += ["--compile_cache", str(graphs)] if graphs else []
    make_trainer(load(given), say=lambda line: None).run()
    return results(folder)


def results(folder: Path) -> dict[str, bytes]:
    arrays = load_file(folder / "checkpoints" / "latest" / "network.safetensors")
    found = {name: array.tobytes() for name, array in arrays.items()}
    return {"metrics": (folder / "metrics.jsonl").read_bytes(), **found}


@pytest.fixture(scope="module")
def graphs(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the graphs of a run's step and of its sampler."""
    folder = tmp_path_factory.mktemp("first")
    run(folder / "run", FIRST, folder / "graphs")
    assert len(written(folder / "graphs")) == 2
    return folder / "graphs"


def test_a_second_process_finds_the_graphs(tmp_path: Path, graphs: Path) -> None:
    """The step's and the sampler's, whatever the numbers of plugins, of the optimizer and of the
    schedule, by MindSpore's own count; and computes what it does without them."""
    kept = written(graphs)
    command = [sys.executable, "-m", "sdxl_host", "train", *WORDS, *OTHER_NUMBERS]
    command += ["--save_path", str(tmp_path / "second"), "--compile_cache", str(graphs)]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "GLOG_v": "2"},
    )
    said = done.stdout + done.stderr
    assert said.count("Use the compilation cache and execute the backend actions only") == 2
    assert "Execute all the compilation actions" not in said
    assert written(graphs) == kept
    assert results(tmp_path / "second") == run(tmp_path / "without", OTHER_NUMBERS, None)


@pytest.mark.soak
def test_another_network_or_context_compiles_anew(tmp_path: Path, graphs: Path) -> None:
    """And computes what it does without the folder; the next such run finds its graphs. What each
    of depth, context and adapters alone does to the digest is in test_identity.py."""
    cached = run(tmp_path / "other", OTHER_GRAPHS, graphs)
    kept = written(graphs)
    assert len(kept) == 4
    assert run(tmp_path / "again", OTHER_GRAPHS, graphs) == cached
    assert written(graphs) == kept
    assert run(tmp_path / "without", OTHER_GRAPHS, None) == cached
