"""What an architecture is: its levels' depths, and two descriptions as one."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_host.errors import DataError
from sdxl_host.weights.architecture import (
    SDXL_BASE,
    Architecture,
    level_depths,
    merge,
)
from sdxl_host.weights.formats.diffusers_configs import from_diffusers
from sdxl_host.weights.shapes import expected_shapes

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="module")
def by_config() -> dict[str, Any]:
    """What diffusers builds: `by_config["refiner"]["configs"]["unet"]["act_fn"]`."""
    with gzip.open(REFERENCE / "keys_by_config.json.gz") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def two_levels(by_config: dict[str, Any]) -> Architecture:
    return from_diffusers(by_config["two_levels"]["configs"])


def test_depths_are_of_the_levels_with_attention_and_of_the_middle() -> None:
    unet = {"channel_mult": [1, 2, 4], "transformer_depth": [1, 2, 10]}
    assert level_depths({**unet, "attention_resolutions": [4, 2]}) == ([0, 2, 10], 10)
    assert level_depths({**unet, "attention_resolutions": [1]}) == ([1, 0, 0], 10)
    one = {**unet, "attention_resolutions": [2], "transformer_depth": 3}
    assert level_depths(one) == ([0, 3, 0], 3)


NAMES = ("one.safetensors", "folder")


def test_parts_of_two_sources_are_put_together(two_levels: Architecture) -> None:
    nothing = Architecture(None, None, ())
    unet = replace(nothing, unet=two_levels.unet)
    others = replace(two_levels, unet=None)
    text = replace(nothing, encoders=two_levels.encoders[:1])
    for first, later in ((unet, others), (two_levels, text), (two_levels, two_levels)):
        assert merge(first, later, NAMES) == merge(later, first, NAMES) == two_levels
    assert merge(unet, text, NAMES) == replace(unet, encoders=text.encoders)


def three_levels(resolutions: list[int], depth: list[int] | int) -> Architecture:
    unet = {**(SDXL_BASE.unet or {}), "attention_resolutions": resolutions}
    return replace(SDXL_BASE, unet={**unet, "transformer_depth": depth})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (three_levels([4, 2], [0, 2, 10]), three_levels([4, 2], [1, 2, 10])),
        (three_levels([4, 2], [1, 2, 10]), three_levels([2, 4], [1, 2, 10])),
        (three_levels([4, 2, 1], [3, 3, 3]), three_levels([1, 2, 4], 3)),
        (three_levels([4], [1, 2, 3]), three_levels([4, 2], [0, 0, 3])),
    ],
    ids=["unused depth", "order", "one number", "depth of 0"],
)
@pytest.mark.usefixtures("device")
def test_two_descriptions_of_one_model_are_equal(one: Architecture, other: Architecture) -> None:
    assert one != other
    assert expected_shapes(replace(one, encoders=())) == expected_shapes(
        replace(other, encoders=())
    )
    assert merge(one, other, NAMES) == other
    assert merge(other, one, NAMES) == one


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (three_levels([4, 2], [1, 2, 9]), "unet"),
        (three_levels([4], [1, 2, 10]), "unet"),
        (replace(SDXL_BASE, unet={**(SDXL_BASE.unet or {}), "num_head_channels": 32}), "unet"),
        (replace(SDXL_BASE, autoencoder={**(SDXL_BASE.autoencoder or {}), "x": 1}), "autoencoder"),
        (replace(SDXL_BASE, encoders=SDXL_BASE.encoders[1:]), "encoders"),
    ],
)
def test_descriptions_of_two_models_are_refused(other: Architecture, part: str) -> None:
    with pytest.raises(DataError, match=rf"^folder: its {part} differs in size from that of one"):
        merge(SDXL_BASE, other, NAMES)
