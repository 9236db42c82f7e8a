"""What a checkpoint holds of a trainer: taken from it, and given back to a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from sdxl_host.training.arrays import FetchedArrays
from sdxl_host.training.checkpoint import Checkpoint, Contents
from sdxl_host.training.report import plugin_list, record

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdxl_host.training.trainer import Trainer

__all__ = ["give_back", "take"]


def take(trainer: Trainer) -> Contents:
    """All that a run needs to go on, in float32 whatever the parameters are kept in.

    Its arrays are those of the moment in which they are asked for.
    """
    values, averages = trainer.cell.values(), trainer.cell.average_values()
    named = trainer.parts.network.items()
    network = _held({name: values.get(id(p), p) for name, p in named})
    optimizer = {p.name: p for p in trainer.cell.state_parameters()}

    def export(folder: Path) -> None:
        for change in trainer.model.changes:
            if change.export is not None:
                change.export(network, folder)

    return Contents(
        step=trainer.step,
        config=trainer.folder.settings,
        network=network,
        frozen=_held(trainer.parts.frozen),
        averages=_held({name: averages[id(p)] for name, p in named if id(p) in averages}),
        optimizer=_held(optimizer) if trainer.config.train.save_optimizer else None,
        counts=trainer.guard.counts(),
        plugin_states={**trainer.hooks.state_dict(), **trainer.states_ahead},
        plugins=plugin_list(trainer.config),
        record=record(trainer),
        export=export,
    )


def give_back(trainer: Trainer, checkpoint: Checkpoint, is_lenient: bool) -> list[str]:
    """Sets a new trainer, whose weights are those of the checkpoint already, to its step.

    is_lenient: settings differ, as the user has allowed; what the checkpoint has no state of then
    begins anew, and is named in the lines returned.
    """
    notes = trainer.cell.load_state(checkpoint.optimizer_state(), is_lenient)
    averages, saved = trainer.cell.average_values(), checkpoint.averages()
    for name, parameter in trainer.parts.network.items():
        if id(parameter) in averages and name in saved:
            averages[id(parameter)].set_data(Tensor(saved[name]))
    if averages and not saved:
        notes.append("the moving average begins with these weights")
    trainer.guard.load_counts(checkpoint.counts)
    notes += trainer.hooks.load_state_dict(checkpoint.plugin_states(), is_lenient)
    trainer.step = checkpoint.step
    return notes


def _held(parameters: Mapping[str, Parameter]) -> FetchedArrays:
    """The values of parameters, those in 16 bits as float32."""

    def fetch(name: str) -> np.ndarray:
        array = parameters[name].asnumpy()
        if parameters[name].dtype in (ms.float16, ms.bfloat16):
            array = array.astype(np.float32)
        # On a CPU it is the parameter's own memory, which an exporter must not write into.
        shown = array.view()
        shown.flags.writeable = False
        return shown

    return FetchedArrays(parameters, fetch)
