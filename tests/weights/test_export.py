"""Writing weights: what is in the files, that they are whole or not there, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support.weights import LOGIT_SCALE, POSITIONS, UNET, Arrays, source_of

from sdxl_host.errors import DataError
from sdxl_host.files.tensors import DTYPES
from sdxl_host.weights.export import write_diffusers, write_single_file
from sdxl_host.weights.formats.diffusers_names import diffusers_tensors, split
from sdxl_host.weights.open import open_weights
from sdxl_host.weights.shapes import expected_shapes
from sdxl_host.weights.source import Source

Usage = namedtuple("Usage", "total used free")
OUT = f"{UNET}out.2.weight"


@pytest.fixture
def source(small_model) -> Source:
    return source_of(small_model.arrays)


def assert_same(found: Arrays, expected: Arrays) -> None:
    """Types by name: MindSpore has a bfloat16 of its own, which the library takes for numpy's."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype.name == array.dtype.name, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def header(path: Path) -> dict:
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stored", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", None])
def test_a_single_file_in_every_precision(small_model, tmp_path, stored, dtype):
    """Each tensor is rounded to the nearest once; counted numbers stay int64."""
    path = tmp_path / "out.safetensors"
    given = source_of(small_model.arrays, stored)
    size = write_single_file(path, given, small_model.architecture, dtype)
    # Through float32, which holds both 16-bit formats exactly.
    expected = {
        name: array
        if array.dtype == np.int64
        else array.astype(DTYPES[stored]).astype(np.float32).astype(DTYPES[dtype or stored])
        for name, array in small_model.arrays.items()
    }
    assert_same(load_file(path), expected)
    assert size == sum(array.nbytes for array in expected.values())


def test_bfloat16_is_rounded_to_nearest_even(small_model, tmp_path):
    """Of float32's 16 lower bits: under half, half with an even and with an odd last bit, over."""
    bits = np.array([0x3F807FFF, 0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000], np.uint32)
    arrays = dict(small_model.arrays)
    values = np.resize(bits.view(np.float32), arrays[OUT].size).reshape(arrays[OUT].shape)
    arrays[OUT] = values.copy()
    path = tmp_path / "out.safetensors"
    write_single_file(path, source_of(arrays), small_model.architecture, "bf16")
    found = load_file(path)[OUT].view(np.uint16).ravel()[:5]
    assert [hex(each) for each in found] == ["0x3f80", "0x3f80", "0x3f82", "0x3f81", "0xbf82"]


def test_the_file_is_as_the_format_says(small_model, tmp_path):
    """A header padded to eight bytes, no gaps, every tensor at a multiple of its precision, and
    `format: pt`, without which transformers refuses a file."""
    arrays = dict(small_model.arrays)
    path = tmp_path / "out.safetensors"
    given = source_of(arrays, "fp16")
    write_single_file(path, given, small_model.architecture, metadata={"a": "b", "format": "x"})
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    assert length % 8 == 0
    entries = header(path)
    assert entries.pop("__metadata__") == {"a": "b", "format": "pt"}
    at = 0
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        assert begin == at, name
        assert begin % {"I64": 8, "F16": 2}[entry["dtype"]] == 0, name
        at = end
    assert path.stat().st_size == 8 + length + at
    assert next(iter(entries)) == POSITIONS
    floats = [name for name in expected_shapes(small_model.architecture) if name != POSITIONS]
    assert list(entries)[1:] == floats


def test_a_header_of_any_length_is_padded(small_model, source, tmp_path):
    """The tensors begin at a multiple of eight bytes."""
    for more in range(8):
        path = tmp_path / f"{more}.safetensors"
        write_single_file(path, source, small_model.architecture, metadata={"a": "b" * more})
        with open(path, "rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0
        assert load_file(path).keys() == small_model.arrays.keys()


def test_markers_are_empty_tensors(small_model, source, tmp_path):
    path = tmp_path / "out.safetensors"
    write_single_file(path, source, small_model.architecture, markers=["v_pred", "ztsnr"])
    found = load_file(path)
    assert found["v_pred"].shape == found["ztsnr"].shape == (0,)
    assert len(found) == len(small_model.arrays) + 2


def test_each_tensor_is_read_once_and_in_turn(small_model, tmp_path):
    """One in memory at a time: the next is read after the one before is in the file."""
    seen: list[str] = []
    given = source_of(small_model.arrays, seen=seen)
    reports: list[tuple[int, int, int]] = []

    def progress(done: int, total: int) -> None:
        reports.append((len(seen), done, total))

    size = write_single_file(
        tmp_path / "out.safetensors", given, small_model.architecture, progress=progress
    )
    assert sorted(seen) == sorted(small_model.arrays)
    assert [count for count, _, _ in reports] == list(range(1, len(seen) + 1))
    assert [done for _, done, _ in reports] == np.cumsum(
        [small_model.arrays[name].nbytes for name in seen]
    ).tolist()
    assert {total for _, _, total in reports} == {size}
    assert reports[-1][1] == size


def components(arrays: Arrays, architecture) -> dict[str, Arrays]:
    found: dict[str, Arrays] = {}
    for name, targets in diffusers_tensors(architecture).items():
        for place, part in zip(targets, split(name, arrays[name]), strict=True):
            found.setdefault(place.component, {})[place.name] = part
    return found


def stem(component: str) -> str:
    return "model" if component.startswith("text") else "diffusion_pytorch_model"


def test_a_diffusers_folder(small_model, source, tmp_path):
    folder = tmp_path / "out"
    size = write_diffusers(folder, source, small_model.architecture, metadata={"a": "b"})
    expected = components(small_model.arrays, small_model.architecture)
    assert set(expected) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    for component, arrays in expected.items():
        file = folder / component / f"{stem(component)}.safetensors"
        assert_same(load_file(file), {n: np.ascontiguousarray(a) for n, a in arrays.items()})
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
        assert metadata.pop("format") == "pt"
        assert (metadata == {"a": "b"}) == (component == "unet")
    assert size == sum(a.nbytes for arrays in expected.values() for a in arrays.values())
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")} == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/tokenizer_config.json",
        "tokenizer_2/vocab.json",
    }


def test_the_tokenizers_of_a_folder(small_model, source, tmp_path):
    """The second pads with `!`, id 0, as the released one does."""
    from transformers import CLIPTokenizer

    folder = tmp_path / "out"
    write_diffusers(folder, source, small_model.architecture)
    for name, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        tokenizer = CLIPTokenizer.from_pretrained(str(folder / name), local_files_only=True)
        ids = tokenizer("a photo of a cat", padding="max_length", max_length=77)["input_ids"]
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70
        assert (folder / name / "NOTICE.md").is_file()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_scheduler_of_a_folder(small_model, source, tmp_path, prediction, terminal):
    folder = tmp_path / "out"
    write_diffusers(
        folder,
        source,
        small_model.architecture,
        prediction_type=prediction,
        zero_terminal_snr=terminal,
        scale_factor=0.5,
    )
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == prediction
    assert config.get("rescale_betas_zero_snr", False) is terminal
    assert not terminal or config["timestep_spacing"] == "trailing"
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.5


@pytest.mark.parametrize("shard_bytes", [300_000, 1])
def test_a_large_part_is_cut_into_shards(small_model, source, tmp_path, shard_bytes):
    """None larger than the limit but for a single tensor; the index tells which holds what."""
    folder = tmp_path / "out"
    write_diffusers(folder, source, small_model.architecture, shard_bytes=shard_bytes)
    expected = components(small_model.arrays, small_model.architecture)["unet"]
    unet = folder / "unet"
    index = json.loads((unet / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in expected.values())}
    shards = sorted(unet.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"diffusion_pytorch_model-{n:05d}-of-{len(shards):05d}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    found: Arrays = {}
    for path in shards:
        arrays = load_file(path)
        assert arrays
        assert all(index["weight_map"][name] == path.name for name in arrays)
        assert len(arrays) == 1 or sum(a.nbytes for a in arrays.values()) <= shard_bytes
        found |= arrays
    assert_same(found, expected)
    assert list(index["weight_map"]) == list(found)


def test_the_limit_of_a_shard_is_reached(small_model, source, tmp_path):
    """What just fits is one file; a byte less makes two."""
    arrays = components(small_model.arrays, small_model.architecture)["unet"]
    size = sum(array.nbytes for array in arrays.values())
    assert size > max(
        sum(a.nbytes for a in c.values())
        for n, c in components(small_model.arrays, small_model.architecture).items()
        if n == "vae"
    )
    for limit, count in ((size, 1), (size - 1, 2)):
        folder = tmp_path / str(limit)
        write_diffusers(folder, source, small_model.architecture, shard_bytes=limit)
        assert len(list((folder / "unet").glob("*.safetensors"))) == count


def test_writing_shards_and_reading_them_back(small_model, source, tmp_path):
    """With the one number that the format has no place for."""
    folder = tmp_path / "out"
    arrays = {**small_model.arrays, LOGIT_SCALE: np.array(4.6055, np.float32)}
    write_diffusers(folder, source_of(arrays), small_model.architecture, shard_bytes=100_000)
    found = open_weights(folder)
    assert found.architecture == small_model.architecture
    assert_same({name: found.read(name) for name in found.shapes}, arrays)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_round_trip_is_bit_identical(small_model, tmp_path, dtype):
    """Single file -> diffusers -> single file, header and all."""
    first, folder, second = tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c.safetensors"
    arrays = {**small_model.arrays, LOGIT_SCALE: np.array(4.6055, np.float32)}
    write_single_file(first, source_of(arrays, dtype), small_model.architecture)
    write_diffusers(folder, open_weights(first), small_model.architecture)
    write_single_file(second, open_weights(folder), small_model.architecture)
    assert first.read_bytes() == second.read_bytes()


def test_the_one_number_has_the_precision_of_the_rest(small_model, tmp_path):
    arrays = {**small_model.arrays, LOGIT_SCALE: np.array(4.6055, np.float32)}
    write_diffusers(tmp_path / "out", source_of(arrays), small_model.architecture, "fp16")
    found = open_weights(tmp_path / "out")
    assert found.dtypes[LOGIT_SCALE] == "fp16"
    assert found.read(LOGIT_SCALE) == np.float16(4.6055)


def write(kind: str, target: Path, source: Source, model, dtype: str | None = None) -> None:
    {"single": write_single_file, "diffusers": write_diffusers}[kind](
        target, source, model.architecture, dtype
    )


KINDS = pytest.mark.parametrize("kind", ["single", "diffusers"])


@KINDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({OUT: None}, f"lacks {OUT}; give all parts of one model, several files as A,B"),
        ({OUT: (4, 32, 3, 2)}, f"{OUT} (4, 32, 3, 2) instead of (4, 32, 3, 3); give"),
        ({"loss.weight": (3,)}, "does not have: loss.weight; give"),
    ],
    ids=["missing", "misshapen", "unexpected"],
)
def test_tensors_that_do_not_fit_are_named(small_model, tmp_path, kind, change, message):
    """Before anything is written."""
    arrays = dict(small_model.arrays)
    for name, shape in change.items():
        if shape is None:
            arrays.pop(name)
        else:
            arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(DataError) as raised:
        write(kind, tmp_path / "out", source_of(arrays), small_model)
    assert str(raised.value).startswith("w.safetensors: ")
    assert message in str(raised.value)
    assert left_in(tmp_path) == []


@KINDS
@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("first_stage_model.", "has no autoencoder (first_stage_model.*); give all parts"),
        (UNET, "has no U-Net (model.diffusion_model.*); give all parts"),
        ("conditioner.", "has no text encoder (conditioner.embedders.0.*); give all parts"),
    ],
)
def test_a_missing_part_is_named(small_model, tmp_path, kind, prefix, message):
    from sdxl_host.weights.shapes import infer

    arrays = {n: a for n, a in small_model.arrays.items() if not n.startswith(prefix)}
    given = source_of(arrays)
    lacking = infer(given.shapes, head_width=8)
    writing = {"single": write_single_file, "diffusers": write_diffusers}[kind]
    with pytest.raises(DataError) as raised:
        writing(tmp_path / "out", given, lacking)
    assert message in str(raised.value)
    assert left_in(tmp_path) == []


@KINDS
@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_a_target_is_never_overwritten(small_model, source, tmp_path, kind, there):
    target = tmp_path / "out"
    if there == "folder":
        target.mkdir()
    elif there == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(DataError, match="out: is there already, and is not overwritten; give anot"):
        write(kind, target, source, small_model)
    assert left_in(tmp_path) == ["out"]
    assert target.is_symlink() == (there == "link")
    assert there != "file" or target.read_text() == "mine"


@KINDS
def test_a_small_disk_is_told_before_anything_is_written(
    small_model, source, tmp_path, monkeypatch, kind
):
    """Free space is that of the nearest folder that will hold the target."""
    asked = []
    size = sum(array.nbytes for array in small_model.arrays.values())

    def usage(path):
        asked.append(Path(path))
        return Usage(10**12, 0, size // 2)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(os, "fsync", lambda *_: pytest.fail("something was written"))
    needed, free = (size + 10**7) / 1e9, size // 2 / 1e9
    message = rf"out: needs {needed:.2f} GB and its disk has {free:.2f} GB free; free some space or"
    with pytest.raises(DataError, match=message):
        write(kind, tmp_path / "new" / "out", source, small_model)
    assert asked == [tmp_path]
    assert left_in(tmp_path) == []


@KINDS
def test_just_enough_disk_is_enough(small_model, source, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, size))
    writing = {"single": write_single_file, "diffusers": write_diffusers}[kind]
    size = 10**12
    total = writing(tmp_path / "a", source, small_model.architecture)
    size = total + 10**7
    writing(tmp_path / "b", source, small_model.architecture)
    size -= 1
    with pytest.raises(DataError, match="free some space"):
        writing(tmp_path / "c", source, small_model.architecture)


@pytest.mark.parametrize("value", [65520.0, -70000.0, 1e30])
def test_overflow_of_float16_is_named(small_model, tmp_path, value):
    """65504 is float16's largest; from 65520 on it would be infinite."""
    arrays = dict(small_model.arrays)
    arrays[OUT] = arrays[OUT].copy()
    arrays[OUT][0, 0, 0, 0] = value
    message = rf"{OUT}: holds {abs(value):.4g}, which fp16 can't hold; use --dtype bf16 or fp32"
    with pytest.raises(DataError) as raised:
        write("single", tmp_path / "out", source_of(arrays), small_model, "fp16")
    assert str(raised.value) == message
    assert left_in(tmp_path) == []
    write("single", tmp_path / "out", source_of(arrays), small_model, "bf16")


def test_what_fits_float16_is_written(small_model, tmp_path):
    """Its largest, what rounds to it, and an infinity that was one before."""
    arrays = dict(small_model.arrays)
    arrays[OUT] = arrays[OUT].copy()
    arrays[OUT].ravel()[:3] = [65504, 65519, np.inf]
    path = tmp_path / "out.safetensors"
    write_single_file(path, source_of(arrays), small_model.architecture, "fp16")
    assert load_file(path)[OUT].ravel()[:3].tolist() == [65504, 65504, np.inf]


@KINDS
@pytest.mark.parametrize("error", [DataError("w.safetensors: ends"), KeyboardInterrupt()])
def test_an_error_between_two_tensors_leaves_nothing(small_model, tmp_path, kind, error):
    count = 0
    whole = source_of(small_model.arrays)

    def read(name: str) -> np.ndarray:
        nonlocal count
        count += 1
        if count == 100:
            raise error
        return whole.read(name)

    broken = Source(whole.shapes, whole.dtypes, read, description="w.safetensors")
    with pytest.raises(type(error)):
        write(kind, tmp_path / "out", broken, small_model)
    assert count == 100
    assert left_in(tmp_path) == []


@KINDS
def test_a_disk_that_fails_leaves_nothing(small_model, source, tmp_path, monkeypatch, kind):
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DataError, match=r"out: can't be written \(No space left on device\); noth"):
        write(kind, tmp_path / "out", source, small_model)
    assert left_in(tmp_path) == []
