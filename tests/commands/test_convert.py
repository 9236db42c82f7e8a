"""`sdxl-host convert`: what it writes, what it says, and what it refuses before it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sdxl_host
from sdxl_host.cli import main
from sdxl_host.weights.architecture import SDXL_BASE, Architecture, Encoder
from sdxl_host.weights.export import write_single_file
from sdxl_host.weights.formats.diffusers_names import diffusers_tensors, split_shapes
from sdxl_host.weights.open import open_weights
from sdxl_host.weights.shapes import expected_shapes
from sdxl_host.weights.source import Source

HOST = str(Path(sdxl_host.__file__).parents[1])
UNET = "model.diffusion_model."
POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"


@pytest.fixture
def here(small_model, tmp_path, monkeypatch) -> Path:
    """A folder with `a.safetensors`, a small model in float16, to be in."""
    monkeypatch.chdir(tmp_path)
    save_file(halved(small_model.arrays), tmp_path / "a.safetensors")
    return tmp_path


def halved(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: a if a.dtype == np.int64 else a.astype(np.float16) for n, a in arrays.items()}


def converted(capsys, *words: str) -> str:
    """What `sdxl-host convert WORDS` prints when it goes well."""
    capsys.readouterr()
    assert main(["convert", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys, *words: str) -> str:
    """The one line of error of a `convert` that leaves nothing new behind."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(["convert", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert sorted(Path().rglob("*")) == before
    return lines[0].removeprefix("sdxl-host: error: ")


def header(path: Path) -> dict:
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def same(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(
        array.dtype.name == other[name].dtype.name and array.tobytes() == other[name].tobytes()
        for name, array in one.items()
    )


# ---- what is written


def test_there_and_back(here, capsys):
    """Through diffusers and back: bit for bit the same, and the heads' width is in both."""
    said = converted(capsys, "a.safetensors", "b", "--head_width", "8")
    assert said.splitlines()[0] == "source      a.safetensors (single file)"
    tensors, numbers = (
        len(load_file("a.safetensors")),
        sum(array.size for array in load_file("a.safetensors").values()),
    )
    assert f"weights     {tensors} tensors, {numbers:,} numbers (fp16, int64)\n" in said
    assert "objective   eps\n" in said
    assert re.search(r"^written     b \(0\.01 GB\)$", said, re.MULTILINE)
    converted(capsys, "b", "c.safetensors")
    assert same(Path("a.safetensors"), Path("c.safetensors"))
    found = open_weights(Path("c.safetensors"))
    assert found.architecture == open_weights(Path("b")).architecture
    assert found.architecture is not None
    assert found.architecture.unet is not None
    assert found.architecture.unet["num_head_channels"] == 8


def test_progress_is_ten_lines_where_there_is_no_terminal(here, capsys):
    said = converted(capsys, "a.safetensors", "b.safetensors", "--head_width", "8")
    percent = [int(each) for each in re.findall(r"^progress +(\d+)%", said, re.MULTILINE)]
    assert percent == sorted(set(percent))
    assert 2 <= len(percent) <= 10
    assert percent[-1] == 100


def test_progress_is_a_bar_on_a_terminal(here, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    said = converted(capsys, "a.safetensors", "b.safetensors", "--head_width", "8")
    assert "progress" not in said
    assert "writing: 100%" in said


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("target", ["b.safetensors", "b"])
def test_the_precision_is_chosen(here, capsys, target, dtype):
    said = converted(capsys, "a.safetensors", target, "--dtype", dtype, "--head_width", "8")
    assert f", {dtype})\n" in said
    file = (
        Path(target) if target.endswith("s") else Path("b/unet/diffusion_pytorch_model.safetensors")
    )
    stored = {entry["dtype"] for name, entry in header(file).items() if name != "__metadata__"}
    assert stored - {"I64"} == {{"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[dtype]}


def test_the_metadata_says_what_it_is(here, capsys):
    converted(capsys, "a.safetensors", "b.safetensors", "--head_width", "8")
    with safe_open("b.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.title"] == "b"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", metadata["modelspec.date"])
    assert metadata["sdxl_host.objective"] == "eps"


def test_a_v_prediction_model_stays_one(here, small_model, capsys):
    """Marked for ComfyUI in the single file, for diffusers in the scheduler."""
    empty = np.zeros(0, np.float32)
    save_file({**small_model.arrays, "v_pred": empty, "ztsnr": empty}, "v.safetensors")
    said = converted(capsys, "v.safetensors", "folder", "--head_width", "8")
    assert "note        v_pred is there: the network predicts v\n" in said
    assert "objective   v\n" in said
    scheduler = json.loads(Path("folder/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    assert "objective   v\n" in converted(capsys, "folder", "back.safetensors")
    assert same(Path("v.safetensors"), Path("back.safetensors"))
    assert header(Path("back.safetensors"))["__metadata__"]["modelspec.prediction_type"] == "v"


def test_a_list_makes_a_whole(here, small_model, capsys):
    """A trained U-Net over the model it came from, and one that completes the rest."""
    unet = {n: a + 1 for n, a in small_model.arrays.items() if n.startswith(UNET)}
    rest = {n: a for n, a in small_model.arrays.items() if not n.startswith(UNET)}
    save_file(unet, "unet.safetensors")
    save_file(rest, "rest.safetensors")
    said = converted(capsys, "a.safetensors,unet.safetensors", "b.safetensors", "--head_width", "8")
    assert f"note        {len(unet)} tensors of unet.safetensors (single file) replace" in said
    converted(capsys, "unet.safetensors,rest.safetensors", "c.safetensors", "--head_width", "8")
    for name, array in unet.items():
        assert np.array_equal(load_file("b.safetensors")[name], array)
        assert np.array_equal(load_file("c.safetensors")[name], array)


def test_a_list_is_of_the_objective_of_its_last_u_net(here, small_model, capsys):
    """A v model over a diffusers folder whose scheduler says epsilon."""
    unet = {n: a for n, a in small_model.arrays.items() if n.startswith(UNET)}
    save_file({**unet, "v_pred": np.zeros(0, np.float32)}, "v.safetensors")
    save_file(unet, "plain.safetensors")
    converted(capsys, "a.safetensors", "folder", "--head_width", "8")
    assert "objective   v\n" in converted(capsys, "folder,v.safetensors", "b.safetensors")
    stored = header(Path("b.safetensors"))
    assert "v_pred" in stored
    assert stored["__metadata__"]["sdxl_host.objective"] == "v"
    assert stored["__metadata__"]["modelspec.prediction_type"] == "v"
    said = converted(capsys, "folder,v.safetensors,plain.safetensors", "c")
    assert (
        "note        plain.safetensors (single file) states no objective; that of v.safetensors "
        "(single file), v, is taken\n"
    ) in said
    scheduler = json.loads(Path("c/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_a_stated_part_keeps_its_heads(here, small_model, capsys):
    """The flag is of the parts that state nothing: here the encoders, not the U-Net."""
    rest = {n: a for n, a in small_model.arrays.items() if not n.startswith(UNET)}
    save_file(rest, "rest.safetensors")
    converted(capsys, "a.safetensors", "folder", "--head_width", "8")
    converted(capsys, "folder/unet,rest.safetensors", "b.safetensors", "--head_width", "16")
    found = open_weights(Path("b.safetensors")).architecture
    assert found is not None
    assert found.unet is not None
    assert found.unet["num_head_channels"] == 8
    assert [encoder.heads for encoder in found.encoders] == [1, 2]


SIXTEENTH = Architecture(
    # Widths of SDXL over 16, but 32 channels where norms of 32 groups need them.
    unet={
        **SDXL_BASE.unet,
        "model_channels": 32,
        "num_head_channels": 4,
        "context_dim": 128,
        "adm_in_channels": 176,
    },
    autoencoder={
        **SDXL_BASE.autoencoder,
        "ddconfig": {**SDXL_BASE.autoencoder["ddconfig"], "ch": 32},
    },
    encoders=(Encoder("clip", 48, 12, 12), Encoder("open_clip", 80, 32, 20)),
)


def synthetic(architecture: Architecture) -> Source:
    """Random float16 weights of an architecture, made when they are read."""
    shapes = expected_shapes(architecture)
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(np.float16)

    def read(name: str) -> np.ndarray:
        if name.endswith("position_ids"):
            return np.arange(77, dtype=np.int64)[None]
        return np.resize(block, shapes[name]) if shapes[name] else block[0].reshape(())

    return Source(
        shapes=shapes,
        dtypes={n: "int64" if n.endswith("position_ids") else "fp16" for n in shapes},
        read=read,
        description="synthetic",
    )


def diffusers_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """`unet/conv_in.weight` and its shape, of every tensor."""
    shapes = expected_shapes(architecture)
    return {
        str(place): shape
        for name, targets in diffusers_tensors(architecture).items()
        for place, shape in zip(targets, split_shapes(name, shapes[name]), strict=True)
    }


def written_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in folder.rglob("*.safetensors"):
        for name, entry in header(path).items():
            if name != "__metadata__":
                found[f"{path.parent.name}/{name}"] = tuple(entry["shape"])
    return found


def test_sdxl_at_a_sixteenth_of_its_width(device, tmp_path, capsys):
    """All of SDXL's 2,515 tensors, and diffusers' 2,641, in a small file."""
    source, folder, back = tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c.safetensors"
    write_single_file(source, synthetic(SIXTEENTH), SIXTEENTH)
    assert len(load_file(source)) == 2515
    assert "2,515 tensors" in converted(capsys, str(source), str(folder), "--head_width", "4")
    found = written_shapes(folder)
    assert len(found) == 2641
    assert found == diffusers_shapes(SIXTEENTH)
    converted(capsys, str(folder), str(back))
    assert same(source, back)


# ---- what is refused


def test_what_does_not_fit_is_named(here, small_model, capsys):
    """One missing tensor, one of another shape, one that has no place: nothing is written."""
    arrays = halved(small_model.arrays)
    name = f"{UNET}middle_block.0.in_layers.2.bias"
    for change, message in (
        ({name: None}, f"lacks {name}; give"),
        ({name: np.zeros(3, np.float16)}, f"{name} (3,) instead of (64,); give"),
        ({"extra": np.zeros(3, np.float16)}, "does not have: extra; give"),
    ):
        changed = {n: a for n, a in {**arrays, **change}.items() if a is not None}
        save_file(changed, "bad.safetensors")
        for target in ("b", "b.safetensors"):
            said = refused(capsys, "bad.safetensors", target, "--head_width", "8")
            assert said.startswith("bad.safetensors (single file): ")
            assert message in said


def test_a_part_alone_is_refused(here, small_model, capsys):
    unet = {n: a for n, a in small_model.arrays.items() if n.startswith(UNET)}
    save_file(unet, "unet.safetensors")
    for target in ("b", "b.safetensors"):
        said = refused(capsys, "unet.safetensors", target, "--head_width", "8")
        assert said == (
            "unet.safetensors (single file): has no autoencoder (first_stage_model.*) and no text "
            "encoder (conditioner.embedders.0.*); give all parts of one model, several files as A,B"
        )


def test_a_trained_model_without_an_autoencoder_is_refused(here, capsys):
    """A real run's checkpoint, of a small model on pixels: its plugins and objective are told."""
    from sdxl_host.config.load import load
    from sdxl_host.training.build import make_trainer

    words = ["--config", "tiny.yaml", "--save_path", "runs"]
    words += ["--plugins", "edm,lpw", "--edm_sigma_data", "0.7"]
    trainer = make_trainer(load(words), say=lambda line: None)
    trainer.run()
    checkpoint = trainer.save_path / "checkpoints" / "latest"
    source = open_weights(checkpoint)
    assert source.architecture is not None
    assert source.architecture.unet is not None
    assert source.architecture.unet["num_head_channels"] == 32
    assert [encoder.heads for encoder in source.architecture.encoders] == [2, 2]
    assert source.metadata["sdxl_host.objective"] == "edm"
    assert source.metadata["modelspec.resolution"] == "16x16"
    plugins = json.loads(source.metadata["sdxl_host.plugins"])
    assert [plugin["name"] for plugin in plugins] == ["edm", "lpw"]
    assert plugins[0]["options"]["sigma_data"] == 0.7
    prompts = json.loads(source.metadata["sdxl_host.prompts"])
    assert prompts == {"encode_prompt": "lpw", "options": {"lpw": plugins[1]["options"]}}
    flags = ["--allow_unmarked_objective"]
    said = refused(capsys, str(checkpoint), "out.safetensors", *flags)
    assert "(checkpoint of step 3): has no autoencoder (first_stage_model.*); give all" in said


def test_a_truncated_file_is_refused(here, capsys):
    os.truncate("a.safetensors", 9000)
    assert re.match(
        r"a\.safetensors: can't be read as safetensors \(.*\); get it again$",
        refused(capsys, "a.safetensors", "b"),
    )


def test_a_torch_file_is_refused(here, capsys):
    Path("m.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    said = refused(capsys, "m.ckpt", "b")
    assert said.startswith("m.ckpt: is a file of torch, which may hold code that runs")


def test_a_full_disk_is_told_first(here, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    said = refused(capsys, "a.safetensors", "b", "--head_width", "8")
    assert re.match(r"b: needs 0\.02 GB and its disk has 0\.00 GB free; free some space", said)


def test_a_target_is_not_overwritten(here, capsys):
    said = refused(capsys, "a.safetensors", "a.safetensors", "--head_width", "8")
    assert said == "a.safetensors: is there already, and is not overwritten; give another name"


def test_an_objective_that_can_not_be_marked(here, small_model, capsys):
    """An EDM model is drawn as noise by whatever takes it for eps: only on demand, only for us."""
    save_file(small_model.arrays, "edm.safetensors", {"sdxl_host.objective": "edm"})
    flags = ("--head_width", "8", "--allow_unmarked_objective")
    said = refused(capsys, "edm.safetensors", "b.safetensors", *flags[:2])
    assert "b.safetensors: the network was trained for the objective edm, which the format" in said
    assert said.endswith("; --allow_unmarked_objective writes it for sdxl-host alone")
    for words in (flags[:2], flags):
        said = refused(capsys, "edm.safetensors", "b", *words)
        assert said.endswith(
            "; write a single file with --allow_unmarked_objective, for sdxl-host alone"
        )
    said = converted(capsys, "edm.safetensors", "b.safetensors", *flags)
    assert "note        no other program can tell that it was trained for the objective edm" in said
    metadata = header(Path("b.safetensors"))["__metadata__"]
    assert metadata["sdxl_host.objective"] == "edm"
    assert "modelspec.prediction_type" not in metadata
    assert "v_pred" not in header(Path("b.safetensors"))


def test_another_scale_of_latents_can_not_be_marked_in_a_single_file(here, small_model, capsys):
    """diffusers' config has a place for it."""
    save_file(small_model.arrays, "s.safetensors", {"sdxl_host.scale_factor": "0.5"})
    said = refused(capsys, "s.safetensors", "b.safetensors", "--head_width", "8")
    assert "was trained for latents scaled by 0.5, which the format can't say" in said
    converted(capsys, "s.safetensors", "b", "--head_width", "8")
    assert json.loads(Path("b/vae/config.json").read_text())["scaling_factor"] == 0.5
    converted(capsys, "b", "c.safetensors", "--allow_unmarked_objective")
    assert header(Path("c.safetensors"))["__metadata__"]["sdxl_host.scale_factor"] == "0.5"


def test_a_stated_width_of_heads_is_not_overruled(here, capsys):
    converted(capsys, "a.safetensors", "b", "--head_width", "8")
    said = refused(capsys, "b", "c.safetensors", "--head_width", "16")
    assert said.startswith("--head_width 16: b (diffusers folder) states how wide its heads")
    # An autoencoder that is not described has no width of heads that the flag could be of.
    vae = {n: a for n, a in load_file("a.safetensors").items() if n.startswith("first_stage")}
    save_file(vae, "vae.safetensors")
    index = json.loads(Path("b/model_index.json").read_text())
    Path("b/model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    said = refused(capsys, "b,vae.safetensors", "c.safetensors", "--head_width", "16")
    assert said.startswith("--head_width 16: b (diffusers folder), vae.safetensors (single file)")
    converted(capsys, "b,vae.safetensors", "c.safetensors")
    assert same(Path("a.safetensors"), Path("c.safetensors"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("b.ckpt", "b.ckpt: .ckpt files are not written; give NAME.safetensors, or a folder's"),
        ("b.bin", "b.bin: .bin files are not written; give"),
        ("b.pt", "b.pt: .pt files are not written; give"),
        ("runs/b.PTH", "runs/b.PTH: .PTH files are not written; give"),
        ("b.safetensor", "b.safetensor: is not NAME.safetensors, as a single file must be; give"),
        ("b.SafeTensors", "b.SafeTensors: is not NAME.safetensors"),
        ("b.saftensors", "b.saftensors: is not NAME.safetensors"),
        (".safetensors", ".safetensors: is not NAME.safetensors"),
    ],
)
def test_a_file_of_another_kind_does_not_become_a_folder(here, capsys, target, message):
    assert message in refused(capsys, "a.safetensors", target, "--head_width", "8")


@pytest.mark.parametrize("target", ["model-v1.5", "b.safetensors.d", "safetensors"])
def test_a_folder_may_have_a_dot_in_its_name(here, capsys, target):
    converted(capsys, "a.safetensors", target, "--head_width", "8")
    assert (here / target / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.safetensors"], "DST: is missing; sdxl-host convert --help"),
        (
            ["a.safetensors", "b", "--dtype", "fp8"],
            "--dtype fp8: does not fit its type",
        ),
        (["a.safetensors", "b", "--head_width", "0"], "--head_width: 0 is out of range"),
        ([",", "b"], "SRC: is empty"),
        (["none.safetensors", "b"], "none.safetensors: there is no such file or folder; give a"),
    ],
)
def test_bad_words(here, capsys, words, message):
    assert message in refused(capsys, *words)


# ---- the whole of it


@pytest.mark.soak
def test_the_full_model_is_streamed(device, tmp_path):
    """SDXL's own size in float16, 6.9 GB. 12 GiB of memory are promised; a tensor at a time takes
    far less than one copy of the model."""
    source, folder = tmp_path / "sd_xl_base_1.0.safetensors", tmp_path / "folder"
    write_single_file(source, synthetic(SDXL_BASE), SDXL_BASE)
    assert source.stat().st_size > 6.9e9
    command = [sys.executable, "-m", "sdxl_host", "convert", str(source), str(folder)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": HOST}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    print(said, f"peak memory {usage.ru_maxrss / 2**20:.2f} GiB", sep="\n")
    assert usage.ru_maxrss < 4 * 2**20  # KiB
    percent = [int(each) for each in re.findall(r"^progress +(\d+)%", said, re.MULTILINE)]
    assert percent == list(range(10, 101, 10))
    found = written_shapes(folder)
    assert len(found) == 2641
    assert found == diffusers_shapes(SDXL_BASE)
    shutil.rmtree(tmp_path)
