"""From settings to a model that is ready: hooks, networks, and the weights in them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mindspore import Parameter, nn
from mindspore.nn.utils import no_init_parameters

from sdxl_host.checkpoints.layout import AVERAGES_FILE, FROZEN_FILE, NETWORK_FILE
from sdxl_host.checkpoints.open import Checkpoint
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import ConfigError, DataError, PluginError
from sdxl_host.files.tensors import open_safetensors, over
from sdxl_host.models.initialization import initialize_network, initialize_text_encoder
from sdxl_host.weights.architecture import (
    AUTOENCODER_PREFIX,
    NETWORK_PREFIX,
    Architecture,
    embedder_prefix,
)
from sdxl_host.weights.load import load
from sdxl_host.weights.metadata import SCALE_FACTOR, recorded_objective
from sdxl_host.weights.names import single_file_parameters
from sdxl_host.weights.open import Source, open_all

__all__ = [
    "Parts",
    "change_network",
    "check_fit",
    "make_parts",
    "open_weight",
    "weight_lines",
]


@dataclass(frozen=True)
class Parts:
    """The cells of a model with their parameters, by names of the single file.

    network: the U-Net's parameters, those that plugins added included. frozen: those of the text
    encoders and of the first stage. trained: the network's parameters that are trained.
    """

    cell: nn.Cell
    network: dict[str, Parameter]
    frozen: dict[str, Parameter]
    trained: list[Parameter]

    def digest(self) -> str:
        """Of all weights."""
        found = hashlib.sha256()
        for name, parameter in {**self.network, **self.frozen}.items():
            found.update(name.encode("utf-8"))
            found.update(parameter.asnumpy().tobytes())
        return found.hexdigest()


def open_weight(weight: str) -> Source | None:
    """The weights that `--weight` names, or None where it names none. Raises DataError.

    weight: a path that `open_weights` takes, or several with commas between, of which a later one
    goes before an earlier one.
    """
    if not weight:
        return None
    paths = [Path(path.strip()).expanduser() for path in weight.split(",") if path.strip()]
    if not paths:
        raise DataError(f"--weight {weight!r}: names no file; give one, or leave it out")
    return open_all(paths)


def weight_lines(source: Source, model: DiffusionModel) -> list[str]:
    """What the user is told of the weights: where they come from and what does not fit."""
    lines = [f"weights     {source.description}", *(f"            {note}" for note in source.notes)]
    trained, here = recorded_objective(source.metadata), model.preconditioning.name
    if trained is not None and trained != here:
        lines.append(
            f"note        these weights were trained with the objective {trained}, not {here}"
        )
    scale, own = source.metadata.get(SCALE_FACTOR), float(model.first_stage.scale_factor)
    if scale is not None and not math.isclose(float(scale), own, rel_tol=1e-6):
        lines.append(
            f"note        these weights were trained with scale_factor {scale}, not {own:g}"
        )
    return lines


def check_fit(model: DiffusionModel, size: tuple[int, int], where: str) -> None:
    """Builds the cells, without values, and sees that they fit each other and the images.

    size: (height, width) in pixels; where: what the message calls it. Raises ConfigError.
    """
    # No parameter is given a value before its own: at full size that would take minutes.
    with no_init_parameters():
        network, first_stage, conditioner = model.network, model.first_stage, model.conditioner
    for key, has, needs, whose in (
        ("in_channels", network.in_channels, first_stage.channels, "the first stage's latents"),
        ("context_dim", network.context_dim, conditioner.context_width, "the text encoders"),
        ("adm_in_channels", network.adm_in_channels, conditioner.vector_width, "the embedders"),
    ):
        if has != needs:
            raise ConfigError(
                f"model.params.network_config.params.{key}: {has} does not fit {whose}, which "
                f"give {needs}; set it to {needs}"
            )
    step = first_stage.downsampling * network.downsampling
    if any(length < step or length % step for length in size):
        height, width = size
        raise ConfigError(
            f"{where} {height}x{width}: height and width must be multiples of {step}, by which "
            "autoencoder and network downsample"
        )


def _check_heads(stated: Architecture, model: DiffusionModel, source: str) -> None:
    """Raises ConfigError where weights say that their heads are wider or narrower: names and
    shapes would be the same, and what is computed would not."""
    pairs = []
    if stated.unet:
        pairs.append(
            (
                "model.params.network_config.params.num_head_channels",
                stated.unet["num_head_channels"],
                model.network.num_head_channels,
            )
        )
    for index, (encoder, own) in enumerate(zip(stated.encoders, model.encoders, strict=False)):
        where = f"model.params.conditioner_config.params.emb_models[{index}].params.heads"
        pairs.append((where, encoder.heads, own.cell.heads))
    for where, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(f"{where}: {ours} does not fit {source}, which has {theirs}")


def make_parts(
    model: DiffusionModel,
    seed: int,
    source: Source | None = None,
    checkpoint: Checkpoint | None = None,
    averaged: bool = False,
) -> Parts:
    """Builds the networks; their weights are those of `checkpoint`, else come from `source`, else
    are initial ones.

    Network changes of plugins are made after the weights of `source` are loaded, and before those
    of `checkpoint`. averaged: its moving averages in place of the weights they are of.
    """
    with no_init_parameters():  # as in `check_fit`
        cell = model.network
        encoders = {embedder_prefix(i): encoder.cell for i, encoder in enumerate(model.encoders)}
        first_stage = model.first_stage.cell
    network = single_file_parameters(cell, NETWORK_PREFIX)
    frozen: dict[str, Parameter] = {}
    for prefix, encoder in encoders.items():
        frozen.update(single_file_parameters(encoder, prefix))
    if first_stage is not None:
        frozen.update(single_file_parameters(first_stage, AUTOENCODER_PREFIX))
    if source is not None:
        if source.architecture is not None:
            _check_heads(source.architecture, model, source.description)
        load({**network, **frozen}, source)
    if checkpoint is None:
        if source is None:
            _initialize(cell, network, encoders, first_stage, seed)
        network, trained = change_network(model, network)
        cell.recompute_blocks()
        return Parts(cell, network, frozen, trained)
    weights = _saved(checkpoint.folder / NETWORK_FILE)
    if averaged and checkpoint.has_averages:
        weights = over(weights, _saved(checkpoint.folder / AVERAGES_FILE))
    if model.changes:
        # A change may look at the weights it finds, so they are there before it as well as after.
        inside = {name: shape for name, shape in weights.shapes.items() if name in network}
        load(network, replace(weights, shapes=inside))
    network, trained = change_network(model, network)
    cell.recompute_blocks()
    load(network, weights)
    load(frozen, _saved(checkpoint.folder / FROZEN_FILE))
    return Parts(cell, network, frozen, trained)


def _saved(file: Path) -> Source:
    """A file of a checkpoint; at full size it would not fit into memory beside the networks."""
    found = open_safetensors(file)
    return Source(found.shapes, found.dtypes, found.read, description=str(file))


def change_network(
    model: DiffusionModel, network: dict[str, Parameter]
) -> tuple[dict[str, Parameter], list[Parameter]]:
    """Makes the plugins' changes of the network; its parameters now, and those that are trained.

    network: its parameters before. Raises PluginError where one is gone, or none is left to train.
    """
    for change in model.changes:
        change.change(model.network)
    if model.changes:
        # A part put in later names its parameters from itself down, and theirs would not be unique.
        model.network.update_parameters_name()
        changed = single_file_parameters(model.network, NETWORK_PREFIX)
        gone = [name for name in network if name not in changed]
        if gone:
            raise PluginError(
                f"with_network: the change took the parameter {gone[0]} away; a plugin keeps the "
                "names of existing parameters"
            )
        network = changed
    picks: list[Callable[[str], bool]] = [c.trainable for c in model.changes if c.trainable]
    trained = [p for name, p in network.items() if all(pick(name) for pick in picks)]
    if not trained:
        raise PluginError("with_network: no parameter is left to train; mend `trainable`")
    return network, trained


def _initialize(
    cell: nn.Cell,
    network: Mapping[str, Parameter],
    encoders: Mapping[str, nn.Cell],
    first_stage: nn.Cell | None,
    seed: int,
) -> None:
    """Weights of an untrained model."""
    initialize_network(network, {id(p) for p in cell.zero_initialized()}, seed)
    for prefix, encoder in encoders.items():
        initialize_text_encoder(encoder, single_file_parameters(encoder, prefix), seed)
    if first_stage is not None:
        initialize_network(single_file_parameters(first_stage, AUTOENCODER_PREFIX), set(), seed)
