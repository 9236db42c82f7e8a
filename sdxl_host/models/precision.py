"""Mixed precision: which cells compute in float16 or bfloat16, and which weights are kept so.

The levels are those of MindSpore's `auto_mixed_precision`. Weights stay in float32 and are cast
where they are used, unless `halve_parameters` keeps them in the lower type.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import mindspore as ms
from mindspore import Parameter, nn

from sdxl_host.device import has_bfloat16
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import ConfigError
from sdxl_host.models.attention import CrossAttention
from sdxl_host.models.layers import Conv2d, Dense
from sdxl_host.settings.declarations import TrainSettings

__all__ = [
    "LARGEST_LOSS_SCALE",
    "LEVELS",
    "LOSS_SCALE",
    "apply_precision",
    "check_precision",
    "drawing_settings",
    "half_notes",
    "halve_parameters",
    "is_half",
    "is_scaled",
    "precision_line",
    "set_precision",
]

LEVELS = {
    "O0": "float32",
    "O1": "products in {low}, everything between them in float32",
    "O2": "{low} but for norms and SiLU",
    "O3": "{low} throughout",
}
_TYPES = {"float16": ms.float16, "bfloat16": ms.bfloat16}
_NORMS = (nn.LayerNorm, nn.GroupNorm)

# The loss scale of the first step. If it is too high, a few steps are skipped until it is halved.
LOSS_SCALE = 65536.0
LARGEST_LOSS_SCALE = 2.0**24


def is_half(level: str) -> bool:
    """Whether matrices and convolutions are multiplied in 16 bits at this level."""
    return level != "O0"


def is_scaled(settings: TrainSettings) -> bool:
    """Whether the loss is scaled: without, gradients in float16 vanish; in bfloat16 they do not."""
    return is_half(settings.ms_amp_level) and settings.ms_amp_dtype == "float16"


def check_precision(settings: TrainSettings) -> None:
    """Raises ConfigError where the device lacks the type, or settings contradict each other."""
    if not is_half(settings.ms_amp_level):
        for flag, is_set in (
            ("ms_amp_dtype bfloat16", settings.ms_amp_dtype == "bfloat16"),
            ("param_fp16 True", settings.param_fp16),
        ):
            if is_set:
                raise ConfigError(
                    f"--{flag}: has no use at ms_amp_level O0, where everything is float32; use "
                    "--ms_amp_level O2, or leave it out"
                )
        return
    if settings.ms_amp_dtype == "bfloat16" and not has_bfloat16():
        raise ConfigError(
            "--ms_amp_dtype bfloat16: this device does not compute in it (an Ascend 910B or newer "
            "does); use float16, or --ms_amp_level O0"
        )


def drawing_settings(settings: TrainSettings) -> tuple[TrainSettings, list[str]]:
    """The settings to draw with what was trained with `settings`, and notes: in float32 where the
    device lacks bfloat16. Checkpoints hold float32 at every level, so it loses nothing."""
    in_bfloat16 = is_half(settings.ms_amp_level) and settings.ms_amp_dtype == "bfloat16"
    if not in_bfloat16 or has_bfloat16():
        return settings, []
    plain = replace(settings, ms_amp_level="O0", ms_amp_dtype="float16", param_fp16=False)
    note = (
        f"trained at {settings.ms_amp_level} in bfloat16, which this device does not compute in; "
        "drawn at O0, in float32"
    )
    return plain, [note]


def precision_line(settings: TrainSettings) -> str:
    """The precision in words."""
    level = LEVELS[settings.ms_amp_level].format(low=settings.ms_amp_dtype)
    if not is_half(settings.ms_amp_level):
        return f"O0, {level}"
    weights = f"weights in {settings.ms_amp_dtype} with float32 copies that are updated"
    return (
        f"{settings.ms_amp_level}, {level}, "
        f"{weights if settings.param_fp16 else 'weights in float32'}"
    )


def set_precision(model: DiffusionModel, settings: TrainSettings) -> None:
    """Sets the types of the network's cells, and of the first stage's where the config has
    `disable_first_stage_amp: False`; before they first run."""
    apply_precision(model.network, settings.ms_amp_level, settings.ms_amp_dtype)
    first_stage = model.first_stage
    if first_stage.cell is not None and not first_stage.keeps_float32:
        apply_precision(first_stage.cell, settings.ms_amp_level, settings.ms_amp_dtype)


def apply_precision(network: nn.Cell, level: str, dtype: str = "float16") -> None:
    """Sets the cells' types, before the network first runs.

    level: "O0", float32; "O1", dense layers, convolutions and attention's products in `dtype`, all
    sums between them in float32; "O2", everything in `dtype` but norms and SiLU, which stay
    float32; "O3", everything in `dtype`. Sinusoids and softmax are float32 at every level.
    """
    if not is_half(level):
        return
    low = _TYPES[dtype]
    rest = low if level == "O3" else ms.float32
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.Dense | nn.Conv2d):
            cell.to_float(low)
            if level == "O1" and isinstance(cell, Dense | Conv2d):
                cell.output_type = ms.float32
        elif isinstance(cell, (*_NORMS, nn.SiLU)):
            cell.to_float(rest)
    for _, cell in network.cells_and_names():
        if isinstance(cell, CrossAttention):
            # Their outputs only enter the products inside the attention, so they stay in `dtype`.
            for projection in (cell.to_q, cell.to_k, cell.to_v):
                projection.output_type = None


def halve_parameters(network: nn.Cell, dtype: str) -> dict[int, Any]:
    """Keeps the weights of dense layers and convolutions in `dtype`; norms stay in float32.

    Returns their values in float32 by the parameter's `id`: the step updates those.
    """
    values = {}
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.Dense | nn.Conv2d):
            for parameter in cell.get_parameters(expand=True):
                if parameter.dtype == ms.float32:
                    values[id(parameter)] = parameter.asnumpy().copy()
                    _convert(parameter, _TYPES[dtype])
    return values


def half_notes(network: Collection[Parameter], trained: Collection[Parameter]) -> list[str]:
    """What to say at the start of a run that `halve_parameters` keeps weights in 16 bits.

    network: all its parameters; trained: those with a float32 copy, which is what is saved.
    """
    notes = [
        "param_fp16: weights in 16 bits make training less stable; without it they stay in "
        "float32 and are cast where they are used"
    ]
    updated = {id(parameter) for parameter in trained}
    rounded = sum(p.size for p in network if p.dtype in _TYPES.values() and id(p) not in updated)
    if rounded:
        notes.append(
            f"param_fp16: {rounded:,} weights that are not trained have no float32 copy, and "
            "checkpoints hold them rounded to 16 bits; without it they stay as they were given"
        )
    return notes


def _convert(parameter: Parameter, dtype: Any) -> None:
    parameter.set_dtype(dtype)
