"""`sdxl-host plan`: what a run would be is told rightly, and nothing is trained or allocated."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sdxl_host
from sdxl_host.cli import main
from sdxl_host.config.load import load
from sdxl_host.planning.curves import curves
from sdxl_host.planning.memory import model_parts
from sdxl_host.plugins.hooks import make_hooks

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
SDXL = "configs/training/sd_xl_base_finetune_910b.yaml"
FILES = ["config.yaml", "curves.csv", "curves.png"]


def plan(*words: str) -> int:
    return main(["plan", "--config", TINY, *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that is said when the command ends with exit code 2."""
    capsys.readouterr()
    assert plan(*words) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    return said.err.removeprefix("sdxl-host: error: ").strip()


def images(folder: Path, captions: dict[str, str]) -> Path:
    folder.mkdir()
    for name, caption in captions.items():
        Image.new("RGB", (40, 36), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


LONG = " ".join(["cat"] * 200)
WEIGHTED = "((cat)) " * 76


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["captions    2 of 3 cut off; encoded by host", "long.png: 125 of 200 tokens lost"]),
        (["--lpw", "--lpw_max_embeddings_multiples", "2"],
         ["captions    2 of 3 cut off; encoded by lpw", "long.png: 50 of 200 tokens lost"]),
        (["--lpw"], ["captions    1 of 3 cut off; encoded by lpw"]),
        (["--lpw", "--lpw_max_embeddings_multiples", "4"], ["captions    none of 3 cut off"]),
        (["--lpw", "--lpw_max_embeddings_multiples", "2", "--lpw_prompt_weights"],
         ["captions    1 of 3 cut off", "long.png: 50 of 200 tokens lost"]),
    ],
)  # fmt: skip
def test_captions_with_and_without_long_prompts(
    device: str, here: Path, capsys, words: list[str], said: list[str]
) -> None:
    """Read as prompt weights, brackets are no tokens."""
    images(here / "data", {"short": "a cat", "long": LONG, "weighted": WEIGHTED})
    assert plan("--data_path", "data", *words) == 0
    text = capsys.readouterr().out
    for part in said:
        assert part in text
    longest = "200 tokens (long.png)" if "weights" in " ".join(words) else "(weighted.png)"
    assert longest in text


def test_what_cant_be_used_is_counted_as_train_would(device: str, here: Path, capsys) -> None:
    """And too much of it is refused as train would."""
    folder = images(here / "data", {"a": "a cat", "b": "a dog", "c": "a cow"})
    (folder / "b.png").write_bytes(b"")
    words = ["--data_path", "data", "data.max_bad_fraction=0.5"]
    assert plan(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("data        2 captioned images")
    assert lines[place + 1 : place + 6] == [
        "set aside   1",
        "            1 x an empty image file (b.png: it is empty)",
        "sizes       median 36x40, height x width",
        "            smallest 36x40 (a.png)",
        "            largest 36x40 (a.png)",
    ]
    assert "captions    none of 2 cut off; encoded by host" in lines
    assert "1 of 3 images can't be read as an image" in refused(capsys, "--data_path", "data")


def test_only_the_worst_captions_are_named_and_the_rest_counted(
    device: str, here: Path, capsys
) -> None:
    captions = {f"p{n}": " ".join(["cat"] * (80 + n)) for n in range(8)}
    images(here / "data", captions)
    assert plan("--data_path", "data", "--plugins", "none") == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("  cut off")]
    assert named[0] == "  cut off   p7.png: 12 of 87 tokens lost"
    assert len(named) == 5
    assert "            and 3 more that lose less or as much" in lines


FULL = """
import resource, sys
from sdxl_host.cli import main
code = main(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_real_sdxl_is_planned_in_less_memory_than_a_fifth_of_its_weights(here: Path) -> None:
    """float32 weights alone would take 13.9 GB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sdxl_host.__file__).parents[1])}
    words = ["plan", "--config", SDXL, "--plugins", "edm,snr", "--out", "full"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *words],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    code, kilobytes = map(int, last.split())
    assert code == 0
    assert kilobytes < 2_000_000
    numbers = [line.split() for line in lines]
    assert ["network", "2,567,463,684", "2,567,463,684", "trained"] in numbers
    assert ["text", "encoder", "1", "123,060,480", "frozen"] in numbers
    assert ["text", "encoder", "2", "694,659,841", "frozen"] in numbers
    assert ["first", "stage", "83,653,863", "frozen"] in numbers
    total = 16 * 2_567_463_684 + 4 * (123_060_480 + 694_659_841 + 83_653_863)
    assert ["together", f"{total / 2**30:.2f}", "GiB"] in numbers
    assert "attention   plain, in blocks where sequences are long (flash-attention needs an " in (
        done.stdout
    )
    assert "precision   O2, float16 but for norms and SiLU" in done.stdout
    assert sorted(path.name for path in (here / "full").iterdir()) == FILES


# ---- the command


def test_the_whole_of_a_plan(device: str, here: Path, capsys) -> None:
    words = ["--plugins", "edm,snr", "--timestep_bias_strategy", "later",
             "--timestep_bias_multiplier", "2", "--ms_amp_level", "O2"]  # fmt: skip
    assert plan(*words) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for line in (
        "  seed: 42",
        "plugins     edm, snr, timestep_bias",
        "objective   edm",
        "device      CPU",
        "attention   plain, in blocks where sequences are long "
        "(flash-attention needs an Ascend device)",
        "precision   O2, float16 but for norms and SiLU, weights in float32",
        "curves      quarters of the timesteps, clean to noisy; without plugins -> with them",
        "captions    none of 64 of the images that the package carries cut off; encoded by host",
        "parameters",
        "memory      of one device, estimated; activations come on top and are not",
        "written     plan/config.yaml, plan/curves.csv, plan/curves.png",
    ):
        assert line in [each.split("  #")[0].rstrip() for each in lines], line
    assert any("adapts build_model, claims sample_timesteps" in line for line in lines)
    assert any(line.startswith("note        edm: ") for line in lines)
    assert any(line.startswith("0-99 ") for line in lines)
    # Nothing but the plan's folder: no run, no checkpoint.
    assert [path.name for path in here.iterdir()] == ["plan"]
    assert sorted(path.name for path in (here / "plan").iterdir()) == FILES
    written = (here / "plan" / "config.yaml").read_text("utf-8")
    assert text.startswith(written)
    assert load(["--config", "plan/config.yaml"]).tree == load(["--config", TINY, *words]).tree


def test_the_attention_is_that_of_network_device_and_precision(
    device: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host.training import summary

    asked: list[tuple[Any, ...]] = []

    def watch(*arguments: Any) -> str:
        asked.append(arguments)
        return "watched"

    monkeypatch.setattr(summary, "attention_in_use", watch)
    assert plan() == 0
    assert plan("--ms_amp_level", "O3") == 0
    assert asked == [("flash-attention", "CPU", False, 32), ("flash-attention", "CPU", True, 32)]


def test_the_table_of_numbers_is_the_curves(device: str, here: Path) -> None:
    words = ["--plugins", "snr"]
    assert plan(*words, "--out", "new/folder") == 0
    with open(here / "new" / "folder" / "curves.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    config = load(["--config", TINY, *words])
    hooks = make_hooks(config.plugins)
    before, after = curves(hooks, hooks.build_model(config.tree), config.tree)
    assert [int(row["timestep"]) for row in rows] == list(range(1000))
    for name, values in (
        ("sigma", after.sigma), ("p_before", before.p), ("w_before", before.w),
        ("share_before", before.share), ("p_after", after.p), ("w_after", after.w),
        ("share_after", after.share),
    ):  # fmt: skip
        assert np.allclose([float(row[name]) for row in rows], values, rtol=1e-8), name


def test_the_image_shows_the_plugins(device: str, here: Path) -> None:
    for out, plugins in (("one", "snr"), ("two", "edm"), ("three", "snr")):
        assert plan("--plugins", plugins, "--out", out) == 0
    files = [(here / out / "curves.png").read_bytes() for out in ("one", "two", "three")]
    assert files[0] != files[1]
    assert files[0] == files[2]
    with Image.open(here / "one" / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width > 900


def test_by_default_nothing_is_overwritten(device: str, here: Path, capsys) -> None:
    for _ in range(3):
        assert plan("--plugins", "none") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("written")]
    assert [line.split()[1] for line in said] == [
        "plan/config.yaml,", "plan-2/config.yaml,", "plan-3/config.yaml,"
    ]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_holds_a_plan_is_refused(here: Path, capsys, name: str) -> None:
    (here / "mine").mkdir()
    (here / "mine" / name).write_text("kept")
    assert refused(capsys, "--out", "mine").startswith(f"--out mine: already holds {name}; ")
    assert (here / "mine" / name).read_text() == "kept"
    assert [path.name for path in (here / "mine").iterdir()] == [name]


def test_a_folder_with_other_files_is_written_to(device: str, here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("kept")
    assert plan("--out=mine") == 0
    assert sorted(path.name for path in (here / "mine").iterdir()) == [*FILES, "notes.txt"]


def unwritable(here: Path) -> list[str]:
    (here / "file").write_text("")
    return ["--out", "file/plan"]


def not_a_folder(here: Path) -> list[str]:
    (here / "file").write_text("")
    return ["--out", "file"]


def weight_is_pickle(here: Path) -> list[str]:
    (here / "w.ckpt").write_bytes(b"PK\x03\x04 and so on")
    return ["--weight", "w.ckpt"]


def weight_of_another_model(here: Path) -> list[str]:
    name = "model.diffusion_model.out.2.bias"
    save_file({name: np.zeros(5, np.float32)}, here / "w.safetensors")
    return ["--weight", "w.safetensors"]


def captions_missing(here: Path) -> list[str]:
    (images(here / "data", {"b": "x"}) / "b.txt").unlink()
    return ["--data_path", "data"]


SHORT = (
    "optim.scheduler_config={target: sdxl_host.LambdaLinearScheduler, params: {warm_up_steps: [0], "
    "f_min: [1.0], f_max: [1.0], f_start: [1.0], cycle_lengths: [1.0]}}"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda here: ["--out"], "--out: needs a value (Path)"),
        (lambda here: ["--out", "--seed"], "--out: needs a value (Path)"),
        (lambda here: ["--out=a", "--out", "b"], "--out: given twice; give it once"),
        (not_a_folder, "--out file: is not a folder"),
        (unwritable, "--out file/plan: can't be written"),
        (lambda here: ["--sede", "1"], "--sede: there is no such flag (did you mean seed?)"),
        (lambda here: ["--plugins", "zzz"], "plugin zzz is not installed"),
        (lambda here: ["--data_path", "nowhere"], "data_path nowhere: there is no such folder"),
        (captions_missing, "image, but 1 x an image without a caption (b.png); put images"),
        (lambda here: ["--weight", "no.safetensors"], "no.safetensors: there is no such file"),
        (weight_is_pickle, "w.ckpt: is a file of torch"),
        (weight_of_another_model, "holds weights of another shape: model.diffusion_model.out.2"),
        (lambda here: ["--resume", "nowhere"], "nowhere"),
        (lambda here: ["optim.optimizer_config.params.beta=1"], "AdamW has no such parameter"),
        (lambda here: ["optim.scheduler_config.params.warm_up_steps=-1"], "warm_up_steps must be"),
        (lambda here: ["model.params.network_config.params.context_dim=48"],
         "context_dim: 48 does not fit the text encoders, which give 32"),
        (lambda here: ["data.dataset_config.params.target_size=15"], "target_size 15x15: "),
        (lambda here: [SHORT], "optim.scheduler_config.params: LambdaLinearScheduler: the cycles"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(
    device: str, here: Path, capsys, words: Any, message: str
) -> None:
    given = words(here)
    before = sorted(here.rglob("*"))
    assert message in refused(capsys, *given)
    assert sorted(here.rglob("*")) == before


# ---- weights and checkpoints


def test_weights_are_named_and_not_read(
    device: str, here: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(["--config", TINY])
    parts = model_parts(make_hooks(config.plugins).build_model(config.tree))
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    save_file(arrays, here / "w.safetensors")
    from sdxl_host.files import tensors

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(tensors, "read_pieces", refuse)
    assert plan("--weight", "w.safetensors") == 0
    assert "weights     w.safetensors (single file)" in capsys.readouterr().out


STATEFUL = """
from sdxl_host import hookimpl

class Fake:
    factor = 1.0

    @hookimpl(wrapper=True)
    def weight_loss(self):
        weights = yield
        return weights * self.factor

    @hookimpl
    def on_step_end(self):
        self.factor = 5.0

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]
"""


def test_a_run_that_goes_on_is_planned_with_its_plugins_state(
    site, device: str, here: Path, capsys
) -> None:
    from sdxl_host.training.build import make_trainer

    site.add("grow", source=STATEFUL)
    words = ["--plugins", "grow", "--save_path", "runs", "--save_path_with_time", "False"]
    make_trainer(load(["--config", TINY, *words, "--total_step", "1"]), lambda line: None).run()
    before = {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")}
    assert plan(*words, "--resume", "latest") == 0
    text = capsys.readouterr().out
    assert "step_00000001 at step 1" in text
    assert "  mean w    1.000  ->  5.000" in text
    assert {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")} == before
