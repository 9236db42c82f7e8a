"""The names and shapes of a model's tensors: from an architecture, and to the architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from sdxl_host.errors import DataError
from sdxl_host.weights.architecture import (
    AUTOENCODER_PREFIX,
    CONDITIONER_PREFIX,
    NETWORK_PREFIX,
    SDXL_BASE,
    SDXL_REFINER,
    Architecture,
    Encoder,
    embedder_prefix,
)

__all__ = ["complete", "expected_shapes", "infer"]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_POSITIONS = "transformer.text_model.embeddings.position_ids"

# The share of a released model's tensors by which weights are recognized as that model. A file in
# which some tensors are wrong or missing is then reported tensor by tensor, and not taken for a
# model of another size.
_RECOGNIZED = 0.9


# ---- from an architecture -----------------------------------------------------------------------


def expected_shapes(architecture: Architecture) -> dict[str, Shape]:
    """The single-file names and shapes of an architecture's tensors.

    They are those of the cells' parameters, and `position_ids` (int64) of a clip encoder, which the
    file holds and the cell computes. No memory of the weights' size is allocated. Raises DataError
    for an architecture that the cells refuse.
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
    """The names, without prefix, and shapes of one part; settings: its cell's arguments as JSON."""
    # Imported here, because MindSpore takes seconds and small models are inferred without it.
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
        arguments["layer_idx"] = arguments["layers"]  # the default may exceed a small model's
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
    """The architecture of tensors, from their single-file names and shapes.

    A part that shares nine tenths of its tensors with a released model's is taken for that model's,
    so that a wrong tensor is reported by its name. head_width: the channels of an attention head,
    which no shape shows; 64 everywhere in SDXL. Names outside the model's parts are ignored.

    Raises DataError, naming the tensor, where a tensor that a size is read from is missing or has
    an unexpected number of axes.
    """
    return complete(None, shapes, head_width)


def complete(stated: Architecture | None, shapes: Shapes, head_width: int = 64) -> Architecture:
    """The stated architecture; the parts that it lacks are inferred as in `infer`.

    Encoders are inferred after the last stated one. Raises DataError as `infer` does.
    """
    stated = stated or Architecture(None, None, ())
    network, first_stage = _Part(shapes, NETWORK_PREFIX), _Part(shapes, AUTOENCODER_PREFIX)
    unet, autoencoder = stated.unet, stated.autoencoder
    if unet is None and network.shapes:
        unet = _recognize(network, "unet", head_width) or _infer_unet(network, head_width)
    if autoencoder is None and first_stage.shapes:
        autoencoder = _recognize(first_stage, "autoencoder") or _infer_autoencoder(first_stage)
    others = _infer_encoders(shapes, head_width, start=len(stated.encoders))
    return Architecture(unet, autoencoder, (*stated.encoders, *others))


class _Part:
    """The tensors whose names begin with a prefix, by the rest of their names."""

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        self.prefix = prefix
        self.shapes = {
            name[len(prefix) :]: tuple(shape)
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }

    def size(self, name: str, axis: int, axes: int) -> int:
        """The size of a tensor along an axis. Raises DataError unless it has so many `axes`."""
        shape = self.shapes.get(name)
        if shape is None:
            raise self.error(name, "missing, and the model's size is read from it")
        if len(shape) != axes or 0 in shape:
            raise self.error(name, f"has the shape {shape}, where {axes} axes are expected")
        return shape[axis]

    def below(self, path: str, start: int = 0) -> list[set[str]]:
        """For each number that follows `path`, from `start` on, the names after it.

        `[{"0.weight", ...}, ...]`. Raises DataError where a number is left out.
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
                raise self.error(f"{path}{number}", "missing, with all tensors below it")
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


# The parts of the released models, and how many tensors each has. A part with far fewer tensors is
# not compared with them, because that means building them.
_RELEASED: dict[str, list[tuple[dict[str, Any], int]]] = {
    "unet": [(SDXL_BASE.unet or {}, 1680), (SDXL_REFINER.unet or {}, 1220)],
    "autoencoder": [(SDXL_BASE.autoencoder or {}, 248)],
    "clip": [(asdict(SDXL_BASE.encoders[0]), 197)],
    "open_clip": [(asdict(SDXL_BASE.encoders[1]), 390)],
}


def _recognize(part: _Part, kind: str, head_width: int = 64) -> dict[str, Any] | None:
    """The settings of the released model that a part belongs to, or None."""
    if head_width != 64:
        return None
    for settings, tensors in _RELEASED[kind]:
        if len(part.shapes) >= _RECOGNIZED * tensors:
            arguments = {key: value for key, value in settings.items() if key != "kind"}
            expected = _part_shapes(kind, json.dumps(arguments))
            right = sum(part.shapes.get(name) == shape for name, shape in expected.items())
            if right >= _RECOGNIZED * len(expected):
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
            **(SDXL_BASE.autoencoder or {})["ddconfig"],
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
    """The encoders from index `start` on."""
    conditioner = _Part(shapes, CONDITIONER_PREFIX)
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
        released = _recognize(part, kind, head_width)
        if released:
            yield Encoder(**released)
            continue
        width = part.size(table, 1, 2)
        if width % head_width:
            raise part.error(table, f"is {width} wide, no multiple of a head's {head_width}")
        yield Encoder(kind, width, len(part.below(layers)), width // head_width)
