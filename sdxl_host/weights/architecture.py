"""What a set of weights is a model of: the arguments of our cells, and what they make.

Told from the names and shapes of a single file here, from a diffusers folder's configs in
`diffusers_configs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from sdxl_host.errors import DataError

__all__ = [
    "AUTOENCODER_PREFIX",
    "INITIAL_LOGIT_SCALE",
    "NETWORK_PREFIX",
    "SDXL_BASE",
    "SDXL_REFINER",
    "Architecture",
    "Encoder",
    "completed",
    "embedder_prefix",
    "encoder_component",
    "expected_shapes",
    "infer",
    "joint",
    "level_depths",
]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

NETWORK_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
_CONDITIONER = "conditioner.embedders."
_POSITIONS = "transformer.text_model.embeddings.position_ids"

# What the scale of CLIP's similarities starts from, whose logarithm is trained: a temperature of
# 0.07 (Radford et al. 2021, section 2.5).
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)

# Of a released model's tensors, how many must be there for weights to be taken for it: so a file
# with some wrong or missing tensors is told which, rather than taken for another model.
_RECOGNISED = 0.9


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
    """What a set of SDXL weights is a model of. A part that is not known, or that the weights lack,
    is None or ().

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
    """What an encoder's names begin with, by its place among the encoders."""
    return f"{_CONDITIONER}{index}."


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
    """Transformer blocks in each level, 0 where it has no attention, and in the middle block."""
    depth, levels = unet["transformer_depth"], len(unet["channel_mult"])
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    attended = unet["attention_resolutions"]
    return [own if 2**level in attended else 0 for level, own in enumerate(depths)], depths[-1]


def joint(first: Architecture, later: Architecture, names: tuple[str, str]) -> Architecture:
    """All parts that either states; of one that both state, the later's description.

    names: of their sources, for the message. Raises DataError where both state a part and it makes
    other cells.
    """
    different = {
        "unet": first.unet and later.unet and _plain(first.unet) != _plain(later.unet),
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


def _plain(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The same for all descriptions of a U-Net: its depths say where there is attention."""
    others = {key: value for key, value in unet.items() if key != "attention_resolutions"}
    return {**others, "transformer_depth": level_depths(unet)}


# ---- what our cells are made of -----------------------------------------------------------------


def expected_shapes(architecture: Architecture) -> dict[str, Shape]:
    """The single-file names and shapes of an architecture, as our cells have them.

    With `position_ids`, int64, of a clip encoder, which the file has and the cell computes. Nothing
    of the weights' size is allocated. Raises DataError for what the cells refuse.
    """
    expected: dict[str, Shape] = {}

    def add(prefix: str, part: str, settings: Mapping[str, Any]) -> None:
        for name, shape in _part_shapes(part, json.dumps(settings)).items():
            expected[prefix + name] = shape

    if architecture.unet is not None:
        add(NETWORK_PREFIX, "unet", architecture.unet)
    if architecture.autoencoder is not None:
        add(AUTOENCODER_PREFIX, "autoencoder", architecture.autoencoder)
    for index, encoder in enumerate(architecture.encoders):
        settings = asdict(encoder)
        add(embedder_prefix(index), settings.pop("kind"), settings)
    return expected


@lru_cache(maxsize=64)
def _part_shapes(part: str, settings: str) -> dict[str, Shape]:
    """Local names and shapes of one part; settings: its cell's arguments as JSON."""
    # Late, because they take seconds and inference from shapes does without.
    from mindspore.nn.utils import no_init_parameters

    from sdxl_host.models.autoencoder import AutoencoderKL
    from sdxl_host.models.text_encoders import (
        CONTEXT_LENGTH,
        FrozenCLIPEmbedder,
        FrozenOpenCLIPEmbedder2,
    )
    from sdxl_host.models.unet import UNetModel
    from sdxl_host.weights.names import single_file_parameters

    arguments = json.loads(settings)
    cells = {
        "unet": UNetModel,
        "autoencoder": AutoencoderKL,
        "clip": FrozenCLIPEmbedder,
        "open_clip": FrozenOpenCLIPEmbedder2,
    }
    if part == "clip":
        arguments["layer_idx"] = arguments["layers"]  # any will do; the default is CLIP-L's
    try:
        with no_init_parameters():
            cell = cells[part](**arguments)
    except ValueError as error:
        raise DataError(f"{error}; use weights of SDXL's structure") from error
    shapes = {name: tuple(each.shape) for name, each in single_file_parameters(cell).items()}
    if part == "clip":
        shapes[_POSITIONS] = (1, CONTEXT_LENGTH)
    return shapes


# ---- from names and shapes ----------------------------------------------------------------------


def infer(shapes: Shapes, head_width: int = 64) -> Architecture:
    """The architecture that single-file names and shapes are of.

    A part of which nine tenths of the tensors are those of a released model is that model's, so
    that a wrong tensor is later reported by its name. head_width: of every attention head; it can't
    be seen in shapes, and is 64 in all of SDXL. Names outside the model's parts are not looked at.

    Raises DataError, naming the tensor, where the one that a size is read from is missing or has
    another number of axes.
    """
    return completed(None, shapes, head_width)


def completed(stated: Architecture | None, shapes: Shapes, head_width: int = 64) -> Architecture:
    """A stated architecture with the parts that it leaves out as `infer` tells them.

    The tensors of a stated part are not looked at. Of the encoders those after the stated ones are
    told. Raises DataError as `infer` does.
    """
    stated = stated or Architecture(None, None, ())
    network, first_stage = _Part(shapes, NETWORK_PREFIX), _Part(shapes, AUTOENCODER_PREFIX)
    unet, autoencoder = stated.unet, stated.autoencoder
    if unet is None and network.shapes:
        unet = _recognised(network, "unet", head_width) or _infer_unet(network, head_width)
    if autoencoder is None and first_stage.shapes:
        autoencoder = _recognised(first_stage, "autoencoder") or _infer_autoencoder(first_stage)
    others = _infer_encoders(shapes, head_width, start=len(stated.encoders))
    return Architecture(unet, autoencoder, (*stated.encoders, *others))


class _Part:
    """The tensors below a prefix, by their local names."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        self.prefix = prefix
        self.shapes = {
            name[len(prefix) :]: tuple(shape)
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }

    def size(self, name: str, axis: int, axes: int) -> int:
        """The size of a tensor, which has so many axes, along one of them."""
        shape = self.shapes.get(name)
        if shape is None:
            raise self.error(name, "missing, and the model's size can't be told without it")
        if len(shape) != axes or 0 in shape:
            raise self.error(name, f"has the shape {shape}, where {axes} axes are expected")
        return shape[axis]

    def below(self, path: str, start: int = 0) -> list[set[str]]:
        """What stands below each number from `start` after a path, `[{"0.weight", ...}, ...]`.

        Raises DataError when a number is left out.
        """
        found: dict[int, set[str]] = {}
        for name in self.shapes:
            if name.startswith(path):
                number, _, rest = name[len(path) :].partition(".")
                if number.isdecimal() and int(number) >= start:
                    found.setdefault(int(number), set()).add(rest)
        numbers = range(start, start + len(found))
        for number in numbers:
            if number not in found:
                raise self.error(f"{path}{number}", "missing, with all that stands below it")
        return [found[number] for number in numbers]

    def ratio(self, name: str, axes: int, unit: int) -> int:
        """The first size of a tensor, as a multiple of `unit`."""
        size = self.size(name, 0, axes)
        if size % unit:
            raise self.error(name, f"is {size} wide, which is no multiple of {unit}")
        return size // unit

    def error(self, name: str, problem: str) -> DataError:
        return DataError(
            f"{self.prefix}{name}: {problem}; use weights of SDXL's structure, or get them again"
        )


# The released models by part, each with the number of its tensors: a part with far fewer is not
# compared with them, which would take building them.
_RELEASED: dict[str, list[tuple[dict[str, Any], int]]] = {
    "unet": [(SDXL_BASE.unet or {}, 1680), (SDXL_REFINER.unet or {}, 1220)],
    "autoencoder": [(_AUTOENCODER, 248)],
    "clip": [(asdict(_CLIP_L), 197)],
    "open_clip": [(asdict(_BIG_G), 390)],
}


def _recognised(part: _Part, kind: str, head_width: int = 64) -> dict[str, Any] | None:
    """The released model's sizes that a part is recognised by, or None."""
    if head_width != 64:
        return None
    for settings, tensors in _RELEASED[kind]:
        if len(part.shapes) >= _RECOGNISED * tensors:
            arguments = {key: value for key, value in settings.items() if key != "kind"}
            expected = _part_shapes(kind, json.dumps(arguments))
            right = sum(part.shapes.get(name) == shape for name, shape in expected.items())
            if right >= _RECOGNISED * len(expected):
                return deepcopy(settings)
    return None


def _infer_unet(part: _Part, head_width: int) -> dict[str, Any]:
    channels = part.size("input_blocks.0.0.weight", 0, 4)
    # The input blocks between two downsampling ones are the residual blocks of one level.
    levels: list[list[int]] = [[]]
    blocks = part.below("input_blocks.")
    for number, names in enumerate(blocks[1:], start=1):
        if any(name.startswith("0.op.") for name in names):
            levels.append([])
        else:
            levels[-1].append(number)
    counts = [len(level) for level in levels]
    if len(set(counts)) != 1 or not counts[0]:
        raise part.error(
            "input_blocks", f"the levels have {', '.join(map(str, counts))} residual blocks each"
        )
    depths = [
        max(len(part.below(f"input_blocks.{number}.1.transformer_blocks.")) for number in level)
        for level in levels
    ]
    attended = [level for level, depth in enumerate(depths) if depth]
    if len(depths) - 1 not in attended:
        depths[-1] = len(part.below("middle_block.1.transformer_blocks."))
    return {
        "in_channels": part.size("input_blocks.0.0.weight", 1, 4),
        "out_channels": part.size("out.2.weight", 0, 4),
        "model_channels": channels,
        "channel_mult": [
            part.ratio(f"input_blocks.{level[0]}.0.out_layers.3.weight", 4, channels)
            for level in levels
        ],
        "num_res_blocks": counts[0],
        "attention_resolutions": [2**level for level in reversed(attended)],
        "transformer_depth": depths,
        "num_head_channels": head_width,
        "context_dim": part.size("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1, 2),
        "adm_in_channels": part.size("label_emb.0.0.weight", 1, 2),
    }


def _infer_autoencoder(part: _Part) -> dict[str, Any]:
    channels = part.size("encoder.conv_in.weight", 0, 4)
    levels = range(len(part.below("encoder.down.")))
    z_channels = part.size("decoder.conv_in.weight", 1, 4)
    return {
        "embed_dim": part.size("post_quant_conv.weight", 1, 4),
        "ddconfig": {
            **_AUTOENCODER["ddconfig"],
            "double_z": part.size("encoder.conv_out.weight", 0, 4) == 2 * z_channels,
            "z_channels": z_channels,
            "in_channels": part.size("encoder.conv_in.weight", 1, 4),
            "out_ch": part.size("decoder.conv_out.weight", 0, 4),
            "ch": channels,
            "ch_mult": [
                part.ratio(f"encoder.down.{level}.block.0.conv1.weight", 4, channels)
                for level in levels
            ],
            "num_res_blocks": len(part.below("encoder.down.0.block.")),
        },
    }


def _infer_encoders(shapes: Shapes, head_width: int, start: int) -> Iterator[Encoder]:
    """The encoders from the one in place `start`."""
    conditioner = _Part(shapes, _CONDITIONER)
    for index, names in enumerate(conditioner.below("", start), start):
        part = _Part(shapes, embedder_prefix(index))
        if any(name.startswith("transformer.text_model.") for name in names):
            kind, table = "clip", "transformer.text_model.embeddings.token_embedding.weight"
            layers = "transformer.text_model.encoder.layers."
        elif any(name.startswith("model.") for name in names):
            kind, table = "open_clip", "model.token_embedding.weight"
            layers = "model.transformer.resblocks."
        else:
            raise conditioner.error(str(index), f"holds {min(names)}, which is no text encoder's")
        released = _recognised(part, kind, head_width)
        if released:
            yield Encoder(**released)
            continue
        width = part.size(table, 1, 2)
        if width % head_width:
            raise part.error(table, f"is {width} wide, no multiple of a head's {head_width}")
        yield Encoder(kind, width, len(part.below(layers)), width // head_width)
