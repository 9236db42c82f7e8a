"""Data sink: a CPU has no queue, so its rows are run by a loop instead."""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from threading import enumerate as enumerate_threads
from types import SimpleNamespace
from typing import Any, cast

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file

from sdxl_host import hookimpl
from sdxl_host.config.load import RunConfig, load
from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.hooks import Hooks, Plugin
from sdxl_host.plugins.selection_and_order import SelectedPlugin
from sdxl_host.training import data_sink
from sdxl_host.training.build import make_trainer

pytestmark = pytest.mark.usefixtures("device")

WORDS = [
    *("--config", "tiny.yaml", "--guidance_scale", "1", "--save_path_with_time", "False"),
    *("data.total_step=4", "--save_ckpt_interval", "2", "--sink_size", "2", "--plugins"),
]

Queue = Callable[..., Callable[[], None]]


def loop(step: data_sink.SinkStep, rows: Iterator[Any], *_: Any) -> Callable[[], None]:
    """The same on any device: what Ascend's queue must be equal to."""

    def call() -> None:
        for _ in range(step.size):
            step(*map(Tensor, next(rows)))

    return call


def thread(step: data_sink.SinkStep, rows: Iterator[Any], *_: Any) -> Callable[[], None]:
    """A queue that a thread fills, as far ahead as there are rows."""
    filled: SimpleQueue[Any] = SimpleQueue()
    Thread(target=lambda: [filled.put(row) for row in rows], name="fills").start()
    return loop(step, iter(filled.get, None))


class Observing:
    """Keeps state of the steps that it has observed."""

    def __init__(self) -> None:
        self.seen = 0

    @hookimpl
    def on_step_end(self):
        self.seen += 1

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class Counting:
    """Keeps state in a hook that is asked for each step: how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    @hookimpl(wrapper=True)
    def weight_loss(self):
        weights = yield
        self.asked += 1
        return weights / self.asked

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


def counting(config: RunConfig) -> RunConfig:
    """The config with the plugins `Counting` and `Observing` as well."""
    more = [
        SelectedPlugin(Installed(cls.__name__.lower(), "fake", "1", None, "", ""), cls, None)
        for cls in (Counting, Observing)
    ]
    return RunConfig(**{**vars(config), "plugins": (*config.plugins, *more)})


@contextmanager
def queue(make: Queue) -> Iterator[None]:
    """Inside, a data sink's rows are run by another queue than Ascend's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_sink, "check", lambda *arguments: None)
        patch.setattr(data_sink, "device_queue", make)
        yield


def train(folder: Path, make: Queue | None, *plugins: str) -> Path:
    """A run of four eager steps; with a queue, two steps a call."""
    words = [*WORDS, ",".join(plugins), "--save_path", str(folder)]
    words += ["--data_sink", "True"] if make is not None else []
    with queue(make or loop):
        made = make_trainer(counting(load(words)), say=lambda line: None)
        made.run()
    return made.save_path


@pytest.fixture(scope="module")
def ordinary(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("ordinary"), None, "edm", "snr")


def bits(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("make", [loop, thread])
def test_calls_give_what_ordinary_steps_give(ordinary: Path, tmp_path: Path, make: Queue) -> None:
    """Losses, norms and rates from the rings, weights, optimizer, and a plugin's state at every
    checkpoint; whether a thread takes the rows ahead of the steps or not."""
    run = train(tmp_path, make, "edm", "snr")
    assert (run / "metrics.jsonl").read_bytes() == (ordinary / "metrics.jsonl").read_bytes()
    for step in ("step_00000002", "step_00000004"):
        one, other = (folder / "checkpoints" / step for folder in (ordinary, run))
        for name in ("network.safetensors", "optimizer.safetensors"):
            expected, found = (bits(load_file(folder / name)) for folder in (one, other))
            assert found == expected
        for name, what in (("counting", "asked"), ("observing", "seen")):
            state = Path("plugins") / f"{name}.json"
            assert (one / state).read_text() == (other / state).read_text()
            assert f'"{what}": {step[-1]}' in (one / state).read_text()


def test_a_resumed_run_has_a_queue_of_the_steps_that_are_left(
    ordinary: Path, tmp_path: Path
) -> None:
    """And goes on as if it had not ended."""
    folder = shutil.copytree(ordinary, tmp_path / "run", symlinks=True)
    totals: list[int] = []

    def noting(step: data_sink.SinkStep, rows: Any, total: int, *_: Any) -> Callable[[], None]:
        totals.append(total)
        return loop(step, rows)

    words = [*WORDS, "edm,snr", "--save_path", str(folder), "--data_sink", "True"]
    words += ["--allow_changes", "True", "--resume", str(folder / "checkpoints" / "step_00000002")]
    with queue(noting):
        made = make_trainer(counting(load(words)), say=lambda line: None)
        made.run()
    assert totals == [2]
    assert (folder / "metrics.jsonl").read_bytes() == (ordinary / "metrics.jsonl").read_bytes()


def test_a_stop_waits_for_the_end_of_the_call(tmp_path: Path) -> None:
    """Within a call the weights are already those of its last step. The thread that waits for the
    next call's rows ends; while a call runs, the batches of the next one are made."""

    def interrupting(step: data_sink.SinkStep, rows: Any, *_: Any) -> Callable[[], None]:
        call = thread(step, rows)

        def run() -> None:
            call()
            made.stop("seen enough")

        return run

    words = [*WORDS, "none", "--save_path", str(tmp_path), "--data_sink", "True"]
    with queue(interrupting):
        made = make_trainer(load(words), say=lambda line: None)
        made.batches.get(1)
        assert sorted(made.batches._prepared) == [2, 3]
        made.run()
    assert made.step == 2
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"latest", "step_00000002"}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    for waiting in enumerate_threads():
        if waiting.name == "fills":
            waiting.join(60)
            assert not waiting.is_alive()


def test_the_rows_that_a_queue_counts_on_are_there_after_an_early_end() -> None:
    """It was promised as many as the run has steps; the last one stands for those not made."""
    inner = SimpleNamespace(load_rows=lambda table: None, rows=np.zeros((8, 8)))
    step: Any = SimpleNamespace(size=2, outputs=list, step=inner)
    taken: list[Any] = []

    def all_of_them(step: Any, rows: Iterator[Any], *_: Any) -> Callable[[], None]:
        taken.extend([next(rows), next(rows), rows])
        return lambda: None

    runner = data_sink.SinkRunner(step, np.zeros((5, 8), np.float32), 5)
    with queue(all_of_them):
        for value in (1.0, 2.0):
            runner([[np.float32(value)]])
    runner.close()
    assert [*taken[:2], *taken[2]] == [[1.0], [2.0], [2.0], [2.0], [2.0]]


# ---- the device's queue


def test_the_queue_is_called_as_mindspore_defines_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset gives the columns in order; `ms.data_sink` takes what it is given, to the point
    where it finds that this is no Ascend device."""
    given: list[tuple[Any, ...]] = []
    real = ms.data_sink

    def watch(*arguments: Any, **options: Any) -> Any:
        inspect.signature(real).bind(*arguments, **options)
        given.append((arguments, options))
        return real(*arguments, **options)

    monkeypatch.setattr(ms, "data_sink", watch)
    monkeypatch.delenv("MS_DATASET_SINK_QUEUE", raising=False)
    rows = [tuple(np.full((2,), 10 * k + c, np.float32) for c in range(6)) for k in range(4)]
    step: Any = SimpleNamespace(size=2)
    with pytest.raises(Exception, match=r"(?i)ascend"):
        data_sink.device_queue(step, iter(rows), 4, queue_size=3, jit_level="O0")()
    assert os.environ["MS_DATASET_SINK_QUEUE"] == "3"
    (_, dataset), options = given[0]
    assert options["sink_size"] == 2
    assert dataset.get_col_names() == list(data_sink.COLUMNS)
    assert dataset.get_dataset_size() == 4
    # MindSpore has asked for sizes and shapes by now, and no row has been used up by that.
    arrived = list(dataset.create_tuple_iterator(output_numpy=True, num_epochs=1))
    np.testing.assert_array_equal(arrived, rows)


# ---- what is refused


CHECKED = ["--config", "tiny.yaml", "train.ms_mode=0", "train.sink_size=2", "data.total_step=4"]


def check(*words: str, plugins: Sequence[Plugin] = (), cell: Any = None, step: int = 0) -> None:
    """`data_sink.check` of the tiny config with overrides, as if on Ascend."""
    model: Any = SimpleNamespace(first_stage=SimpleNamespace(cell=cell))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_sink, "on_ascend", lambda: True)
        data_sink.check(load([*CHECKED, *words]), Hooks(object(), plugins), model, step)


def plugin(name: str, cls: type) -> Plugin:
    return Plugin(Installed(name, f"fake-{name}", "1.0", None, "", ""), None, cls())


def test_on_the_cpu_it_is_refused(tmp_path: Path) -> None:
    words = [*CHECKED, "--data_sink", "True", "--save_path", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"^--data_sink True: .*on the CPU; leave the flag out$"):
        make_trainer(load(words), say=lambda line: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.ms_mode=1"], "needs compiled steps"),
        (["train.gradient_accumulation_steps=2"], "gradient_accumulation_steps 1"),
        (["--compile_cache", "graphs"], r"^--data_sink True: .* --compile_cache"),
        (["--buckets", "True"], r"^--data_sink True: .* --buckets"),
        (["--shuffle_tags", "True"], r"^--data_sink True: .* --shuffle_tags"),
        (["data.total_step=5"], r"^data\.total_step: 5 steps are no multiple of sink_size 2"),
        (["train.save_ckpt_interval=3"], r"^train\.save_ckpt_interval: 3 steps"),
        (["train.sample_interval=1"], r"^train\.sample_interval: 1 steps"),
    ],
)
def test_settings_that_a_queue_can_t_have(words: list[str], message: str) -> None:
    check()
    with pytest.raises(ConfigError, match=message):
        check(*words)


def test_a_first_stage_that_computes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"latents must be there beforehand.*sdxl-host cache"):
        check(cell=object())
    with pytest.raises(ConfigError, match="latents must be there beforehand"):
        check("--cache_text_embedding", "True", cell=object())
    check("--cache_latent", "True", cell=object())


def test_a_resumed_run_begins_at_the_end_of_a_call() -> None:
    check(step=2)
    with pytest.raises(ConfigError, match=r"^--resume: 1 steps are no multiple"):
        check(step=1)


def test_a_plugin_with_feedback_is_refused_by_name() -> None:
    """One that only observes, or only answers, is not."""

    class Answering:
        @hookimpl(wrapper=True)
        def sample_timesteps(self):
            distribution = yield
            return distribution

    class Observing:
        @hookimpl
        def on_step_end(self):
            pass

    class Both(Answering, Observing):
        pass

    check(plugins=[plugin("answering", Answering), plugin("observing", Observing)])
    message = (
        r"the plugin both \(fake-both 1\.0\) observes on_step_end and answers sample_timesteps"
    )
    with pytest.raises(ConfigError, match=message):
        check(plugins=[plugin("both", Both)])


class Lengths:
    """Encodes a prompt, a number, as so much in each place; a call's longest gives the context."""

    def __init__(self, masked: int, length: int = 3) -> None:
        self.calls: list[list[str]] = []
        self.masked = masked  # the call that has a mask, from 1; 0 for none
        self.length = length

    @hookimpl
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbedding:
        self.calls.append(list(prompts))
        values = np.array([int(prompt) for prompt in prompts], np.float32)
        length = self.length if len(self.calls) == 2 else 3
        mask = np.tile(np.arange(length) < 2, (len(prompts), 1))
        context = np.tile(values[:, None, None], (1, length, 4))
        is_masked = len(self.calls) == self.masked
        return PromptEmbedding(
            context, np.tile(-values[:, None], (1, 2)), mask if is_masked else None
        )


def fixed(hook: Lengths, count: int) -> data_sink.FixedCaptions:
    """The embeddings of the captions "0", "1", ... of twice as many images."""
    encoders = [SimpleNamespace(width=4, pooled_width=2)]
    captions = [("", [str(index % count)]) for index in range(2 * count)]
    model: Any = SimpleNamespace(encoders=encoders)
    return data_sink.FixedCaptions(
        Hooks(hook), model, cast(Any, SimpleNamespace(all_captions=lambda: captions))
    )


@pytest.mark.parametrize("masked", [0, 3])
def test_captions_are_encoded_once_and_a_few_at_a_time(masked: int) -> None:
    """All at once would be a batch of thousands. A mask of some is one of all."""
    hook = Lengths(masked)
    captions = fixed(hook, 40)
    assert [len(call) for call in hook.calls] == [16, 16, 8]
    assert list(itertools.chain(*hook.calls)) == [str(index) for index in range(40)]
    found = captions(["37", "0", "20", "0"])
    assert found.context[:, 0, 0].tolist() == [37, 0, 20, 0]
    assert found.context.shape == (4, 3, 4)
    assert found.pooled[:, 1].tolist() == [-37, 0, -20, 0]
    if masked:
        assert found.attended().sum(axis=1).tolist() == [2, 3, 3, 3]
    assert (found.mask is None) == (not masked)


def test_contexts_of_several_lengths_are_refused() -> None:
    fixed(Lengths(0, length=6), 16)
    with pytest.raises(PluginError, match=r"^encode_prompt: host: .* 3, 6 tokens, .*; give all"):
        fixed(Lengths(0, length=6), 17)


def test_more_captions_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [("", [str(index)]) for index in range(3)]
    dataset: Any = SimpleNamespace(all_captions=lambda: captions)
    monkeypatch.setattr(data_sink, "_MOST_CAPTIONS", 2)
    with pytest.raises(ConfigError, match="of 3 captions there are too many"):
        data_sink.FixedCaptions(Hooks(object()), SimpleNamespace(encoders=None), dataset)  # type: ignore[arg-type]
