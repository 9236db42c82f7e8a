"""Parameters by part of the model, and the memory they take; no weight is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdxl_host.config.load import load
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.planning.memory import memory, model_parts
from sdxl_host.plugins.hooks import make_hooks

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def test_parts_of_a_small_model_are_counted_and_not_made(device: str) -> None:
    from sdxl_host.weights.names import single_file_parameters
    from sdxl_host.weights.networks import build_networks

    config = load(["--config", TINY])
    model = make_hooks(config.plugins).build_model(config.tree)
    parts = model_parts(model)
    assert [part.name for part in parts] == ["network", "text encoder 1", "text encoder 2"]
    cells = [model.network, *(encoder.cell for encoder in model.encoders)]
    for cell in cells:
        for name, parameter in single_file_parameters(cell).items():
            assert parameter.has_init or parameter.size == 1, name

    real = build_networks(make_hooks(config.plugins).build_model(config.tree), 0)
    assert parts[0].count == parts[0].trained == sum(p.size for p in real.trained)
    assert sum(part.count for part in parts[1:]) == sum(p.size for p in real.frozen.values())
    assert all(part.bytes == 4 * part.count for part in parts)
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    assert shapes == {n: tuple(p.shape) for n, p in {**real.network, **real.frozen}.items()}


def changed(change: Any, trainable: Any = None) -> DiffusionModel:
    config = load(["--config", TINY])
    model = make_hooks(config.plugins).build_model(config.tree)
    return model.with_network(change, trainable)


def test_what_plugins_add_and_train_is_counted(device: str) -> None:
    from mindspore import nn

    def add(network: Any) -> None:
        network.extra = nn.Dense(10, 5)

    before = model_parts(changed(lambda network: None))[0]
    after = model_parts(changed(add, lambda name: ".extra." in name))[0]
    assert after.count == before.count + 55
    assert after.trained == 55
    assert after.trained_bytes == 220
    assert after.shapes == before.shapes


def test_a_plugin_that_leaves_nothing_to_train_is_refused(device: str) -> None:
    from sdxl_host.errors import PluginError

    with pytest.raises(PluginError, match="no parameter is left to train"):
        model_parts(changed(lambda network: None, lambda name: False))


def test_memory_is_weights_gradients_two_moments_and_what_is_frozen(device: str) -> None:
    from mindspore import nn

    def add(network: Any) -> None:
        network.extra = nn.Dense(10, 5)

    parts = model_parts(changed(add, lambda name: ".extra." in name))
    sizes = {what: size for what, _, size in memory(parts)}
    assert sizes == {
        "network": 4 * parts[0].count,
        "gradients": 4 * 55,
        "optimizer": 8 * 55,
        "frozen": 4 * (parts[1].count + parts[2].count),
    }
    formulas = [formula for _, formula, _ in memory(parts)]
    assert formulas[1] == "4 bytes x 55 weights"
    assert formulas[2] == "2 moments x 4 bytes x 55 trained"
