"""Reading weights: every format gives the same tensors, and what is damaged is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import sdxl_host
from sdxl_host.errors import DataError
from sdxl_host.files.tensors import DTYPES, Tensors
from sdxl_host.weights.architecture import Architecture, Encoder
from sdxl_host.weights.formats.diffusers_configs import diffusers_configs
from sdxl_host.weights.formats.diffusers_names import places, split
from sdxl_host.weights.metadata import NETWORK_KEYS, markers
from sdxl_host.weights.open import open_all, open_weights
from sdxl_host.weights.source import Source

Arrays = dict[str, np.ndarray]

FLOATS = ("fp16", "bf16", "fp32")
UNET = "model.diffusion_model."
POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"


def cast(arrays: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    """The floats in another precision."""
    return {
        name: array if array.dtype == np.int64 else array.astype(DTYPES[dtype])
        for name, array in arrays.items()
    }


def assert_equal(source: Tensors, arrays: Mapping[str, np.ndarray]) -> None:
    """Names, shapes, precisions and bits."""
    assert set(source.shapes) == set(source.dtypes) == set(arrays)
    for name, expected in arrays.items():
        read = source.read(name)
        assert read.dtype == expected.dtype == DTYPES[source.dtypes[name]], name
        assert read.shape == source.shapes[name] == expected.shape, name
        assert read.tobytes() == expected.tobytes(), name


def refused(path: Path) -> str:
    """The error that opening gives, which begins with what was opened."""
    with pytest.raises(DataError) as raised:
        open_weights(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rewritten(file: Path, change: Callable[[Arrays], object]) -> None:
    """Changes the tensors of a safetensors file."""
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)


def edited(file: Path, change: Callable[[dict], object]) -> None:
    """Changes a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ---- the single file


@pytest.fixture
def single(small_model, tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(small_model.arrays, path)
    return path


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_single_file_is_read(small_model, tmp_path, dtype):
    arrays = cast(small_model.arrays, dtype)
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"modelspec.title": "Model"})
    source = open_weights(path)
    assert_equal(source, arrays)
    assert source.description == f"{path} (single file)"
    assert source.metadata == {"modelspec.title": "Model"}
    assert source.architecture is None
    assert source.notes == ()


def test_opening_reads_the_header_alone(single, small_model):
    """Numbers written after opening are what is read."""
    source = open_weights(single)
    name = f"{UNET}out.2.weight"
    changed = {**small_model.arrays, name: small_model.arrays[name] + 1}
    save_file(changed, single)
    assert np.array_equal(source.read(name), changed[name])


def test_what_other_programs_add_is_left_out_and_told(small_model, tmp_path):
    extras = {
        "model_ema.decay": np.zeros((), np.float32),
        "model_ema.diffusion_modelinput_blocks00weight": np.zeros(3, np.float16),
        "denoiser.sigmas": np.zeros(1000, np.float32),
    }
    path = tmp_path / "model.safetensors"
    save_file({**small_model.arrays, **extras}, path)
    source = open_weights(path)
    assert_equal(source, small_model.arrays)
    assert source.metadata == {}
    assert source.notes == (
        "2 tensors model_ema.* left out: a running average of the U-Net; the U-Net itself is read",
        "denoiser.sigmas left out: the noise schedule, which the config describes",
    )


def test_markers_become_metadata(small_model, tmp_path):
    """ComfyUI's empty tensors for v-prediction and for zero terminal SNR."""
    path = tmp_path / "model.safetensors"
    empty = np.zeros(0, np.float32)
    save_file({**small_model.arrays, "v_pred": empty, "ztsnr": empty}, path)
    source = open_weights(path)
    assert_equal(source, small_model.arrays)
    assert source.metadata == {"v_pred": "true", "ztsnr": "true"}
    assert source.notes == (
        "v_pred is there: the network predicts v",
        "ztsnr is there: trained to a terminal signal-to-noise ratio of zero",
    )


def test_other_extras_stay_for_the_comparison(small_model, tmp_path):
    """What is not known to be harmless is not dropped."""
    path = tmp_path / "model.safetensors"
    save_file({**small_model.arrays, "model_emb.x": np.zeros(1), "edm_mean": np.zeros(4)}, path)
    assert {"model_emb.x", "edm_mean"} < set(open_weights(path).shapes)


def test_what_is_no_trained_weight_is_made_up(single, small_model):
    rewritten(single, lambda arrays: (arrays.pop(POSITIONS), arrays.pop(LOGIT_SCALE)))
    source = open_weights(single)
    scale = np.array(np.log(1 / 0.07), np.float32)
    assert_equal(source, {**small_model.arrays, LOGIT_SCALE: scale})
    assert sorted(source.notes) == [
        f"{POSITIONS} added: 0 to 76, as it always is",
        f"{LOGIT_SCALE} added: log(1/0.07); it has no effect on images",
    ]


@pytest.mark.parametrize(
    "damaged",
    [np.arange(77, dtype=np.float16)[None], np.zeros((1, 77), np.int64), np.arange(76)[None]],
    ids=["fp16", "zeros", "short"],
)
def test_damaged_positions_are_replaced(single, small_model, damaged):
    rewritten(single, lambda arrays: arrays.update({POSITIONS: damaged}))
    source = open_weights(single)
    assert_equal(source, small_model.arrays)
    assert source.notes == (f"{POSITIONS} replaced: it is not 0 to 76 in int64",)


def test_our_metadata_states_the_architecture(small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    text = json.dumps(asdict(small_model.architecture))
    save_file(small_model.arrays, path, metadata={"sdxl_host.architecture": text})
    assert open_weights(path).architecture == small_model.architecture
    save_file(small_model.arrays, path, metadata={"sdxl_host.architecture": text[:-3]})
    assert "metadata sdxl_host.architecture is damaged" in refused(path)


@pytest.mark.parametrize("kept", [0, 5, 60, -4], ids=str)
def test_a_truncated_file_is_named(single, kept):
    """Cut in its length, its header or its numbers."""
    single.write_bytes(single.read_bytes()[:kept])
    assert re.match(r".*model\.safetensors: can't be read as safetensors .*again", refused(single))


def test_a_file_cut_after_opening_is_named(single):
    source = open_weights(single)
    os.truncate(single, single.stat().st_size // 2)
    last = f"{UNET}time_embed.2.weight"
    with pytest.raises(DataError, match=rf"model\.safetensors: ends within {last}; get it again"):
        source.read(last)
    single.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: [\w.]+ can't be read \(No such file"):
        source.read(POSITIONS.replace("position_ids", "token_embedding.weight"))


def test_a_precision_that_is_not_read_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x.weight": np.zeros(4, ml_dtypes.float8_e4m3fn)}, path)
    assert "x.weight is stored as F8_E4M3, and only F16, BF16," in refused(path)


# ---- what is refused by its kind


def torch_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "model.pt", "m.pth", "m"])
def test_torch_files_are_refused(tmp_path, name):
    """A zip archive, and a bare pickle; whatever they are called."""
    path = tmp_path / name
    torch_zip(path)
    expected = rf"{re.escape(str(path))}: is a file of torch, which may hold code .*; convert it"
    assert re.match(expected, refused(path))
    for protocol in range(2, 6):
        path.write_bytes(bytes([0x80, protocol]) + b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
        assert re.match(expected, refused(path))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_suffix_of_torch_is_refused_whatever_is_inside(single, suffix):
    path = single.rename(single.with_suffix(suffix))
    assert "is a file of torch" in refused(path)


def test_a_torch_file_called_safetensors_is_not_read_either(tmp_path):
    path = tmp_path / "model.safetensors"
    torch_zip(path)
    assert "can't be read as safetensors" in refused(path)


def test_other_things_are_named(tmp_path):
    assert "there is no such file or folder; give a .safetensors file," in refused(tmp_path / "no")
    (tmp_path / "model.onnx").write_bytes(b"onnx" * 9)
    assert "model.onnx: is of no kind that is read; give a" in refused(tmp_path / "model.onnx")
    assert "has no model_index.json, config.json or state.json; give" in refused(tmp_path)


# ---- MindSpore


NORM = re.compile(
    r"((in_layers|out_layers)\.0|\.out\.0|\.norm\d?|norm_out|layer_norm\d?|\.ln_(\d|final))\.\w+$"
)


def mindone_name(name: str) -> str:
    """As MindONE's cells call it: MindSpore's names of norms and embeddings."""
    start, _, last = name.rpartition(".")
    if start.endswith("_embedding"):
        return f"{start}.embedding_table"
    if NORM.search(name):
        return f"{start}.{ {'weight': 'gamma', 'bias': 'beta'}[last] }"
    return name


def save_mindspore(path: Path, arrays: Mapping[str, np.ndarray], **options) -> Path:
    """With MindSpore's own function, under MindONE's names and without `position_ids`."""
    import mindspore as ms

    rows = [
        {"name": mindone_name(name), "data": ms.Tensor(array)}
        for name, array in arrays.items()
        if name != POSITIONS
    ]
    ms.save_checkpoint(rows, str(path), **options)
    path.chmod(0o600)
    return path


def test_the_names_of_mindone_differ(small_model):
    """The test's own map is not the identity on what it should change."""
    names = {name: mindone_name(name) for name in small_model.arrays}
    ends = {name.rpartition(".")[2] for name in names.values()}
    assert {"gamma", "beta", "embedding_table", "weight", "bias"} < ends
    norms = [n for n, a in small_model.arrays.items() if n.endswith(".weight") and a.ndim == 1]
    assert all(names[name].endswith(".gamma") for name in norms)
    assert sum(name.endswith(".gamma") for name in names.values()) == len(norms)
    assert sum(name.endswith(".beta") for name in names.values()) == len(norms)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_mindspore_checkpoint_is_read(small_model, tmp_path, dtype):
    arrays = cast(small_model.arrays, dtype)
    source = open_weights(save_mindspore(tmp_path / "SDXL-base-1.0_500.ckpt", arrays))
    assert_equal(source, arrays)
    assert source.description.endswith("SDXL-base-1.0_500.ckpt (MindSpore checkpoint)")
    assert source.notes == (f"{POSITIONS} added: 0 to 76, as it always is",)


def test_bfloat16_of_mindspore_is_read(device, tmp_path):
    import mindspore as ms

    array = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    path = save_mindspore(tmp_path / "a.ckpt", {"x": array})
    ms.save_checkpoint([{"name": "x", "data": ms.Tensor(array, ms.bfloat16)}], str(path))
    assert_equal(open_weights(path), {"x": array.astype(ml_dtypes.bfloat16)})


@pytest.mark.parametrize("start", ["model.diffusion_model.", "diffusion_model."])
def test_a_unet_alone_is_read(small_model, tmp_path, start):
    """`unet_500.ckpt` of training from a cache, and `_backbone` of MindONE's wrappers."""
    unet = {n: a for n, a in small_model.arrays.items() if n.startswith(UNET)}
    written = {f"{start}_backbone.{name[len(UNET) :]}": array for name, array in unet.items()}
    source = open_weights(save_mindspore(tmp_path / "unet_500.ckpt", written))
    assert_equal(source, unet)
    assert source.notes == ()


def test_split_tensors_are_joined(device, tmp_path, monkeypatch):
    """MindSpore cuts a large tensor into several values; here at 1 KB."""
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    arrays = {
        "a.weight": np.arange(2000, dtype=np.float32).reshape(50, 40),
        "b.weight": np.arange(100, dtype=np.float32),
        "c.weight": np.arange(900, dtype=np.float16).reshape(30, 30),
        "d": np.array(7.5, np.float32),
    }
    path = save_mindspore(tmp_path / "a.ckpt", arrays)
    assert path.read_bytes().count(b"a.weight") == 8
    assert_equal(open_weights(path), arrays)


def test_the_check_sum_is_checked(device, tmp_path):
    arrays = {"a.weight": np.arange(20, dtype=np.float32)}
    path = save_mindspore(tmp_path / "a.ckpt", arrays, crc_check=True)
    assert path.read_bytes()[-17:-10] == b"crc_num"
    assert_equal(open_weights(path), arrays)
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    assert "can't be read as a checkpoint of MindSpore (its check sum is another)" in refused(path)


def test_text_and_counters_are_left_out(device, tmp_path):
    """What MindSpore's own callbacks append."""
    array = np.ones(3, np.float32)
    extra = {"epoch_num": 3, "step_num": 7, "note": "some text"}
    path = save_mindspore(tmp_path / "a.ckpt", {"x": array}, append_dict=extra)
    source = open_weights(path)
    assert_equal(source, {"x": array})
    assert source.notes == ("epoch_num, note, step_num left out: not weights",)


@pytest.mark.parametrize("kept", [0, 1, 30, 1000, -1])
def test_a_truncated_checkpoint_is_named(small_model, tmp_path, kept):
    path = save_mindspore(tmp_path / "a.ckpt", small_model.arrays)
    path.write_bytes(path.read_bytes()[:kept])
    assert re.match(r".*a\.ckpt: can't be read as a checkpoint of MindSpore .*again", refused(path))


@pytest.mark.parametrize(
    "content",
    [b"<html>404</html> " * 20, b"\x0a" + b"\xff" * 400],
    ids=["html", "varint"],
)
def test_a_ckpt_of_something_else_is_named(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    expected = (
        r".*a\.ckpt: can't be read as a checkpoint of MindSpore \(byte \d+ is not of such a f"
    )
    assert re.match(expected, refused(path))


def value(tag: str, array: np.ndarray, kind: str, dims: tuple[int, ...] | None = None) -> bytes:
    """One tensor as MindSpore's own protobuf classes write it."""
    from mindspore.train.checkpoint_pb2 import Checkpoint

    message = Checkpoint()
    entry = message.value.add()
    entry.tag = tag
    entry.tensor.dims.extend(array.shape if dims is None else dims)
    entry.tensor.tensor_type = kind
    entry.tensor.tensor_content = array.tobytes()
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x12\x02hi", "byte 2 begins something else than a tensor"),
        (b"\x0a\x03\x0a\x01x", "the value at byte 2 has no name or no precision"),
    ],
    ids=["field", "empty"],
)
def test_another_message_of_protobuf_is_named(tmp_path, content, message):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    assert f"a.ckpt: can't be read as a checkpoint of MindSpore ({message}); get" in refused(path)


ONES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([("x", ONES, "Float32", (5,))], "x has 16 bytes instead of 20 for its shape (5,)"),
        ([("x", ONES, "Int8", (16,))], "x is stored as Int8, and only Float16,"),
        ([("n.gamma", ONES, "Float32"), ("n.weight", ONES, "Float32")], "holds n.weight twice"),
        ([("x", ONES, "Float32", (8,)), ("x", ONES, "Float16", (8,))], "the pieces of x differ"),
    ],
    ids=["size", "precision", "twice", "pieces"],
)
def test_a_contradictory_checkpoint_is_named(device, tmp_path, values, message):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"".join(value(*each) for each in values))
    assert message in refused(path)


def test_a_single_number_of_older_versions_is_read(device, tmp_path):
    """Whose only axis is written as 0 long."""
    path = tmp_path / "a.ckpt"
    path.write_bytes(value("x", np.array(4.6, np.float32), "Float32", (0,)))
    assert_equal(open_weights(path), {"x": np.array(4.6, np.float32)})


def test_packed_dims_are_read(device, tmp_path):
    """A writer of protobuf may store the numbers of a list in one field."""
    tensor = b"\x0a\x03\x02\xac\x02" + b"\x12\x05Int32" + b"\x1a\xe0\x12" + bytes(2400)
    entry = b"\x0a\x01x" + b"\x12" + bytes([0x80 | len(tensor) & 0x7F, len(tensor) >> 7]) + tensor
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"\x0a" + bytes([0x80 | len(entry) & 0x7F, len(entry) >> 7]) + entry)
    assert_equal(open_weights(path), {"x": np.zeros((2, 300), np.int32)})


def test_what_is_no_weight_of_a_checkpoint_is_left_out(device, tmp_path):
    path = save_mindspore(tmp_path / "a.ckpt", {"x": ONES, "denoiser.sigmas": ONES})
    source = open_weights(path)
    assert_equal(source, {"x": ONES})
    assert source.notes == (
        "denoiser.sigmas left out: the noise schedule, which the config describes",
    )


def test_a_map_is_refused(device, tmp_path):
    from mindspore.train.checkpoint_pb2 import Checkpoint

    message = Checkpoint()
    entry = message.value.add()
    entry.tag = "table"
    entry.maptensor.tensor.add(dims=[1], tensor_type="Float32", tensor_content=b"1234")
    (tmp_path / "a.ckpt").write_bytes(message.SerializeToString())
    assert "table is a map, not a tensor" in refused(tmp_path / "a.ckpt")


# ---- diffusers


def save_diffusers(folder: Path, model, arrays: Arrays, suffix: str = "") -> Path:
    """A folder with the library's own writer. suffix: ".fp16" of the variant."""
    for key, config in diffusers_configs(model.architecture, "epsilon").items():
        if key == "model_index":
            target = folder / "model_index.json"
        elif key == "scheduler":
            target = folder / key / "scheduler_config.json"
        else:
            target = folder / key / "config.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config))
    components: dict[str, Arrays] = {}
    for name, targets in places(model.architecture).items():
        for place, part in zip(targets, split(name, arrays[name]), strict=True):
            components.setdefault(place.component, {})[place.name] = np.ascontiguousarray(part)
    for component, tensors in components.items():
        save_file(tensors, folder / component / f"{stem(component)}{suffix}.safetensors")
    return folder


def stem(component: str) -> str:
    return "model" if component.startswith("text") else "diffusion_pytorch_model"


def shard(folder: Path, component: str, index: str, count: int = 3) -> None:
    """Cuts a component's file into several with an index."""
    file = folder / component / f"{stem(component)}.safetensors"
    arrays = load_file(file)
    file.unlink()
    weight_map = {}
    for number in range(count):
        part = {name: arrays[name] for name in list(arrays)[number::count]}
        name = f"{stem(component)}-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, file.with_name(name))
        weight_map |= dict.fromkeys(part, name)
    file.with_name(index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(small_model, tmp_path) -> Path:
    return save_diffusers(tmp_path / "pipeline", small_model, small_model.arrays)


def made_up(model, dtype: str = "fp32") -> Arrays:
    """What a folder gives: all but the one number that it has no place for."""
    return {**cast(model.arrays, dtype), LOGIT_SCALE: np.array(np.log(1 / 0.07), np.float32)}


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_diffusers_folder_is_read(small_model, tmp_path, dtype):
    arrays = cast(small_model.arrays, dtype)
    source = open_weights(save_diffusers(tmp_path / "pipeline", small_model, arrays))
    assert_equal(source, made_up(small_model, dtype))
    assert source.description == f"{tmp_path / 'pipeline'} (diffusers folder)"
    assert source.architecture == small_model.architecture
    assert source.metadata == {"sdxl_host.scale_factor": "0.13025", "sdxl_host.objective": "eps"}
    assert sorted(source.notes) == [
        f"{POSITIONS} added: 0 to 76, as it always is",
        f"{LOGIT_SCALE} added: log(1/0.07); it has no effect on images",
    ]


def test_the_fp16_variant_is_read_where_the_plain_one_is_absent(folder, small_model):
    half = cast(small_model.arrays, "fp16")
    save_diffusers(folder, small_model, half, ".fp16")
    assert_equal(open_weights(folder), made_up(small_model))
    for file in folder.rglob("*.safetensors"):
        if ".fp16." not in file.name:
            file.unlink()
    source = open_weights(folder)
    assert_equal(source, made_up(small_model, "fp16"))
    assert (
        "unet: diffusion_pytorch_model.fp16.safetensors is read, as "
        "diffusion_pytorch_model.safetensors is not there"
    ) in source.notes
    assert len(source.notes) == 4 + 2


@pytest.mark.parametrize(
    "end",
    [".safetensors.index.json", ".safetensors.index.fp16.json", ".fp16.safetensors.index.json"],
)
def test_shards_are_read(folder, small_model, end):
    for component in ("unet", "text_encoder_2"):
        shard(folder, component, stem(component) + end)
    assert_equal(open_weights(folder), made_up(small_model))


def test_shards_that_do_not_fit_their_index_are_named(folder):
    unet = folder / "unet"
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    shard(folder, "unet", index.name)
    whole = index.read_text()
    missing = unet / "diffusion_pytorch_model-00002-of-00003.safetensors"
    edited(index, lambda c: c["weight_map"].update({"conv_in.weight": missing.name}))
    assert "has conv_in.weight in diffusion_pytorch_model-00002" in refused(folder)
    index.write_text(whole)
    edited(index, lambda c: c["weight_map"].pop("conv_in.weight"))
    assert "has conv_in.weight in no file, but it is in" in refused(folder)
    index.write_text(whole)
    edited(index, lambda c: c["weight_map"].update({"more": missing.name}))
    assert "but it is in none of them" in refused(folder)
    index.write_text("{}")
    assert f"{index}: has no weight_map; get the folder again" in refused(folder)
    index.write_text(whole)
    missing.unlink()
    assert f"{missing}: is missing; get the folder again" in refused(folder)


@pytest.mark.parametrize(
    ("component", "name", "shape", "message"),
    [
        ("unet", "conv_in.bias", None, "lacks unet/conv_in.bias; get"),
        ("vae", "quant_conv.bias", (3,), "vae/quant_conv.bias (3,) instead of (8,); get"),
        ("unet", "conv_in.extra", (3,), "does not have: unet/conv_in.extra; get"),
        ("text_encoder_2", "text_projection.weight", None, "text_encoder_2/text_projection.weight"),
        (
            "text_encoder_2",
            "text_model.encoder.layers.1.self_attn.k_proj.bias",
            (31,),
            "layers.1.self_attn.k_proj.bias (31,) instead of (32,); get",
        ),
    ],
    ids=["missing", "misshapen", "unexpected", "transposed", "fused"],
)
def test_a_tensor_at_fault_is_told_as_the_folder_spells_it(folder, component, name, shape, message):
    def change(arrays: Arrays) -> None:
        arrays.pop(name, None)
        if shape is not None:
            arrays[name] = np.zeros(shape, np.float32)

    rewritten(folder / component / f"{stem(component)}.safetensors", change)
    assert message in refused(folder)
    assert refused(folder).startswith(f"{folder}: ")


def test_a_tensor_spelled_twice_is_named(folder):
    def change(arrays: Arrays) -> None:
        name = "final_layer_norm.bias"
        arrays[name] = arrays[f"text_model.{name}"]

    rewritten(folder / "text_encoder" / "model.safetensors", change)
    assert re.search(
        r"does not have: text_encoder/(text_model\.)?final_layer_norm\.bias; get", refused(folder)
    )


def test_every_fault_is_told_at_once(folder):
    rewritten(
        folder / "unet" / "diffusion_pytorch_model.safetensors", lambda a: a.pop("conv_in.bias")
    )
    rewritten(
        folder / "vae" / "diffusion_pytorch_model.safetensors", lambda a: a.pop("quant_conv.bias")
    )
    assert "lacks unet/conv_in.bias, vae/quant_conv.bias; get" in refused(folder)


def test_a_folder_of_pickles_is_refused(folder):
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"):
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        torch_zip(folder / "unet" / name)
        assert f"{folder / 'unet' / name}: may hold code that runs" in refused(folder)
        (folder / "unet" / name).unlink()
    assert f"{folder / 'unet'}: has no diffusion_pytorch_model.safetensors" in refused(folder)


def test_a_damaged_folder_is_named(folder):
    unet = folder / "unet" / "config.json"
    whole = unet.read_text()
    unet.write_text("[]")
    assert f"{unet}: is no JSON object; get the folder again" in refused(folder)
    unet.write_text("{")
    assert f"{unet}: can't be read as JSON (" in refused(folder)
    unet.unlink()
    assert f"{unet}: is missing, and model_index.json names unet" in refused(folder)
    unet.write_text(whole)
    (folder / "model_index.json").write_text('{"unet": [null, null]}')
    assert "model_index.json: names none of unet, vae," in refused(folder)


def test_precisions_that_make_one_tensor_must_be_equal(folder):
    def change(arrays: Arrays) -> None:
        name = "text_model.encoder.layers.1.self_attn.k_proj.bias"
        arrays[name] = arrays[name].astype(np.float16)

    rewritten(folder / "text_encoder_2" / "model.safetensors", change)
    assert "make one tensor, but are stored as fp16, fp32; save the folder in one" in refused(
        folder
    )


def test_positions_in_a_text_encoder_are_left_out(folder, small_model):
    """Older versions of transformers saved them."""
    for component in ("text_encoder", "text_encoder_2"):
        rewritten(
            folder / component / "model.safetensors",
            lambda a: a.update({"text_model.embeddings.position_ids": np.arange(77)[None]}),
        )
    source = open_weights(folder)
    assert_equal(source, made_up(small_model))
    assert any("position_ids left out: positions, not weights" in note for note in source.notes)


@pytest.mark.parametrize("kernels", [False, True])
def test_an_autoencoder_of_older_versions_is_read(folder, small_model, kernels):
    """Its attention under other names, as matrices or as 1x1 kernels."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(arrays: Arrays) -> None:
        for name in [each for each in arrays if ".attentions.0." in each]:
            array = arrays.pop(name)
            for new, old in names.items():
                name = name.replace(f".{new}.", f".{old}.")
            is_kernel = kernels and array.ndim == 2
            arrays[name] = array[:, :, None, None].copy() if is_kernel else array

    rewritten(folder / "vae" / "diffusion_pytorch_model.safetensors", change)
    assert_equal(open_weights(folder), made_up(small_model))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_one_component_is_read(folder, small_model, component):
    prefix = {
        "unet": UNET,
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
    }[component]
    part = {n: a for n, a in small_model.arrays.items() if n.startswith(prefix)}
    assert_equal(open_weights(folder / component), part)


def test_a_component_that_is_none_of_sdxl_s_is_refused(folder):
    for component in ("unet", "text_encoder_2"):
        where = folder / component
        edited(where / "config.json", lambda c: c.update({"_class_name": "FluxTransformer"}))
    assert "describes FluxTransformer, which is no part of SDXL" in refused(folder / "unet")


def test_the_second_text_encoder_alone_is_refused(folder):
    """Its place is the second in the base and the first in the refiner."""
    said = refused(folder / "text_encoder_2")
    assert "text_encoder_2" in said
    assert "give the whole folder" in said


@pytest.mark.parametrize(
    ("change", "metadata"),
    [
        ({"prediction_type": "v_prediction"}, {"sdxl_host.objective": "v"}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"sdxl_host.objective": "v", "ztsnr": "true"},
        ),
        ({"_class_name": "EDMEulerScheduler"}, {"sdxl_host.objective": "edm"}),
    ],
)
def test_the_scheduler_states_the_objective(folder, change, metadata):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    edited(scheduler, lambda c: c.update(change))
    edited(folder / "vae" / "config.json", lambda c: c.update({"scaling_factor": 0.5}))
    found = dict(open_weights(folder).metadata)
    if metadata["sdxl_host.objective"] == "edm":
        assert json.loads(found.pop("sdxl_host.scheduler")) == json.loads(scheduler.read_text())
    assert found == {"sdxl_host.scale_factor": "0.5", **metadata}


def test_an_unknown_prediction_is_refused(folder):
    edited(
        folder / "scheduler" / "scheduler_config.json", lambda c: c.update(prediction_type="sample")
    )
    assert "prediction_type 'sample' is not known; it must be epsilon or" in refused(folder)


# ---- checkpoints of this program


CONFIG = {
    "model": {
        "params": {
            "scale_factor": 0.25,
            "network_config": {"params": {"num_head_channels": 8}},
            "conditioner_config": {
                "params": {
                    "emb_models": [
                        {"input_key": "txt", "params": {"width": 16, "layers": 2, "heads": 2}},
                        {"input_key": "txt", "params": {"width": 32, "layers": 2, "heads": 8}},
                        {"input_key": "original_size_as_tuple", "params": {"outdim": 16}},
                    ]
                }
            },
        }
    },
    "plugins": {"edm": {"sigma_data": 0.7}, "lpw": {"max_length": 225}},
}
RECORD = {
    "preconditioning": "edm",
    "hooks": {"build_model": "edm", "encode_prompt": "lpw"},
    "size": [64, 96],
    "original_size": [64, 96],
}


@pytest.fixture
def checkpoint(small_model, tmp_path) -> Path:
    from sdxl_host.checkpoints.write import Contents, save_checkpoint

    arrays = {n: a for n, a in small_model.arrays.items() if n != POSITIONS}
    contents = Contents(
        step=7,
        config=yaml.safe_dump(CONFIG),
        network={n: a for n, a in arrays.items() if n.startswith(UNET)},
        frozen={n: a for n, a in arrays.items() if not n.startswith(UNET)},
        averages={},
        optimizer={"m": np.zeros(1, np.float32)},
        counts={"skipped": 0, "skipped_in_a_row": 0},
        plugin_states={},
        plugins=[
            {"name": "edm", "distribution": "sdxl-edm", "version": "0.1.0"},
            {"name": "lpw", "distribution": "sdxl-lpw", "version": "0.1.0"},
        ],
        record=RECORD,
    )
    return save_checkpoint(tmp_path / "checkpoints", contents)


def test_a_checkpoint_is_read(checkpoint, small_model):
    """Also through `latest`, the link to the newest."""
    for path in (checkpoint, checkpoint.parent / "latest"):
        source = open_weights(path)
        assert_equal(source, small_model.arrays)
        assert source.description == f"{path} (checkpoint of step 7)"
        assert source.architecture is not None
        assert source.architecture.unet == small_model.architecture.unet
        assert source.architecture.encoders == (
            Encoder("clip", 16, 2, heads=2),
            Encoder("open_clip", 32, 2, heads=8),
        )


def test_a_checkpoint_says_what_it_was_trained_for(checkpoint):
    metadata = dict(open_weights(checkpoint).metadata)
    plugins = json.loads(metadata.pop("sdxl_host.plugins"))
    prompts = json.loads(metadata.pop("sdxl_host.prompts"))
    assert plugins == [
        {
            "name": "edm",
            "distribution": "sdxl-edm",
            "version": "0.1.0",
            "options": {"sigma_data": 0.7},
        },
        {
            "name": "lpw",
            "distribution": "sdxl-lpw",
            "version": "0.1.0",
            "options": {"max_length": 225},
        },
    ]
    assert prompts == {"encode_prompt": "lpw", "options": {"lpw": {"max_length": 225}}}
    assert metadata == {
        "sdxl_host.objective": "edm",
        "sdxl_host.scale_factor": "0.25",
        "modelspec.resolution": "96x64",
    }


def test_a_changed_checkpoint_is_refused(checkpoint):
    file = checkpoint / "frozen.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "frozen.safetensors: was changed or damaged; use an earlier" in refused(checkpoint)


# ---- several


def test_later_sources_replace_earlier_ones(single, folder, small_model, tmp_path):
    """A trained U-Net over the file it came from."""
    unet = {n: a + 1 for n, a in small_model.arrays.items() if n.startswith(UNET)}
    trained = save_mindspore(tmp_path / "unet_500.ckpt", unet)
    source = open_all([single, trained])
    assert_equal(source, {**small_model.arrays, **unet})
    assert source.description == f"{single} (single file), {trained} (MindSpore checkpoint)"
    assert source.notes == (
        f"{len(unet)} tensors of {trained} (MindSpore checkpoint) replace earlier ones",
    )
    assert source.architecture is None
    assert_equal(open_all([trained, single]), small_model.arrays)
    assert open_all([folder, trained]).architecture == small_model.architecture
    assert open_all([trained, folder]).architecture == small_model.architecture


def test_a_later_source_may_be_of_another_precision_or_shape(single, tmp_path):
    """It is the later one that is then compared."""
    name = f"{UNET}out.2.bias"
    for later in (np.zeros(4, np.float16), np.zeros(9, np.float32)):
        save_file({name: later}, tmp_path / "later.safetensors")
        found = open_all([single, tmp_path / "later.safetensors"])
        assert found.shapes[name] == later.shape
        assert found.read(name).dtype == later.dtype == DTYPES[found.dtypes[name]]


def test_what_is_made_up_replaces_nothing(single, folder, small_model):
    """A folder that has no logit_scale over a file that has one."""
    assert_equal(open_all([single, folder]), small_model.arrays)


def test_parts_make_a_whole(folder, small_model, tmp_path):
    text = {n: a for n, a in small_model.arrays.items() if n.startswith("conditioner.")}
    save_file(text, tmp_path / "text.safetensors")
    source = open_all([tmp_path / "text.safetensors", folder / "unet", folder / "vae"])
    assert_equal(source, small_model.arrays)


def test_a_part_that_one_source_states_stays_stated(folder, small_model, tmp_path):
    """The U-Net's heads, of a folder that is the U-Net alone, beside a file that states nothing."""
    rest = {n: a for n, a in small_model.arrays.items() if not n.startswith(UNET)}
    save_file(rest, tmp_path / "rest.safetensors")
    unet = Architecture(small_model.architecture.unet, None, ())
    for order in ((0, 1), (1, 0)):
        paths = [(folder / "unet", tmp_path / "rest.safetensors")[place] for place in order]
        assert open_all(paths).architecture == unet
    whole = open_all([folder / "vae", tmp_path / "rest.safetensors", folder / "text_encoder"])
    assert whole.architecture == Architecture(
        None, small_model.architecture.autoencoder, small_model.architecture.encoders[:1]
    )


def test_two_descriptions_of_one_model_agree(folder, small_model, tmp_path):
    """diffusers writes some depth, often 1, for a level without attention, where there is none."""
    assert small_model.architecture.unet["transformer_depth"] == [0, 1]
    said = json.dumps(asdict(small_model.architecture))
    save_file(small_model.arrays, tmp_path / "a.safetensors", {"sdxl_host.architecture": said})
    edited(folder / "unet" / "config.json", lambda c: c.update(transformer_layers_per_block=[1, 1]))
    found = open_all([tmp_path / "a.safetensors", folder]).architecture
    assert found is not None
    assert found.unet is not None
    assert found.unet["transformer_depth"] == [1, 1]


EMPTY = np.zeros(0, np.float32)


@pytest.fixture
def of(small_model, tmp_path) -> Callable[..., Path]:
    """Makes NAME.safetensors of one part, which says `metadata`."""

    def make(name: str, part: str, metadata: Mapping[str, str], *markers: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        arrays = {n: a for n, a in small_model.arrays.items() if n.startswith(part)}
        save_file({**arrays, **dict.fromkeys(markers, EMPTY)}, path, dict(metadata))
        return path

    return make


def objectives(source: Source) -> dict[str, str]:
    """What a source says of the U-Net."""
    return {key: value for key, value in source.metadata.items() if key in NETWORK_KEYS}


def test_the_last_u_net_says_what_it_predicts(folder, of):
    """A marked v model over a folder whose scheduler says epsilon, and the other way around."""
    v = of("v", "", {}, "v_pred", "ztsnr")
    found = open_all([folder, v])
    assert objectives(found) == {"v_pred": "true", "ztsnr": "true"}
    assert markers(found.metadata) == ["v_pred", "ztsnr"]
    assert not any("states no objective" in note for note in found.notes)
    found = open_all([v, folder])
    assert objectives(found) == {"sdxl_host.objective": "eps"}
    assert markers(found.metadata) == []
    spec = of("spec", UNET, {"modelspec.prediction_type": "epsilon", "modelspec.title": "Spec"})
    found = open_all([v, spec])
    assert objectives(found) == {"modelspec.prediction_type": "epsilon"}
    assert found.metadata["modelspec.title"] == "Spec"


def test_how_a_u_net_was_trained_goes_with_it(of):
    """Not with what another U-Net was trained for."""
    edm = {
        "sdxl_host.objective": "edm",
        "sdxl_host.plugins": '[{"name": "edm"}]',
        "sdxl_host.prompts": '{"encode_prompt": "lpw"}',
        "sdxl_host.scheduler": '{"_class_name": "EDMEulerScheduler"}',
    }
    first, eps = of("edm", "", edm), of("eps", UNET, {"sdxl_host.objective": "eps"})
    assert objectives(open_all([first])) == edm
    assert objectives(open_all([first, eps])) == {"sdxl_host.objective": "eps"}
    assert objectives(open_all([eps, first])) == edm
    # A U-Net that states nothing was trained on with what it was trained with before.
    assert objectives(open_all([first, of("plain", UNET, {})])) == edm


def test_an_objective_is_taken_over_where_none_is_stated(of):
    v, plain = of("v", "", {}, "v_pred"), of("plain", UNET, {"modelspec.title": "Plain"}, "ztsnr")
    found = open_all([v, plain])
    assert objectives(found) == {"v_pred": "true", "ztsnr": "true"}
    assert found.metadata["modelspec.title"] == "Plain"
    assert found.notes[-1] == (
        f"{plain} (single file) states no objective; that of {v} (single file), v, is taken"
    )
    assert sum("states no objective" in note for note in found.notes) == 1
    # Nothing is said where a later one states it, or where none does.
    for paths in ([v, plain, v], [plain, v], [plain, of("other", UNET, {})], [plain]):
        assert not any("states no objective" in note for note in open_all(paths).notes)


def test_what_has_no_u_net_says_nothing_of_it(of):
    v = of("v", "", {}, "v_pred")
    text = of("text", "conditioner.", {"sdxl_host.objective": "eps", "modelspec.title": "Text"})
    plain = of("plain", UNET, {})
    found = open_all([v, text])
    assert objectives(found) == {"v_pred": "true"}
    assert found.metadata["modelspec.title"] == "Text"
    assert objectives(open_all([v, text, plain])) == {"v_pred": "true"}
    assert objectives(open_all([plain, text])) == {}
    # Unless it is all that is said, before the U-Net: then the user is told.
    found = open_all([of("clip", "conditioner.", {"sdxl_host.objective": "v"}), plain])
    assert objectives(found) == {"sdxl_host.objective": "v"}
    assert "clip.safetensors (single file), v, is taken" in found.notes[-1]


def test_the_scale_of_latents_is_the_autoencoder_s(folder, of):
    edited(folder / "vae" / "config.json", lambda c: c.update(scaling_factor=0.5))
    scale = "sdxl_host.scale_factor"
    unet = of("unet", UNET, {scale: "0.13025"})
    whole = of("whole", "", {scale: "0.25"})
    plain = of("plain", "first_stage_model.", {})
    for paths, expected in (
        ([folder, unet], "0.5"),
        ([unet, folder], "0.5"),
        ([folder, whole], "0.25"),
        ([whole, folder, plain], "0.5"),
        ([plain, unet], "0.13025"),
    ):
        assert open_all(paths).metadata[scale] == expected
    assert scale not in open_all([plain]).metadata


def test_two_sizes_are_refused(folder, small_model, tmp_path):
    other = shutil.copytree(folder / "unet", tmp_path / "other")
    edited(other / "config.json", lambda c: c.update(attention_head_dim=[4, 4]))
    with pytest.raises(DataError, match=r"other.*: its unet differs in size from that of .*pipe"):
        open_all([folder, other])


# ---- lightness


def test_reading_imports_neither_mindspore_nor_torch(single):
    """Opening a file to tell what it is takes no seconds."""
    code = (
        "import sys; from pathlib import Path; "
        "from sdxl_host.weights.open import open_weights; "
        f"source = open_weights(Path({str(single)!r})); "
        "print(len(source.shapes), sorted({'mindspore', 'torch'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sdxl_host.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{len(load_file(single))} []\n"


def test_crc_of_zlib_is_that_of_mindspore(device, tmp_path):
    """The check sum is over all bytes before its mark."""
    path = save_mindspore(tmp_path / "a.ckpt", {"x": np.zeros(3, np.float32)}, crc_check=True)
    content = path.read_bytes()
    assert zlib.crc32(content[:-17]) == int.from_bytes(content[-10:], "big")
