"""Parameters of our cells under the names of the original single file.

The cells carry those names but for MindSpore's own: a norm's `gamma` and `beta` and an embedding's
`embedding_table` are `weight`, `bias` and `weight` in the file. Mapped by layer type, not by name.
"""

from __future__ import annotations

from mindspore import Parameter, nn

__all__ = ["single_file_parameters"]


def single_file_parameters(cell: nn.Cell, prefix: str = "") -> dict[str, Parameter]:
    """The cell's parameters by their names in the single file, each after `prefix`."""
    found: dict[str, Parameter] = {}
    for path, part in cell.cells_and_names():
        own = f"{prefix}{path}." if path else prefix
        for attribute, parameter in part.parameters_and_names(expand=False):
            local = attribute.rpartition(".")[2]
            found[own + _renamed(part, local)] = parameter
    return found


def _renamed(cell: nn.Cell, attribute: str) -> str:
    if isinstance(cell, nn.LayerNorm | nn.GroupNorm):
        return {"gamma": "weight", "beta": "bias"}[attribute]
    if isinstance(cell, nn.Embedding):
        return "weight"
    return attribute
