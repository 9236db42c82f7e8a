"""Initial weights of a model trained from scratch: functions of the seed and the name alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor, nn

from sdxl_host.randomness import named

__all__ = ["initialize_network", "initialize_text_encoder"]


def initialize_network(parameters: Mapping[str, Parameter], zeros: set[int], seed: int) -> None:
    """A U-Net's initial weights: uniform in +-1/sqrt(fan in), norms 1 and 0, zeros where `zeros`
    (parameter ids) says so, as in the original implementation."""
    for name, parameter in parameters.items():
        if id(parameter) in zeros:
            values = np.zeros(parameter.shape, np.float32)
        elif parameter.ndim >= 2:
            bound = float(np.prod(parameter.shape[1:])) ** -0.5
            values = named(seed, name).uniform(-bound, bound, parameter.shape)
        else:
            continue  # biases start at MindSpore's 0, norms at 1
        parameter.set_data(Tensor(values.astype(np.float32)))


def initialize_text_encoder(
    encoder: nn.Cell, parameters: Mapping[str, Parameter], seed: int
) -> None:
    """An untrained text encoder whose outputs still tell prompts apart.

    Embeddings of unit variance give the context the scale that a trained encoder's has; matrices
    have a variance of 1/fan in.
    """
    tables = {
        id(cell.embedding_table)
        for _, cell in encoder.cells_and_names()
        if isinstance(cell, nn.Embedding)
    }
    for name, parameter in parameters.items():
        if parameter.ndim < 2:
            continue
        is_table = id(parameter) in tables or name.endswith("positional_embedding")
        scale = 1.0 if is_table else float(np.prod(parameter.shape[1:])) ** -0.5
        values = named(seed, name).standard_normal(parameter.shape, np.float32) * scale
        parameter.set_data(Tensor(values.astype(np.float32)))
