"""Every setting has an effect: short runs of the smallest network show most of them."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError, DataError

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


@dataclass
class Run:
    """A run that ended: its trainer, what it said, its steps, and its grids as they were asked
    for, each with the network's last bias at that moment."""

    trainer: Any
    said: list[str]
    results: list[Any]
    grids: list[dict[str, Any]]

    @property
    def folder(self) -> Path:
        return self.trainer.save_path

    @property
    def metrics(self) -> list[dict[str, float]]:
        text = (self.folder / "metrics.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step_*"))

    def arrays(self, name: str, step: str = "latest") -> dict[str, np.ndarray]:
        return load_file(self.folder / "checkpoints" / step / name)


NETWORK = "model.params.network_config.params"
SMALLER = [f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"]
BIAS = "model.diffusion_model.out.2.bias"

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(device: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A trainer of tiny.yaml, smaller still, with the arguments given."""
    from sdxl_host.training.build import make_trainer

    def trainer(*arguments: str, said: list[str] | None = None) -> Any:
        words = ["--config", TINY, "--plugins=none", *SMALLER]
        given = {word.partition("=")[0] for word in arguments}
        words = [word for word in words if word.partition("=")[0] not in given]
        if "--save_path" not in given:
            words += [f"--save_path={tmp_path_factory.mktemp('runs')}"]
        shown = [] if said is None else said
        made = make_trainer(load([*words, *arguments]), lambda fact: shown.extend(lines_of(fact)))
        made.folder.close()  # the tests hold no folder against each other
        return made

    return trainer


@pytest.fixture(scope="module")
def run(make: Make) -> Callable[..., Run]:
    """The same, run; images are not drawn, but asked for."""
    from sdxl_host.sampling.pipeline import ImageSampler
    from sdxl_host.training.observers import FiniteGuard

    def run_with(*arguments: str) -> Run:
        said: list[str] = []
        results: list[Any] = []
        grids: list[dict[str, Any]] = []
        trainer = make(*arguments, said=said)
        guard = FiniteGuard.on_step_end

        def draw(self: Any, prompts: Any, steps: int, guidance: float, seed: int, **more: Any):
            bias = trainer.state.networks.network[BIAS].asnumpy().copy()
            asked = {"prompts": prompts, "steps": steps, "guidance": guidance, "seed": seed}
            grids.append({"step": trainer.step, "bias": bias, **asked, **more})
            return np.zeros((len(prompts), 3, 16, 16), np.float32)

        def on_step_end(self: Any, trainer: Any, result: Any) -> None:
            results.append(result)
            guard(self, trainer, result)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ImageSampler, "draw", draw)
            patch.setattr(FiniteGuard, "on_step_end", on_step_end)
            trainer.run()
        return Run(trainer, said, results, grids)

    return run_with


@pytest.fixture(scope="module")
def plain(run: Callable[..., Run]) -> Run:
    """Three steps, each with a checkpoint."""
    return run("--save_ckpt_interval=1")


@pytest.fixture
def part(plain: Run, tmp_path: Path) -> Path:
    """The checkpoints of a copy of that run, as after two steps."""
    folder = shutil.copytree(plain.folder, tmp_path / "part", symlinks=True) / "checkpoints"
    shutil.rmtree(folder / "step_00000003")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step_00000002")
    return folder


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=0, atol=atol, err_msg=name)


def test_a_run_saves_logs_and_ends_when_it_is_told_to(run: Callable[..., Run], plain: Run) -> None:
    found = run(
        "--total_step=5", "--log_interval=2", "--save_ckpt_interval=2", "--max_num_ckpt=2"
    )  # fmt: skip
    assert [result.step for result in found.results] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in found.metrics] == [2, 4, 5]
    assert found.checkpoints == ["step_00000004", "step_00000005"]
    assert [line["step"] for line in plain.metrics] == [1, 2, 3]
    assert plain.checkpoints == ["step_00000001", "step_00000002", "step_00000003"]


def test_a_folder_named_by_date_and_time(make: Make, tmp_path: Path) -> None:
    timed = make("--save_path_with_time=True", f"--save_path={tmp_path}").save_path
    assert timed.parent == tmp_path
    assert re.fullmatch(r"\d{4}\.\d\d\.\d\d-\d\d\.\d\d\.\d\d", timed.name)
    named = make("--save_path_with_time=False", f"--save_path={tmp_path / 'mine'}").save_path
    assert named == tmp_path / "mine"


# ---- resuming


def test_a_run_with_other_settings_goes_on_where_that_is_allowed(
    run: Callable[..., Run], plain: Run, part: Path
) -> None:
    changed = [f"--resume={part / 'latest'}", "optim.base_learning_rate=0.0005"]
    told = "optim.base_learning_rate is 0.001 there and 0.0005 here"
    with pytest.raises(ConfigError, match=f"{re.escape(told)}.*--allow_changes True$"):
        run(*changed)
    found = run(*changed, "--allow_changes=True", "--save_ckpt_interval=1")
    assert f"changed     {told}" in found.said
    rates = [line["learning_rate"] for line in found.metrics]
    assert rates == pytest.approx([0.0005, 0.001, 0.0005])
    before = [line["loss"] for line in plain.metrics]
    assert [line["loss"] for line in found.metrics] == before  # the third is of the same weights
    # It is of that once: the run that comes of it is checked against what it now is.
    assert load(["--config", str(found.folder / "config.yaml")]).train.allow_changes is False


@pytest.mark.parametrize(
    "words",
    [
        ["--resume_step=2"],
        ["--optimizer_weight={}/optimizer.safetensors"],
        ["--optimizer_weight={}", "--resume_step=2"],
    ],
)
def test_the_guides_way_to_resume_is_resume(
    run: Callable[..., Run], plain: Run, part: Path, words: list[str]
) -> None:
    checkpoint = part / "step_00000002"
    found = run(
        f"--weight={checkpoint}", *(word.format(checkpoint) for word in words),
        "--save_ckpt_interval=1",
    )  # fmt: skip
    assert found.folder == part.parent
    assert f"resumed     {checkpoint} at step 2" in found.said
    assert found.metrics == plain.metrics
    for name in ("network.safetensors", "optimizer.safetensors"):
        arrays, expected = found.arrays(name), plain.arrays(name)
        assert arrays.keys() == expected.keys()
        assert all(arrays[key].tobytes() == expected[key].tobytes() for key in expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight={0}", "--resume_step=1"], r"^--resume_step 1: .* is of step 2; give that"),
        (["--resume={0}", "--resume_step=1"], r"^--resume_step 1: .* is of step 2; give that"),
        (["--resume_step=2"], r"^--resume_step 2: continues .* --weight \(nothing\) is none"),
        (
            ["--weight={0}/network.safetensors", "--resume_step=2"],
            r"^--resume_step 2: .*network\.safetensors is none; give --weight RUN/checkpoints/",
        ),
        (
            ["--weight={0}", "--optimizer_weight={1}/optimizer.safetensors"],
            r"^--optimizer_weight .*step_00000001/optimizer\.safetensors: is not that of",
        ),
        (["--optimizer_weight={0}"], r"^--optimizer_weight .*: continues a checkpoint folder"),
        (
            ["--resume={0}", "--optimizer_weight={0}"],
            r"^--optimizer_weight .*: has no use beside --resume; leave it out",
        ),
    ],
)
def test_a_way_to_resume_that_names_two_things_is_refused(
    make: Make, part: Path, words: list[str], message: str
) -> None:
    places = part / "step_00000002", part / "step_00000001"
    with pytest.raises(ConfigError, match=message):
        make(*(word.format(*places) for word in words))


def test_a_checkpoint_of_weights_alone_is_not_resumed(run: Callable[..., Run], make: Make) -> None:
    found = run("--save_optimizer=False", "--total_step=1")
    latest = found.folder / "checkpoints" / "latest"
    assert not (latest / "optimizer.safetensors").exists()
    with pytest.raises(DataError, match=r"holds weights alone .* new run from it with --weight"):
        make(f"--resume={latest}", "--total_step=2")
    fresh = make(f"--weight={latest}")
    assert_close(
        {name: value.asnumpy() for name, value in fresh.state.networks.network.items()},
        found.arrays("network.safetensors"),
        atol=0,
    )


# ---- the update


def test_the_rate_is_that_of_the_global_batch(make: Make) -> None:
    """base * samples of an update * the schedule's factor, which warms up over 2 updates."""
    words = ["--per_batch_size=3", "--gradient_accumulation_steps=2", "--total_step=3"]
    words.append("optim.base_learning_rate=0.0001")

    def rates(*more: str) -> list[float]:
        return make(*words, *more).run_step._run._rows._table[:, 0].tolist()

    warm_up = "optim.scheduler_config.params.warm_up_steps=2"
    assert rates(warm_up, "--scale_lr=True") == pytest.approx([3e-4, 6e-4, 6e-4])
    assert rates(warm_up, "--scale_lr=False") == pytest.approx([0.5e-4, 1e-4, 1e-4])
    assert rates("optim.scheduler_config=null") == pytest.approx([1e-4, 1e-4, 1e-4])


@pytest.mark.parametrize(("clip_grad", "share"), [("True", 0.25), ("True", 4.0), ("False", 0.25)])
def test_gradients_enter_the_moments_clipped(
    run: Callable[..., Run], plain: Run, clip_grad: str, share: float
) -> None:
    """After one step m = (1 - beta1) g min(1, c / |g|), with the global norm |g|."""
    norm = plain.metrics[0]["gradient_norm"]
    found = run(
        "--total_step=1", f"--clip_grad={clip_grad}", f"--max_grad_norm={share * norm}",
        "optim.optimizer_config.params.beta1=0.75",
    )  # fmt: skip
    assert found.metrics[0]["gradient_norm"] == norm
    moments = found.arrays("optimizer.safetensors")
    squares = [np.square(v, dtype=np.float64).sum() for n, v in moments.items() if "adam_m." in n]
    kept = min(1.0, share) if clip_grad == "True" else 1.0
    assert np.sqrt(np.sum(squares)) == pytest.approx(0.25 * norm * kept, rel=1e-5)


def test_the_ema_is_kept_and_drawn_from(run: Callable[..., Run], plain: Run) -> None:
    from sdxl_host.sampling.load import restore_sampler

    found = run("--use_ema=True", "--save_ckpt_interval=1")
    weights, ema = found.arrays("network.safetensors"), found.arrays("ema.safetensors")
    assert_close(weights, plain.arrays("network.safetensors"), atol=0)
    earlier = found.arrays("ema.safetensors", "step_00000002")
    decay = 3 / 12  # (1 + k) / (10 + k) of the third update
    expected = {n: decay * earlier[n] + (1 - decay) * weights[n] for n in weights}
    assert_close(ema, expected, atol=1e-6)
    assert (ema[BIAS] != weights[BIAS]).any()
    np.testing.assert_array_equal(found.grids[-1]["bias"], ema[BIAS])
    latest = found.folder / "checkpoints" / "latest"
    for use_ema, drawn in ((True, ema), (None, ema), (False, weights)):
        sampler, _ = restore_sampler(latest, use_ema)
        parameters = {p.name: p.asnumpy() for p in sampler.model.network.get_parameters()}
        np.testing.assert_array_equal(parameters[bias_of(parameters)], drawn[BIAS])
    # Without the flag there are none.
    assert not (plain.folder / "checkpoints" / "latest" / "ema.safetensors").exists()
    np.testing.assert_array_equal(plain.grids[-1]["bias"], weights[BIAS])
    with pytest.raises(ConfigError, match=r"^--use_ema True: .* keeps no EMA"):
        restore_sampler(plain.folder / "checkpoints" / "latest", True)


def bias_of(names: Any) -> str:
    return next(name for name in names if name.endswith("out.2.bias"))


def test_an_ema_that_forgets_at_once_is_the_weights(run: Callable[..., Run]) -> None:
    found = run("--use_ema", "--ema_decay=0", "--total_step=2")
    assert_close(found.arrays("ema.safetensors"), found.arrays("network.safetensors"), atol=1e-6)
    with pytest.raises(ConfigError, match=r"^train\.ema_decay: 1\.5 is out of range"):
        load(["--ema_decay", "1.5"])


# ---- the images


def test_what_the_grids_are_drawn_with(run: Callable[..., Run], plain: Run) -> None:
    found = run(
        "--sample_interval=2", "--sample_prompts=[a, b]", "--sample_steps=4",
        "--guidance_scale=2.5", "--negative_prompt=c", "--sampler=heun", "--spacing=karras",
    )  # fmt: skip
    asked = {"prompts": ["a", "b"], "steps": 4, "guidance": 2.5, "seed": 42}
    asked |= {"negative_prompt": "c", "sampler": "heun", "spacing": "karras"}
    kept = [{k: v for k, v in grid.items() if k != "bias"} for grid in found.grids]
    assert kept == [{"step": 2, **asked}, {"step": 3, **asked}]
    names = sorted(path.name for path in (found.folder / "samples").iterdir())
    assert names == ["step_00000002.png", "step_00000003.png"]
    # Unless told otherwise: at the end, the first captions, as the model's own sampler draws.
    (grid,) = plain.grids
    own = {"negative_prompt": None, "sampler": None, "spacing": None}
    assert {key: grid[key] for key in own} == own
    assert grid["step"] == 3
    (more,) = run("--sample_count=3", "--total_step=1").grids
    captions = [image.text for image in plain.trainer.dataset.images]
    assert (grid["prompts"], more["prompts"]) == (captions[:1], captions[:3])


# ---- the data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six captioned images, a.png to f.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, name in enumerate("abcdef"):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"image {name}")
    return folder


def test_without_shuffle_the_first_batch_has_the_first_names(
    run: Callable[..., Run], images: Path
) -> None:
    seen = {}
    key = "data.dataset_config.params.data_path"
    for shuffle, place in (("True", "--data_path"), ("False", key)):
        found = run(f"{place}={images}", f"data.shuffle={shuffle}")
        seen[shuffle] = [name for result in found.results for name in result.sample_ids]
    assert seen["False"] == [f"{name}.png" for name in "abcdef"]
    assert sorted(seen["True"]) == seen["False"]
    assert seen["True"] != seen["False"]


def test_threads_change_speed_alone(
    run: Callable[..., Run], plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host.training import batches

    asked: dict[str, int] = {}

    def pool(threads: int, name: str) -> ThreadPoolExecutor:
        asked[name] = threads
        return ThreadPoolExecutor(threads, name)

    monkeypatch.setattr(batches, "ThreadPoolExecutor", pool)
    assert run("data.num_parallel_workers=5").metrics == plain.metrics
    assert asked["images"] == 5


# ---- the device


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        (["--ms_mode=0"], {"O0"}),
        (["--ms_mode=0", "--jit_level=O1"], {"O1"}),
        (["--ms_mode=1"], set()),
    ],
)
def test_steps_are_compiled_at_the_level_or_eager(
    make: Make, monkeypatch: pytest.MonkeyPatch, words: list[str], levels: set[str]
) -> None:
    import mindspore as ms

    signature, asked = inspect.signature(ms.jit), []

    def jit(*given: Any, **options: Any) -> Any:
        asked.append(signature.bind(*given, **options).arguments["jit_level"])
        return given[0]

    monkeypatch.setattr(ms, "jit", jit)
    make(*words)
    assert set(asked) == levels


def test_the_queue_holds_as_many_steps_as_it_is_told_to(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mindspore as ms

    from sdxl_host.training import data_sink

    name = "MS_DATASET_SINK_QUEUE"
    monkeypatch.setattr(data_sink, "check", lambda *arguments: None)  # it wants an Ascend device
    monkeypatch.setattr(ms, "data_sink", lambda *given, **options: lambda: None)
    for words, told in ((["--sink_queue_size=3"], "3"), ([], "")):
        monkeypatch.setenv(name, "")
        trainer = make("--data_sink=True", "--sink_size=1", *words)
        trainer.run_step._step.outputs = list
        trainer.run_step([[np.zeros(2, np.float32)] * 6])
        assert os.environ[name] == told


def test_bfloat16_where_the_device_has_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_host.models import precision

    words = ["--ms_amp_level=O2", "--ms_amp_dtype=bfloat16"]
    with pytest.raises(ConfigError, match=r"^--ms_amp_dtype bfloat16: this device does not"):
        make(*words)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    with pytest.raises(ConfigError, match=r"^--ms_amp_dtype bfloat16: has no use at ms_amp_level"):
        make(words[1])
    said: list[str] = []
    trainer = make(*words, said=said)
    assert "precision   O2, bfloat16 but for norms and SiLU, weights in float32" in said
    assert not trainer.state.cell.is_scaled  # its exponents reach as far as float32's
    assert make("--ms_amp_level=O2", "--ms_amp_dtype=float16").state.cell.is_scaled


def test_weights_in_16_bits_but_for_norms(make: Make) -> None:
    import mindspore as ms
    from mindspore import nn

    said: list[str] = []
    trainer = make("--ms_amp_level=O2", "--param_fp16=True", said=said)
    assert any(line.startswith("note        param_fp16: ") for line in said)
    types = {nn.Dense: ms.float16, nn.Conv2d: ms.float16}
    types |= {nn.GroupNorm: ms.float32, nn.LayerNorm: ms.float32}
    seen = set()
    for _, cell in trainer.state.networks.cell.cells_and_names():
        for kind, dtype in types.items():
            if isinstance(cell, kind):
                seen.add(kind)
                assert {p.dtype for p in cell.get_parameters(expand=False)} <= {dtype}
    assert seen == set(types)
    with pytest.raises(ConfigError, match=r"^--param_fp16 True: has no use at ms_amp_level O0"):
        make("--param_fp16=True")


# ---- the config's own switches


def test_recomputed_blocks_are_called_again_backwards(
    run: Callable[..., Run], plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host.models import unet

    calls: list[int] = []
    construct = unet.Stage.construct

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        return construct(self, *arguments)

    monkeypatch.setattr(unet.Stage, "construct", counted)
    counts = []
    for use_recompute in ("False", "True"):
        calls.clear()
        found = run(f"{NETWORK}.use_recompute={use_recompute}", "--total_step=2")
        counts.append(len(calls))
        np.testing.assert_allclose(
            [line["loss"] for line in found.metrics],
            [line["loss"] for line in plain.metrics[:2]],
            rtol=1e-6,
        )
    assert counts[1] == 2 * counts[0]
