"""Checkpoints of MindSpore and MindONE, under the single file's names."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from support.weights import POSITIONS, UNET, cast

from sdxl_host.weights.open import open_weights

NORM = re.compile(
    r"((in_layers|out_layers)\.0|\.out\.0|\.norm\d?|norm_out|layer_norm\d?|\.ln_(\d|final))\.\w+$"
)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_mindspore_checkpoint_is_read(assert_equal, save_mindspore, small_model, tmp_path, dtype):
    arrays = cast(small_model.arrays, dtype)
    source = open_weights(save_mindspore(tmp_path / "SDXL-base-1.0_500.ckpt", arrays))
    assert_equal(source, arrays)
    assert source.description.endswith("SDXL-base-1.0_500.ckpt (MindSpore checkpoint)")
    assert source.notes == (f"{POSITIONS} added: 0 to 76, as it always is",)


def test_bfloat16_of_mindspore_is_read(assert_equal, save_mindspore, device, tmp_path):
    import mindspore as ms

    array = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    path = save_mindspore(tmp_path / "a.ckpt", {"x": array})
    ms.save_checkpoint([{"name": "x", "data": ms.Tensor(array, ms.bfloat16)}], str(path))
    assert_equal(open_weights(path), {"x": array.astype(ml_dtypes.bfloat16)})


@pytest.mark.parametrize("start", ["model.diffusion_model.", "diffusion_model."])
def test_a_unet_alone_is_read(assert_equal, save_mindspore, small_model, tmp_path, start):
    """`unet_500.ckpt` of training from a cache, and `_backbone` of MindONE's wrappers."""
    unet = {n: a for n, a in small_model.arrays.items() if n.startswith(UNET)}
    written = {f"{start}_backbone.{name[len(UNET) :]}": array for name, array in unet.items()}
    source = open_weights(save_mindspore(tmp_path / "unet_500.ckpt", written))
    assert_equal(source, unet)
    assert source.notes == ()


def test_split_tensors_are_joined(assert_equal, save_mindspore, device, tmp_path, monkeypatch):
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


def test_the_check_sum_is_checked(assert_equal, refused, save_mindspore, device, tmp_path):
    arrays = {"a.weight": np.arange(20, dtype=np.float32)}
    path = save_mindspore(tmp_path / "a.ckpt", arrays, crc_check=True)
    assert path.read_bytes()[-17:-10] == b"crc_num"
    assert_equal(open_weights(path), arrays)
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    assert "can't be read as a checkpoint of MindSpore (its check sum does not fit)" in refused(
        path
    )


def test_text_and_counters_are_left_out(assert_equal, save_mindspore, device, tmp_path):
    """What MindSpore's own callbacks append."""
    array = np.ones(3, np.float32)
    extra = {"epoch_num": 3, "step_num": 7, "note": "some text"}
    path = save_mindspore(tmp_path / "a.ckpt", {"x": array}, append_dict=extra)
    source = open_weights(path)
    assert_equal(source, {"x": array})
    assert source.notes == ("epoch_num, note, step_num left out: not weights",)


@pytest.mark.parametrize("kept", [0, 1, 30, 1000, -1])
def test_a_truncated_checkpoint_is_named(refused, save_mindspore, small_model, tmp_path, kept):
    path = save_mindspore(tmp_path / "a.ckpt", small_model.arrays)
    path.write_bytes(path.read_bytes()[:kept])
    assert re.match(r".*a\.ckpt: can't be read as a checkpoint of MindSpore .*again", refused(path))


@pytest.mark.parametrize(
    "content",
    [b"<html>404</html> " * 20, b"\x0a" + b"\xff" * 400],
    ids=["html", "varint"],
)
def test_a_ckpt_of_something_else_is_named(refused, tmp_path, content):
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
        (b"\x12\x02hi", "byte 2 does not begin a tensor"),
        (b"\x0a\x03\x0a\x01x", "the value at byte 2 has no name or no precision"),
    ],
    ids=["field", "empty"],
)
def test_another_message_of_protobuf_is_named(refused, tmp_path, content, message):
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
def test_a_contradictory_checkpoint_is_named(refused, device, tmp_path, values, message):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"".join(value(*each) for each in values))
    assert message in refused(path)


def test_a_single_number_of_older_versions_is_read(assert_equal, device, tmp_path):
    """Whose only axis is written as 0 long."""
    path = tmp_path / "a.ckpt"
    path.write_bytes(value("x", np.array(4.6, np.float32), "Float32", (0,)))
    assert_equal(open_weights(path), {"x": np.array(4.6, np.float32)})


def test_packed_dims_are_read(assert_equal, device, tmp_path):
    """A writer of protobuf may store the numbers of a list in one field."""
    tensor = b"\x0a\x03\x02\xac\x02" + b"\x12\x05Int32" + b"\x1a\xe0\x12" + bytes(2400)
    entry = b"\x0a\x01x" + b"\x12" + bytes([0x80 | len(tensor) & 0x7F, len(tensor) >> 7]) + tensor
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"\x0a" + bytes([0x80 | len(entry) & 0x7F, len(entry) >> 7]) + entry)
    assert_equal(open_weights(path), {"x": np.zeros((2, 300), np.int32)})


def test_a_map_is_refused(refused, device, tmp_path):
    from mindspore.train.checkpoint_pb2 import Checkpoint

    message = Checkpoint()
    entry = message.value.add()
    entry.tag = "table"
    entry.maptensor.tensor.add(dims=[1], tensor_type="Float32", tensor_content=b"1234")
    (tmp_path / "a.ckpt").write_bytes(message.SerializeToString())
    assert "table is a map, not a tensor" in refused(tmp_path / "a.ckpt")
