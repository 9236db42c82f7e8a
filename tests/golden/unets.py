"""Golden U-Nets: diffusers' UNet2DConditionModel and its autograd."""

import json
from typing import Any

import numpy as np
import torch
from deterministic import array
from diffusers import UNet2DConditionModel
from loading import Arrays, gradient, load_weights, summarise_gradients
from names import Layout

CONTEXT_LENGTH = 77

UNET_A: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2],
    "num_head_channels": 16,
    "transformer_depth": [1, 2, 3],
    "context_dim": 48,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 32 + 6 * 16,
}
UNET_B: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_head_channels": 32,
    "transformer_depth": [0, 2],
    "context_dim": 40,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 24 + 6 * 8,
}
# The structure of SDXL's refiner: no attention on the first level and the last, but in the middle.
UNET_C: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2],
    "num_head_channels": 32,
    "transformer_depth": 2,
    "context_dim": 40,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 24 + 5 * 8,
}
UNET_D: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "attention_resolutions": [1, 4],
    "num_head_channels": 8,
    "transformer_depth": [2, 1, 1],
    "context_dim": 24,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 16 + 6 * 8,
}


def attended_levels(config: dict[str, Any]) -> tuple[bool, ...]:
    """Whether each level has attention, finest first."""
    levels = len(config["channel_mult"])
    return tuple(2**level in config["attention_resolutions"] for level in range(levels))


def layout(config: dict[str, Any]) -> Layout:
    """What the rules of the names must know of this U-Net."""
    return Layout(config["num_res_blocks"], attended_levels(config))


def build_unet(config: dict[str, Any], size_width: int) -> UNet2DConditionModel:
    """U-Net of `config` (the original YAML's keys), `size_width` sinusoids for each size number."""
    channels = tuple(config["model_channels"] * factor for factor in config["channel_mult"])
    attends = attended_levels(config)
    return UNet2DConditionModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        layers_per_block=config["num_res_blocks"],
        transformer_layers_per_block=config["transformer_depth"],
        # diffusers calls the number of heads attention_head_dim.
        attention_head_dim=tuple(width // config["num_head_channels"] for width in channels),
        cross_attention_dim=config["context_dim"],
        use_linear_projection=config["use_linear_in_transformer"],
        addition_embed_type="text_time",
        addition_time_embed_dim=size_width,
        projection_class_embeddings_input_dim=config["adm_in_channels"],
    )


def run_unet(
    label: str,
    config: dict[str, Any],
    x: np.ndarray,
    timesteps: np.ndarray,
    context_length: int,
    time_ids: np.ndarray,
    size_width: int,
    mask: np.ndarray | None = None,
) -> tuple[UNet2DConditionModel, Arrays]:
    """Output for x (B, C, H, W) and gradients of mean(out^2); the model keeps its gradients.

    timesteps (B,) float64; time_ids (B, 6) as original, crop and target size, each height first,
    or (B, 5) as original size, crop and aesthetic score; mask (B, L) bool, True where attended.
    """
    batch, pooled_width = len(x), config["adm_in_channels"] - time_ids.shape[1] * size_width
    context = array(f"{label}.context", (batch, context_length, config["context_dim"]))
    pooled = array(f"{label}.pooled", (batch, pooled_width))
    model = build_unet(config, size_width)
    load_weights(model, "unet/", layout(config))

    seen: Arrays = {}
    model.add_embedding.register_forward_pre_hook(
        lambda _, inputs: seen.update(vector=inputs[0].detach().numpy())
    )
    inputs = [torch.from_numpy(values).requires_grad_() for values in (x, context)]
    added = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)}
    out = model(
        inputs[0],
        torch.from_numpy(timesteps),
        encoder_hidden_states=inputs[1],
        encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
        added_cond_kwargs=added,
    ).sample
    out.square().mean().backward()

    arrays: Arrays = {
        "config": np.array(json.dumps(config)),
        "x": x,
        "timesteps": timesteps,
        "context": context,
        "pooled": pooled,
        "time_ids": time_ids,
        "vector": seen["vector"],
        "out": out.detach().numpy(),
        "x_grad": gradient(inputs[0]),
        "context_grad": gradient(inputs[1]),
    }
    return model, arrays if mask is None else arrays | {"mask": mask}


def golden_unet_a() -> Arrays:
    """Three levels as SDXL has them, with every parameter's gradient."""
    time_ids = np.array([[512, 640, 3, 7, 512, 512], [768, 1024, 0, 64, 1024, 768]], np.float32)
    model, arrays = run_unet(
        "unet_a",
        UNET_A,
        x=array("unet_a.x", (2, 4, 16, 16)),
        timesteps=np.array([3.25, 871.5]),
        context_length=CONTEXT_LENGTH,
        time_ids=time_ids,
        size_width=16,
    )
    return arrays | summarise_gradients(model, "unet/", layout(UNET_A))


def golden_unet_b() -> Arrays:
    """Two levels, latents that are not square, and a mask that differs between the rows."""
    mask = np.ones((3, 9), dtype=bool)
    mask[1, 5:] = False
    mask[2, [0, 3, 8]] = False
    time_ids = np.array(
        [[64, 96, 0, 0, 64, 96], [480, 640, 11, 0, 256, 384], [1024, 1024, 0, 5, 512, 768]],
        dtype=np.float32,
    )
    _, arrays = run_unet(
        "unet_b",
        UNET_B,
        x=array("unet_b.x", (3, 3, 8, 12)),
        timesteps=np.array([0.75, 500.0, 998.625]),
        context_length=9,
        time_ids=time_ids,
        size_width=8,
        mask=mask,
    )
    return arrays


def golden_unet_c() -> Arrays:
    """Four levels as the refiner has them, with every parameter's gradient."""
    time_ids = np.array([[512, 640, 3, 7, 6.0], [1024, 768, 0, 0, 2.5]], np.float32)
    model, arrays = run_unet(
        "unet_c",
        UNET_C,
        x=array("unet_c.x", (2, 4, 16, 8)),
        timesteps=np.array([41.5, 199.0]),
        context_length=11,
        time_ids=time_ids,
        size_width=8,
    )
    return arrays | summarise_gradients(model, "unet/", layout(UNET_C))


def golden_unet_d() -> Arrays:
    """Attention on the first level and not on the second, narrow heads, latents of 8 by 24."""
    time_ids = np.array([[256, 768, 0, 128, 256, 768]] * 2, np.float32)
    model, arrays = run_unet(
        "unet_d",
        UNET_D,
        x=array("unet_d.x", (2, 4, 8, 24)),
        timesteps=np.array([998.5, 7.0]),
        context_length=13,
        time_ids=time_ids,
        size_width=8,
    )
    return arrays | summarise_gradients(model, "unet/", layout(UNET_D))
