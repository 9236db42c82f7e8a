"""The configs of a diffusers folder: read as an architecture, and written from one.

Reading refuses, by component and key, a structure that our cells don't have. From what is written
diffusers and transformers build exactly the tensors of the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_host.errors import ConfigError, DataError
from sdxl_host.weights.architecture import (
    SDXL_BASE,
    Architecture,
    Encoder,
    encoder_component,
    level_depths,
)

__all__ = ["DIFFUSERS_VERSION", "diffusers_configs", "from_diffusers"]

DIFFUSERS_VERSION = "0.42.1"  # keys that are not written have this version's defaults
_PREDICTION_TYPES = ("epsilon", "v_prediction")
_SIZE_EMBEDDING = 256  # sinusoids for each number among the sizes
_END_OF_TEXT = 49407

# Keys that must have this value, or be absent where it is diffusers' default. All empty values
# (None, False, 0, a list of such) count as equal.
_UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "use_linear_projection": True,
}
_UNET_REQUIRED = ("addition_embed_type", "use_linear_projection")
# Read elsewhere, or without effect on what the network computes.
_UNET_FREE = (
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "in_channels",
    "layers_per_block",
    "num_attention_heads",
    "out_channels",
    "projection_class_embeddings_input_dim",
    "sample_size",
    "transformer_layers_per_block",
    "up_block_types",
    "upcast_attention",
)
_VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_VAE_FREE = (
    "block_out_channels",
    "down_block_types",
    "force_upcast",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "out_channels",
    "sample_size",
    "scaling_factor",  # the training config's `scale_factor`
    "up_block_types",
)
_TEXT_FIXED: dict[str, Any] = {
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}

_PLAIN = ("DownBlock2D", "UpBlock2D")
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


# ---- reading ------------------------------------------------------------------------------------


def from_diffusers(configs: Mapping[str, Mapping[str, Any]]) -> Architecture:
    """The architecture of a diffusers folder.

    configs: the contents of config.json by component, "unet", "vae", "text_encoder" and
    "text_encoder_2"; those that the folder has. Raises DataError, naming component and key, for a
    structure that our cells don't have.
    """
    unet = configs.get("unet")
    vae = configs.get("vae")
    encoders = [
        _text_encoder(_Config(component, configs[component]), kind, activation)
        for component, kind, activation in (
            ("text_encoder", "clip", "quick_gelu"),
            ("text_encoder_2", "open_clip", "gelu"),
        )
        if component in configs
    ]
    return Architecture(
        None if unet is None else _unet(_Config("unet", unet)),
        None if vae is None else _autoencoder(_Config("vae", vae)),
        tuple(encoders),
    )


class _Config:
    """One component's config.json."""

    def __init__(self, component: str, values: Mapping[str, Any]) -> None:
        self.path = f"{component}/config.json"
        self.values = values

    def need(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise DataError(f"{self.path}: {key} is missing; get the folder again")
        return self.values[key]

    def number(self, key: str) -> int:
        """A key's whole number, or what all of its list have in common."""
        value = self.need(key)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(type(each) is int and each == numbers[0] > 0 for each in numbers):
            raise self.refuse(key, "one whole number")
        return numbers[0]

    def levels(self, key: str, count: int) -> list[int]:
        """A key's whole number for each level; one serves all."""
        value = self.need(key)
        numbers = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(numbers) != count or not all(type(each) is int and each >= 0 for each in numbers):
            raise self.refuse(key, f"a whole number, or one for each of {count} levels")
        return numbers

    def widths(self) -> tuple[int, list[int]]:
        """The first level's width, and each level's as a multiple of it."""
        widths = self.need("block_out_channels")
        if not all(type(each) is int and each > 0 and each % widths[0] == 0 for each in widths):
            raise self.refuse("block_out_channels", "multiples of the first")
        return widths[0], [width // widths[0] for width in widths]

    def require(self, fixed: Mapping[str, Any], required: Sequence[str] = ()) -> None:
        """Raises DataError for a key with another value than our cells need."""
        for key, expected in fixed.items():
            value = self.values.get(key, None if key in required else expected)
            if not (value == expected or (_is_empty(value) and _is_empty(expected))):
                raise self.refuse(key, repr(expected))

    def require_known(self, known: Sequence[str]) -> None:
        """Raises DataError for an unknown key, unless it is empty or a note (`_class_name`)."""
        for key, value in self.values.items():
            if key not in known and not key.startswith("_") and not _is_empty(value):
                raise DataError(
                    f"{self.path}: {key} is not known, so what {value!r} changes isn't either; "
                    "use a folder of SDXL's structure"
                )

    def refuse(self, key: str, expected: str) -> DataError:
        return DataError(
            f"{self.path}: {key} is {self.values.get(key)!r}, SDXL's structure has {expected}; "
            "use a folder of SDXL's structure"
        )


def _is_empty(value: Any) -> bool:
    return not any(value) if isinstance(value, list | tuple) else not value


def _unet(config: _Config) -> dict[str, Any]:
    config.require(_UNET_FIXED, _UNET_REQUIRED)
    config.require_known([*_UNET_FIXED, *_UNET_FREE])
    channels, multiples = config.widths()
    levels = len(multiples)
    down = config.need("down_block_types")
    if len(down) != levels or not all(kind in (_PLAIN[0], _CROSS[0]) for kind in down):
        raise config.refuse("down_block_types", f"{levels} of {_PLAIN[0]} and {_CROSS[0]}")
    attended = [kind == _CROSS[0] for kind in down]
    up = _up_block_types(attended)
    if list(config.need("up_block_types")) != up:
        raise config.refuse("up_block_types", f"{up}, as down_block_types has it")

    # Despite its name, diffusers' `attention_head_dim` is the number of heads.
    heads_key = "num_attention_heads"
    if config.values.get(heads_key) is None:
        heads_key = "attention_head_dim"
    heads = config.levels(heads_key, levels)
    used = [level for level in range(levels) if attended[level] or level == levels - 1]
    widths = {channels * multiples[level] / heads[level] if heads[level] else 0 for level in used}
    head_width = widths.pop()
    if widths or head_width < 1 or head_width != int(head_width):
        raise config.refuse(heads_key, "heads of the same width in every level")
    depths = config.levels("transformer_layers_per_block", levels)
    return {
        "in_channels": config.number("in_channels"),
        "out_channels": config.number("out_channels"),
        "model_channels": channels,
        "channel_mult": multiples,
        "num_res_blocks": config.number("layers_per_block"),
        "attention_resolutions": [2**level for level in reversed(range(levels)) if attended[level]],
        "transformer_depth": depths,
        "num_head_channels": int(head_width),
        "context_dim": config.number("cross_attention_dim"),
        "adm_in_channels": config.number("projection_class_embeddings_input_dim"),
    }


def _up_block_types(attended: Sequence[bool]) -> list[str]:
    return [(_CROSS if each else _PLAIN)[1] for each in reversed(attended)]


def _autoencoder(config: _Config) -> dict[str, Any]:
    config.require(_VAE_FIXED)
    config.require_known([*_VAE_FIXED, *_VAE_FREE])
    channels, multiples = config.widths()
    for key, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if list(config.need(key)) != [kind] * len(multiples):
            raise config.refuse(key, f"{len(multiples)} of {kind}")
    latent = config.number("latent_channels")
    defaults = (SDXL_BASE.autoencoder or {})["ddconfig"]
    return {
        "embed_dim": latent,
        "ddconfig": {
            **defaults,
            "z_channels": latent,
            "in_channels": config.number("in_channels"),
            "out_ch": config.number("out_channels"),
            "ch": channels,
            "ch_mult": multiples,
            "num_res_blocks": config.number("layers_per_block"),
        },
    }


def _text_encoder(config: _Config, kind: str, activation: str) -> Encoder:
    config.require(_TEXT_FIXED)
    width = config.number("hidden_size")
    # Absent keys are transformers' defaults, which are another size's.
    if config.values.get("hidden_act", "quick_gelu") != activation:
        raise config.refuse("hidden_act", repr(activation))
    if config.number("intermediate_size") != 4 * width:
        raise config.refuse("intermediate_size", f"{4 * width}, four times hidden_size")
    if kind == "open_clip":
        if config.number("projection_dim") != width:
            raise config.refuse("projection_dim", f"{width}, as hidden_size")
        # transformers takes 2 for "the highest id", which is the end of text as well.
        if config.values.get("eos_token_id", _END_OF_TEXT) not in (2, _END_OF_TEXT):
            raise config.refuse("eos_token_id", f"{_END_OF_TEXT} or 2")
    heads = config.number("num_attention_heads")
    if width % heads:
        raise config.refuse("num_attention_heads", f"a divisor of hidden_size {width}")
    return Encoder(kind, width, config.number("num_hidden_layers"), heads)


# ---- writing ------------------------------------------------------------------------------------


def diffusers_configs(
    architecture: Architecture, prediction_type: str, scale_factor: float = 0.13025
) -> dict[str, dict[str, Any]]:
    """The JSON files of a diffusers folder.

    prediction_type: what the network predicts, "epsilon" or "v_prediction". scale_factor: of the
    latents. Returns config.json of "unet", "vae", "text_encoder" and "text_encoder_2",
    tokenizer_config.json of "tokenizer" and "tokenizer_2", scheduler_config.json of "scheduler" and
    model_index.json as "model_index", each for what the architecture has; the index where a
    pipeline can be loaded, that is with a U-Net, an autoencoder and OpenCLIP. Without CLIP it is
    the refiner's, which takes images and an aesthetic score.

    Raises DataError for an architecture that diffusers can't build, ConfigError for another
    prediction type.
    """
    if prediction_type not in _PREDICTION_TYPES:
        raise ConfigError(
            f"prediction_type: {prediction_type!r} is not one of diffusers' for SDXL; it must be "
            f"{' or '.join(_PREDICTION_TYPES)}"
        )
    configs: dict[str, dict[str, Any]] = {"scheduler": _written_scheduler(prediction_type)}
    for index, encoder in enumerate(architecture.encoders):
        component = encoder_component(architecture.encoders, index)
        configs[component] = _written_encoder(encoder)
        configs[component.replace("text_encoder", "tokenizer")] = _written_tokenizer(encoder)
    refiner = "text_encoder_2" in configs and "text_encoder" not in configs
    if architecture.unet is not None:
        pooled = configs.get("text_encoder_2", {}).get("projection_dim")
        size_width = _size_width(architecture.unet["adm_in_channels"], pooled, refiner)
        configs["unet"] = _written_unet(architecture.unet, size_width)
    if architecture.autoencoder is not None:
        configs["vae"] = _written_autoencoder(architecture.autoencoder, scale_factor)
    if {"unet", "vae", "text_encoder_2"} <= configs.keys():
        configs["model_index"] = _written_index(configs, refiner)
    return configs


def _size_width(vector: int, pooled: int | None, refiner: bool) -> int:
    """The sinusoids for each number that the vector holds beside the pooled text.

    Six numbers: original size, crop and target size; in the refiner five, with the aesthetic score
    in place of the target size.
    """
    if pooled is None:
        return _SIZE_EMBEDDING
    numbers = 5 if refiner else 6
    if vector <= pooled or (vector - pooled) % (2 * numbers):
        raise DataError(
            f"adm_in_channels: {vector} is not {pooled} of pooled text and {numbers} numbers of "
            "the same even width, as diffusers has it; use a single file"
        )
    return (vector - pooled) // numbers


def _written_unet(unet: Mapping[str, Any], size_width: int) -> dict[str, Any]:
    widths = [unet["model_channels"] * multiple for multiple in unet["channel_mult"]]
    attended = [depth > 0 for depth in level_depths(unet)[0]]
    depth = unet["transformer_depth"]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **_UNET_FIXED,
        "addition_time_embed_dim": size_width,
        # Despite its name, the number of heads.
        "attention_head_dim": [max(1, width // unet["num_head_channels"]) for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": unet["context_dim"],
        "down_block_types": [(_CROSS if each else _PLAIN)[0] for each in attended],
        "in_channels": unet["in_channels"],
        "layers_per_block": unet["num_res_blocks"],
        "num_attention_heads": None,
        "out_channels": unet["out_channels"],
        "projection_class_embeddings_input_dim": unet["adm_in_channels"],
        "sample_size": 128,
        "transformer_layers_per_block": depth if isinstance(depth, int) else list(depth),
        "up_block_types": _up_block_types(attended),
        "upcast_attention": False,
    }


def _written_autoencoder(autoencoder: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    ddconfig = autoencoder["ddconfig"]
    latent, levels = ddconfig["z_channels"], len(ddconfig["ch_mult"])
    for key, value, expected in (
        ("embed_dim", autoencoder["embed_dim"], latent),
        ("double_z", ddconfig["double_z"], True),
        ("attn_resolutions", list(ddconfig["attn_resolutions"]), []),
    ):
        if value != expected:
            raise DataError(
                f"autoencoder {key}: {value!r} can't be written for diffusers, which has "
                f"{expected!r}; use a single file"
            )
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        **_VAE_FIXED,
        "block_out_channels": [ddconfig["ch"] * multiple for multiple in ddconfig["ch_mult"]],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,  # the released autoencoder overflows in float16
        "in_channels": ddconfig["in_channels"],
        "latent_channels": latent,
        "layers_per_block": ddconfig["num_res_blocks"],
        "out_channels": ddconfig["out_ch"],
        "sample_size": 1024,
        "scaling_factor": scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _written_encoder(encoder: Encoder) -> dict[str, Any]:
    clip = encoder.kind == "clip"
    return {
        "architectures": ["CLIPTextModel" if clip else "CLIPTextModelWithProjection"],
        **_TEXT_FIXED,
        "attention_dropout": 0.0,
        "bos_token_id": 49406,
        # Released configs say 2, for which transformers pools at the highest id, the same position.
        "eos_token_id": _END_OF_TEXT,
        "hidden_act": "quick_gelu" if clip else "gelu",
        "hidden_size": encoder.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * encoder.width,
        "model_type": "clip_text_model",
        "num_attention_heads": encoder.heads,
        "num_hidden_layers": encoder.layers,
        "pad_token_id": _END_OF_TEXT if clip else 0,
        "projection_dim": encoder.width,
    }


def _written_tokenizer(encoder: Encoder) -> dict[str, Any]:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        # bigG was trained with padding by 0, which is "!".
        "pad_token": "<|endoftext|>" if encoder.kind == "clip" else "!",
        "unk_token": "<|endoftext|>",
    }


def _written_scheduler(prediction_type: str) -> dict[str, Any]:
    return {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "use_karras_sigmas": False,
    }


def _written_index(configs: Mapping[str, Any], refiner: bool) -> dict[str, Any]:
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "feature_extractor": None,
        "image_encoder": None,
    }
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusionXL{'Img2Img' if refiner else ''}Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        # Zeros are what dropped captions were in training; the released refiner's were not.
        "force_zeros_for_empty_prompt": not refiner,
        **{name: found if name in configs else [None, None] for name, found in classes.items()},
    }
    if refiner:
        index["requires_aesthetics_score"] = True
    return index
