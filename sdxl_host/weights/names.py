"""Parameters of our cells under the names of the original single file.

The cells use these names, except where MindSpore names a parameter itself: `gamma` and `beta` of a
norm and `embedding_table` of an embedding are `weight`, `bias` and `weight` in the file. Parameters
are renamed by the type of their layer, not by their name.
"""

from __future__ import annotations

from mindspore import Parameter, nn

__all__ = ["single_file_parameters"]


def single_file_parameters(cell: nn.Cell, prefix: str = "") -> dict[str, Parameter]:
    """The cell's parameters by their names in the single file, each after `prefix`."""
    found: dict[str, Parameter] = {}
    for path, part in cell.cells_and_names():
        start = f"{prefix}{path}." if path else prefix
        for attribute, parameter in part.parameters_and_names(expand=False):
            local = attribute.rpartition(".")[2]
            found[start + _renamed(part, local)] = parameter
    return found


def _renamed(cell: nn.Cell, attribute: str) -> str:
    if isinstance(cell, nn.LayerNorm | nn.GroupNorm):
        return {"gamma": "weight", "beta": "bias"}[attribute]
    if isinstance(cell, nn.Embedding):
        return "weight"
    return attribute
