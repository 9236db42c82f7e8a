"""Opening weights: by their kind, several as one, and what files may lack."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sdxl_host
from sdxl_host.errors import DataError
from sdxl_host.files.tensors import DTYPES
from sdxl_host.weights.architecture import Architecture
from sdxl_host.weights.metadata import NETWORK_KEYS, markers
from sdxl_host.weights.open import open_all, open_weights
from sdxl_host.weights.source import Source

Arrays = dict[str, np.ndarray]
UNET = "model.diffusion_model."
POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"


def test_what_is_no_trained_weight_is_made_up(assert_equal, rewritten, single, small_model):
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
def test_damaged_positions_are_replaced(assert_equal, rewritten, single, small_model, damaged):
    rewritten(single, lambda arrays: arrays.update({POSITIONS: damaged}))
    source = open_weights(single)
    assert_equal(source, small_model.arrays)
    assert source.notes == (f"{POSITIONS} replaced: it is not 0 to 76 in int64",)


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "model.pt", "m.pth", "m"])
def test_torch_files_are_refused(refused, torch_zip, tmp_path, name):
    """A zip archive, and a bare pickle; whatever they are called."""
    path = tmp_path / name
    torch_zip(path)
    expected = rf"{re.escape(str(path))}: is a file of torch, which may hold code .*; convert it"
    assert re.match(expected, refused(path))
    for protocol in range(2, 6):
        path.write_bytes(bytes([0x80, protocol]) + b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
        assert re.match(expected, refused(path))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_suffix_of_torch_is_refused_whatever_is_inside(refused, single, suffix):
    path = single.rename(single.with_suffix(suffix))
    assert "is a file of torch" in refused(path)


def test_a_torch_file_called_safetensors_is_not_read_either(refused, torch_zip, tmp_path):
    path = tmp_path / "model.safetensors"
    torch_zip(path)
    assert "can't be read as safetensors" in refused(path)


def test_other_things_are_named(refused, tmp_path):
    assert "there is no such file or folder; give a .safetensors file," in refused(tmp_path / "no")
    (tmp_path / "model.onnx").write_bytes(b"onnx" * 9)
    assert "model.onnx: is of no kind that is read; give a" in refused(tmp_path / "model.onnx")
    assert "has no model_index.json, config.json or state.json; give" in refused(tmp_path)


NORM = re.compile(
    r"((in_layers|out_layers)\.0|\.out\.0|\.norm\d?|norm_out|layer_norm\d?|\.ln_(\d|final))\.\w+$"
)


def stem(component: str) -> str:
    return "model" if component.startswith("text") else "diffusion_pytorch_model"


def test_later_sources_replace_earlier_ones(
    assert_equal, save_mindspore, single, folder, small_model, tmp_path
):
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


def test_what_is_made_up_replaces_nothing(assert_equal, single, folder, small_model):
    """A folder that has no logit_scale over a file that has one."""
    assert_equal(open_all([single, folder]), small_model.arrays)


def test_parts_make_a_whole(assert_equal, folder, small_model, tmp_path):
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


def test_two_descriptions_of_one_model_agree(edited, folder, small_model, tmp_path):
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
    return {key: text for key, text in source.metadata.items() if key in NETWORK_KEYS}


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


def test_the_scale_of_latents_is_the_autoencoder_s(edited, folder, of):
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


def test_two_sizes_are_refused(edited, folder, small_model, tmp_path):
    other = shutil.copytree(folder / "unet", tmp_path / "other")
    edited(other / "config.json", lambda c: c.update(attention_head_dim=[4, 4]))
    with pytest.raises(DataError, match=r"other.*: its unet differs in size from that of .*pipe"):
        open_all([folder, other])


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
