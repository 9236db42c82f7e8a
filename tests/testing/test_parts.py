"""The parts of the testing kit: numbers, encoders, and what a snapshot sees."""

from __future__ import annotations

import logging
import random
from collections import deque
from typing import Any, ClassVar

import numpy as np
import pytest

from sdxl_host import encode_truncated
from sdxl_host.errors import HostError
from sdxl_host.testing.parts import noise_levels, tiny_encoders, tiny_model
from sdxl_host.testing.snapshot import attributes, changed, class_attributes

# ---- the parts


def test_noise_levels_go_from_1e4_to_1e_4():
    noise = noise_levels()
    assert noise.snr[[0, -1]] == pytest.approx([1e4, 1e-4])
    assert (np.diff(noise.sigma) > 0).all()
    assert noise.sigma.shape == noise.timestep.shape == (161,)
    assert len(noise_levels(5).sigma) == 5


def test_the_tiny_model_has_numbers_and_no_network():
    model = tiny_model()
    assert model.preconditioning.name == "eps"
    assert len(model.schedule) == 1000
    assert encode_truncated(["a"], model.encoders).context.shape == (1, 77, 8)
    for part in ("network", "first_stage", "conditioner"):
        with pytest.raises(HostError, match=rf"has no {part.replace('_', ' ')}; .* use tiny_run"):
            getattr(model, part)


def test_the_tiny_encoders_tell_prompts_apart():
    """By words, their letters and their order; and a position knows nothing of later ones."""
    embedding = encode_truncated(["cat dog", "dog cat", "cta dog", "cat bird"], tiny_encoders())
    for one in range(4):
        for other in range(one):
            assert not np.array_equal(embedding.pooled[one], embedding.pooled[other])
    assert np.array_equal(embedding.context[0, :2], embedding.context[3, :2])
    assert embedding.context.dtype == embedding.pooled.dtype == np.float32


def test_attributes_that_change_are_found():
    class One:
        count = 0
        shared: ClassVar[list[int]] = []

        def __init__(self) -> None:
            self.array, self.rng, self.table = np.zeros(2), np.random.default_rng(0), {"a": [1]}
            self.inner = noise_levels(3)

    one = One()
    before = attributes(one), class_attributes(One)
    assert changed(before[0], attributes(one)) == []
    one.array[0] = 1
    one.rng.random()
    one.table["a"].append(2)
    one.inner.sigma[0] = 7
    one.new = 1
    assert changed(before[0], attributes(one)) == ["array", "rng", "table", "inner", "new"]
    One.shared.append(1)
    One.count += 1
    assert changed(before[1], class_attributes(One)) == ["count", "shared"]


def test_what_belongs_to_others_is_not_looked_into():
    """Loggers know of all loggers, modules of all there is, and tensors compute to compare."""
    from mindspore import Parameter, Tensor, nn

    class Adapter(logging.LoggerAdapter[logging.Logger]):
        pass

    class Inner:
        pass

    class One:
        log, numpy = logging.getLogger(__name__), np

        def __init__(self) -> None:
            self.log, self.adapter, self.np = type(self).log, Adapter(type(self).log, {}), np
            self.tensor, self.cell = Tensor(np.ones(2)), nn.Cell()
            self.inner = Inner()
            self.inner.weights = [Parameter(np.ones(2, np.float32))]
            self.recent = deque([1.0])
            self.chance = random.Random(0)
            self.parts = np.array([np.ones(2), None], object)
            self.kind = Inner

    one = One()
    before = attributes(one), class_attributes(One)
    logging.getLogger(f"{__name__}.later")
    assert changed(before[0], attributes(one)) == []
    assert changed(before[1], class_attributes(One)) == []
    one.tensor, one.inner.weights[0] = Tensor(np.ones(2)), Parameter(np.ones(2, np.float32))
    one.recent.append(2.0)
    one.chance.random()
    one.parts[0][0] = 2.0
    found = changed(before[0], attributes(one))
    assert found == ["tensor", "inner", "recent", "chance", "parts"]


def test_an_array_of_another_library_is_compared_element_by_element():
    class Array:
        def __ne__(self, other: object) -> Any:
            return np.array([False, True])

        def __hash__(self) -> int:
            return 0

    assert changed({"a": Array()}, {"a": Array()}) == ["a"]


def test_a_property_that_is_kept_is_no_change():
    one = type("One", (), {})()
    one.schedule = tiny_model().schedule
    before = attributes(one)
    assert one.schedule.edges is not None
    assert "edges" in vars(one.schedule)
    assert changed(before, attributes(one)) == []
