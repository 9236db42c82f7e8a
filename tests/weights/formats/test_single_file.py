"""The single file in safetensors, and what other programs add to it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.weights import POSITIONS, UNET, cast

from sdxl_host.errors import DataError
from sdxl_host.weights.open import open_weights

FLOATS = ("fp16", "bf16", "fp32")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_single_file_is_read(assert_equal, small_model, tmp_path, dtype):
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


def test_what_other_programs_add_is_left_out_and_told(assert_equal, small_model, tmp_path):
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


def test_markers_become_metadata(assert_equal, small_model, tmp_path):
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


def test_our_metadata_states_the_architecture(refused, small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    text = json.dumps(asdict(small_model.architecture))
    save_file(small_model.arrays, path, metadata={"sdxl_host.architecture": text})
    assert open_weights(path).architecture == small_model.architecture
    save_file(small_model.arrays, path, metadata={"sdxl_host.architecture": text[:-3]})
    assert "metadata sdxl_host.architecture is damaged" in refused(path)


@pytest.mark.parametrize("kept", [0, 5, 60, -4], ids=str)
def test_a_truncated_file_is_named(refused, single, kept):
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


def test_a_precision_that_is_not_read_is_named(refused, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x.weight": np.zeros(4, ml_dtypes.float8_e4m3fn)}, path)
    assert "x.weight is stored as F8_E4M3, and only F16, BF16," in refused(path)
