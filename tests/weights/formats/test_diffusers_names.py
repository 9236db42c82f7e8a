"""Names in the single file and in a diffusers folder, against names made elsewhere."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_host.errors import DataError
from sdxl_host.weights.architecture import SDXL_BASE, SDXL_REFINER, Architecture, Encoder
from sdxl_host.weights.formats.diffusers_configs import from_diffusers
from sdxl_host.weights.formats.diffusers_names import (
    DiffusersTensor,
    diffusers_tensors,
    join,
    match,
    split,
    split_shapes,
)
from sdxl_host.weights.shapes import expected_shapes

REFERENCE = Path(__file__).parents[2] / "reference"
SMALL = ("two_levels", "three_levels", "middle_only", "small_refiner")

FUSED = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
PROJECTION = "conditioner.embedders.1.model.text_projection"
SCALE = "conditioner.embedders.1.model.logit_scale"
POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
ATTENTION = "first_stage_model.decoder.mid.attn_1.q.weight"

Shapes = dict[str, tuple[int, ...]]


def table(name: str) -> dict[str, str]:
    """The two columns of a reference file."""
    with gzip.open(REFERENCE / f"{name}.tsv.gz", "rt", encoding="utf-8") as file:
        return dict(line.rstrip("\n").split("\t") for line in file)


def shape_table(name: str) -> Shapes:
    return {key: tuple(json.loads(shape)) for key, shape in table(name).items()}


@pytest.fixture(scope="module")
def by_config() -> dict[str, Any]:
    """What diffusers builds: `by_config["refiner"]["shapes"]["unet"]["conv_in.weight"]`."""
    with gzip.open(REFERENCE / "keys_by_config.json.gz") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def small(by_config: dict[str, Any]) -> Architecture:
    return from_diffusers(by_config["two_levels"]["configs"])


def in_diffusers(architecture: Architecture, shapes: Shapes) -> Shapes:
    """The folder that single-file shapes are split into."""
    found: Shapes = {}
    for name, parts in diffusers_tensors(architecture).items():
        for place, shape in zip(parts, split_shapes(name, shapes[name]), strict=True):
            assert str(place) not in found, "two tensors have one place"
            found[str(place)] = shape
    return found


def folder(architecture: Architecture) -> list[DiffusersTensor]:
    return [place for parts in diffusers_tensors(architecture).values() for place in parts]


def test_the_single_file_has_these_2515_names() -> None:
    expected = table("sdxl_base_keys")
    assert len(expected) == 2515
    assert diffusers_tensors(SDXL_BASE).keys() == expected.keys()


def test_the_diffusers_folder_has_these_2641_names_and_shapes() -> None:
    expected = shape_table("sdxl_diffusers_keys")
    assert len(expected) == 2641
    assert in_diffusers(SDXL_BASE, shape_table("sdxl_base_keys")) == expected


def test_every_name_is_mapped_as_in_the_reference() -> None:
    mapped = {
        str(place): name for name, parts in diffusers_tensors(SDXL_BASE).items() for place in parts
    }
    assert mapped == table("sdxl_name_map")


def test_a_whole_folder_makes_the_single_file() -> None:
    shapes = shape_table("sdxl_diffusers_keys")
    found = match([DiffusersTensor(*name.split("/", 1)) for name in shapes], SDXL_BASE)
    # Numbers take no memory here, where each is a view of one.
    joined = {
        name: join(name, [np.broadcast_to(np.int8(0), shapes[str(part)]) for part in parts]).shape
        for name, parts in found.tensors.items()
    }
    single = shape_table("sdxl_base_keys")
    assert single.keys() - joined.keys() == {SCALE, POSITIONS}
    assert single == joined | {name: single[name] for name in (SCALE, POSITIONS)}
    assert not found.constants
    # The reverse of the same rule, not only as large: every part stands in its order.
    assert found.tensors == {
        name: parts for name, parts in diffusers_tensors(SDXL_BASE).items() if parts
    }


@pytest.mark.parametrize("name", ["refiner", *SMALL])
def test_other_models_have_the_names_and_shapes_that_diffusers_builds(
    by_config: dict[str, Any], device: str, name: str
) -> None:
    architecture = from_diffusers(by_config[name]["configs"])
    assert (architecture == SDXL_REFINER) == (name == "refiner")
    shapes = expected_shapes(architecture)
    assert diffusers_tensors(architecture).keys() == shapes.keys()
    assert in_diffusers(architecture, shapes) == {
        f"{component}/{key}": tuple(shape)
        for component, state in by_config[name]["shapes"].items()
        for key, shape in state.items()
    }


def test_the_refiners_only_encoder_is_the_first_embedder_and_text_encoder_2() -> None:
    named = diffusers_tensors(SDXL_REFINER)
    assert named["conditioner.embedders.0.model.text_projection"] == (
        DiffusersTensor("text_encoder_2", "text_projection.weight"),
    )
    assert not any(place.component == "text_encoder" for place in folder(SDXL_REFINER))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_splitting_and_joining_gives_the_same_bits(
    small: Architecture, device: str, dtype: type
) -> None:
    """uint16 stands for bfloat16's bits."""
    random = np.random.default_rng(1)
    named = diffusers_tensors(small)
    for name, shape in expected_shapes(small).items():
        array = random.integers(0, 1000, shape).astype(dtype)
        parts = split(name, array)
        assert [part.shape for part in parts] == split_shapes(name, shape)
        assert len(parts) == len(named[name])
        assert all(part.dtype == dtype for part in parts)
        if parts:
            back = join(name, parts)
            assert back.dtype == dtype
            np.testing.assert_array_equal(back, array)


def test_a_fused_projection_is_query_key_and_value_in_turn() -> None:
    fused = np.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(np.stack(split(FUSED, fused)), fused.reshape(3, 2, 2))
    prefix = "text_model.encoder.layers.0.self_attn."
    assert diffusers_tensors(SDXL_BASE)[FUSED] == tuple(
        DiffusersTensor("text_encoder_2", f"{prefix}{each}_proj.weight") for each in "qkv"
    )


def test_the_text_projection_is_transposed() -> None:
    matrix = np.arange(6).reshape(2, 3)
    (parted,) = split(PROJECTION, matrix)
    np.testing.assert_array_equal(parted, [[0, 3], [1, 4], [2, 5]])
    assert parted.flags.c_contiguous
    np.testing.assert_array_equal(join(PROJECTION, [parted]), matrix)


def test_the_autoencoders_attention_is_a_matrix_in_diffusers() -> None:
    kernel = np.arange(6).reshape(2, 3, 1, 1)
    (matrix,) = split(ATTENTION, kernel)
    np.testing.assert_array_equal(matrix, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(join(ATTENTION, [matrix]), kernel)
    # Its bias, the other convolutions and the U-Net's transformers are as they are.
    for name, shape in (
        (ATTENTION.replace("weight", "bias"), (3,)),
        ("first_stage_model.quant_conv.weight", (8, 8, 1, 1)),
        ("model.diffusion_model.input_blocks.4.0.skip_connection.weight", (64, 32, 1, 1)),
    ):
        assert split_shapes(name, shape) == [shape]


def test_what_diffusers_lacks_has_no_place() -> None:
    assert split(SCALE, np.float32(2.6593) * np.ones(())) == []
    assert split(POSITIONS, np.arange(77)[None]) == []
    assert diffusers_tensors(SDXL_BASE)[SCALE] == diffusers_tensors(SDXL_BASE)[POSITIONS] == ()
    assert not {SCALE, POSITIONS} & match(folder(SDXL_BASE), SDXL_BASE).tensors.keys()


@pytest.mark.parametrize(
    ("component", "today", "old"),
    [
        ("text_encoder", "text_model.final_layer_norm.bias", "final_layer_norm.bias"),
        (
            "text_encoder_2",
            "text_model.encoder.layers.0.mlp.fc1.weight",
            "encoder.layers.0.mlp.fc1.weight",
        ),
        *(
            (
                "vae",
                f"{half}.mid_block.attentions.0.{today}.{kind}",
                f"{half}.mid_block.attentions.0.{old}.{kind}",
            )
            for half in ("encoder", "decoder")
            for kind in ("weight", "bias")
            for today, old in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            )
        ),
    ],
)
def test_other_spellings_are_read(
    small: Architecture, component: str, today: str, old: str
) -> None:
    new_place, old_place = DiffusersTensor(component, today), DiffusersTensor(component, old)
    listed = folder(small)
    assert new_place in listed
    found = match([old_place if each == new_place else each for each in listed], small)
    (name,) = (name for name, parts in diffusers_tensors(small).items() if new_place in parts)
    assert old_place in found.tensors[name]
    assert len([part for parts in found.tensors.values() for part in parts]) == len(listed)


def test_an_encoder_saved_by_transformers_5_is_read_whole(small: Architecture) -> None:
    listed = [
        DiffusersTensor(each.component, each.name.removeprefix("text_model."))
        for each in folder(small)
    ]
    found = match(listed, small)
    parts = [part for each in found.tensors.values() for part in each]
    assert sorted(parts) == sorted(listed)


def test_an_old_attention_kernel_is_read() -> None:
    matrix = np.arange(6).reshape(2, 3)
    for saved in (matrix, matrix[:, :, None, None]):
        np.testing.assert_array_equal(join(ATTENTION, [saved]), matrix[:, :, None, None])


def test_of_two_spellings_the_first_is_taken(small: Architecture) -> None:
    twice = DiffusersTensor("text_encoder", "final_layer_norm.bias")
    assert match([*folder(small), twice], small) == match(folder(small), small)


def test_stored_positions_are_constants(small: Architecture) -> None:
    stored = (
        DiffusersTensor("text_encoder", "text_model.embeddings.position_ids"),
        DiffusersTensor("text_encoder_2", "embeddings.position_ids"),
    )
    found = match([*folder(small), *stored], small)
    assert found.constants == stored
    without_clip = Architecture(small.unet, small.autoencoder, ())
    assert match([*folder(small), *stored], without_clip).constants == ()


def test_tensors_of_no_part_of_the_architecture_are_not_taken(small: Architecture) -> None:
    strange = (
        DiffusersTensor("unet", "conv_in.scale"),
        DiffusersTensor("unet", "down_blocks.0.attentions.0.norm.weight"),
        DiffusersTensor("vae", "text_model.final_layer_norm.bias"),
        DiffusersTensor("safety_checker", "conv_in.weight"),
    )
    assert match([*strange, *folder(small)], small) == match(folder(small), small)
    autoencoder = Architecture(None, small.autoencoder, ())
    found = match(folder(small), autoencoder)
    assert {part.component for parts in found.tensors.values() for part in parts} == {"vae"}
    assert found.tensors.keys() == diffusers_tensors(autoencoder).keys()


def test_a_tensor_that_is_not_there_whole_is_left_out(small: Architecture) -> None:
    key = DiffusersTensor("text_encoder_2", "text_model.encoder.layers.0.self_attn.k_proj.weight")
    out = DiffusersTensor("unet", "conv_out.bias")
    found = match([each for each in folder(small) if each not in (key, out)], small)
    whole = match(folder(small), small).tensors
    assert whole.keys() - found.tensors.keys() == {FUSED, "model.diffusion_model.out.2.bias"}
    assert found.tensors.items() <= whole.items()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (FUSED, (7, 2)),
        (FUSED, ()),
        (PROJECTION, (4,)),
        (ATTENTION, (4, 4)),
        (ATTENTION, (4, 4, 3, 3)),
    ],
)
def test_what_can_not_be_split_is_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=rf"^{name}: .*get the weights again$"):
        split(name, np.zeros(shape))


@pytest.mark.parametrize(
    "kinds", [("open_clip", "clip"), ("clip", "clip"), ("clip", "open_clip", "clip")]
)
def test_encoders_that_no_diffusers_folder_holds_are_refused(kinds: tuple[str, ...]) -> None:
    encoders = tuple(Encoder(kind, 32, 1, 1) for kind in kinds)
    with pytest.raises(DataError, match=r"^text encoders .*use a single file$"):
        diffusers_tensors(Architecture(None, None, encoders))
