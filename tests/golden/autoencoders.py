"""Golden autoencoders: diffusers' AutoencoderKL."""

import json
from typing import Any

import numpy as np
import torch
from deterministic import array
from diffusers import AutoencoderKL
from loading import Arrays, load_weights
from names import Layout, single_file_name

SCALE_FACTOR = 0.13025  # SDXL's
EMBED_DIM = 4


def ddconfig(channels: int, multiples: list[int], resnets: int) -> dict[str, Any]:
    """The original YAML's `ddconfig`."""
    return {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels,
        "ch_mult": multiples,
        "num_res_blocks": resnets,
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def build_autoencoder(config: dict[str, Any]) -> AutoencoderKL:
    """Autoencoder of `config`, a ddconfig; attention stands in the middle only."""
    channels = tuple(config["ch"] * multiple for multiple in config["ch_mult"])
    return AutoencoderKL(
        in_channels=config["in_channels"],
        out_channels=config["out_ch"],
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        norm_num_groups=32,
        scaling_factor=SCALE_FACTOR,
    )


def run_autoencoder(label: str, config: dict[str, Any], pixels: np.ndarray) -> Arrays:
    """pixels (B, 3, H, W) -> moments, a sample of the posterior as a latent, and pixels of `z`."""
    model = build_autoencoder(config)
    layout = Layout(vae_levels=len(config["ch_mult"]))
    load_weights(model, "vae/", layout)
    names = sorted(single_file_name(f"vae/{name}", layout) for name, _ in model.named_parameters())
    factor = 2 ** (len(config["ch_mult"]) - 1)
    side = [length // factor for length in pixels.shape[2:]]
    noise, z = (array(f"{label}.{key}", (len(pixels), EMBED_DIM, *side)) for key in ("noise", "z"))
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels)).latent_dist
        sampled = posterior.mean + posterior.std * torch.from_numpy(noise)
        decoded = model.decode(torch.from_numpy(z)).sample
    return {
        "ddconfig": np.array(json.dumps(config)),
        "names": np.array(names),
        "pixels": pixels,
        "moments": posterior.parameters.numpy(),
        "mean": posterior.mode().numpy(),
        "noise": noise,
        "latent": (model.config.scaling_factor * sampled).numpy(),
        "z": z,
        "decoded": decoded.numpy(),
    }


def golden_autoencoder() -> Arrays:
    """Two autoencoders, their keys begun with `a_` (3 levels) and `b_` (4, as SDXL's has)."""
    a = run_autoencoder(
        "autoencoder_a", ddconfig(32, [1, 2, 2], 2), array("autoencoder_a.pixels", (2, 3, 16, 24))
    )
    b = run_autoencoder(
        "autoencoder_b",
        ddconfig(32, [1, 2, 2, 2], 2),
        array("autoencoder_b.pixels", (1, 3, 40, 24)),
    )
    arrays = {f"a_{key}": values for key, values in a.items()}
    arrays |= {f"b_{key}": values for key, values in b.items()}
    return arrays | {"scale_factor": np.array(SCALE_FACTOR), "embed_dim": np.array(EMBED_DIM)}
