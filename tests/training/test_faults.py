"""What goes wrong in a run: one clear line and exit code 2, and the earlier checkpoint loads."""

from __future__ import annotations

import fcntl
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.specifiers import SpecifierSet
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdxl_host import hookimpl
from sdxl_host.checkpoints.open import find_latest, open_checkpoint
from sdxl_host.cli import main
from sdxl_host.config.load import load
from sdxl_host.data.dataset import Sample, Text2ImageDataset
from sdxl_host.errors import DataError, PluginError
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.hooks import Hooks, Plugin

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
NAMES = ("anchor", "banana", "crab")
ARGUMENTS = [
    *("--config", TINY, "--save_path_with_time=False", "--per_batch_size=1"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"),
    f"data.dataset_config.params.only=[{','.join(f'{name}.png' for name in NAMES)}]",
    *("data.shuffle=False", "--save_ckpt_interval=1"),
]

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def done(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, each with its checkpoint."""
    folder = tmp_path_factory.mktemp("done")
    words = [*ARGUMENTS, "--plugins=none", "--total_step=2", "--save_path", str(folder)]
    assert main(["train", *words]) == 0
    return folder


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(done, tmp_path / "run", symlinks=True)


@pytest.fixture
def refused(device: str, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line with which `sdxl-host train` into a folder ends; its exit code is 2."""

    def line(folder: Path, *words: str) -> str:
        given = {word.partition("=")[0] for word in words}
        usual = {"--plugins": "none", "--total_step": "3"}
        others = [f"{name}={value}" for name, value in usual.items() if name not in given]
        capsys.readouterr()
        assert main(["train", *ARGUMENTS, "--save_path", str(folder), *others, *words]) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        (line,) = captured.err.splitlines()
        assert line.startswith("sdxl-host: error: ")
        return line.removeprefix("sdxl-host: error: ")

    return line


def loads(run: Path, step: int) -> None:
    """The newest checkpoint of the run is that of `step`, it is whole, and so are all the others;
    nothing else is left beside them."""
    assert open_checkpoint(find_latest(run)).step == step
    for path in (run / "checkpoints").iterdir():
        assert path.name == "latest" or open_checkpoint(path).step


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what a full disk looks like to who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- the disk


def test_a_disk_that_is_full_when_a_checkpoint_is_saved(
    run: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    """With room again, the run goes on."""
    with full_disk(100_000):
        line = refused(run, "--resume=latest")
    assert line.startswith(f"{run}/checkpoints/step_00000003: the checkpoint can't be written (")
    assert line.endswith("free some space or choose another --save_path")
    loads(run, 2)
    words = [*ARGUMENTS, "--plugins=none", "--total_step=3", "--save_path", str(run)]
    assert main(["train", *words, "--resume=latest"]) == 0
    loads(run, 3)


def test_a_disk_that_is_full_when_a_run_begins(run: Path, refused: Refused) -> None:
    with full_disk(1000):
        line = refused(run, "--resume=latest")
    assert line.startswith(f"{run}: can't be written (File too large); choose another --save_path")
    loads(run, 2)


def test_a_disk_that_is_full_when_metrics_are_written(run: Path, refused: Refused) -> None:
    """At the start, where the lines of later steps are dropped, and at a step."""
    lines = [json.dumps({"step": step, "note": "x" * 6000}) + "\n" for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(lines))
    with full_disk(10_000):
        line = refused(run, "--resume=latest")
    assert line == f"{run}/metrics.jsonl: can't be written (File too large); free some space"
    assert (run / "metrics.jsonl").read_text() == "".join(lines)
    with full_disk(len("".join(lines)) + 10):
        line = refused(run, "--resume=latest")
    assert line == f"{run}/metrics.jsonl: can't be written (File too large); free some space"
    loads(run, 2)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "samples", ".lock", ""])
def test_a_file_where_a_folder_belongs_or_a_folder_where_a_file_does(
    tmp_path: Path, refused: Refused, name: str
) -> None:
    """As good as a folder that may not be written, which stops no administrator."""
    folder = tmp_path / "new"
    if name in ("metrics.jsonl", ".lock"):
        (folder / name).mkdir(parents=True)
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    line = refused(folder, "--total_step=1")
    assert line.startswith(str(folder / name).removesuffix("/.lock"))
    assert "can't be written (" in line
    if name == "samples":
        loads(folder, 1)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "theirs").write_text("kept")
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / ".lock").symlink_to(tmp_path / "theirs")
    assert refused(folder, "--total_step=1").startswith(f"{folder}: can't be written (")
    assert (tmp_path / "theirs").read_text() == "kept"


# ---- damaged checkpoints


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_goes_on(
    run: Path, refused: Refused, how: str
) -> None:
    file = run / "checkpoints" / "step_00000002" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.unlink()
    if how == "flipped":
        file.write_bytes(content)
    told = {"flipped": "was changed or damaged", "missing": "is missing"}[how]
    assert refused(run, "--resume=latest") == f"{file}: {told}; use an earlier checkpoint"
    words = [*ARGUMENTS, "--plugins=none", "--total_step=2", "--save_path", str(run)]
    earlier = run / "checkpoints" / "step_00000001"
    assert main(["train", *words, "--resume", str(earlier)]) == 0
    loads(run, 2)


# ---- numbers that are none


def test_a_image_that_gives_nan_ends_the_run_and_is_named(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its step; the one before it has its checkpoint, with weights that are finite."""
    sample = Text2ImageDataset.sample

    def spoilt(self: Text2ImageDataset, index: int, generator: np.random.Generator) -> Sample:
        found = sample(self, index, generator)
        if found.name == "crab.png":
            found = replace(found, pixels=np.where(np.eye(16) > 0, np.nan, found.pixels))
        return found

    monkeypatch.setattr(Text2ImageDataset, "sample", spoilt)
    line = refused(tmp_path / "run", "--gradient_accumulation_steps=2", "--use_ema=True")
    assert line.startswith("step 2: loss or gradients are not finite (sigma ")
    assert "images crab.png); the update was not applied" in line
    assert line.endswith("look at these images")
    loads(tmp_path / "run", 1)
    for name in ("network", "ema", "optimizer"):
        file = tmp_path / "run" / "checkpoints" / "latest" / f"{name}.safetensors"
        assert all(np.isfinite(array).all() for array in load_file(file).values()), name
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_weights_that_hold_nan_end_the_run_at_its_first_step(
    done: Path, tmp_path: Path, refused: Refused
) -> None:
    """The user's own way to a loss that is not finite."""
    network = load_file(done / "checkpoints" / "latest" / "network.safetensors")
    network["model.diffusion_model.out.2.bias"][0] = np.nan
    save_file(network, tmp_path / "bad.safetensors")
    weight = f"--weight={done / 'checkpoints' / 'latest'},{tmp_path / 'bad.safetensors'}"
    line = refused(tmp_path / "run", weight)
    assert line.startswith("step 1: loss or gradients are not finite")
    assert "images anchor.png)" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_image_file_of_floats_is_refused(done: Path, tmp_path: Path) -> None:
    """Whatever a file holds, what is decoded is bytes: no file gives NaN."""
    for index, value in enumerate((np.nan, np.inf, -np.inf, 1e30)):
        levels = np.full((16, 16), value, np.float32)
        Image.fromarray(levels).save(tmp_path / f"{index}.png", "TIFF")
        (tmp_path / f"{index}.txt").write_text("floats")
    params = load(ARGUMENTS).data.dataset_config["params"]
    dataset = Text2ImageDataset(16, params["transforms"], str(tmp_path))
    for index in range(4):
        with pytest.raises(DataError, match=rf"{index}\.png: .*floating-point numbers; save it"):
            dataset.sample(index, np.random.default_rng(0))


# ---- plugins

RAISING = """
from sdxl_host import hookimpl

class Fake:
    def __init__(self):
        self.steps = 0

    @hookimpl(wrapper=True)
    def {hook}(self):
        result = yield
        if {when}:
            raise KeyError('gone')
        return result

    @hookimpl
    def on_step_end(self):
        self.steps += 1
"""
HOOKS = ("build_model", "sample_timesteps", "weight_loss", "encode_prompt", "on_step_end")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_plugin_that_raises_is_named_with_its_hook(
    site: Any, refused: Refused, tmp_path: Path, hook: str
) -> None:
    """In the second step; in the first place where it builds the model."""
    last = {"build_model": 0, "on_step_end": 2}.get(hook, 1)
    if hook == "on_step_end":
        source = RAISING.format(hook="weight_loss", when="False")
        source += f"        if self.steps == {last}:\n            raise KeyError('gone')\n"
    else:
        source = RAISING.format(hook=hook, when=f"self.steps == {last}")
    site.add("raising", source=source)
    line = refused(tmp_path / "run", "--plugins=raising", "--total_step=2", "--sample_interval=9")
    chain = "raising" if hook == "on_step_end" else "host -> raising"
    told = "plugin raising (fake-raising 1.0) raised KeyError: 'gone'"
    assert line == f"{hook}: {chain}: {told}; mend the plugin, or run without it"
    if hook == "build_model":
        assert not (tmp_path / "run").exists()
    else:
        loads(tmp_path / "run", 1)


KEEPING = """
from sdxl_host import hookimpl

class Fake:
    @hookimpl
    def on_step_end(self, result):
        self.step = result.step

    def state_dict(self):
        if self.step == 2:
            raise KeyError('gone')
        return {}

    def load_state_dict(self, state):
        raise ValueError('no such state')
"""


def test_a_plugin_that_can_t_keep_its_state_is_named(
    site: Any, refused: Refused, tmp_path: Path
) -> None:
    """When it is asked for it, and when it is given it back."""
    site.add("keeping", source=KEEPING)
    words, who = ["--plugins=keeping", "--total_step=2"], "plugin keeping (fake-keeping 1.0)"
    remedy = "mend the plugin, or run without it"
    line = refused(tmp_path / "run", *words)
    assert line == f"state_dict: keeping: {who} raised KeyError: 'gone'; {remedy}"
    loads(tmp_path / "run", 1)
    line = refused(tmp_path / "run", *words, "--resume=latest")
    assert line == f"load_state_dict: keeping: {who} raised ValueError: no such state; {remedy}"
    loads(tmp_path / "run", 1)


CHANGING = """
from sdxl_host import hookimpl

class Fake:
    @hookimpl(wrapper=True)
    def build_model(self):
        model = yield
        return model.with_network(lambda network: None, export=self.export)

    def export(self, parameters, folder):
        (folder / "extra.txt").write_text("half")
        parameters["model.diffusion_model.out.2.bias"][{at}] = 0
"""


def test_a_plugin_that_can_t_export_is_named(site: Any, refused: Refused, tmp_path: Path) -> None:
    """Whatever it has written by then; and it can't write into the weights."""
    site.add("changing", source=CHANGING.format(at="3:"))
    line = refused(tmp_path / "run", "--plugins=changing", "--total_step=1", "--ms_mode=1")
    assert line == (
        "with_network: export: changing: plugin changing (fake-changing 1.0) raised ValueError: "
        "assignment destination is read-only; mend the plugin, or run without it"
    )
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_plugin_that_raises_where_it_is_not_asked_by_a_hook_is_named() -> None:
    """In its notes, and in the parts of `with_network`, whoever calls them and whoever is next."""

    def fail(*given: Any) -> None:
        raise KeyError("gone")

    class Raising:
        notes = fail

        @hookimpl(wrapper=True)
        def build_model(self) -> Any:
            model = yield
            return model.with_network(fail, fail, fail)

    class Other:
        @hookimpl(wrapper=True)
        def build_model(self) -> Any:
            model = yield
            return model.with_network(lambda network: 7)

    installed = [Installed(n, f"fake-{n}", "1.0", SpecifierSet(), n, n) for n in ("one", "two")]
    pairs = zip(installed, (Raising(), Other()), strict=True)
    hooks = Hooks(Defaults(), [Plugin(who, None, instance) for who, instance in pairs])
    first, second = hooks.build_model(load(ARGUMENTS).tree).changes
    told = r"{}: one: plugin one \(fake-one 1\.0\) raised KeyError: 'gone'; mend the plugin, or run"
    for part in ("change", "trainable", "export"):
        with pytest.raises(PluginError, match=told.format(f"with_network: {part}")):
            getattr(first, part)("asked")
    assert (second.change("asked"), second.trainable, second.export) == (7, None, None)
    with pytest.raises(PluginError, match=told.format("notes")):
        hooks.notes(None)


# ---- what is in a new run's folder


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_file_that_no_run_has_written_is_not_written_over(
    tmp_path: Path, refused: Refused, name: str
) -> None:
    """However often it is tried: the folder is left as it was."""
    (tmp_path / name).write_text("mine")
    for _ in range(2):
        line = refused(tmp_path)
        assert line.startswith(f"{tmp_path / name}: a new run would write over it; choose another")
        assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(name, "mine")]


def test_a_folder_that_holds_a_run_is_refused_with_a_way_that_works(
    run: Path, refused: Refused
) -> None:
    """Weights alone can't be resumed."""
    told = f"{run}: already holds a run; choose another --save_path, "
    assert refused(run) == f"{told}or continue it with --resume latest"
    last = run / "checkpoints" / "step_00000002"
    (last / "optimizer.safetensors").unlink()
    assert refused(run) == f"{told}with --weight {last} to start from its weights"


# ---- two runs in one folder


def test_a_second_run_in_the_folder_of_one_at_work_is_refused(run: Path, refused: Refused) -> None:
    """Whether it would resume it or begin in it; nothing of the first one is changed."""
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    told = f"{run}: another run is at work in it; wait until it ends, or choose another --save_path"
    with open(run / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refused(run, "--resume=latest") == told
        shutil.move(run / "checkpoints", run.parent / "aside")
        assert refused(run) == told
        shutil.move(run.parent / "aside", run / "checkpoints")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_holds_its_folder_until_it_ends(run: Path, refused: Refused) -> None:
    from sdxl_host.training.build import make_trainer

    words = [*ARGUMENTS, "--plugins=none", "--save_path", str(run), "--resume=latest"]
    first = make_trainer(load([*words, "--total_step=3"]), [].append)
    assert "another run is at work in it" in refused(run, "--resume=latest")
    assert first.run() == 0
    second = make_trainer(load([*words, "--total_step=4"]), [].append)
    assert second.run() == 0
    loads(run, 4)
