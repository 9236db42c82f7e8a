"""A diffusers folder, or a part of it, and what is wrong with one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.weights import LOGIT_SCALE, POSITIONS, UNET, Arrays, cast

from sdxl_host.weights.open import open_weights

FLOATS = ("fp16", "bf16", "fp32")


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


def without_extra(model, dtype: str = "fp32") -> Arrays:
    """What a folder gives: all but the one number that it has no place for."""
    return {**cast(model.arrays, dtype), LOGIT_SCALE: np.array(np.log(1 / 0.07), np.float32)}


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_diffusers_folder_is_read(assert_equal, save_diffusers, small_model, tmp_path, dtype):
    arrays = cast(small_model.arrays, dtype)
    source = open_weights(save_diffusers(tmp_path / "pipeline", small_model, arrays))
    assert_equal(source, without_extra(small_model, dtype))
    assert source.description == f"{tmp_path / 'pipeline'} (diffusers folder)"
    assert source.architecture == small_model.architecture
    assert source.metadata == {"sdxl_host.scale_factor": "0.13025", "sdxl_host.objective": "eps"}
    assert sorted(source.notes) == [
        f"{POSITIONS} added: 0 to 76, as it always is",
        f"{LOGIT_SCALE} added: log(1/0.07); it has no effect on images",
    ]


def test_the_fp16_variant_is_read_where_the_plain_one_is_absent(
    assert_equal, save_diffusers, folder, small_model
):
    half = cast(small_model.arrays, "fp16")
    save_diffusers(folder, small_model, half, ".fp16")
    assert_equal(open_weights(folder), without_extra(small_model))
    for file in folder.rglob("*.safetensors"):
        if ".fp16." not in file.name:
            file.unlink()
    source = open_weights(folder)
    assert_equal(source, without_extra(small_model, "fp16"))
    assert (
        "unet: diffusion_pytorch_model.fp16.safetensors is read, as "
        "diffusion_pytorch_model.safetensors is not there"
    ) in source.notes
    assert len(source.notes) == 4 + 2


@pytest.mark.parametrize(
    "end",
    [".safetensors.index.json", ".safetensors.index.fp16.json", ".fp16.safetensors.index.json"],
)
def test_shards_are_read(assert_equal, folder, small_model, end):
    for component in ("unet", "text_encoder_2"):
        shard(folder, component, stem(component) + end)
    assert_equal(open_weights(folder), without_extra(small_model))


def test_shards_that_do_not_fit_their_index_are_named(refused, edited, folder):
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
def test_a_tensor_at_fault_is_told_as_the_folder_spells_it(
    refused, rewritten, folder, component, name, shape, message
):
    def change(arrays: Arrays) -> None:
        arrays.pop(name, None)
        if shape is not None:
            arrays[name] = np.zeros(shape, np.float32)

    rewritten(folder / component / f"{stem(component)}.safetensors", change)
    assert message in refused(folder)
    assert refused(folder).startswith(f"{folder}: ")


def test_a_tensor_spelled_twice_is_named(refused, rewritten, folder):
    def change(arrays: Arrays) -> None:
        name = "final_layer_norm.bias"
        arrays[name] = arrays[f"text_model.{name}"]

    rewritten(folder / "text_encoder" / "model.safetensors", change)
    assert re.search(
        r"does not have: text_encoder/(text_model\.)?final_layer_norm\.bias; get", refused(folder)
    )


def test_every_fault_is_told_at_once(refused, rewritten, folder):
    rewritten(
        folder / "unet" / "diffusion_pytorch_model.safetensors", lambda a: a.pop("conv_in.bias")
    )
    rewritten(
        folder / "vae" / "diffusion_pytorch_model.safetensors", lambda a: a.pop("quant_conv.bias")
    )
    assert "lacks unet/conv_in.bias, vae/quant_conv.bias; get" in refused(folder)


def test_a_folder_of_pickles_is_refused(refused, torch_zip, folder):
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"):
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        torch_zip(folder / "unet" / name)
        assert f"{folder / 'unet' / name}: may hold code that runs" in refused(folder)
        (folder / "unet" / name).unlink()
    assert f"{folder / 'unet'}: has no diffusion_pytorch_model.safetensors" in refused(folder)


def test_a_damaged_folder_is_named(refused, folder):
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


def test_precisions_that_make_one_tensor_must_be_equal(refused, rewritten, folder):
    def change(arrays: Arrays) -> None:
        name = "text_model.encoder.layers.1.self_attn.k_proj.bias"
        arrays[name] = arrays[name].astype(np.float16)

    rewritten(folder / "text_encoder_2" / "model.safetensors", change)
    assert "make one tensor, but are stored as fp16, fp32; save the folder in one" in refused(
        folder
    )


def test_positions_in_a_text_encoder_are_left_out(assert_equal, rewritten, folder, small_model):
    """Older versions of transformers saved them."""
    for component in ("text_encoder", "text_encoder_2"):
        rewritten(
            folder / component / "model.safetensors",
            lambda a: a.update({"text_model.embeddings.position_ids": np.arange(77)[None]}),
        )
    source = open_weights(folder)
    assert_equal(source, without_extra(small_model))
    assert any("position_ids left out: positions, not weights" in note for note in source.notes)


@pytest.mark.parametrize("kernels", [False, True])
def test_an_autoencoder_of_older_versions_is_read(
    assert_equal, rewritten, folder, small_model, kernels
):
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
    assert_equal(open_weights(folder), without_extra(small_model))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_one_component_is_read(assert_equal, folder, small_model, component):
    prefix = {
        "unet": UNET,
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
    }[component]
    part = {n: a for n, a in small_model.arrays.items() if n.startswith(prefix)}
    assert_equal(open_weights(folder / component), part)


def test_a_component_that_is_none_of_sdxl_s_is_refused(refused, edited, folder):
    for component in ("unet", "text_encoder_2"):
        where = folder / component
        edited(where / "config.json", lambda c: c.update({"_class_name": "FluxTransformer"}))
    assert "describes FluxTransformer, which is no part of SDXL" in refused(folder / "unet")


def test_the_second_text_encoder_alone_is_refused(refused, folder):
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
def test_the_scheduler_states_the_objective(edited, folder, change, metadata):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    edited(scheduler, lambda c: c.update(change))
    edited(folder / "vae" / "config.json", lambda c: c.update({"scaling_factor": 0.5}))
    found = dict(open_weights(folder).metadata)
    if metadata["sdxl_host.objective"] == "edm":
        assert json.loads(found.pop("sdxl_host.scheduler")) == json.loads(scheduler.read_text())
    assert found == {"sdxl_host.scale_factor": "0.5", **metadata}


def test_an_unknown_prediction_is_refused(refused, edited, folder):
    edited(
        folder / "scheduler" / "scheduler_config.json", lambda c: c.update(prediction_type="sample")
    )
    assert "prediction_type 'sample' is not known; it must be epsilon or" in refused(folder)
