"""What a checkpoint holds of a trainer: taken from it, and given back to a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from sdxl_host.checkpoints.layout import AVERAGES_FILE, OPTIMIZER_FILE
from sdxl_host.checkpoints.open import Checkpoint
from sdxl_host.checkpoints.write import Contents
from sdxl_host.errors import ConfigError, in_brief
from sdxl_host.files.arrays import FetchedArrays
from sdxl_host.files.tensors import open_safetensors
from sdxl_host.training.summary import plugin_list, record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from sdxl_host.config.load import RunConfig
    from sdxl_host.training.trainer import Trainer

__all__ = ["give_back", "take"]

Shapes = dict[str, tuple[int, ...]]

_ARRAYS = " of the optimizer's arrays"


def take(trainer: Trainer) -> Contents:
    """All that a run needs to go on, in float32 whatever the parameters are kept in.

    Its arrays are those of the moment in which they are asked for.
    """
    values, averages = trainer.cell.values(), trainer.cell.ema_values()
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

    is_lenient: the user allows differences. What the checkpoint has no state of then begins anew,
    what it has more is left out, and the lines returned name both. Otherwise ConfigError where what
    is trained differs, or PluginError.
    """
    cell, optimizer = trainer.cell, checkpoint.optimizer_state()
    values, saved = cell.ema_values(), checkpoint.averages()
    averages = {n: values[id(p)] for n, p in trainer.parts.network.items() if id(p) in values}
    there = _shapes_in(checkpoint.folder / OPTIMIZER_FILE)
    here = {p.name: tuple(p.shape) for p in cell.state_parameters()}
    averages_there = _shapes_in(checkpoint.folder / AVERAGES_FILE)
    averages_here = {name: tuple(p.shape) for name, p in averages.items()}
    differences = [
        *_differences(there, here),
        *(f"the average of {line}" for line in _differences(averages_there, averages_here)),
    ]
    if differences and not is_lenient:
        raise _refusal(checkpoint, trainer.config, differences)
    fitting = [name for name in here if there.get(name) == here[name]]
    cell.load_state(FetchedArrays(fitting, optimizer.__getitem__))
    for name, parameter in averages.items():
        if averages_there.get(name) == averages_here[name]:
            parameter.set_data(Tensor(saved[name]))
    notes = [*_optimizer_notes(there, here), *_average_notes(averages_there, averages_here)]
    trainer.guard.load_counts(checkpoint.counts)
    notes += trainer.hooks.load_state_dict(checkpoint.plugin_states(), is_lenient)
    trainer.step = checkpoint.step
    return notes


def _shapes_in(file: Path) -> Shapes:
    """Of a file's arrays, by name; none where there is no file."""
    return dict(open_safetensors(file).shapes) if file.is_file() else {}


def _differences(there: Shapes, here: Shapes) -> Iterator[str]:
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            shapes = [f"of shape {s[name]}" if name in s else "missing" for s in (there, here)]
            yield f"{name} is {shapes[0]} there and {shapes[1]} here"


def _refusal(checkpoint: Checkpoint, config: RunConfig, differences: Sequence[str]) -> ConfigError:
    """Settings are the same, so it is plugins that now choose other parameters to train."""
    now = {plugin["name"]: plugin["version"] for plugin in plugin_list(config)}
    earlier = [
        f"{plugin['name']} {plugin['version']} in place of {now[plugin['name']]}"
        for plugin in checkpoint.plugins
        if now.get(plugin["name"], plugin["version"]) != plugin["version"]
    ]
    return ConfigError(
        f"--resume {checkpoint.folder}: other parameters were trained than this run trains: "
        f"{in_brief(differences, 1)}; go on with "
        f"{', '.join(earlier) or 'the plugins as they were'}, or with these by --allow_changes True"
    )


def _optimizer_notes(there: Shapes, here: Shapes) -> Iterator[str]:
    """What begins anew, and what is left out."""
    anew, left = _apart(there, here)
    if anew:
        verb = "begins" if len(anew) == 1 else "begin"
        yield f"{_named(anew, _ARRAYS)} {verb} anew"
    if left:
        verb = "is" if len(left) == 1 else "are"
        yield f"{_named(left, _ARRAYS)} {verb} left out"


def _average_notes(there: Shapes, here: Shapes) -> Iterator[str]:
    """The same of the moving averages; without names where it is all of them."""
    anew, left = _apart(there, here)
    if anew:
        whose = "" if len(anew) == len(here) else f" of {_named(anew)}"
        yield f"the moving average{whose} begins with these weights"
    if left:
        whose = "" if len(left) == len(there) else f" of {_named(left)}"
        yield f"the moving average{whose} is left out"


def _apart(there: Shapes, here: Shapes) -> tuple[list[str], list[str]]:
    """Names of what begins anew here, and of what is there alone."""
    anew = [name for name in here if there.get(name) != here[name]]
    return anew, [name for name in there if name not in here]


def _named(names: Sequence[str], whole: str = "") -> str:
    """`a`, `a and b`, `a, b and c`, or `a, b and 7 more` and what they are parts of."""
    if len(names) > 3:
        return f"{names[0]}, {names[1]} and {len(names) - 2} more{whole}"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


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
