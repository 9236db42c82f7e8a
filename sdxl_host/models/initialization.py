"""Initial weights of a model trained from scratch: functions of the seed and the name alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor, nn

from sdxl_host.randomness import named

__all__ = ["initialize_network", "initialize_text_encoder"]


def initialize_network(parameters: Mapping[str, Parameter], zeros: set[int], seed: int) -> None:
    """Initializes a U-Net: matrices and kernels uniform in +-1/sqrt(fan in), norms 1, biases 0.

    zeros: ids of parameters that are 0 instead.
    """
    for name, parameter in parameters.items():
        if id(parameter) in zeros:
            values = np.zeros(parameter.shape)
        elif parameter.ndim >= 2:
            bound = float(np.prod(parameter.shape[1:])) ** -0.5
            values = named(seed, name).uniform(-bound, bound, parameter.shape)
        else:
            values = _of_vector(name, parameter)
        _set(parameter, values)


def initialize_text_encoder(
    encoder: nn.Cell, parameters: Mapping[str, Parameter], seed: int
) -> None:
    """An untrained text encoder's weights, with which different prompts have different embeddings.

    Token embeddings of unit variance give the context the scale that a trained encoder's has, and
    matrices have a variance of 1/fan in. Positions are scaled down so that words count more, and
    attention is scaled up, because it averages many tokens and the last one must still show them.
    """
    tables = {
        id(cell.embedding_table)
        for _, cell in encoder.cells_and_names()
        if isinstance(cell, nn.Embedding)
    }
    for name, parameter in parameters.items():
        if parameter.ndim < 2:
            if parameter.ndim == 1:
                _set(parameter, _of_vector(name, parameter))
            continue
        scale = float(np.prod(parameter.shape[1:])) ** -0.5
        if "position" in name:
            scale = 0.3
        elif id(parameter) in tables:
            scale = 1.0
        elif name.endswith("out_proj.weight"):
            scale *= 3.0
        _set(parameter, named(seed, name).standard_normal(parameter.shape, np.float32) * scale)


def _of_vector(name: str, parameter: Parameter) -> np.ndarray:
    """1 for a norm's weight, 0 for a bias. MindSpore's initial values would ignore our seed."""
    return np.full(parameter.shape, float(name.endswith(".weight")))


def _set(parameter: Parameter, values: np.ndarray) -> None:
    parameter.set_data(Tensor(values.astype(np.float32)))
