"""Writes keys_by_config.json.gz: what diffusers and transformers build from a config.

    golden/bin/python tests/reference/make_keys.py     # the environment of tests/golden

Nothing is allocated, and nothing here imports the project. For each model: the config of each
component as the libraries complete it, and the shapes of its state by name.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

TARGET = Path(__file__).parent / "keys_by_config.json.gz"


def unet(widths, heads, attended, depths, blocks, context, vector, embedding):
    return {
        "sample_size": 128,
        "block_out_channels": widths,
        "attention_head_dim": heads,
        "down_block_types": [("CrossAttn" if a else "") + "DownBlock2D" for a in attended],
        "up_block_types": [("CrossAttn" if a else "") + "UpBlock2D" for a in reversed(attended)],
        "transformer_layers_per_block": depths,
        "layers_per_block": blocks,
        "cross_attention_dim": context,
        "projection_class_embeddings_input_dim": vector,
        "addition_time_embed_dim": embedding,
        "addition_embed_type": "text_time",
        "use_linear_projection": True,
    }


def vae(widths, blocks):
    return {
        "sample_size": 1024,
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "scaling_factor": 0.13025,
    }


def text(width, layers, heads, activation):
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
    }


SMALL_TEXT = {
    "text_encoder": text(32, 2, 2, "quick_gelu"),
    "text_encoder_2": text(64, 3, 4, "gelu"),
}
MODELS = {
    "refiner": {
        "unet": unet([384, 768, 1536, 1536], [6, 12, 24, 24], [0, 1, 1, 0], 4, 2, 1280, 2560, 256),
        "vae": vae([128, 256, 512, 512], 2),
        "text_encoder_2": text(1280, 32, 20, "gelu"),
    },
    # Two levels, one block in each, attention at the second.
    "two_levels": {
        "unet": unet([32, 64], [1, 2], [0, 1], [1, 2], 1, 96, 112, 8),
        "vae": vae([32, 64], 1),
        **SMALL_TEXT,
    },
    # Attention at the first and last level, and levels that don't grow.
    "three_levels": {
        "unet": unet([32, 64, 128], [1, 2, 4], [1, 0, 1], [1, 1, 3], 2, 96, 112, 8),
        "vae": vae([32, 32, 64], 1),
        **SMALL_TEXT,
    },
    # Levels that shrink again, three blocks in each, and no attention but in the middle.
    "middle_only": {
        "unet": unet([32, 64, 32], [1, 2, 1], [0, 0, 0], 2, 3, 96, 112, 8),
        "vae": vae([32, 64, 32, 128], 2),
        **SMALL_TEXT,
    },
    "small_refiner": {
        "unet": unet([32, 64, 64], [1, 2, 2], [0, 1, 0], [1, 2, 3], 1, 64, 104, 8),
        "vae": vae([32, 64], 1),
        "text_encoder_2": SMALL_TEXT["text_encoder_2"],
    },
}


def build(component, config):
    with torch.device("meta"):
        if component == "unet":
            return UNet2DConditionModel(**config)
        if component == "vae":
            return AutoencoderKL(**config)
        cls = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
        return cls(CLIPTextConfig(**config))


def shapes(component, model):
    state = {name: list(value.shape) for name, value in model.state_dict().items()}
    if component == "text_encoder":
        # transformers 5 drops this in memory; the released folders have it.
        state = {f"text_model.{name}": shape for name, shape in state.items()}
    return state


def completed(component, model):
    """A module's config with the library's defaults, without its notes (`_class_name`).

    Not a text encoder's: transformers adds dozens of keys that are not the network's.
    """
    if component not in ("unet", "vae"):
        return None
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def main():
    models = {}
    for name, configs in MODELS.items():
        built = {component: build(component, config) for component, config in configs.items()}
        models[name] = {
            "configs": {each: completed(each, built[each]) or configs[each] for each in configs},
            "shapes": {each: shapes(each, built[each]) for each in configs},
        }
    content = json.dumps(models, sort_keys=True).encode()
    TARGET.write_bytes(gzip.compress(content, 9, mtime=0))


if __name__ == "__main__":
    main()
