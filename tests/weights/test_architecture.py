"""What weights are a model of: told from shapes and from configs, and written as configs."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_host.errors import ConfigError, DataError
from sdxl_host.weights.architecture import (
    SDXL_BASE,
    SDXL_REFINER,
    Architecture,
    Encoder,
    level_depths,
    merge,
)
from sdxl_host.weights.formats.diffusers_configs import diffusers_configs, from_diffusers
from sdxl_host.weights.shapes import complete, expected_shapes, infer

REFERENCE = Path(__file__).parents[1] / "reference"
PACKAGE = Path(__file__).parents[2] / "sdxl_host"
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


# ---- what our cells are made of ----------------------------------------------------------------


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


def test_depths_are_of_the_levels_with_attention_and_of_the_middle() -> None:
    unet = {"channel_mult": [1, 2, 4], "transformer_depth": [1, 2, 10]}
    assert level_depths({**unet, "attention_resolutions": [4, 2]}) == ([0, 2, 10], 10)
    assert level_depths({**unet, "attention_resolutions": [1]}) == ([1, 0, 0], 10)
    one = {**unet, "attention_resolutions": [2], "transformer_depth": 3}
    assert level_depths(one) == ([0, 3, 0], 3)


# ---- from shapes -------------------------------------------------------------------------------


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


# ---- stated and told, together -----------------------------------------------------------------


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


NAMES = ("one.safetensors", "folder")


def test_parts_of_two_sources_are_put_together(two_levels: Architecture) -> None:
    nothing = Architecture(None, None, ())
    unet = replace(nothing, unet=two_levels.unet)
    others = replace(two_levels, unet=None)
    text = replace(nothing, encoders=two_levels.encoders[:1])
    for first, later in ((unet, others), (two_levels, text), (two_levels, two_levels)):
        assert merge(first, later, NAMES) == merge(later, first, NAMES) == two_levels
    assert merge(unet, text, NAMES) == replace(unet, encoders=text.encoders)


def three_levels(resolutions: list[int], depth: list[int] | int) -> Architecture:
    unet = {**(SDXL_BASE.unet or {}), "attention_resolutions": resolutions}
    return replace(SDXL_BASE, unet={**unet, "transformer_depth": depth})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (three_levels([4, 2], [0, 2, 10]), three_levels([4, 2], [1, 2, 10])),
        (three_levels([4, 2], [1, 2, 10]), three_levels([2, 4], [1, 2, 10])),
        (three_levels([4, 2, 1], [3, 3, 3]), three_levels([1, 2, 4], 3)),
        (three_levels([4], [1, 2, 3]), three_levels([4, 2], [0, 0, 3])),
    ],
    ids=["unused depth", "order", "one number", "depth of 0"],
)
@pytest.mark.usefixtures("device")
def test_two_descriptions_of_one_model_are_equal(one: Architecture, other: Architecture) -> None:
    assert one != other
    assert expected_shapes(replace(one, encoders=())) == expected_shapes(
        replace(other, encoders=())
    )
    assert merge(one, other, NAMES) == other
    assert merge(other, one, NAMES) == one


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (three_levels([4, 2], [1, 2, 9]), "unet"),
        (three_levels([4], [1, 2, 10]), "unet"),
        (replace(SDXL_BASE, unet={**(SDXL_BASE.unet or {}), "num_head_channels": 32}), "unet"),
        (replace(SDXL_BASE, autoencoder={**(SDXL_BASE.autoencoder or {}), "x": 1}), "autoencoder"),
        (replace(SDXL_BASE, encoders=SDXL_BASE.encoders[1:]), "encoders"),
    ],
)
def test_descriptions_of_two_models_are_refused(other: Architecture, part: str) -> None:
    with pytest.raises(DataError, match=rf"^folder: its {part} differs in size from that of one"):
        merge(SDXL_BASE, other, NAMES)


# ---- from configs ------------------------------------------------------------------------------

# As released with SDXL base 1.0, in the keys that say something of the structure or its size.
RELEASED: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.0.dev0",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "class_embed_type": None,
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_only_cross_attention": None,
        "norm_num_groups": 32,
        "num_attention_heads": None,
        "only_cross_attention": False,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
    "vae": {
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float16",
        "vocab_size": 49408,
    },
    "text_encoder_2": {
        "architectures": ["CLIPTextModelWithProjection"],
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "vocab_size": 49408,
    },
}


def changed(component: str, key: str, value: Any) -> dict[str, dict[str, Any]]:
    configs = deepcopy(RELEASED)
    configs[component][key] = value
    return configs


def test_the_released_configs_are_read(by_config: dict[str, Any]) -> None:
    assert from_diffusers(RELEASED) == SDXL_BASE
    refiner = from_diffusers(by_config["refiner"]["configs"])
    assert refiner == SDXL_REFINER
    assert refiner.encoders == (Encoder("open_clip", 1280, 32, 20),)


def test_only_what_the_folder_has_is_read() -> None:
    assert from_diffusers({}) == Architecture(None, None, ())
    only = from_diffusers({"vae": RELEASED["vae"]})
    assert only == Architecture(None, SDXL_BASE.autoencoder, ())


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("unet", "act_fn", "gelu"),
        ("unet", "addition_embed_type", "text"),
        ("unet", "addition_embed_type", None),
        ("unet", "attention_head_dim", 8),
        ("unet", "attention_head_dim", [5, 10, 10]),
        ("unet", "attention_head_dim", [6, 12, 24]),
        ("unet", "attention_head_dim", [5, 10]),
        ("unet", "attention_head_dim", [5, 10, 0]),
        ("unet", "block_out_channels", [320, 640, 1300]),
        ("unet", "center_input_sample", True),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "conv_in_kernel", 1),
        ("unet", "cross_attention_dim", [2048, 2048, 1024]),
        ("unet", "cross_attention_norm", "layer_norm"),
        ("unet", "down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"]),
        ("unet", "down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
        ("unet", "dual_cross_attention", True),
        ("unet", "encoder_hid_dim_type", "image_proj"),
        ("unet", "flip_sin_to_cos", False),
        ("unet", "freq_shift", 1),
        ("unet", "in_channels", 0),
        ("unet", "layers_per_block", [2, 2, 3]),
        ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet", "norm_eps", 1e-6),
        ("unet", "norm_num_groups", 16),
        ("unet", "num_class_embeds", 10),
        ("unet", "only_cross_attention", [False, True, False]),
        ("unet", "resnet_time_scale_shift", "scale_shift"),
        ("unet", "reverse_transformer_layers_per_block", [10, 2, 2]),
        ("unet", "time_cond_proj_dim", 256),
        ("unet", "time_embedding_type", "fourier"),
        ("unet", "transformer_layers_per_block", [1, 2]),
        ("unet", "transformer_layers_per_block", [1, 2, [10, 10]]),
        ("unet", "up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
        ("unet", "use_linear_projection", False),
        ("vae", "act_fn", "relu"),
        ("vae", "block_out_channels", [128, 200]),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("vae", "latents_mean", [0.1, 0.2, 0.3, 0.4]),
        ("vae", "mid_block_add_attention", False),
        ("vae", "shift_factor", 0.1),
        ("vae", "up_block_types", ["UpDecoderBlock2D"] * 3),
        ("vae", "use_quant_conv", False),
        ("text_encoder", "hidden_act", "gelu"),
        ("text_encoder", "intermediate_size", 768),
        ("text_encoder", "max_position_embeddings", 248),
        ("text_encoder", "num_attention_heads", 11),
        ("text_encoder", "vocab_size", 49409),
        ("text_encoder_2", "eos_token_id", 7),
        ("text_encoder_2", "hidden_act", "quick_gelu"),
        ("text_encoder_2", "layer_norm_eps", 1e-6),
        ("text_encoder_2", "projection_dim", 1024),
    ],
)
def test_another_structure_is_refused_by_its_key(component: str, key: str, value: Any) -> None:
    pattern = rf"^{component}/config\.json: {key} is .*use a folder of SDXL's structure$"
    with pytest.raises(DataError, match=pattern):
        from_diffusers(changed(component, key, value))


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("unet", "block_out_channels"),
        ("unet", "attention_head_dim"),
        ("unet", "cross_attention_dim"),
        ("unet", "projection_class_embeddings_input_dim"),
        ("vae", "latent_channels"),
        ("vae", "down_block_types"),
        ("text_encoder", "hidden_size"),
        ("text_encoder_2", "num_hidden_layers"),
    ],
)
def test_a_missing_size_is_told(component: str, key: str) -> None:
    configs = deepcopy(RELEASED)
    del configs[component][key]
    with pytest.raises(DataError, match=rf"^{component}/config\.json: {key} is missing"):
        from_diffusers(configs)


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("unet", "use_linear_projection"),
        ("unet", "addition_embed_type"),
        ("text_encoder_2", "hidden_act"),
    ],
)
def test_what_is_not_written_is_not_sdxls_where_the_default_is_not(
    component: str, key: str
) -> None:
    configs = deepcopy(RELEASED)
    del configs[component][key]
    with pytest.raises(DataError, match=rf"^{component}/config\.json: {key} is None"):
        from_diffusers(configs)


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_unknown_keys_are_refused_unless_empty(component: str) -> None:
    assert from_diffusers(changed(component, "novelty", None)) == SDXL_BASE
    assert from_diffusers(changed(component, "_note", "a note")) == SDXL_BASE
    with pytest.raises(DataError, match=rf"^{component}/config\.json: novelty is not known"):
        from_diffusers(changed(component, "novelty", "on"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("only_cross_attention", [False, False, False]),
        ("class_embeddings_concat", None),
        ("time_cond_proj_dim", 0),
    ],
)
def test_one_empty_value_is_as_good_as_another(key: str, value: Any) -> None:
    assert from_diffusers(changed("unet", key, value)) == SDXL_BASE


def test_heads_may_go_by_either_name() -> None:
    configs = changed("unet", "num_attention_heads", [5, 10, 20])
    del configs["unet"]["attention_head_dim"]
    assert from_diffusers(configs) == SDXL_BASE


@pytest.mark.parametrize("end", [2, 49407])
def test_either_released_end_of_text_is_read(end: int) -> None:
    assert from_diffusers(changed("text_encoder_2", "eos_token_id", end)) == SDXL_BASE


# ---- as configs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refiner", *SMALL])
def test_written_configs_are_those_that_diffusers_completes(
    by_config: dict[str, Any], name: str
) -> None:
    configs = by_config[name]["configs"]
    architecture = from_diffusers(configs)
    written = diffusers_configs(architecture, "epsilon")
    assert from_diffusers(written) == architecture
    assert ("text_encoder" in written) == ("text_encoder" in configs)
    for component, config in configs.items():
        own = {key: value for key, value in written[component].items() if key[0] != "_"}
        expected = dict(config)
        expected.pop("addition_embed_type_num_heads", None)  # of another type of embedding
        depth = expected.get("transformer_layers_per_block")
        if isinstance(depth, int):  # one number serves all levels
            levels = len(expected["block_out_channels"])
            expected["transformer_layers_per_block"] = [depth] * levels
        if component in ("unet", "vae"):
            assert own == expected
        else:
            assert own == own | expected


def test_the_released_models_are_written_and_read_again() -> None:
    for released in (SDXL_BASE, SDXL_REFINER):
        assert from_diffusers(diffusers_configs(released, "epsilon")) == released


def test_written_sizes_of_the_base_model_are_the_released_ones() -> None:
    written = diffusers_configs(SDXL_BASE, "epsilon")
    ours = {"bos_token_id", "eos_token_id", "pad_token_id", "upcast_attention"}
    notes = {"_diffusers_version", "addition_embed_type_num_heads", "dropout", "torch_dtype"}
    for component, released in RELEASED.items():
        for key in released.keys() - ours - notes:
            assert written[component][key] == released[key], f"{component} {key}"


def test_pooling_is_at_the_first_end_of_text() -> None:
    """For 49407 transformers takes the first such id; any other would be another place."""
    written = diffusers_configs(SDXL_BASE, "epsilon")
    assert written["text_encoder_2"]["eos_token_id"] == 49407
    assert written["text_encoder_2"]["pad_token_id"] == 0


def test_the_tokenizers_differ_in_padding_alone() -> None:
    written = diffusers_configs(SDXL_BASE, "epsilon")
    own = PACKAGE / "models" / "clip_tokenizer" / "tokenizer_config.json"
    assert written["tokenizer"] == json.loads(own.read_text("utf-8"))
    assert written["tokenizer_2"] == {**written["tokenizer"], "pad_token": "!"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_scheduler_is_sdxls_own(prediction_type: str) -> None:
    scheduler = diffusers_configs(SDXL_BASE, prediction_type)["scheduler"]
    assert scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert scheduler["prediction_type"] == prediction_type
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
    assert scheduler["beta_schedule"] == "scaled_linear"
    assert scheduler["num_train_timesteps"] == 1000
    assert scheduler["timestep_spacing"] == "trailing"


def test_another_prediction_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^prediction_type: 'edm' .*epsilon or v_prediction$"):
        diffusers_configs(SDXL_BASE, "edm")


def test_the_index_lists_what_the_pipeline_loads() -> None:
    written = diffusers_configs(SDXL_BASE, "epsilon")
    index = written["model_index"]
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True
    assert "requires_aesthetics_score" not in index
    listed = {key for key, value in index.items() if isinstance(value, list) and value[0]}
    assert listed == written.keys() - {"model_index"}
    assert index["image_encoder"] == index["feature_extractor"] == [None, None]


def test_the_refiners_index_is_of_images_and_their_scores() -> None:
    written = diffusers_configs(SDXL_REFINER, "epsilon")
    index = written["model_index"]
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert index["requires_aesthetics_score"] is True
    assert index["force_zeros_for_empty_prompt"] is False
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert "text_encoder" not in written
    assert "tokenizer" not in written
    assert written["unet"]["addition_time_embed_dim"] == 256


def test_parts_that_make_no_pipeline_have_no_index() -> None:
    unet = diffusers_configs(replace(SDXL_BASE, autoencoder=None, encoders=()), "epsilon")
    assert unet.keys() == {"unet", "scheduler"}
    assert unet["unet"]["addition_time_embed_dim"] == 256
    clip = diffusers_configs(Architecture(None, None, SDXL_BASE.encoders[:1]), "epsilon")
    assert clip.keys() == {"text_encoder", "tokenizer", "scheduler"}


def test_the_scale_factor_is_written() -> None:
    assert diffusers_configs(SDXL_BASE, "epsilon")["vae"]["scaling_factor"] == 0.13025
    assert diffusers_configs(SDXL_BASE, "epsilon", 0.5)["vae"]["scaling_factor"] == 0.5


@pytest.mark.parametrize("width", [1280, 2817, 1280 + 6 * 255])
def test_a_vector_that_is_no_text_and_sizes_is_refused(width: int) -> None:
    assert SDXL_BASE.unet is not None
    strange = replace(SDXL_BASE, unet={**SDXL_BASE.unet, "adm_in_channels": width})
    with pytest.raises(DataError, match=rf"^adm_in_channels: {width} .*use a single file$"):
        diffusers_configs(strange, "epsilon")


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("embed_dim", {"embed_dim": 8}),
        ("double_z", {"ddconfig": {"double_z": False}}),
        ("attn_resolutions", {"ddconfig": {"attn_resolutions": [32]}}),
    ],
)
def test_an_autoencoder_that_diffusers_can_not_build_is_refused(
    key: str, changes: Mapping[str, Any]
) -> None:
    assert SDXL_BASE.autoencoder is not None
    original = SDXL_BASE.autoencoder
    autoencoder = {**original, **changes}
    autoencoder["ddconfig"] = {**original["ddconfig"], **changes.get("ddconfig", {})}
    with pytest.raises(DataError, match=rf"^autoencoder {key}: .*use a single file$"):
        diffusers_configs(replace(SDXL_BASE, autoencoder=autoencoder), "epsilon")
