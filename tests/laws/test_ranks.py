"""Several processes that share a run: law 5, and what must be equal on all of them.

Two real ranks are started by `msrun`, as a user starts them; steps are eager.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.images import image

import sdxl_host
from sdxl_host.checkpoints.open import find_latest, open_checkpoint
from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError
from sdxl_host.training.build import make_trainer
from sdxl_host.training.distributed import Ranks, join

UPDATES = 6
RATE = 2.5e-5
PLUGIN = """
import os, signal, time
import numpy as np
from sdxl_host import hookimpl


class Fake:
    "Weighs each sample by the mean loss so far, of all samples. Slow to save on rank 0."

    def __init__(self):
        self.mean, self.seen = np.ones(3), 0

    @hookimpl(wrapper=True)
    def weight_loss(self):
        weights = yield
        return weights / self.mean.mean()

    @hookimpl
    def on_step_end(self, trainer, result):
        self.seen += len(result.per_sample_loss)
        self.mean[result.step % 3] = result.per_sample_loss.mean(dtype=np.float64)
        trainer.log("mean_loss", self.mean.mean())
        if os.environ.get("RANK_ID") == "1" and result.step == SIGNALLED:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self):
        time.sleep(3 if os.environ.get("RANK_ID") == "0" else 0)
        return {"mean": self.mean, "seen": self.seen}

    def load_state_dict(self, state):
        self.mean, self.seen = state["mean"], state["seen"]
""".replace("SIGNALLED", str(UPDATES))
NETWORK = "model.params.network_config.params"
WORDS = [
    *("--config", "tiny.yaml", "--save_path_with_time", "False", "--guidance_scale", "1"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]"),
    *("--plugins", "edm,snr,measured", "--use_ema", "True", "--scale_lr", "True"),
    # Where a gradient is 0 but for rounding, Adam moves by the rate all the same: keep that small.
    f"optim.base_learning_rate={RATE}",
]


def metrics(folder: Path) -> dict[str, np.ndarray]:
    """Each number of metrics.jsonl, by name, over the steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == UPDATES
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def start_ranks(log: Path, python_path: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`msrun` with two ranks of `sdxl-host train WORDS`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",  # msrun starts `python` from it
        "PYTHONPATH": python_path,
    }
    command = [str(programs / "msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True",
               f"--master_port={port}", f"--log_dir={log}",
               str(Path(sdxl_host.__file__).parent / "__main__.py"), "train", *words]  # fmt: skip
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


# ---- law 5


def shapes(folder: Path) -> Path:
    """Seven wide images, five square ones and two tall ones, in colours of their own."""
    sizes = [(40, 20)] * 7 + [(30, 30)] * 5 + [(20, 60)] * 2
    for index, size in enumerate(sizes):
        image(folder / f"{index}.png", *size, color=(17 * index, 255 - 17 * index, 90))
        (folder / f"{index}.txt").write_text(f"image number {index}")
    return folder


@pytest.fixture
def measured(device: str, site, monkeypatch: pytest.MonkeyPatch):
    """The plugin `measured`, which keeps state of all samples, beside edm and snr."""
    for name in ("edm", "snr"):
        module = f"sdxl_{name}"
        source = f"from {module} import *\nfrom {module} import "
        source += {"edm": "EDM", "snr": "MinSNR"}[name] + " as Fake\n"
        site.add(name, source=source, distribution=f"sdxl-{name}", version="0.1.0")
    site.add("measured", source=PLUGIN)
    return site


def test_law_one_batch_of_4_is_two_batches_of_2_and_two_ranks(measured, tmp_path: Path) -> None:
    """Losses, weights, EMA and a plugin's state after some updates, within float32 rounding; the
    plugin's state is the same on both ranks, or they would draw apart.

    Images of three shapes, of uneven numbers, come in buckets: each step takes the same one on both
    ranks. The rate is multiplied by the 4 samples. Rank 1 gets SIGTERM in the last
    step but one, and both end after it, rank 0 seconds later than the other."""
    runs = {}
    data = ["--data_path", str(shapes(tmp_path / "images")), "--buckets", "True"]
    for name, words in (
        ("one", ["--per_batch_size", "4"]),
        ("accumulated", ["--gradient_accumulation_steps", "2"]),
    ):
        runs[name] = tmp_path / name
        words += [*data, "--total_step", str(UPDATES), "--save_path", str(runs[name])]
        make_trainer(load([*WORDS, *words]), say=lambda line: None).run()
    runs["ranks"] = tmp_path / "ranks"
    words = [*WORDS, *data, "--is_parallel", "True", "--save_path", str(runs["ranks"])]
    plugins = os.pathsep.join([measured.python_path, *sys.path])
    done = start_ranks(tmp_path / "logs", plugins, *words, "--total_step", str(UPDATES + 1))
    logs = "\n".join(file.read_text() for file in (tmp_path / "logs").glob("worker_*.log"))
    assert done.returncode == 0, logs[-3000:]
    assert "update      of 4 samples: 2 a batch x 2 ranks" in logs
    assert f"stopped after step {UPDATES}: interrupted by a signal to another rank" in logs
    assert open_checkpoint(find_latest(runs["ranks"])).step == UPDATES
    assert metrics(runs["ranks"])["learning_rate"][-1] == np.float32(4 * RATE)

    expected = metrics(runs["one"])
    final = runs["one"] / "checkpoints" / "latest"
    for name in ("accumulated", "ranks"):
        for number, values in metrics(runs[name]).items():
            scale = np.abs(expected[number]).max()
            difference = np.abs(values - expected[number]).max()
            assert difference <= 1e-5 * scale, (name, number)
        folder = runs[name] / "checkpoints" / "latest"
        for file in ("network.safetensors", "ema.safetensors"):
            one, other = load_file(final / file), load_file(folder / file)
            assert one.keys() == other.keys()
            for key, values in one.items():
                assert np.abs(other[key] - values).max() <= 1e-5 * max(1.0, np.abs(values).max())
        one, other = (load_file(f / "plugins" / "measured.safetensors") for f in (final, folder))
        for key, values in one.items():
            np.testing.assert_allclose(other[key], values, rtol=1e-5)
        state = json.loads((folder / "plugins" / "measured.json").read_text())
        assert state["seen"] == 4 * UPDATES
    assert len(list((runs["ranks"]).glob("**/metrics.jsonl"))) == 1


def test_a_failed_rank_ends_the_run_and_says_why(
    device: str, site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 alone has a plugin that raises; the run ends and its log has the one line."""
    failing = PLUGIN.replace(
        "        self.seen += ",
        "        import os\n        if os.environ['RANK_ID'] == '1' and result.step == 2:\n"
        "            raise ValueError('out of luck')\n        self.seen += ",
    )
    site.add("measured", source=failing)
    words = [*("--config", "tiny.yaml", "--plugins", "measured", "--is_parallel", "True")]
    words += ["--save_path", str(tmp_path / "run")]
    path = os.pathsep.join([site.python_path, *sys.path])
    monkeypatch.setenv("MS_NODE_TIMEOUT", "10")  # seconds until the silent rank is missed
    done = start_ranks(tmp_path / "logs", path, *words)
    assert done.returncode != 0
    log = (tmp_path / "logs" / "worker_1.log").read_text()
    (error,) = [line for line in log.splitlines() if line.startswith("sdxl-host: error:")]
    assert "plugin measured (fake-measured 1.0) raised ValueError: out of luck" in error
    assert "Traceback" not in log


# ---- what ranks exchange


def test_one_rank_needs_no_other() -> None:
    alone = Ranks()
    assert (alone.rank, alone.world_size, alone.is_main_process) == (0, 1, True)
    assert alone.any(True)
    assert not alone.any(False)
    assert alone.texts("runs/a") == ["runs/a"]
    alone.check_equal("abc", "settings")


class Three(Ranks):
    """Rank 0 of three, with what the others would answer."""

    def __init__(self, *others: str) -> None:
        super().__init__(0, 3)
        self.others = others

    def texts(self, text: str) -> list[str]:
        return [text, *self.others]


def test_ranks_with_other_settings_are_named() -> None:
    Three("abc", "abc").check_equal("abc", "settings")
    with pytest.raises(ConfigError, match=r"^rank 2 has other settings than rank 0; start every"):
        Three("abc", "abd").check_equal("abc", "settings")
    with pytest.raises(ConfigError, match=r"^rank 1, 2 has other plugins"):
        Three("", "abd").check_equal("abc", "plugins")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # A rank table without msrun, and parts of what msrun sets.
        {"RANK_TABLE_FILE": "ranks.json", "RANK_ID": "0", "RANK_SIZE": "8"},
        {"MS_WORKER_NUM": "2"},
        {"MS_WORKER_NUM": "2", "MS_ROLE": "MS_PSERVER"},
        {"MS_WORKER_NUM": "two", "MS_ROLE": "MS_WORKER"},
    ],
)
def test_is_parallel_needs_msrun(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MS_WORKER_NUM", "MS_ROLE", "RANK_TABLE_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert join(False).world_size == 1
    with pytest.raises(
        ConfigError, match=r"^--is_parallel True: .*; call it by msrun --worker_num"
    ):
        join(True)


@pytest.mark.parametrize("role", ["MS_WORKER", "MS_SCHED"])
def test_msrun_starts_ranks_and_their_scheduler(
    device: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All by the same command; without the scheduler the others would wait for it."""
    from mindspore import communication

    for name, answer in (("init", None), ("get_rank", 1), ("get_group_size", 2)):
        monkeypatch.setattr(communication, name, lambda answer=answer: answer)
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    monkeypatch.setenv("MS_ROLE", role)
    joined = join(True)
    assert (joined.rank, joined.world_size) == (1, 2)


def test_ranks_without_is_parallel_would_each_train_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(
        ConfigError, match=r"msrun has started 2 processes, .* use --is_parallel True"
    ):
        join(False)
    monkeypatch.setenv("MS_WORKER_NUM", "1")
    assert join(False).world_size == 1


def test_a_text_is_exchanged_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coded as numbers and back, whatever its letters; one that is too long is refused."""
    from sdxl_host.training import distributed

    monkeypatch.setattr(
        distributed, "_collect", lambda operator, array: np.concatenate([array, array[:, ::1]])
    )
    pair = Ranks(1, 2)
    assert pair.texts("läufe/一") == ["läufe/一", "läufe/一"]
    with pytest.raises(ConfigError, match="is too long to exchange between 2 ranks"):
        pair.texts("x" * 1025)


def test_a_flag_of_any_rank_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_host.training import distributed

    monkeypatch.setattr(distributed, "_collect", lambda operator, array: array + np.float32(1))
    assert Ranks(1, 2).any(False)
    monkeypatch.setattr(distributed, "_collect", lambda operator, array: array)
    assert not Ranks(1, 2).any(False)
