"""Frozen networks: their weights may stay in their file, and their digest is of what they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from support.cache import AUTOENCODER, TINY
from support.weights import source_of

from sdxl_host.config.load import load
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.weights.frozen import ENCODERS, FIRST_STAGE, FrozenNetworks, build_frozen

pytestmark = pytest.mark.usefixtures("device")


def model():
    config = load(["--config", TINY, "--plugins", "none", AUTOENCODER])
    return make_hooks(config.plugins).build_model(config.tree)


@pytest.fixture(scope="module")
def arrays(device: str) -> dict[str, np.ndarray]:
    """Initial weights, rounded so that 16 bits hold them."""
    built = build_frozen(model(), 3, None, (FIRST_STAGE, ENCODERS))
    return {
        name: parameter.asnumpy().astype(np.float16).astype(np.float32)
        for name, parameter in built.parameters.items()
    }


def build(arrays, parts: Sequence[str], seen: list[str], dtype: str = "fp32") -> FrozenNetworks:
    return build_frozen(model(), 0, source_of(arrays, dtype, seen), parts)


@pytest.mark.parametrize("part", [FIRST_STAGE, ENCODERS])
def test_a_part_alone_is_read(arrays, part: str) -> None:
    seen: list[str] = []
    found = build(arrays, [part], seen)
    inside = {name for name in arrays if name.startswith(part)}
    assert set(seen) == inside
    assert found.left == set(arrays) - inside
    for name in inside:
        np.testing.assert_array_equal(found.parameters[name].asnumpy(), arrays[name])


def test_what_was_left_is_loaded_once(arrays) -> None:
    seen: list[str] = []
    found = build(arrays, [], seen)
    assert seen == []
    found.load()
    found.load()
    assert sorted(seen) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.parameters[name].asnumpy(), array)


def test_the_digest_is_the_same_wherever_the_weights_are(arrays) -> None:
    loaded = build(arrays, [FIRST_STAGE, ENCODERS], [])
    for dtype in ("fp32", "fp16"):
        left = build(arrays, [], [], dtype)
        for part in (FIRST_STAGE, ENCODERS, ""):
            assert left.digest(part) == loaded.digest(part)
        assert left.left == set(arrays)


def test_each_weight_is_in_the_digest_of_its_part_alone(arrays) -> None:
    before = build(arrays, [], [])
    for part, other in ((FIRST_STAGE, ENCODERS), (ENCODERS, FIRST_STAGE)):
        name = next(name for name in arrays if name.startswith(part))
        after = build({**arrays, name: arrays[name] + np.float32(1)}, [], [])
        assert after.digest(part) != before.digest(part)
        assert after.digest(other) == before.digest(other)


def test_arrays_are_the_weights_wherever_they_are(arrays) -> None:
    found = build(arrays, [FIRST_STAGE], [])
    assert found.left
    for name, array in found.arrays().items():
        np.testing.assert_array_equal(array, arrays[name])


def test_initial_weights_are_those_of_the_seed(arrays) -> None:
    one, same, other = (build_frozen(model(), seed, None, ()) for seed in (3, 3, 4))
    assert one.digest() == same.digest() != other.digest()
    assert not one.left
