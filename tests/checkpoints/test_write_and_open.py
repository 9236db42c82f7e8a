"""Checkpoints: complete or not there, checked when opened; and the state of plugins."""

from __future__ import annotations

import json
import os
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_host.checkpoints.open import Checkpoint, find_latest, open_checkpoint
from sdxl_host.checkpoints.plugin_state import pack, unpack
from sdxl_host.checkpoints.write import Contents, save_checkpoint
from sdxl_host.errors import DataError, PluginError
from sdxl_host.files.arrays import FetchedArrays, read_arrays, write_arrays
from sdxl_host.version import __version__

PLUGINS = [{"name": "snr", "distribution": "sdxl-snr", "version": "0.1.0"}]
CONFIG = "train:\n  seed: 7\n"


def arrays(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"a": generator.standard_normal((3, 40)).astype(np.float32), "b": np.arange(seed + 2.0)}


def save(parent: Path, step: int, **changes: Any) -> Path:
    """A small checkpoint; its network is `arrays(step)`."""
    given: dict[str, Any] = {
        "config": CONFIG,
        "network": arrays(step),
        "frozen": {"text": np.ones((4, 4), np.float32)},
        "optimizer": arrays(step + 100) | {"applied": np.array(step, np.int32)},
        "plugin_states": {"snr": {"seen": step, "mean": np.arange(3.0)}, "lpw": {}},
        "plugins": PLUGINS,
        "record": {"size": [32, 32], "objective": "eps"},
        "ema": arrays(step + 200),
        "counts": {"skipped": 3, "skipped_in_a_row": 1},
    }
    return save_checkpoint(parent, Contents(step=step, **(given | changes)))


class Array(np.ndarray):
    """One that a set can hold, by what it is and not by what is in it."""

    def __hash__(self) -> int:
        return id(self)


def assert_equal(first: Any, second: Any) -> None:
    """Equal values of equal types, arrays bit for bit, at any depth."""
    assert type(first) is type(second)
    if isinstance(first, np.ndarray):
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        assert first.tobytes() == second.tobytes()
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


# ---- saving and opening


def test_round_trip(tmp_path):
    """What was saved is what is opened."""
    folder = save(tmp_path, 12)
    assert folder == tmp_path / "step_00000012"
    opened = open_checkpoint(folder)
    assert isinstance(opened, Checkpoint)
    assert (opened.folder, opened.step, opened.plugins) == (folder, 12, PLUGINS)
    assert opened.record == {"size": [32, 32], "objective": "eps"}
    assert opened.versions["sdxl-host"] == __version__
    assert opened.versions["numpy"] == np.__version__
    assert opened.config_file.read_text("utf-8") == CONFIG
    optimizer = opened.optimizer_state()
    for name, expected in (arrays(112) | {"applied": np.array(12, np.int32)}).items():
        assert_equal(optimizer[name], expected)
    states = opened.plugin_states()
    assert_equal(states["snr"], {"seen": 12, "mean": np.arange(3.0)})
    assert states["lpw"] == {}
    network = read_arrays(folder / "network.safetensors")
    for name, expected in arrays(12).items():
        assert_equal(network[name], expected)


def test_the_folder_is_complete(tmp_path):
    """Each file is listed with its hash in state.json, and there is nothing else."""
    folder = save(tmp_path, 1, export=lambda partial: (partial / "lora.txt").write_text("extra"))
    listed = json.loads((folder / "state.json").read_text())["files"]
    assert set(listed) == set(contents(folder)) - {"state.json"}
    assert set(listed) == {
        "config.yaml",
        "ema.safetensors",
        "frozen.safetensors",
        "lora.txt",
        "network.safetensors",
        "optimizer.safetensors",
        "plugins/lpw.json",
        "plugins/snr.json",
        "plugins/snr.safetensors",
    }
    assert (folder / "lora.txt").read_text() == "extra"
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_metadata_of_the_network_says_what_it_is(tmp_path):
    """A network file that is copied away still tells its step and record."""
    from safetensors import safe_open

    with safe_open(save(tmp_path, 3) / "network.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "sdxl-host"
    assert metadata["step"] == "3"
    assert json.loads(metadata["record"])["objective"] == "eps"


def test_latest_points_to_the_newest(tmp_path):
    """A relative link, so that a run's folder can be moved."""
    for step in (5, 10):
        folder = save(tmp_path, step)
        assert (tmp_path / "latest").resolve() == folder
    assert os.readlink(tmp_path / "latest") == "step_00000010"
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000010"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    """A run that goes on from step 5 comes to step 10 again."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    again = save(tmp_path, 10, network=arrays(77))
    assert_equal(read_arrays(again / "network.safetensors")["a"], arrays(77)["a"])
    assert open_checkpoint(again).step == 10
    assert (tmp_path / "latest").resolve() == again
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000010"]


def test_frozen_weights_are_one_file_on_the_disk(tmp_path):
    """They never change in a run, so a second checkpoint links to the first's."""
    first, second = (save(tmp_path, step) / "frozen.safetensors" for step in (1, 2))
    assert os.path.samefile(first, second)
    other = save(tmp_path / "other", 1) / "frozen.safetensors"
    assert not os.path.samefile(first, other)
    assert not os.path.samefile(
        *(tmp_path / s / "network.safetensors" for s in names(tmp_path)[2:])
    )


def test_frozen_weights_are_copied_where_links_are_refused(tmp_path, monkeypatch):
    """Some disks have no hard links."""
    first = save(tmp_path, 1)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    second = save(tmp_path, 2)
    assert not os.path.samefile(first / "frozen.safetensors", second / "frozen.safetensors")
    assert_equal(read_arrays(second / "frozen.safetensors")["text"], np.ones((4, 4), np.float32))


def test_arrays_are_in_memory_a_file_at_a_time(tmp_path):
    """Fetched when their file is written, in its turn, and gone when the next one's are."""
    alive: weakref.WeakSet[Array] = weakref.WeakSet()
    most = {}

    def fetched(file: str) -> FetchedArrays:
        def fetch(name: str) -> np.ndarray:
            array = np.full(4, float(len(file)), np.float32).view(Array)
            alive.add(array)
            most[file] = len(alive)
            return array

        return FetchedArrays(["a", "b"], fetch)

    files_ = {name: fetched(name) for name in ("network", "frozen", "ema", "optimizer")}
    saved = open_checkpoint(save(tmp_path, 1, **files_))
    assert most == dict.fromkeys(files_, 2)
    assert not alive
    assert dict(saved.ema().items())["b"].tolist() == [3.0] * 4
    with pytest.raises(KeyError, match="c"):
        fetched("network")["c"]


# ---- what can go wrong when writing


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 300 bytes: what a full disk looks like to who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(call: int) -> Callable[..., None]:
    """`write_arrays` that fails the call-th time it is called."""
    write, calls = write_arrays, iter(range(1, 100))

    def fail(*arguments: Any) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        write(*arguments)

    return fail


def assert_only_step_1_is_left(parent: Path, before: dict[str, bytes]) -> None:
    assert names(parent) == ["latest", "step_00000001"]
    assert (parent / "latest").resolve() == parent / "step_00000001"
    assert contents(parent / "step_00000001") == before
    assert open_checkpoint(parent / "latest").step == 1


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failing_write_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch, call):
    """Of network, optimizer or a plugin's arrays: DataError, no partial folder, same `latest`."""
    before = contents(save(tmp_path, 1))
    monkeypatch.setattr("sdxl_host.checkpoints.write.write_arrays", failing(call))
    message = r"step_00000002: the checkpoint can't be written \(No space left on device\)"
    with pytest.raises(DataError, match=message):
        save(tmp_path, 2)
    assert_only_step_1_is_left(tmp_path, before)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path):
    """The same when it is the file system that refuses, in whichever library writes."""
    before = contents(save(tmp_path, 1))
    with full_disk(), pytest.raises(DataError, match="the checkpoint can't be written"):
        save(tmp_path, 2)
    assert_only_step_1_is_left(tmp_path, before)


def test_a_failing_swap_of_latest_leaves_it_as_it_was(tmp_path, monkeypatch):
    """The new folder is whole by then; `latest` still points to a whole one."""
    save(tmp_path, 1)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(DataError, match="Input/output error"):
            save(tmp_path, 2)
    assert open_checkpoint(tmp_path / "latest").step == 1
    save(tmp_path, 3)
    assert open_checkpoint(tmp_path / "latest").step == 3


@pytest.mark.parametrize("step", [2, 3])
def test_partial_folders_of_a_crash_are_cleaned(tmp_path, step):
    """Whether it was this step's or another's that was being written."""
    save(tmp_path, 1)
    partial = tmp_path / ".partial-step_00000002"
    partial.mkdir()
    (partial / "network.safetensors").write_bytes(b"half")
    save(tmp_path, step)
    assert names(tmp_path) == ["latest", "step_00000001", f"step_{step:08d}"]


def test_a_crash_while_replacing_does_not_stop_the_next_replacement(tmp_path):
    """A crash between the two renames and the removal leaves the replaced folder behind, not
    empty; saving that step once more must still work and clean it away."""
    folder = save(tmp_path, 4)
    left = tmp_path / ".old-step_00000004"
    left.mkdir()
    (left / "state.json").write_text("{}")
    save(tmp_path, 4, network=arrays(9))
    assert_equal(read_arrays(folder / "network.safetensors")["a"], arrays(9)["a"])
    assert names(tmp_path) == ["latest", "step_00000004"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"seen": (1, 2)}, r"plugin snr: state_dict: state.seen is a tuple"),
        ({"mean": np.array(["x"])}, r"plugin snr: state_dict: state.mean is an array of"),
    ],
    ids=["tuple", "text"],
)
def test_a_plugin_s_state_that_can_t_be_saved(tmp_path, state, message):
    """It names plugin and place, and neither a partial folder nor a changed `latest` is left."""
    before = contents(save(tmp_path, 1))
    with pytest.raises(PluginError, match=message):
        save(tmp_path, 2, plugin_states={"snr": state})
    assert_only_step_1_is_left(tmp_path, before)


# ---- what can go wrong when opening


def listed_files() -> list[str]:
    return [
        "config.yaml",
        "ema.safetensors",
        "frozen.safetensors",
        "network.safetensors",
        "optimizer.safetensors",
        "plugins/snr.json",
        "plugins/snr.safetensors",
    ]


@pytest.mark.parametrize("name", listed_files())
def test_a_flipped_bit_is_found(tmp_path, name):
    """One bit of any file: DataError that names it."""
    folder = save(tmp_path, 1)
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / name).write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{name}: was changed or damaged; use an earlier"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", listed_files())
def test_a_missing_file_is_found(tmp_path, name):
    folder = save(tmp_path, 1)
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: is missing; use an earlier checkpoint"):
        open_checkpoint(folder)


def test_another_format_is_refused(tmp_path):
    """The message tells which version wrote it."""
    folder = save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    state |= {"format": 99, "versions": {"sdxl-host": "7.1"}}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        DataError, match=r"has the checkpoint format 99, .* wrote it \(sdxl-host 7\.1\)"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"format": 2}', '{"format": 2, "files": {}}', "\udcff"]
)
def test_a_damaged_state_file_is_named(tmp_path, text):
    """Cut short, of another kind, incomplete or not text."""
    folder = save(tmp_path, 1)
    (folder / "state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"state\.json: is damaged; use an earlier checkpoint"):
        open_checkpoint(folder)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(DataError, match=r"is no checkpoint \(it has no state\.json\)"):
        open_checkpoint(tmp_path)


# ---- the newest


def test_find_latest_over_several_runs(tmp_path):
    """The last run by name that has a checkpoint: names begin with the time."""
    for run in ("2026-01-01_10-00-00", "2026-01-02_09-00-00"):
        save(tmp_path / run / "checkpoints", 3)
        newest = save(tmp_path / run / "checkpoints", 7)
    (tmp_path / "2026-01-03_08-00-00" / "checkpoints").mkdir(parents=True)  # it saved nothing
    (tmp_path / "zz.txt").write_text("not a run")
    assert find_latest(tmp_path) == newest


def test_find_latest_in_one_run(tmp_path):
    folder = save(tmp_path / "checkpoints", 3)
    assert find_latest(tmp_path) == folder


def test_find_latest_passes_over_a_link_to_nothing(tmp_path):
    """A run whose newest checkpoint was deleted by hand."""
    earlier = save(tmp_path / "1" / "checkpoints", 3)
    later = save(tmp_path / "2" / "checkpoints", 3)
    later.rename(tmp_path / "elsewhere")
    assert find_latest(tmp_path) == earlier


def test_find_latest_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"--resume latest: no run in .* has a checkpoint"):
        find_latest(tmp_path)
    with pytest.raises(DataError, match=r"--resume latest: .*gone is not there"):
        find_latest(tmp_path / "gone")


# ---- the state of plugins


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [],
        "text",
        {"a": [1, 2.5, True, None, "\u00fc", [], {}]},
        {"float": 0.1, "large": 2**70, "tiny": 5e-324, "infinite": float("inf")},
        {"x": np.arange(6.0).reshape(2, 3), "deep": [{"y": np.array([], np.int8)}]},
        [np.array(3, np.int64), np.array([True, False]), np.float16([1.5])],
    ],
    ids=["none", "dict", "list", "text", "mixed", "numbers", "arrays", "types"],
)
def test_state_round_trip(tmp_path, state):
    """Through JSON and safetensors: equal values of equal types, arrays bit for bit."""
    folder = save(tmp_path, 1, plugin_states={"snr": state})
    assert_equal(open_checkpoint(folder).plugin_states()["snr"], state)


def test_packed_state_is_json_and_arrays():
    kept: dict[str, np.ndarray] = {}
    packed = pack({"a": [np.zeros(2)], "b": 1}, kept)
    assert list(kept) == ["0 state.a[0]"]
    assert unpack(json.loads(json.dumps(packed)), kept)["b"] == 1


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": np.zeros(1), "a": {"b": np.ones(1)}},
        {"a[0]": np.zeros(1), "a": [np.ones(1)]},
    ],
    ids=["dot", "bracket"],
)
def test_arrays_whose_places_read_alike_stay_apart(state):
    """A key may hold what also separates keys."""
    kept: dict[str, np.ndarray] = {}
    assert_equal(unpack(pack(state, kept), kept), state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ((1, 2), "state is a tuple"),
        ({"a": [0, (1,)]}, r"state\.a\[1\] is a tuple"),
        ({"a": np.float64(1.0)}, r"state\.a is a float64"),
        ({"a": np.bool_(True)}, r"state\.a is a bool"),
        ({"a": {1, 2}}, r"state\.a is a set"),
        ({"a": b"x"}, r"state\.a is a bytes"),
        ({"a": object()}, r"state\.a is a object"),
        ({"a": np.array([None])}, r"state\.a is an array of object"),
        ({"a": np.array(["x"])}, r"state\.a is an array of"),
        ({"a": np.array(["2026"], "datetime64[D]")}, r"state\.a is an array of"),
        ({"a": {1: "x"}}, r"state\.a has the key 1; keys must be text"),
        ({"__array__": "x"}, r"state has the key '__array__'"),
    ],
)
def test_state_that_is_refused(state, message):
    """Nothing is guessed: whatever would not come back as it was is named with its place."""
    with pytest.raises(TypeError, match=message):
        pack(state, {})
