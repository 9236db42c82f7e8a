"""What a resumed run depends on: a checkpoint, (seed, step), and settings, which are checked."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdxl_host.checkpoints.open import open_checkpoint
from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load, restore
from sdxl_host.errors import ConfigError
from sdxl_host.training.state import RunRecord

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
EMBEDDERS = "model.params.conditioner_config.params.emb_models"
IMAGES = "[anchor.png,banana.png,crab.png,gem_stone.png,key.png]"
ARGUMENTS = [
    *("--config", TINY, "--save_path_with_time=False", "--per_batch_size=1"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"),
    *(f"data.dataset_config.params.only={IMAGES}", "--save_ckpt_interval=1"),
]

Train = Callable[..., tuple[Path, list[str]]]


@pytest.fixture(scope="module")
def train(device: str) -> Train:
    """Trains in this process, into a folder; gives the run's and what was said."""
    from sdxl_host.training.build import make_trainer

    def run(folder: Path, *words: str) -> tuple[Path, list[str]]:
        said: list[str] = []
        config = load([*ARGUMENTS, "--save_path", str(folder), *words])
        trainer = make_trainer(config, lambda fact: said.extend(lines_of(fact)))
        trainer.run()
        return trainer.save_path, said

    return run


def resumed(run: Path, *words: str) -> tuple[Any, list[str]]:
    """A trainer that would go on, and what was said."""
    from sdxl_host.training.build import make_trainer

    said: list[str] = []
    config = load([*ARGUMENTS, "--save_path", str(run), *words])
    trainer = make_trainer(config, lambda fact: said.extend(lines_of(fact)))
    trainer.folder.close()
    return trainer, said


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
    """Five steps with accumulation, EMA, three plugins and caption dropout."""
    return train(tmp_path_factory.mktemp("whole"), *ALL)[0]


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_goes_on_the_same_from_any_checkpoint_and_in_any_process(
    train: Train, whole: Path, tmp_path: Path, step: int
) -> None:
    """Whatever the generators that others share have drawn, however many threads load images,
    and whatever grids are drawn on the way. Five images in twos: updates cross epochs."""
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
    from sdxl_host.training.build import make_trainer

    checkpoint = open_checkpoint(copied(whole, tmp_path / "part", 4))
    trainer = make_trainer(load([*ARGUMENTS, *ALL, f"--resume={checkpoint.folder}"]), [].append)
    record = RunRecord("", [], {}, with_optimizer=True, exports=[])
    state = trainer.state
    assert state.capture(record).counts == {"skipped": 0, "skipped_in_a_row": 0}
    arrays = state.capture(record).network.values()
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    assert not any(array.flags.writeable for array in arrays)  # they may be the weights themselves
    counts = {"skipped": 3, "skipped_in_a_row": 2}
    assert state.restore(replace(checkpoint, counts=counts), is_lenient=False) == []
    assert state.capture(record).counts == counts
    trainer.folder.close()


def test_what_settings_that_may_differ_have_no_state_of_is_named(
    whole: Path, device: str, tmp_path: Path
) -> None:
    """And nothing is, where nothing differs, though it might."""
    copied(whole, tmp_path / "part", 4)
    words = [*ALL, "--resume=latest", "--allow_changes=True"]
    same, said = resumed(tmp_path / "part", *words)
    assert not any(line.startswith("changed ") for line in said)
    kept = load_file(tmp_path / "part" / "checkpoints" / "latest" / "optimizer.safetensors")
    state = same.state.cell.state()
    assert {n: a.tobytes() for n, a in state.items()} == {n: a.tobytes() for n, a in kept.items()}

    words[words.index("--use_ema=True")] = "--use_ema=False"
    _, said = resumed(tmp_path / "part", *words, "--ms_amp_level=O2")
    assert [line[12:] for line in said if line.startswith("changed ")] == [
        "train.use_ema is True there and False here",
        "train.ms_amp_level is 'O0' there and 'O2' here",
        "loss_scale and loss_scale_age begin anew",
        "the EMA is left out",
    ]


def test_state_of_another_shape_is_not_taken(whole: Path, device: str, tmp_path: Path) -> None:
    """Refused before any other is taken, or named where that is allowed."""
    checkpoint = open_checkpoint(copied(whole, tmp_path / "part", 4))
    trainer, _ = resumed(tmp_path / "part", *ALL, f"--resume={checkpoint.folder}")
    before = trainer.state.cell.state()
    name = "adam_v.out.2.bias"
    other = {n: np.full_like(a, 9) for n, a in before.items()} | {name: np.zeros(2, np.float32)}
    ema = load_file(checkpoint.folder / "ema.safetensors")
    lost = "model.diffusion_model.out.2.bias"
    ema.pop(lost)
    for file, found in (("optimizer", other), ("ema", ema)):
        (checkpoint.folder / f"{file}.safetensors").unlink()
        save_file(found, checkpoint.folder / f"{file}.safetensors")
    told = rf"{name} is of shape \(2,\) there and of shape \(3,\) here; and 1 more; go on with the"
    with pytest.raises(ConfigError, match=told):
        trainer.state.restore(checkpoint, is_lenient=False)
    assert trainer.state.cell.state()["applied"] == 4
    assert trainer.state.restore(checkpoint, is_lenient=True) == [
        f"{name} begins anew",
        f"the EMA of {lost} begins with these weights",
    ]
    after = trainer.state.cell.state()
    assert after["applied"] == 9
    assert after[name].tobytes() == before[name].tobytes()


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
    assert f"{there}; {here}; {order}; go on with those of the checkpoint by --config" in str(
        refused.value
    )
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000002"

    upgrade(site, "second")
    _, said = train(run, *changed, "--allow_changes=True")
    assert "note        second 1.0 there and 1.1 here" in said
    assert not any("mindspore" in line for line in said if line.startswith("note "))
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


FREEZING = """
from sdxl_host import hookimpl

class Fake:
    @hookimpl(wrapper=True)
    def build_model(self):
        model = yield
        return model.with_network(lambda network: None, trainable=lambda name: {pick})
"""


def upgrade(site: Any, name: str) -> None:
    """Makes the version 1.0 of a fake plugin's distribution 1.1."""
    (old,) = site.folder.glob(f"fake_{name}-*.dist-info")
    metadata = (old / "METADATA").read_text()
    (old / "METADATA").write_text(metadata.replace("Version: 1.0", "Version: 1.1"))
    old.rename(old.with_name(old.name.replace("1.0", "1.1")))


def test_a_plugin_that_trains_other_parameters_is_refused_and_allowed_when_asked_for(
    train: Train, site: Any, tmp_path: Path
) -> None:
    """With the same options, in another version; what is trained by both keeps its state."""
    module = site.add("freezing", source=FREEZING.format(pick="'.out.' in name"))
    words = ["--plugins=freezing", "--use_ema=True"]
    run, _ = train(tmp_path / "run", *words, "--total_step=2")
    checkpoint = run / "checkpoints" / "step_00000002"
    kept = load_file(checkpoint / "optimizer.safetensors")
    pick = "'.out.2.weight' in name or '.time_embed.' in name"
    (site.folder / f"{module}.py").write_text(FREEZING.format(pick=pick))
    sys.modules.pop(module)
    words += ["--total_step=3", "--resume=latest"]
    copy, other = (copied(run, tmp_path / name, 2) for name in ("copy", "other"))
    told = (
        "--resume {}: other parameters were trained than this run trains: "
        "adam_m.time_embed.0.weight is missing there and of shape (128, 32) here; and 20 more; go "
        "on with {}, or with these by --allow_changes True"
    )
    with pytest.raises(ConfigError) as refused:
        train(run, *words)
    assert str(refused.value) == told.format(checkpoint, "the plugins as they were")
    upgrade(site, "freezing")
    with pytest.raises(ConfigError) as refused:
        train(tmp_path / "copy", *words)
    assert str(refused.value) == told.format(copy, "freezing 1.0 in place of 1.1")
    trainer, said = resumed(other.parents[1], *words, "--allow_changes=True")
    assert [line[12:] for line in said if line.startswith("changed ")] == [
        "adam_m.time_embed.0.weight, adam_m.time_embed.0.bias and 6 more of the optimizer's arrays "
        "begin anew",
        "adam_m.out.0.beta, adam_m.out.0.gamma and 4 more of the optimizer's arrays are left out",
        "the EMA of {0}time_embed.0.weight, {0}time_embed.0.bias and 2 more begins with "
        "these weights".format("model.diffusion_model."),
        "the EMA of {0}out.0.bias, {0}out.0.weight and {0}out.2.bias is left out".format(
            "model.diffusion_model."
        ),
    ]
    state, stays = trainer.state.cell.state(), [f"adam_{x}.out.2.weight" for x in "mv"]
    assert all(state[name].tobytes() == kept[name].tobytes() for name in [*stays, "applied"])
    assert not any(state[name].any() for name in state if ".time_embed." in name)


# ---- runs that began with weights


def test_a_run_that_began_with_weights_goes_on_without_them(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    # The same file, however it is written.
    monkeypatch.chdir(base)
    same = "--weight=./checkpoints/latest"
    again, _ = train(tmp_path / "again", *words, "--resume=latest", same)
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
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "config.yaml").write_text("train: {}\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    run, _ = train(tmp_path / "run", "--plugins=none", "--total_step=1")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert "9.0" not in (run / "metrics.jsonl").read_text()
