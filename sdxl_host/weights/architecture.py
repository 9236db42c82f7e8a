"""The architecture of a set of weights: the arguments of the cells that hold them.

`shapes` infers it from the tensors of a single file, `formats.diffusers_configs` reads it from the
configs of a diffusers folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_host.errors import DataError

__all__ = [
    "AUTOENCODER_PREFIX",
    "CONDITIONER_PREFIX",
    "INITIAL_LOGIT_SCALE",
    "NETWORK_PREFIX",
    "SDXL_BASE",
    "SDXL_REFINER",
    "Architecture",
    "Encoder",
    "embedder_prefix",
    "encoder_component",
    "level_depths",
    "merge",
]

NETWORK_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
CONDITIONER_PREFIX = "conditioner.embedders."

# CLIP trains the logarithm of the scale of its similarities, from a temperature of 0.07 on
# (Radford et al. 2021, section 2.5).
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class Encoder:
    """One text encoder.

    kind: "clip" (CLIP-L's structure) or "open_clip" (OpenCLIP bigG's).
    width, layers, heads: of its transformer; the feed-forward is four times as wide.
    """

    kind: str
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Architecture:
    """The arguments of the cells that hold a set of SDXL weights.

    A part that is not known, or that the weights lack, is None or ().

    unet: arguments of `UNetModel`.
    autoencoder: arguments of `AutoencoderKL`, `embed_dim` and `ddconfig`.
    encoders: in the order of `conditioner.embedders`, from the first.
    """

    unet: dict[str, Any] | None
    autoencoder: dict[str, Any] | None
    encoders: tuple[Encoder, ...]


_CLIP_L = Encoder("clip", width=768, layers=12, heads=12)
_BIG_G = Encoder("open_clip", width=1280, layers=32, heads=20)
_AUTOENCODER: dict[str, Any] = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}
# Podell et al. 2023, as in the original configs.
SDXL_BASE = Architecture(
    unet={
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": 2,
        "attention_resolutions": [4, 2],
        "transformer_depth": [1, 2, 10],
        "num_head_channels": 64,
        "context_dim": 2048,
        "adm_in_channels": 2816,
    },
    autoencoder=_AUTOENCODER,
    encoders=(_CLIP_L, _BIG_G),
)
SDXL_REFINER = Architecture(
    unet={
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 384,
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attention_resolutions": [4, 2],
        "transformer_depth": [4, 4, 4, 4],
        "num_head_channels": 64,
        "context_dim": 1280,
        "adm_in_channels": 2560,
    },
    autoencoder=_AUTOENCODER,
    encoders=(_BIG_G,),
)


def embedder_prefix(index: int) -> str:
    """The prefix of the names of an encoder's tensors, by its index among the encoders."""
    return f"{CONDITIONER_PREFIX}{index}."


def encoder_component(encoders: Sequence[Encoder], index: int) -> str:
    """The folder of an encoder's weights in diffusers: "text_encoder" or "text_encoder_2".

    Raises DataError for encoders that such a folder can't hold.
    """
    kinds = [encoder.kind for encoder in encoders]
    if kinds not in (["clip", "open_clip"], ["clip"], ["open_clip"]):
        raise DataError(
            f"text encoders {', '.join(kinds)}: a diffusers folder holds one clip, then one "
            "open_clip, or one of them; use a single file"
        )
    return "text_encoder" if kinds[index] == "clip" else "text_encoder_2"


def level_depths(unet: Mapping[str, Any]) -> tuple[list[int], int]:
    """The number of transformer blocks in each level (0 without attention) and in the middle."""
    depth, levels = unet["transformer_depth"], len(unet["channel_mult"])
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    attended = unet["attention_resolutions"]
    return [n if 2**level in attended else 0 for level, n in enumerate(depths)], depths[-1]


def merge(first: Architecture, later: Architecture, names: tuple[str, str]) -> Architecture:
    """The parts of both; a part that both have is the later one's.

    names: of their sources, for the message. Raises DataError where both have a part, and the two
    describe different cells.
    """
    different = {
        "unet": first.unet and later.unet and _normalized(first.unet) != _normalized(later.unet),
        "autoencoder": first.autoencoder
        and later.autoencoder
        and first.autoencoder != later.autoencoder,
        "encoders": any(
            one != other for one, other in zip(first.encoders, later.encoders, strict=False)
        ),
    }
    for part, differs in different.items():
        if differs:
            raise DataError(
                f"{names[1]}: its {part} differs in size from that of {names[0]}; give weights of "
                "one model"
            )
    return Architecture(
        later.unet or first.unet,
        later.autoencoder or first.autoencoder,
        max(later.encoders, first.encoders, key=len),
    )


def _normalized(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Equal for all descriptions of the same cells: where a depth is 0 there is no attention."""
    others = {key: value for key, value in unet.items() if key != "attention_resolutions"}
    return {**others, "transformer_depth": level_depths(unet)}
