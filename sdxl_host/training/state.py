"""What a checkpoint captures of a run, and restores to another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from sdxl_host.checkpoints.layout import EMA_FILE, OPTIMIZER_FILE
from sdxl_host.checkpoints.open import Checkpoint
from sdxl_host.checkpoints.write import Contents
from sdxl_host.errors import ConfigError, in_brief
from sdxl_host.files.arrays import FetchedArrays
from sdxl_host.files.tensors import open_safetensors
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.training.step import TrainStep
from sdxl_host.weights.networks import Networks

__all__ = ["RunRecord", "RunState"]

Shapes = dict[str, tuple[int, ...]]

_ARRAYS = " of the optimizer's arrays"


@dataclass(frozen=True)
class RunRecord:
    """What is the same in all checkpoints of a run.

    settings: as YAML. plugins: name, distribution and version of each. learned: what was learned
    and on what. with_optimizer: whether the optimizer's state is saved. exports: called with the
    network's arrays and the checkpoint's folder, to add files.
    """

    settings: str
    plugins: list[dict[str, str]]
    learned: dict[str, Any]
    with_optimizer: bool
    exports: Sequence[Callable[[Mapping[str, np.ndarray], Path], None]]


@dataclass
class RunState:
    """What changes from step to step, all of which a checkpoint captures and restores.

    networks: with the weights. cell: the compiled step, with the optimizer's state and the EMA.
    hooks: the plugins, with their states. step: the last step made, from 1. skipped,
    skipped_in_a_row: updates left out because they were not finite, in all and up to this step.
    """

    networks: Networks
    cell: TrainStep
    hooks: Hooks
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def capture(self, record: RunRecord) -> Contents:
        """All that a run needs to go on, in float32 whatever the parameters are kept in.

        Its arrays are those of the moment in which they are read.
        """
        values, ema = self.cell.values(), self.cell.ema_values()
        named = self.networks.network.items()
        network = _arrays({name: values.get(id(p), p) for name, p in named})
        optimizer = {p.name: p for p in self.cell.state_parameters()}

        def export(folder: Path) -> None:
            for write in record.exports:
                write(network, folder)

        return Contents(
            step=self.step,
            config=record.settings,
            network=network,
            frozen=self.networks.rest.arrays(),
            ema=_arrays({name: ema[id(p)] for name, p in named if id(p) in ema}),
            optimizer=_arrays(optimizer) if record.with_optimizer else None,
            counts={"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row},
            plugin_states=self.hooks.state_dict(),
            plugins=record.plugins,
            record=record.learned,
            export=export,
        )

    def restore(self, checkpoint: Checkpoint, is_lenient: bool) -> list[str]:
        """Sets the state of a new run, whose weights are the checkpoint's already, to its step.

        is_lenient: the user allows differences. What the checkpoint has no state of then begins
        anew, what it has more is left out, and the lines returned name both. Otherwise ConfigError
        where what is trained differs, or PluginError.
        """
        cell, optimizer = self.cell, checkpoint.optimizer_state()
        values, saved = cell.ema_values(), checkpoint.ema()
        ema = {n: values[id(p)] for n, p in self.networks.network.items() if id(p) in values}
        there = _shapes_in(checkpoint.folder / OPTIMIZER_FILE)
        here = {p.name: tuple(p.shape) for p in cell.state_parameters()}
        ema_there = _shapes_in(checkpoint.folder / EMA_FILE)
        ema_here = {name: tuple(p.shape) for name, p in ema.items()}
        differences = [
            *_differences(there, here),
            *(f"the EMA of {line}" for line in _differences(ema_there, ema_here)),
        ]
        if differences and not is_lenient:
            raise _refusal(checkpoint, self.hooks, differences)
        fitting = [name for name in here if there.get(name) == here[name]]
        cell.load_state(FetchedArrays(fitting, optimizer.__getitem__))
        for name, parameter in ema.items():
            if ema_there.get(name) == ema_here[name]:
                parameter.set_data(Tensor(saved[name]))
        notes = [*_optimizer_notes(there, here), *_ema_notes(ema_there, ema_here)]
        notes += self.hooks.load_state_dict(checkpoint.plugin_states(), is_lenient)
        self.step = checkpoint.step
        self.skipped = checkpoint.counts["skipped"]
        self.skipped_in_a_row = checkpoint.counts["skipped_in_a_row"]
        return notes


def _shapes_in(file: Path) -> Shapes:
    """Of a file's arrays, by name; none where there is no file."""
    return dict(open_safetensors(file).shapes) if file.is_file() else {}


def _differences(there: Shapes, here: Shapes) -> Iterator[str]:
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            shapes = [f"of shape {s[name]}" if name in s else "missing" for s in (there, here)]
            yield f"{name} is {shapes[0]} there and {shapes[1]} here"


def _refusal(checkpoint: Checkpoint, hooks: Hooks, differences: Sequence[str]) -> ConfigError:
    """Settings are the same, so it is plugins that now choose other parameters to train."""
    now = {plugin.name: plugin.installed.version for plugin in hooks.plugins}
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


def _ema_notes(there: Shapes, here: Shapes) -> Iterator[str]:
    """The same of the EMA; without names where it is all of it."""
    anew, left = _apart(there, here)
    if anew:
        whose = "" if len(anew) == len(here) else f" of {_named(anew)}"
        yield f"the EMA{whose} begins with these weights"
    if left:
        whose = "" if len(left) == len(there) else f" of {_named(left)}"
        yield f"the EMA{whose} is left out"


def _apart(there: Shapes, here: Shapes) -> tuple[list[str], list[str]]:
    """Names of what begins anew here, and of what is there alone."""
    anew = [name for name in here if there.get(name) != here[name]]
    return anew, [name for name in there if name not in here]


def _named(names: Sequence[str], whole: str = "") -> str:
    """`a`, `a and b`, `a, b and c`, or `a, b and 7 more` and what they are parts of."""
    if len(names) > 3:
        return f"{names[0]}, {names[1]} and {len(names) - 2} more{whole}"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _arrays(parameters: Mapping[str, Parameter]) -> FetchedArrays:
    """The values of parameters, those in 16 bits as float32."""

    def fetch(name: str) -> np.ndarray:
        array = parameters[name].asnumpy()
        if parameters[name].dtype in (ms.float16, ms.bfloat16):
            array = array.astype(np.float32)
        # On a CPU it is the parameter's memory itself, which an exporter must not write into.
        view = array.view()
        view.flags.writeable = False
        return view

    return FetchedArrays(parameters, fetch)
