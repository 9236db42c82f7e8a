"""A model's networks with weights in them: loaded, restored from a checkpoint, or initial ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from mindspore import Parameter, nn
from mindspore.nn.utils import no_init_parameters

from sdxl_host.checkpoints.layout import EMA_FILE, FROZEN_FILE, NETWORK_FILE
from sdxl_host.checkpoints.open import Checkpoint
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.files.tensors import open_safetensors, over
from sdxl_host.models.initialization import initialize_network
from sdxl_host.weights.architecture import NETWORK_PREFIX, Architecture
from sdxl_host.weights.frozen import FrozenCells, FrozenNetworks
from sdxl_host.weights.load import load
from sdxl_host.weights.metadata import SCALE_FACTOR, recorded_objective
from sdxl_host.weights.names import single_file_parameters
from sdxl_host.weights.source import Source

__all__ = [
    "Networks",
    "build_networks",
    "change_network",
    "check_fit",
    "size_step",
    "weight_rows",
]


@dataclass(frozen=True)
class Networks:
    """The U-Net's cell, and the parameters of all networks by their names in the single file.

    network: the U-Net's parameters, including those that plugins added. rest: the text encoders
    and the first stage. trained: the parameters of the U-Net that are trained.
    """

    cell: nn.Cell
    network: dict[str, Parameter]
    rest: FrozenNetworks
    trained: list[Parameter]

    @property
    def frozen(self) -> dict[str, Parameter]:
        """The parameters of the text encoders and of the first stage."""
        return self.rest.parameters

    def digest(self) -> str:
        """A hash of all weights."""
        found = hashlib.sha256()
        for name, parameter in self.network.items():
            found.update(name.encode("utf-8"))
            found.update(parameter.asnumpy().tobytes())
        found.update(self.rest.digest().encode("ascii"))
        return found.hexdigest()


def weight_rows(source: Source, model: DiffusionModel) -> list[tuple[str, str]]:
    """(label, text) rows: where the weights come from, and what of the settings differs."""
    rows = [("weights", source.description), *(("", note) for note in source.notes)]
    trained, here = recorded_objective(source.metadata), model.preconditioning.name
    if trained is not None and trained != here:
        rows.append(
            ("note", f"these weights were trained with the objective {trained}, not {here}")
        )
    scale, configured = source.metadata.get(SCALE_FACTOR), float(model.first_stage.scale_factor)
    if scale is not None and not math.isclose(float(scale), configured, rel_tol=1e-6):
        rows.append(
            ("note", f"these weights were trained with scale_factor {scale}, not {configured:g}")
        )
    return rows


def size_step(model: DiffusionModel) -> int:
    """What the sides of an image must be multiples of, in pixels."""
    return model.first_stage.downsampling * model.network.downsampling


def check_fit(model: DiffusionModel, size: tuple[int, int], where: str) -> None:
    """Raises ConfigError unless the networks fit each other and images of `size`.

    size: (height, width) in pixels. where: the setting that the size comes from, for the message.
    The cells are built, but their parameters get no values yet.
    """
    with no_init_parameters():  # at full size, random values that are replaced take minutes
        network, first_stage, conditioner = model.network, model.first_stage, model.conditioner
    for key, configured, needed, part in (
        ("in_channels", network.in_channels, first_stage.channels, "the first stage's latents"),
        ("context_dim", network.context_dim, conditioner.context_width, "the text encoders"),
        ("adm_in_channels", network.adm_in_channels, conditioner.vector_width, "the embedders"),
    ):
        if configured != needed:
            raise ConfigError(
                f"model.params.network_config.params.{key}: {configured} does not fit {part}, "
                f"which give {needed}; set it to {needed}"
            )
    step = size_step(model)
    if any(length < step or length % step for length in size):
        height, width = size
        raise ConfigError(
            f"{where} {height}x{width}: autoencoder and network downsample by {step}; give a "
            f"height and a width that are multiples of {step}"
        )


def _check_heads(stated: Architecture, model: DiffusionModel, source: str) -> None:
    """Raises ConfigError where the weights state another number of attention heads.

    Names and shapes of tensors are the same for any number of heads, but not what is computed.
    """
    pairs = []
    if stated.unet:
        pairs.append(
            (
                "model.params.network_config.params.num_head_channels",
                stated.unet["num_head_channels"],
                model.network.num_head_channels,
            )
        )
    for index, (encoder, ours) in enumerate(zip(stated.encoders, model.encoders, strict=False)):
        where = f"model.params.conditioner_config.params.emb_models[{index}].params.heads"
        pairs.append((where, encoder.heads, ours.cell.heads))
    for where, stored, configured in pairs:
        if stored != configured:
            raise ConfigError(
                f"{where}: {configured} does not fit {source}, which has {stored}; set it to "
                f"{stored}"
            )


def build_networks(
    model: DiffusionModel,
    seed: int,
    source: Source | None = None,
    checkpoint: Checkpoint | None = None,
    use_ema: bool = False,
    left: Collection[str] = (),
) -> Networks:
    """Builds the networks, with the weights of `checkpoint`, else of `source`, else initial ones.

    Plugins change the network after the weights of `source` are loaded, and before those of
    `checkpoint`. use_ema: load the checkpoint's EMA weights, where it has them, in place of the
    trained ones. seed: of the initial weights. left: parts of the frozen networks, as `frozen`
    names them, whose weights stay in their file; initial ones are in none.
    """
    with no_init_parameters():  # as in `check_fit`
        cell = model.network
    cells = FrozenCells(model)
    network, frozen = single_file_parameters(cell, NETWORK_PREFIX), cells.parameters
    unset = {name for name in frozen if name.startswith(tuple(left))}
    if source is not None:
        if source.architecture is not None:
            _check_heads(source.architecture, model, source.description)
        load({**network, **frozen}, source, left=unset)
    if checkpoint is None:
        rest = FrozenNetworks(frozen, unset, source)
        if source is None:
            initialize_network(network, {id(p) for p in cell.zero_initialized()}, seed)
            cells.initialize(seed)
            rest = FrozenNetworks(frozen)
        network, trained = change_network(model, network)
        cell.recompute_blocks()
        return Networks(cell, network, rest, trained)
    weights = _saved(checkpoint.folder / NETWORK_FILE)
    if use_ema and checkpoint.has_ema:
        weights = over(weights, _saved(checkpoint.folder / EMA_FILE))
    if model.changes:
        # A change may depend on the weights of the network it changes, so they are loaded before
        # it, and once more after it together with those that it adds.
        inside = {name: shape for name, shape in weights.shapes.items() if name in network}
        load(network, replace(weights, shapes=inside))
    network, trained = change_network(model, network)
    cell.recompute_blocks()
    load(network, weights)
    saved = _saved(checkpoint.folder / FROZEN_FILE)
    load(frozen, saved, left=unset)
    return Networks(cell, network, FrozenNetworks(frozen, unset, saved), trained)


def _saved(file: Path) -> Source:
    """A file of a checkpoint. Its tensors are read one by one: at full size all of them would not
    fit into memory beside the networks."""
    found = open_safetensors(file)
    return Source(found.shapes, found.dtypes, found.read, description=str(file))


def change_network(
    model: DiffusionModel, network: dict[str, Parameter]
) -> tuple[dict[str, Parameter], list[Parameter]]:
    """Applies the plugins' changes; returns the network's parameters and those that are trained.

    network: its parameters before the changes. Raises PluginError where a change removed one of
    them, or left none to train.
    """
    for change in model.changes:
        change.change(model.network)
    if model.changes:
        # The parameters of a cell that was added are named from that cell down, so two such cells
        # would have parameters of the same name.
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
        raise PluginError("with_network: no parameter is left to train; correct `trainable`")
    return network, trained
