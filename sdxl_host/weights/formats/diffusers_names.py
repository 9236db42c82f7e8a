"""Names of the original single file and of a diffusers folder, by rule, in both directions.

Everything here is a function of the architecture, so a tensor that an architecture does not have
has no name. `split` and `join` work on one tensor at a time and on any type of number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdxl_host.errors import DataError
from sdxl_host.weights.architecture import (
    AUTOENCODER_PREFIX,
    NETWORK_PREFIX,
    Architecture,
    Encoder,
    embedder_prefix,
    encoder_component,
    level_depths,
)

__all__ = [
    "DiffusersTensor",
    "Matches",
    "diffusers_tensors",
    "join",
    "match",
    "split",
    "split_shapes",
]

Pairs = Iterator[tuple[str, str]]  # (single-file name, diffusers name)

_POSITIONS = "text_model.embeddings.position_ids"

# What a residual block of the U-Net, and of the autoencoder, calls its layers.
_UNET_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_AUTOENCODER_BLOCK = ("norm1", "conv1", "norm2", "conv2")
_AUTOENCODER_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CLIP_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm1",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)

# What diffusers called the autoencoder's attention layers before version 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_NAME = re.compile(
    rf"(?<=\.mid_block\.attentions\.0\.)({'|'.join(_OLD_ATTENTION)})(?=\.)"
)

_FUSED = re.compile(r"\.attn\.in_proj_(weight|bias)$")
_TRANSPOSED = re.compile(r"\.model\.text_projection$")
_KERNEL = re.compile(rf"^{re.escape(AUTOENCODER_PREFIX)}.*\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")


@dataclass(frozen=True, order=True)
class DiffusersTensor:
    """One tensor of a diffusers folder.

    component: "unet", "vae", "text_encoder" or "text_encoder_2".
    name: in the component's safetensors, "conv_in.weight".
    """

    component: str
    name: str

    def __str__(self) -> str:
        return f"{self.component}/{self.name}"


@dataclass(frozen=True)
class Matches:
    """The tensors of a diffusers folder that single-file tensors are made of.

    tensors: for each single-file tensor that is there whole, the folder's tensors, named as the
        folder names them and in the order that `join` takes.
    constants: tensors that hold the positions 0..76, which are not read.
    """

    tensors: dict[str, tuple[DiffusersTensor, ...]]
    constants: tuple[DiffusersTensor, ...]


def diffusers_tensors(architecture: Architecture) -> dict[str, tuple[DiffusersTensor, ...]]:
    """Every single-file name of an architecture, and its tensors in a diffusers folder.

    One tensor, or three (query, key and value) for a fused projection, or none where diffusers has
    no such tensor. Raises DataError for text encoders that a diffusers folder can't hold.
    """
    named: dict[str, tuple[DiffusersTensor, ...]] = {}

    def add(component: str, prefix: str, pairs: Pairs) -> None:
        for single, other in pairs:
            named[prefix + single] = (
                *named.get(prefix + single, ()),
                DiffusersTensor(component, other),
            )

    if architecture.unet is not None:
        add("unet", NETWORK_PREFIX, _unet(architecture.unet))
    if architecture.autoencoder is not None:
        add("vae", AUTOENCODER_PREFIX, _autoencoder(architecture.autoencoder["ddconfig"]))
    for index, encoder in enumerate(architecture.encoders):
        component = encoder_component(architecture.encoders, index)
        prefix = embedder_prefix(index)
        if encoder.kind == "clip":
            named[f"{prefix}transformer.{_POSITIONS}"] = ()
            add(component, f"{prefix}transformer.", _clip(encoder))
        else:
            named[f"{prefix}model.logit_scale"] = ()
            add(component, f"{prefix}model.", _open_clip(encoder))
    return named


def match(found: Iterable[DiffusersTensor], architecture: Architecture) -> Matches:
    """Which tensors of a folder make which single-file tensor.

    found: every tensor of the folder. Accepted besides today's names: text encoders without
    `text_model.`, as transformers 5 saves them, and the autoencoder's attention as `query`, `key`,
    `value` and `proj_attn`. Of two spellings of one tensor the first is taken.
    """
    spelled: dict[DiffusersTensor, DiffusersTensor] = {}
    constants: list[DiffusersTensor] = []
    wanted = diffusers_tensors(architecture)
    known = {tensor for parts in wanted.values() for tensor in parts}
    present = {tensor.component for tensor in known}
    for tensor in found:
        today = _today(tensor)
        if today in known:
            spelled.setdefault(today, tensor)
        elif today.name == _POSITIONS and today.component in present:
            constants.append(tensor)
    tensors = {
        name: tuple(spelled[part] for part in parts)
        for name, parts in wanted.items()
        if parts and all(part in spelled for part in parts)
    }
    return Matches(tensors, tuple(constants))


def split(name: str, array: np.ndarray) -> list[np.ndarray]:
    """The tensors that a single-file tensor is in diffusers, in the order of `diffusers_tensors`.

    Raises DataError, naming the tensor, for a shape that can't be split.
    """
    shapes = split_shapes(name, array.shape)
    if _FUSED.search(name):
        return list(np.split(array, 3))
    if _TRANSPOSED.search(name):
        return [np.asarray(array.T, order="C")]
    return [array.reshape(shape) for shape in shapes]


def split_shapes(name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of `split`'s tensors."""
    if name.endswith((f".{_POSITIONS}", ".model.logit_scale")):
        return []
    if _FUSED.search(name):
        if not shape or shape[0] % 3:
            raise _misshapen(name, shape, "query, key and value one above the other")
        return [(shape[0] // 3, *shape[1:])] * 3
    if _TRANSPOSED.search(name):
        if len(shape) != 2:
            raise _misshapen(name, shape, "a matrix")
        return [(shape[1], shape[0])]
    if _KERNEL.search(name):
        if len(shape) != 4 or shape[2:] != (1, 1):
            raise _misshapen(name, shape, "a 1x1 convolution's kernel")
        return [shape[:2]]
    return [shape]


def join(name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The single-file tensor that diffusers tensors make: the inverse of `split`.

    arrays: of the shapes that `split_shapes` gives; the autoencoder's attention may be the 1x1
    kernels that some were saved as before diffusers 0.18.
    """
    if _FUSED.search(name):
        return np.concatenate(arrays)
    (array,) = arrays
    if _TRANSPOSED.search(name):
        return np.asarray(array.T, order="C")
    if _KERNEL.search(name):
        return array.reshape(*array.shape[:2], 1, 1)
    return array


def _misshapen(name: str, shape: tuple[int, ...], expected: str) -> DataError:
    return DataError(f"{name}: the shape {shape} is not that of {expected}; get the weights again")


def _today(tensor: DiffusersTensor) -> DiffusersTensor:
    """The tensor under the name that diffusers has for it now."""
    name = tensor.name
    if tensor.component == "vae":
        name = _OLD_ATTENTION_NAME.sub(lambda match: _OLD_ATTENTION[match[0]], name)
    elif tensor.component.startswith("text_encoder") and not name.startswith(
        ("text_model.", "text_projection.")
    ):
        name = f"text_model.{name}"
    return DiffusersTensor(tensor.component, name)


# ---- pairs of names, part by part ---------------------------------------------------------------


def _affine(single: str, other: str) -> Pairs:
    yield f"{single}.weight", f"{other}.weight"
    yield f"{single}.bias", f"{other}.bias"


def _unet(unet: Mapping[str, Any]) -> Pairs:
    """Block by block, as the U-Net is built: only so is a block's number in one known from its
    number in the other, and whether a residual block changes its width."""
    depths, middle_depth = level_depths(unet)
    widths = [unet["model_channels"] * multiple for multiple in unet["channel_mult"]]
    levels, blocks = len(widths), unet["num_res_blocks"]

    yield from _affine("time_embed.0", "time_embedding.linear_1")
    yield from _affine("time_embed.2", "time_embedding.linear_2")
    yield from _affine("label_emb.0.0", "add_embedding.linear_1")
    yield from _affine("label_emb.0.2", "add_embedding.linear_2")
    yield from _affine("input_blocks.0.0", "conv_in")

    channels, number = unet["model_channels"], 1
    for level, width in enumerate(widths):
        down = f"down_blocks.{level}"
        for block in range(blocks):
            single = f"input_blocks.{number}"
            yield from _unet_block(f"{single}.0", f"{down}.resnets.{block}", channels != width)
            if depths[level]:
                yield from _transformer(f"{single}.1", f"{down}.attentions.{block}", depths[level])
            channels, number = width, number + 1
        if level < levels - 1:
            yield from _affine(f"input_blocks.{number}.0.op", f"{down}.downsamplers.0.conv")
            number += 1

    yield from _unet_block("middle_block.0", "mid_block.resnets.0", False)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", middle_depth)
    yield from _unet_block("middle_block.2", "mid_block.resnets.1", False)

    number = 0
    for level in reversed(range(levels)):
        up = f"up_blocks.{levels - 1 - level}"
        for block in range(blocks + 1):
            single = f"output_blocks.{number}"
            # A block's input is joined by an earlier one's output, so it is always the wider.
            yield from _unet_block(f"{single}.0", f"{up}.resnets.{block}", True)
            if depths[level]:
                yield from _transformer(f"{single}.1", f"{up}.attentions.{block}", depths[level])
            if level > 0 and block == blocks:
                index = 2 if depths[level] else 1
                yield from _affine(f"{single}.{index}.conv", f"{up}.upsamplers.0.conv")
            number += 1

    yield from _affine("out.0", "conv_norm_out")
    yield from _affine("out.2", "conv_out")


def _unet_block(single: str, other: str, changes_width: bool) -> Pairs:
    for mine, theirs in _UNET_BLOCK.items():
        yield from _affine(f"{single}.{mine}", f"{other}.{theirs}")
    if changes_width:
        yield from _affine(f"{single}.skip_connection", f"{other}.conv_shortcut")


def _transformer(single: str, other: str, depth: int) -> Pairs:
    """A spatial transformer; the names inside it are the same in both."""
    for layer in ("norm", "proj_in", "proj_out"):
        yield from _affine(f"{single}.{layer}", f"{other}.{layer}")
    for index in range(depth):
        block = f"transformer_blocks.{index}"
        for attention in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v"):
                local = f"{block}.{attention}.{projection}.weight"
                yield f"{single}.{local}", f"{other}.{local}"
            local = f"{block}.{attention}.to_out.0"
            yield from _affine(f"{single}.{local}", f"{other}.{local}")
        for layer in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"):
            yield from _affine(f"{single}.{block}.{layer}", f"{other}.{block}.{layer}")


def _autoencoder(ddconfig: Mapping[str, Any]) -> Pairs:
    widths = [ddconfig["ch"] * multiple for multiple in ddconfig["ch_mult"]]
    levels, blocks = len(widths), ddconfig["num_res_blocks"]

    yield from _affine("quant_conv", "quant_conv")
    yield from _affine("post_quant_conv", "post_quant_conv")
    for half in ("encoder", "decoder"):
        yield from _affine(f"{half}.conv_in", f"{half}.conv_in")
        yield from _autoencoder_middle(f"{half}.mid", f"{half}.mid_block")
        yield from _affine(f"{half}.norm_out", f"{half}.conv_norm_out")
        yield from _affine(f"{half}.conv_out", f"{half}.conv_out")

    channels = widths[0]
    for level, width in enumerate(widths):
        single, other = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for block in range(blocks):
            yield from _autoencoder_block(
                f"{single}.block.{block}", f"{other}.resnets.{block}", channels != width
            )
            channels = width
        if level < levels - 1:
            yield from _affine(f"{single}.downsample.conv", f"{other}.downsamplers.0.conv")

    for level in reversed(range(levels)):
        # The single file counts levels from the finest, diffusers in the order they are run.
        single, other = f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for block in range(blocks + 1):
            yield from _autoencoder_block(
                f"{single}.block.{block}", f"{other}.resnets.{block}", channels != widths[level]
            )
            channels = widths[level]
        if level > 0:
            yield from _affine(f"{single}.upsample.conv", f"{other}.upsamplers.0.conv")


def _autoencoder_block(single: str, other: str, changes_width: bool) -> Pairs:
    for layer in _AUTOENCODER_BLOCK:
        yield from _affine(f"{single}.{layer}", f"{other}.{layer}")
    if changes_width:
        yield from _affine(f"{single}.nin_shortcut", f"{other}.conv_shortcut")


def _autoencoder_middle(single: str, other: str) -> Pairs:
    yield from _autoencoder_block(f"{single}.block_1", f"{other}.resnets.0", False)
    for mine, theirs in _AUTOENCODER_ATTENTION.items():
        yield from _affine(f"{single}.attn_1.{mine}", f"{other}.attentions.0.{theirs}")
    yield from _autoencoder_block(f"{single}.block_2", f"{other}.resnets.1", False)


def _clip(encoder: Encoder) -> Pairs:
    """The names of transformers, in both."""
    for table in ("token_embedding", "position_embedding"):
        name = f"text_model.embeddings.{table}.weight"
        yield name, name
    layers = [
        f"text_model.encoder.layers.{index}.{layer}"
        for index in range(encoder.layers)
        for layer in _CLIP_LAYER
    ]
    for name in (*layers, "text_model.final_layer_norm"):
        yield from _affine(name, name)


def _open_clip(encoder: Encoder) -> Pairs:
    yield "token_embedding.weight", "text_model.embeddings.token_embedding.weight"
    yield "positional_embedding", "text_model.embeddings.position_embedding.weight"
    yield "text_projection", "text_projection.weight"
    yield from _affine("ln_final", "text_model.final_layer_norm")
    for index in range(encoder.layers):
        single = f"transformer.resblocks.{index}"
        other = f"text_model.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            for projection in ("q_proj", "k_proj", "v_proj"):
                yield f"{single}.attn.in_proj_{kind}", f"{other}.self_attn.{projection}.{kind}"
        for mine, theirs in _OPEN_CLIP_LAYER.items():
            yield from _affine(f"{single}.{mine}", f"{other}.{theirs}")
