"""The configs of a diffusers folder: read as an architecture, and written."""

from __future__ import annotations

import gzip
import json
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
)
from sdxl_host.weights.formats.diffusers_configs import diffusers_configs, from_diffusers

REFERENCE = Path(__file__).parents[2] / "reference"
PACKAGE = Path(__file__).parents[3] / "sdxl_host"
SMALL = ("two_levels", "three_levels", "middle_only", "small_refiner")


@pytest.fixture(scope="module")
def by_config() -> dict[str, Any]:
    """What diffusers builds: `by_config["refiner"]["configs"]["unet"]["act_fn"]`."""
    with gzip.open(REFERENCE / "keys_by_config.json.gz") as file:
        return json.load(file)


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
