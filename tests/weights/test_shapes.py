"""Names and shapes of an architecture, and the architecture of names and shapes."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_host.errors import DataError
from sdxl_host.weights.architecture import (
    SDXL_BASE,
    SDXL_REFINER,
    Architecture,
    level_depths,
)
from sdxl_host.weights.formats.diffusers_configs import from_diffusers
from sdxl_host.weights.shapes import complete, expected_shapes, infer

REFERENCE = Path(__file__).parents[1] / "reference"
SMALL = ("two_levels", "three_levels", "middle_only", "small_refiner")
NETWORK = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
CLIP = "conditioner.embedders.0."
BIG_G = "conditioner.embedders.1."
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def base() -> Shapes:
    """Names and shapes of SDXL's original single file."""
    with gzip.open(REFERENCE / "sdxl_base_keys.tsv.gz", "rt", encoding="utf-8") as file:
        lines = [line.split("\t") for line in file]
    return {name: tuple(json.loads(shape)) for name, shape in lines}


@pytest.fixture(scope="module")
def by_config() -> dict[str, Any]:
    """What diffusers builds: `by_config["refiner"]["configs"]["unet"]["act_fn"]`."""
    with gzip.open(REFERENCE / "keys_by_config.json.gz") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def two_levels(by_config: dict[str, Any]) -> Architecture:
    return from_diffusers(by_config["two_levels"]["configs"])


@pytest.fixture(scope="module")
def small_shapes(two_levels: Architecture, device: str) -> Shapes:
    return expected_shapes(two_levels)


def starting(shapes: Shapes, *prefixes: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}


def same_network(one: Architecture, other: Architecture) -> bool:
    """Equal but for the depth of levels without attention, which no tensor shows."""
    sizes = []
    for unet in (one.unet, other.unet):
        assert unet is not None
        sizes.append({**unet, "transformer_depth": level_depths(unet)})
    return sizes[0] == sizes[1] and replace(one, unet=None) == replace(other, unet=None)


@pytest.mark.usefixtures("device")
def test_the_cells_have_the_original_names_and_shapes(base: Shapes) -> None:
    assert expected_shapes(SDXL_BASE) == base


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        (NETWORK, 2_567_463_684),
        (AUTOENCODER, 83_653_863),
        (CLIP, 123_060_480 + 77),  # with the positions
        (BIG_G, 694_659_840 + 1),  # with the scale of similarities
    ],
)
def test_the_cells_have_the_published_numbers_of_parameters(prefix: str, count: int) -> None:
    shapes = starting(expected_shapes(SDXL_BASE), prefix)
    assert sum(math.prod(shape) for shape in shapes.values()) == count


@pytest.mark.usefixtures("device")
def test_the_refiner_has_as_many_parameters_as_diffusers_builds(by_config: dict[str, Any]) -> None:
    expected = expected_shapes(SDXL_REFINER)
    for prefix, component in ((NETWORK, "unet"), (AUTOENCODER, "vae")):
        state = by_config["refiner"]["shapes"][component]
        assert sum(math.prod(shape) for shape in starting(expected, prefix).values()) == sum(
            math.prod(shape) for shape in state.values()
        )


@pytest.mark.usefixtures("device")
def test_parts_that_are_not_there_have_no_shapes(two_levels: Architecture) -> None:
    only = Architecture(None, two_levels.autoencoder, ())
    assert {name.split(".")[0] for name in expected_shapes(only)} == {"first_stage_model"}
    assert expected_shapes(Architecture(None, None, ())) == {}


@pytest.mark.usefixtures("device")
def test_an_architecture_that_the_cells_refuse_is_told_by_its_key(two_levels: Architecture) -> None:
    assert two_levels.unet is not None
    narrow = Architecture({**two_levels.unet, "model_channels": 33}, None, ())
    with pytest.raises(DataError, match="model_channels must be a multiple of 32"):
        expected_shapes(narrow)


def test_the_released_files_are_recognised(base: Shapes, device: str) -> None:
    found = infer(base)
    assert found == SDXL_BASE
    assert found.unet is not SDXL_BASE.unet, "a caller may change its own"
    assert infer(expected_shapes(SDXL_REFINER)) == SDXL_REFINER


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "prefix", [NETWORK, AUTOENCODER, "conditioner."], ids=["unet", "autoencoder", "encoders"]
)
def test_one_wrong_or_missing_tensor_makes_no_other_architecture(base: Shapes, prefix: str) -> None:
    """Any one of them, by part: only so is it later named as what is wrong."""
    part = starting(base, prefix)
    expected = infer(part)
    assert expected == Architecture(
        SDXL_BASE.unet if prefix == NETWORK else None,
        SDXL_BASE.autoencoder if prefix == AUTOENCODER else None,
        SDXL_BASE.encoders if prefix == "conditioner." else (),
    )
    for name, shape in part.items():
        assert infer({**part, name: (*shape[1:], 3)}) == expected, f"{name} has another shape"
        assert infer({other: part[other] for other in part if other != name}) == expected, name


def test_a_tenth_of_wrong_tensors_is_too_many(base: Shapes, device: str) -> None:
    """Rather what the others say than a model that this is not."""
    part = starting(base, AUTOENCODER)
    for count, recognised in ((24, True), (25, False)):
        wrong = dict.fromkeys(sorted(part, reverse=True)[:count], (1,))
        if recognised:
            assert infer(part | wrong).autoencoder == SDXL_BASE.autoencoder
        else:
            with pytest.raises(DataError, match=r"post_quant_conv\.weight: has the shape"):
                infer(part | wrong)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("device")
def test_other_sizes_are_told_from_shapes(by_config: dict[str, Any], name: str) -> None:
    architecture = from_diffusers(by_config[name]["configs"])
    # Their encoders' heads are 16 wide, those of the networks 32.
    found = infer(expected_shapes(architecture), head_width=16)
    assert found.unet is not None
    assert found.unet["num_head_channels"] == 16
    found = replace(found, unet={**found.unet, "num_head_channels": 32})
    assert same_network(found, architecture)
    assert expected_shapes(found) == expected_shapes(architecture)


@pytest.mark.usefixtures("device")
def test_the_released_sizes_are_told_from_shapes_alone() -> None:
    """By the rules that other sizes are told by: another head's width is another model's."""
    for released in (SDXL_BASE, SDXL_REFINER):
        found = infer(expected_shapes(released), head_width=32)
        assert released.unet is not None
        expected = Architecture(
            {**released.unet, "num_head_channels": 32},
            released.autoencoder,
            tuple(replace(each, heads=each.heads * 2) for each in released.encoders),
        )
        assert same_network(found, expected)


@pytest.mark.usefixtures("device")
def test_a_last_level_without_attention_is_as_deep_as_the_middle(
    by_config: dict[str, Any],
) -> None:
    shapes = expected_shapes(from_diffusers(by_config["small_refiner"]["configs"]))
    unet = infer(shapes, head_width=16).unet
    assert unet is not None
    assert unet["transformer_depth"] == [0, 2, 3]
    assert unet["attention_resolutions"] == [2]


def test_a_part_alone_is_enough(small_shapes: Shapes, two_levels: Architecture) -> None:
    whole = infer(small_shapes, head_width=16)
    assert infer(starting(small_shapes, NETWORK), 16) == Architecture(whole.unet, None, ())
    assert infer(starting(small_shapes, AUTOENCODER)) == Architecture(
        None, two_levels.autoencoder, ()
    )
    assert infer(starting(small_shapes, "conditioner."), 16) == Architecture(
        None, None, two_levels.encoders
    )
    assert infer({}) == Architecture(None, None, ())


def test_names_outside_the_model_are_not_looked_at(small_shapes: Shapes) -> None:
    extras = {"denoiser.sigmas": (1000,), "model_ema.decay": (), "global_step": ()}
    assert infer(small_shapes | extras, 16) == infer(small_shapes, 16)


@pytest.mark.parametrize(
    "name",
    [
        f"{NETWORK}input_blocks.0.0.weight",
        f"{NETWORK}input_blocks.1.0.out_layers.3.weight",
        f"{NETWORK}label_emb.0.0.weight",
        f"{NETWORK}middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        f"{NETWORK}out.2.weight",
        f"{AUTOENCODER}decoder.conv_in.weight",
        f"{AUTOENCODER}decoder.conv_out.weight",
        f"{AUTOENCODER}encoder.conv_in.weight",
        f"{AUTOENCODER}encoder.conv_out.weight",
        f"{AUTOENCODER}encoder.down.1.block.0.conv1.weight",
        f"{AUTOENCODER}post_quant_conv.weight",
        f"{CLIP}transformer.text_model.embeddings.token_embedding.weight",
        f"{BIG_G}model.token_embedding.weight",
    ],
)
def test_a_tensor_that_a_size_is_read_from_is_needed(small_shapes: Shapes, name: str) -> None:
    assert name in small_shapes
    with pytest.raises(DataError, match=rf"^{name}: missing, .*get them again$"):
        infer({other: small_shapes[other] for other in small_shapes if other != name}, 16)
    with pytest.raises(DataError, match=rf"^{name}: has the shape \(5,\)"):
        infer({**small_shapes, name: (5,)}, 16)


def test_any_other_tensor_of_a_small_model_can_go(small_shapes: Shapes) -> None:
    """Loading will name it: the sizes are as with it, or it is named here."""
    whole = infer(small_shapes, 16)
    for name in small_shapes:
        rest = {other: small_shapes[other] for other in small_shapes if other != name}
        named = None
        try:
            assert infer(rest, 16) == whole, name
        except DataError as error:
            named = str(error).partition(":")[0]
        assert named in (None, name)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (f"{NETWORK}input_blocks.1.", r"input_blocks\.1: missing, with all"),
        (f"{NETWORK}input_blocks.2.", r"input_blocks\.2: missing, with all"),
        (f"{NETWORK}input_blocks.3.", r"input_blocks: the levels have 1, 0 residual"),
        (f"{AUTOENCODER}encoder.down.0.", r"encoder\.down\.0: missing, with all"),
        (CLIP, r"conditioner\.embedders\.0: missing, with all"),
    ],
)
def test_a_gap_is_told(small_shapes: Shapes, gone: str, message: str) -> None:
    rest = {name: shape for name, shape in small_shapes.items() if not name.startswith(gone)}
    with pytest.raises(DataError, match=message):
        infer(rest, 16)


def test_levels_of_unlike_width_are_refused(small_shapes: Shapes) -> None:
    name = f"{NETWORK}input_blocks.3.0.out_layers.3.weight"
    with pytest.raises(DataError, match=rf"{name}: is 65 wide, which is no multiple of 32"):
        infer({**small_shapes, name: (65, 32, 3, 3)}, 16)


def test_an_encoder_narrower_than_a_head_is_refused(small_shapes: Shapes) -> None:
    with pytest.raises(DataError, match=r"token_embedding\.weight: is 32 wide, no multiple of a"):
        infer(starting(small_shapes, "conditioner."))


def test_an_embedder_that_is_no_text_encoder_is_refused() -> None:
    with pytest.raises(DataError, match=r"embedders\.0: holds net\.weight, which is no text"):
        infer({f"{CLIP}net.weight": (3, 3)})


def test_stated_parts_are_kept_and_the_others_told(
    small_shapes: Shapes, two_levels: Architecture
) -> None:
    """Heads of the stated parts stay 32 (U-Net) and 16 (encoders) wide, whatever the flag says."""
    assert two_levels.unet is not None
    told = infer(small_shapes, head_width=8)
    assert told.unet is not None
    assert two_levels.unet["num_head_channels"] != told.unet["num_head_channels"] == 8
    nothing = Architecture(None, None, ())
    for stated in (None, nothing):
        assert complete(stated, small_shapes, 8) == told
    for part in ("unet", "autoencoder", "encoders"):
        own = {part: getattr(two_levels, part)}
        assert complete(replace(nothing, **own), small_shapes, 8) == replace(told, **own)
    one = replace(nothing, encoders=two_levels.encoders[:1])
    assert complete(one, small_shapes, 8) == replace(
        told, encoders=(two_levels.encoders[0], told.encoders[1])
    )


def test_tensors_of_stated_parts_are_not_looked_at(
    small_shapes: Shapes, two_levels: Architecture
) -> None:
    """What is wrong with them is told later, with all the rest."""
    damaged = dict.fromkeys(small_shapes, (5,))
    assert complete(two_levels, damaged) == two_levels
    assert complete(two_levels, {}) == two_levels
    with pytest.raises(DataError, match=r"^first_stage_model\."):
        complete(replace(two_levels, autoencoder=None), damaged)
    rest = starting(small_shapes, BIG_G)
    assert complete(two_levels, rest) == two_levels
    one = replace(two_levels, encoders=two_levels.encoders[:1])
    assert complete(one, rest, 16) == two_levels
    third = {name.replace(BIG_G, "conditioner.embedders.2."): rest[name] for name in rest}
    with pytest.raises(DataError, match=r"^conditioner\.embedders\.1: missing, with all"):
        complete(one, third, 16)
