"""Names of tensors: a diffusers folder -> the original single file."""

import re
from dataclasses import dataclass

UNET_STEMS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPEN_CLIP_STEMS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


@dataclass(frozen=True)
class Layout:
    """What the rules must know of a model beside its names; the defaults are SDXL's.

    resnets: the U-Net's layers_per_block. attends: whether each of its levels has attention,
    finest first. vae_levels: levels of the VAE.
    """

    resnets: int = 2
    attends: tuple[bool, ...] = (False, True, True)
    vae_levels: int = 4


SDXL = Layout()


def match(pattern: str, name: str) -> tuple[str, ...]:
    """Groups of `pattern` in the whole of `name`, empty where a group took no part."""
    found = re.fullmatch(pattern, name)
    if found is None:
        raise ValueError(f"{name!r}: no rule for this name; expected {pattern}")
    return found.groups(default="")


def single_file_name(name: str, layout: Layout = SDXL) -> str:
    """Single-file name of `name`, a tensor of a diffusers folder such as "unet/conv_in.weight"."""
    component, _, rest = name.partition("/")
    if component == "unet":
        return "model.diffusion_model." + unet_name(rest, layout)
    if component == "vae":
        return "first_stage_model." + vae_name(rest, layout.vae_levels)
    if component == "text_encoder":
        return "conditioner.embedders.0.transformer." + rest
    if component == "text_encoder_2":
        return "conditioner.embedders.1.model." + open_clip_name(rest)
    raise ValueError(f"{name!r}: unknown component; expected unet, vae or text_encoder(_2)")


def unet_name(name: str, layout: Layout) -> str:
    """Original U-Net name: blocks are numbered through all levels, one per skip connection."""
    stem, _, kind = name.rpartition(".")
    if stem in UNET_STEMS:
        return f"{UNET_STEMS[stem]}.{kind}"
    where, level, part, index, rest = match(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name
    )
    resnets = layout.resnets
    number = int(level or 0) * (resnets + 1) + int(index)
    if part == "downsamplers":
        return f"input_blocks.{number + resnets + 1}.0.op.{kind}"
    if part == "upsamplers":
        # Behind the attention, where the level has one; levels are counted from the coarsest here.
        entry = 2 if layout.attends[-1 - int(level)] else 1
        return f"output_blocks.{number + resnets}.{entry}.{rest}"
    if where == "mid":
        # The middle is resnet 0, attention, resnet 1.
        block = f"middle_block.{1 if part == 'attentions' else 2 * int(index)}"
    else:
        block = f"input_blocks.{number + 1}" if where == "down" else f"output_blocks.{number}"
        block += ".1" if part == "attentions" else ".0"
    return f"{block}.{rest if part == 'attentions' else resnet_name(rest)}"


def resnet_name(name: str) -> str:
    """Part of a U-Net residual block, e.g. conv1.weight -> in_layers.2.weight."""
    part, kind = name.split(".")
    return f"{UNET_RESNET[part]}.{kind}"


def vae_name(name: str, levels: int) -> str:
    """Original VAE name: the decoder's levels are counted from the finest, unlike diffusers'."""
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda level: f"up.{levels - 1 - int(level[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda i: f"mid.block_{int(i[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
    name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
    for part, original in VAE_PARTS.items():
        name = name.replace(f".{part}.", f".{original}.")
    return name


def open_clip_name(name: str) -> str:
    """Original OpenCLIP name; the three of q, k and v share one, that of their concatenation."""
    if name in OPEN_CLIP_STEMS:
        return OPEN_CLIP_STEMS[name]
    layer, part, kind = match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    block = f"transformer.resblocks.{layer}"
    if re.fullmatch(r"self_attn\.[qkv]_proj", part):
        return f"{block}.attn.in_proj_{kind}"
    return f"{block}.{OPEN_CLIP_PARTS[part]}.{kind}"
