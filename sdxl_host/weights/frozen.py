"""The networks that are not trained, text encoders and first stage: where their weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.nn.utils import no_init_parameters

from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.files.arrays import FetchedArrays
from sdxl_host.models.initialization import initialize_network, initialize_text_encoder
from sdxl_host.weights.architecture import (
    AUTOENCODER_PREFIX,
    CONDITIONER_PREFIX,
    embedder_prefix,
)
from sdxl_host.weights.load import load
from sdxl_host.weights.names import single_file_parameters
from sdxl_host.weights.source import Source

__all__ = ["ENCODERS", "FIRST_STAGE", "FrozenCells", "FrozenNetworks", "build_frozen"]

# The parts, as the beginnings of their parameters' names.
FIRST_STAGE = AUTOENCODER_PREFIX
ENCODERS = CONDITIONER_PREFIX


class FrozenCells:
    """The cells of a model's frozen networks, built without values.

    encoders: by the beginning of their parameters' names. first_stage: None where it computes
    nothing. parameters: of all of them, by their names in the single file.
    """

    def __init__(self, model: DiffusionModel) -> None:
        with no_init_parameters():  # at full size, random values that are replaced take minutes
            self.encoders: dict[str, nn.Cell] = {
                embedder_prefix(i): encoder.cell for i, encoder in enumerate(model.encoders)
            }
            self.first_stage: nn.Cell | None = model.first_stage.cell
        self.parameters: dict[str, Parameter] = {}
        for prefix, encoder in self.encoders.items():
            self.parameters.update(single_file_parameters(encoder, prefix))
        if self.first_stage is not None:
            self.parameters.update(single_file_parameters(self.first_stage, FIRST_STAGE))

    def initialize(self, seed: int) -> None:
        """Gives them the weights of an untrained model."""
        for prefix, encoder in self.encoders.items():
            initialize_text_encoder(encoder, single_file_parameters(encoder, prefix), seed)
        if self.first_stage is not None:
            parameters = single_file_parameters(self.first_stage, FIRST_STAGE)
            initialize_network(parameters, set(), seed)


@dataclass
class FrozenNetworks:
    """The weights of the frozen networks.

    parameters: by their names in the single file. left: the names of those that have no values yet,
    because nothing has needed them; they stay in `source` until `load`.
    """

    parameters: dict[str, Parameter]
    left: set[str] = field(default_factory=set)
    source: Source | None = None

    def load(self) -> None:
        """Gives the parameters that were left their values."""
        for name in sorted(self.left):
            self.parameters[name].set_data(Tensor(self._array(name)))
        self.left.clear()

    def arrays(self) -> FetchedArrays:
        """All weights by name, wherever they are."""
        return FetchedArrays(self.parameters, self._array)

    def digest(self, part: str = "") -> str:
        """A hash of the weights whose names begin with `part`, in float32: the same whatever file
        and format they came from."""
        found = hashlib.sha256()
        for name in sorted(name for name in self.parameters if name.startswith(part)):
            array = np.ascontiguousarray(self._array(name))
            found.update(f"{name}{array.shape}".encode())
            found.update(array.data)
        return found.hexdigest()

    def _array(self, name: str) -> np.ndarray:
        if name not in self.left:
            return self.parameters[name].asnumpy()
        assert self.source is not None  # what is left is in a file
        return self.source.read(name).astype(np.float32)


def build_frozen(
    model: DiffusionModel, seed: int, source: Source | None, parts: Collection[str]
) -> FrozenNetworks:
    """Builds frozen networks alone, with the weights of `source`, else with initial ones.

    parts: those that get values, `FIRST_STAGE` and `ENCODERS`. seed: of the initial weights.
    """
    cells = FrozenCells(model)
    if source is None:
        cells.initialize(seed)
        return FrozenNetworks(cells.parameters)
    left = {name for name in cells.parameters if not name.startswith(tuple(parts))}
    load(cells.parameters, source, (FIRST_STAGE, ENCODERS), left)
    return FrozenNetworks(cells.parameters, left, source)
