"""Batches: functions of (seed, step), made beside the running step."""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_host.config.load import load
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.data.order import Order
from sdxl_host.errors import DataError
from sdxl_host.training.batches import Batch, Batches
from sdxl_host.training.distributed import Ranks

TOTAL = 7


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Batches of four, of which this rank takes the two in the middle, from five images."""
    for index in range(5):  # wider than high, so that they are cropped by chance
        pixels = np.random.default_rng(index).integers(0, 256, (20, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"image {index}")
    transforms = load(["--config", "tiny.yaml"]).data.dataset_config["params"]["transforms"]

    def batches(threads: int = 1, seed: int = 5, ahead: int = 1) -> Batches:
        dataset = Text2ImageDataset(16, transforms, str(tmp_path))
        order = Order([np.arange(len(dataset))], 4, seed, shuffle=True)
        given = {"threads": threads, "total": TOTAL, "ahead": ahead}
        return Batches(dataset, order, range(1, 3), seed, [(3, 16, 16)], 0.1, True, **given)

    return batches


def values(batch: Batch) -> dict[str, Any]:
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    found |= {f"sizes.{name}": value for name, value in found.pop("sizes").items()}
    return {n: v.tobytes() if isinstance(v, np.ndarray) else v for n, v in found.items()}


def test_a_batch_is_a_function_of_seed_and_step(make: Any) -> None:
    """Made alone, after others, backwards, ahead, and from more threads: the same, all of it."""
    one, other, third = make(threads=1), make(threads=4), make(ahead=3)
    forwards = [values(one.get(step)) for step in range(1, TOTAL + 1)]
    backwards = [values(other.make(step)) for step in range(TOTAL, 0, -1)]
    assert forwards == backwards[::-1]
    assert forwards == [values(third.get(step)) for step in range(1, TOTAL + 1)]
    assert values(make(threads=2).get(TOTAL)) == forwards[-1]
    for name in ("level_u", "noise", "posterior", "dropout_u", "sizes.crop_coords_top_left"):
        assert len({found[name] for found in forwards}) == TOTAL, name
    differ = {n for n, v in values(make(seed=6).make(TOTAL)).items() if v != forwards[-1][n]}
    assert differ >= {"ids", "level_u", "noise", "posterior", "dropout_u"}


@pytest.mark.parametrize(("ahead", "after_1"), [(1, [1, 2]), (3, [1, 2, 3, 4])])
def test_the_next_batches_are_made_in_a_thread_and_no_more_of_them(
    make: Any, monkeypatch: pytest.MonkeyPatch, ahead: int, after_1: list[int]
) -> None:
    """Each once, and none after the last step."""
    made: list[tuple[int, bool]] = []
    original = Batches.make

    def noting(self: Batches, step: int) -> Batch:
        made.append((step, threading.current_thread() is not threading.main_thread()))
        return original(self, step)

    monkeypatch.setattr(Batches, "make", noting)
    batches = make(ahead=ahead)
    batches.get(1)
    batches._preparer.submit(lambda: None).result()
    assert made == [(step, True) for step in after_1]
    for step in range(2, TOTAL + 1):
        assert batches.get(step).step == step
    batches.close()
    assert made == [(step, True) for step in range(1, TOTAL + 1)]
    assert not batches._prepared  # images are not kept


def test_in_place_of_an_image_that_broke_the_next_in_order_is_taken(
    make: Any, tmp_path: Path
) -> None:
    """With its own caption, and the crop and noise of the place; its neighbours do not change."""
    whole = make()
    broken = whole._order.indices(2)[1]
    (tmp_path / f"{broken}.png").write_bytes(b"no image")
    batches = make()
    for step in range(1, TOTAL + 1):
        batch, expected = batches.get(step), []
        for position in (1, 2):
            place = next(n for n in range(9) if whole._order.following(step, position, n) != broken)
            expected.append(whole._order.following(step, position, place))
            assert batch.tries.get(position, 0) == place
        assert [batch.ids[position] for position in (1, 2)] == [f"{n}.png" for n in expected]
        assert batch.captions == [f"image {n}" for n in expected]
        assert {problem.name for problem in batch.set_aside} <= {f"{broken}.png"}
        assert len(batch.set_aside) == sum(batch.tries.values())
        if step == 2:
            assert batch.set_aside[0].kind == "a file that is no image"
    batches.close()


def test_other_ranks_know_which_image_was_taken_instead(make: Any, tmp_path: Path) -> None:
    """Hooks see the names of all G samples, so they must be the same on every rank."""
    batches = make()
    broken = batches._order.indices(2)[1]
    (tmp_path / f"{broken}.png").write_bytes(b"no image")

    class Two(Ranks):
        """Rank 1 of two; rank 0 has passed over two images at position 3, and one at 0."""

        def any(self, flag: bool) -> bool:
            return True

        def texts(self, text: str) -> list[str]:
            return ['{"3": 2, "0": 1}', text]

    batches._ranks = Two(1, 2)
    batch = batches.get(2)
    following = batches._order.following
    assert batch.ids[0] == f"{following(2, 0, 1)}.png"
    assert batch.ids[1] == f"{following(2, 1, batch.tries[1])}.png"
    assert batch.ids[3] == f"{following(2, 3, 2)}.png"
    own = len([one for one in batch.set_aside if one.detail != "on rank 0"])
    assert own == sum(batch.tries.values()) >= 1
    assert [one.name for one in batch.set_aside[own:]] == [
        f"{following(2, 3, 0)}.png",
        f"{following(2, 3, 1)}.png",
        f"{following(2, 0, 0)}.png",
    ]
    batches.close()


def test_where_no_image_can_be_read_the_run_ends(make: Any, tmp_path: Path) -> None:
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"")
    batches = make()
    message = r"^step 1: 16 images in a row can't be read; see .*\.png: can't be read as an image"
    with pytest.raises(DataError, match=message):
        batches.get(1)
    batches.close()
