"""What a resumed run depends on: a checkpoint, (seed, step), and settings, which are checked."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sdxl_host.config import load, restore
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.data.order import Order
from sdxl_host.errors import ConfigError
from sdxl_host.training.checkpoint import open_checkpoint

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
EMBEDDERS = "model.params.conditioner_config.params.emb_models"
PICTURES = "[anchor.png,banana.png,crab.png,gem_stone.png,key.png]"
ARGUMENTS = [
    *("--config", TINY, "--save_path_with_time=False", "--per_batch_size=1"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"),
    *(f"data.dataset_config.params.only={PICTURES}", "--save_ckpt_interval=1"),
]

Train = Callable[..., tuple[Path, list[str]]]


@pytest.fixture(scope="module")
def train(device: str) -> Train:
    """Trains in this process, into a folder; gives the run's and what was said."""
    from sdxl_host.training.trainer import Trainer

    def run(folder: Path, *words: str) -> tuple[Path, list[str]]:
        said: list[str] = []
        trainer = Trainer(load([*ARGUMENTS, "--save_path", str(folder), *words]), said.append)
        trainer.run()
        return trainer.save_path, said

    return run


def copied(run: Path, place: Path, step: int) -> Path:
    """A copy of a run as it was when it had saved `step`; gives that checkpoint's copy."""
    folder = shutil.copytree(run, place, symlinks=True) / "checkpoints"
    for checkpoint in folder.glob("step_*"):
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(f"step_{step:08d}")
    return folder / f"step_{step:08d}"


def arrays(run: Path, name: str) -> dict[str, bytes]:
    found = load_file(run / "checkpoints" / "latest" / f"{name}.safetensors")
    return {key: array.tobytes() for key, array in found.items()}


def assert_same_run(one: Path, other: Path, names: tuple[str, ...]) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name in names:
        assert arrays(one, name) == arrays(other, name), name


# ---- (seed, step) and nothing else

ALL = [
    *("--plugins=edm,snr,timestep_bias", "plugins.timestep_bias.strategy=earlier"),
    *("plugins.timestep_bias.multiplier=2", "--gradient_accumulation_steps=2", "--use_ema=True"),
    *(f"{EMBEDDERS}[{index}].ucg_rate=0.4" for index in (0, 1)),
    *(f"{NETWORK}.attention_resolutions=[1]", "--total_step=5"),
]


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps with accumulation, averages, three plugins and caption dropout."""
    return train(tmp_path_factory.mktemp("whole"), *ALL)[0]


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_goes_on_the_same_from_any_checkpoint_and_in_any_process(
    train: Train, whole: Path, tmp_path: Path, step: int
) -> None:
    """Whatever the generators that others share have drawn, however many threads load pictures,
    and whatever grids are drawn on the way. Five pictures in twos: updates cross epochs."""
    import mindspore as ms

    random.seed(step)
    np.random.seed(step)
    ms.set_seed(step)
    checkpoint = copied(whole, tmp_path / "part", step)
    other = [f"data.num_parallel_workers={step}", "--sample_interval=2", "--max_num_ckpt=1"]
    run, _ = train(tmp_path / "part", *ALL, f"--resume={checkpoint}", *other)
    assert_same_run(whole, run, ("network", "optimizer", "ema", "frozen"))


def test_updates_that_were_skipped_are_counted_on(whole: Path, device: str, tmp_path: Path) -> None:
    """So a resumed run that skips too many in a row ends where the uninterrupted one ends."""
    from sdxl_host.training import snapshot
    from sdxl_host.training.trainer import Trainer

    checkpoint = open_checkpoint(copied(whole, tmp_path / "part", 4))
    trainer = Trainer(load([*ARGUMENTS, *ALL, f"--resume={checkpoint.folder}"]), [].append)
    assert snapshot.take(trainer).counts == {"skipped": 0, "skipped_in_a_row": 0}
    counts = {"skipped": 3, "skipped_in_a_row": 2}
    assert snapshot.give_back(trainer, replace(checkpoint, counts=counts), is_lenient=False) == []
    assert snapshot.take(trainer).counts == counts
    assert trainer.guard.lines() == ["skipped     3 updates, whose gradients were not finite"]
    trainer.folder.release()


def test_a_batch_is_a_function_of_seed_and_step(device: str, tmp_path: Path) -> None:
    """Asked for alone, after others, backwards, and from more threads: the same, all of it."""
    from sdxl_host.training.batches import Batch, Batches

    for index in range(5):  # wider than high, so that they are cropped by chance
        pixels = np.random.default_rng(index).integers(0, 256, (20, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    transforms = load(ARGUMENTS).data.dataset_config["params"]["transforms"]

    def batches(threads: int, seed: int = 5) -> Any:
        dataset = Text2ImageDataset(16, transforms, str(tmp_path))
        order = Order(len(dataset), 4, seed, shuffle=True)
        return Batches(dataset, order, range(1, 3), seed, (3, 16, 16), 0.1, True, threads)

    def values(batch: Batch) -> dict[str, Any]:
        found = {field.name: getattr(batch, field.name) for field in fields(batch)}
        found |= {f"sizes.{name}": value for name, value in found.pop("sizes").items()}
        return {n: v.tobytes() if isinstance(v, np.ndarray) else v for n, v in found.items()}

    one, other = batches(1), batches(4)
    forwards = [values(one.batch(step)) for step in range(1, 8)]
    backwards = [values(other.batch(step)) for step in range(7, 0, -1)]
    assert forwards == backwards[::-1]
    assert values(batches(2).batch(7)) == forwards[-1]
    for name in ("level_u", "noise", "posterior", "dropout_u", "sizes.crop_coords_top_left"):
        assert len({found[name] for found in forwards}) == 7, name
    differ = {n for n, v in values(batches(1, seed=6).batch(7)).items() if v != forwards[-1][n]}
    assert differ >= {"names", "level_u", "noise", "posterior", "dropout_u"}


# ---- other plugins

KEEPING = """
from sdxl_host import hookimpl

class Fake:
    def __init__(self):
        self.asked = 0

    @hookimpl
    def on_step_end(self, trainer):
        self.asked += 1
        trainer.log("{name}", self.asked)

    def state_dict(self):
        return {{"asked": self.asked}}

    def load_state_dict(self, state):
        self.asked = state["asked"]
"""


def test_other_plugins_are_refused_by_name_and_allowed_when_asked_for(
    train: Train, site: Any, tmp_path: Path
) -> None:
    """The state of those that stay is kept; that of a new one begins anew, which is said."""
    for name in ("first", "second", "third"):
        site.add(name, source=KEEPING.format(name=name))
    run, _ = train(tmp_path / "run", "--plugins=first,second", "--total_step=2")
    changed = ["--plugins=third,second", "--total_step=3", "--resume=latest"]
    with pytest.raises(ConfigError) as refused:
        train(run, *changed)
    there = r"plugins.first is {} there and None here"
    here = r"plugins.third is None there and {} here"
    order = "plugins in the order first, second there and third, second here"
    assert f"{there}; {here}; {order}; go on with its own by --config" in str(refused.value)
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000002"

    _, said = train(run, *changed, "--allow_changes=True")
    assert [line[12:] for line in said if line.startswith("changed ")] == [
        there,
        here,
        order,
        "the state of third (fake-third 1.0) begins anew",
    ]
    logged = (run / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
    assert '"third": 1' in logged
    assert '"second": 3' in logged
    assert [plugin.installed.name for plugin in restore(run / "config.yaml").plugins] == [
        "third",
        "second",
    ]


# ---- runs that began with weights


def test_a_run_that_began_with_weights_goes_on_without_them(train: Train, tmp_path: Path) -> None:
    """They are in the checkpoint, so neither the flag nor the file is needed again; another one
    contradicts."""
    words = ["--plugins=none", "--total_step=3"]
    base, _ = train(tmp_path / "base", "--plugins=none", "--total_step=1", "--seed=3")
    weight = base / "checkpoints" / "step_00000001"
    run, _ = train(tmp_path / "run", *words, f"--weight={weight}")
    copied(run, tmp_path / "again", 1)
    checkpoint = copied(run, tmp_path / "part", 1)

    with pytest.raises(ConfigError) as refused:
        train(tmp_path / "part", *words, f"--resume={checkpoint}", f"--weight={run}")
    assert f"contradict each other: the run began with {weight}; leave --weight out" in str(
        refused.value
    )
    with pytest.raises(ConfigError, match=r"the run began with untrained weights; leave --weight"):
        train(base, "--plugins=none", "--total_step=3", "--resume=latest", f"--weight={weight}")

    again, _ = train(tmp_path / "again", *words, "--resume=latest", f"--weight={weight}")
    assert_same_run(run, again, ("network", "optimizer"))
    shutil.rmtree(base)
    part, said = train(tmp_path / "part", *words, "--resume=latest")
    assert_same_run(run, part, ("network", "optimizer"))
    assert not any("untrained" in line for line in said)
    assert restore(part / "config.yaml").train.weight == str(weight)


# ---- runs that have no checkpoint yet


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    train: Train, tmp_path: Path
) -> None:
    """Its folder holds half a checkpoint, which is no run to be kept."""
    partial = tmp_path / "run" / "checkpoints" / ".partial-step_00000001"
    partial.mkdir(parents=True)
    (partial / "network.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    run, _ = train(tmp_path / "run", "--plugins=none", "--total_step=1")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert "9.0" not in (run / "metrics.jsonl").read_text()
