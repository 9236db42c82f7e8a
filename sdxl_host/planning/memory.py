"""What a run holds: parameters by part of the model, and the device memory they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.weights.architecture import AUTOENCODER_PREFIX, NETWORK_PREFIX, embedder_prefix

if TYPE_CHECKING:
    from mindspore import Parameter, nn

__all__ = [
    "Part",
    "memory",
    "model_parts",
]


@dataclass(frozen=True)
class Part:
    """A part of the model: its parameters, those of them that are trained, and both in bytes.

    shapes: those of its parameters, by their names in the single file, before plugins changed it.
    """

    name: str
    count: int
    trained: int
    bytes: int
    trained_bytes: int
    shapes: dict[str, tuple[int, ...]]


def model_parts(model: DiffusionModel) -> list[Part]:
    """The network, the text encoders and the first stage, in this order; no weight is made.

    Plugins' network changes are made, as before a run but without loaded weights.
    """
    from mindspore.nn.utils import no_init_parameters

    from sdxl_host.weights.networks import change_network

    with no_init_parameters():
        cell = model.network
        encoders = [encoder.cell for encoder in model.encoders]
        first_stage = model.first_stage.cell
        before = _shapes(cell, NETWORK_PREFIX)
        network, trained = change_network(model, _parameters(cell, NETWORK_PREFIX))
    parts = [_part("network", network.values(), trained, before)]
    for index, encoder in enumerate(encoders):
        shapes = _shapes(encoder, embedder_prefix(index))
        parts.append(_part(f"text encoder {index + 1}", _parameters(encoder).values(), [], shapes))
    if first_stage is not None:
        shapes = _shapes(first_stage, AUTOENCODER_PREFIX)
        parts.append(_part("first stage", _parameters(first_stage).values(), [], shapes))
    return parts


def _part(
    name: str,
    parameters: Iterable[Parameter],
    trained: Iterable[Parameter],
    shapes: dict[str, tuple[int, ...]],
) -> Part:
    every, learning = list(parameters), list(trained)
    return Part(
        name,
        sum(p.size for p in every),
        sum(p.size for p in learning),
        sum(_bytes(p) for p in every),
        sum(_bytes(p) for p in learning),
        shapes,
    )


def _bytes(parameter: Parameter) -> int:
    from mindspore.common.dtype import dtype_to_nptype

    return parameter.size * np.dtype(dtype_to_nptype(parameter.dtype)).itemsize


def _parameters(cell: nn.Cell, prefix: str = "") -> dict[str, Parameter]:
    """By their names in the single file."""
    from sdxl_host.weights.names import single_file_parameters

    return single_file_parameters(cell, prefix)


def _shapes(cell: nn.Cell, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in _parameters(cell, prefix).items()}


def memory(parts: Sequence[Part]) -> list[tuple[str, str, int]]:
    """What stays in a device's memory during training: (what, formula, bytes) of each kind.

    Activations are not part of it: they depend on the batch, the image's size and the compiler.
    """
    network, frozen = parts[0], parts[1:]
    moments = 2 * 4 * network.trained  # AdamW keeps both in float32, whatever the weights are
    frozen_count, frozen_bytes = sum(p.count for p in frozen), sum(p.bytes for p in frozen)
    return [
        ("network", _formula(network.count, network.bytes), network.bytes),
        ("gradients", _formula(network.trained, network.trained_bytes), network.trained_bytes),
        ("optimizer", f"2 moments x 4 bytes x {network.trained:,} trained", moments),
        ("frozen", _formula(frozen_count, frozen_bytes), frozen_bytes),
    ]


def _formula(count: int, size: int) -> str:
    """4 for float32; the mean where types differ."""
    return f"{size / max(count, 1):.3g} bytes x {count:,} weights"
