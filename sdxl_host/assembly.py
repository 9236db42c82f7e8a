"""From settings to a model that is ready: hooks, networks, and the weights in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindspore import Parameter, nn

from sdxl_host.config import RunConfig
from sdxl_host.errors import DataError, PluginError
from sdxl_host.hooks import Hooks, Plugin
from sdxl_host.host import Defaults
from sdxl_host.model import DiffusionModel
from sdxl_host.weights import files
from sdxl_host.weights.initial import initialize_network, initialize_text_encoder
from sdxl_host.weights.names import UNET_PREFIX, single_file_parameters

__all__ = ["FROZEN_FILE", "NETWORK_FILE", "Parts", "make_hooks", "make_parts"]

NETWORK_FILE = "network.safetensors"
FROZEN_FILE = "frozen.safetensors"


def make_hooks(config: RunConfig) -> Hooks:
    """The hooks of a run, with each selected plugin and its options."""
    plugins = []
    for selected in config.plugins:
        try:
            arguments = () if selected.options is None else (selected.options,)
            instance = selected.cls(*arguments)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {selected.installed}: could not be made from its options: "
                f"{type(error).__name__}: {error}; mend the plugin, or run without it"
            ) from error
        plugins.append(Plugin(selected.installed, selected.options, instance))
    return Hooks(Defaults(), plugins)


@dataclass(frozen=True)
class Parts:
    """The cells of a model with their parameters, by names of the single file.

    network: the U-Net's parameters, those that plugins added included. frozen: the text encoders'.
    trained: the network's parameters that are trained.
    """

    cell: nn.Cell
    network: dict[str, Parameter]
    frozen: dict[str, Parameter]
    trained: list[Parameter]

    def load(self, checkpoint: Path) -> None:
        """Takes all weights from a checkpoint folder."""
        for parameters, name in ((self.network, NETWORK_FILE), (self.frozen, FROZEN_FILE)):
            files.assign(parameters, files.read(checkpoint / name), str(checkpoint / name))


def make_parts(model: DiffusionModel, seed: int, weight: str = "") -> Parts:
    """Builds the networks; weights are initial ones, or come from `weight`.

    weight: a safetensors file with the names of the single file, or a checkpoint folder. Network
    changes of plugins are made after the weights are loaded.
    """
    cell = model.network
    network = single_file_parameters(cell, UNET_PREFIX)
    frozen: dict[str, Parameter] = {}
    initialize_network(network, {id(p) for p in cell.zero_initialized()}, seed)
    for index, encoder in enumerate(model.encoders):
        own = single_file_parameters(encoder.cell, f"conditioner.embedders.{index}.")
        initialize_text_encoder(encoder.cell, own, seed)
        frozen.update(own)
    if weight:
        _load_weight(Path(weight).expanduser(), network, frozen)
    for change in model.changes:
        change.change(cell)
    if model.changes:
        changed = single_file_parameters(cell, UNET_PREFIX)
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
    return Parts(cell, network, frozen, trained)


def check_weight(weight: str) -> None:
    """Raises DataError when --weight names nothing that can be read."""
    path = Path(weight).expanduser()
    if not path.exists():
        raise DataError(f"--weight {weight}: there is no such file or folder")


def _load_weight(path: Path, network: dict[str, Parameter], frozen: dict[str, Parameter]) -> None:
    if path.is_dir():
        arrays = {**files.read(path / NETWORK_FILE), **files.read(path / FROZEN_FILE)}
    else:
        arrays = files.read(path)
    trained = {name: a for name, a in arrays.items() if name.startswith(UNET_PREFIX)}
    rest = {name: a for name, a in arrays.items() if not name.startswith(UNET_PREFIX)}
    files.assign(network, trained, str(path))
    if rest:
        files.assign(frozen, rest, str(path))
