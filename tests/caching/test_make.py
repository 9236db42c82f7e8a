"""Entries are made in batches, images of several sizes among them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sdxl_host.caching.make import SIZES, in_short, make_embeddings, make_latents, missing
from sdxl_host.caching.progress import Progress, clock, size
from sdxl_host.data.cache import Cache, CacheWriter, Key, Recipe
from sdxl_host.data.dataset import Sample
from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.errors import PluginError

KEYS = Recipe("latents", {})


def load(index: int) -> Sample:
    """Images of two sizes, by turns; one that 16 bits can't hold."""
    shape = (3, 4, 4 + 2 * (index % 2))
    value = 1e5 if index == 3 else index / 3
    sizes = {"original": (20 + index, 30), "score": (6.5,)}
    return Sample(str(index), np.full(shape, value, np.float32), sizes)


def latents(folder: Path, count: int, in_half: bool = False, stop_after: int = 99) -> list[int]:
    """Makes entries of so many images; the batches that the first stage was given."""
    batches: list[int] = []

    def moments(pixels: np.ndarray) -> np.ndarray:
        batches.append(len(pixels))
        return 2 * pixels

    items = [(KEYS.key(index), index) for index in range(count)]
    with ThreadPoolExecutor(2) as threads, CacheWriter(folder) as writer:
        progress = Progress("latents", count, lambda line: None)
        too_large = make_latents(
            items, load, moments, writer, threads, progress, lambda: len(batches) >= stop_after,
            in_half,
        )  # fmt: skip
    assert too_large == (in_half and count > 3)
    return batches


def test_images_of_several_sizes_are_made_in_batches(tmp_path: Path) -> None:
    assert latents(tmp_path, 20) == [4, 4, 4, 4, 2, 2]
    cache = Cache(tmp_path)
    for index in range(20):
        found, expected = cache.read(KEYS.key(index), "it"), load(index)
        assert expected.pixels is not None
        np.testing.assert_array_equal(found["moments"], 2 * expected.pixels)
        assert found[f"{SIZES}original"].tolist() == [20 + index, 30]
        assert found[f"{SIZES}original"].dtype == np.int64
        assert found[f"{SIZES}score"].tolist() == [6.5]


def test_in_16_bits_but_where_they_can_t_hold_a_number(tmp_path: Path) -> None:
    latents(tmp_path, 5, in_half=True)
    cache = Cache(tmp_path)
    types = [cache.read(KEYS.key(index), "it")["moments"].dtype for index in range(5)]
    assert types == [np.float16, np.float16, np.float16, np.float32, np.float16]


def test_it_stops_after_the_batch_in_hand(tmp_path: Path) -> None:
    assert latents(tmp_path, 20, stop_after=1) == [4, 4]
    assert len(Cache(tmp_path)) == 8


def encode(captions: Sequence[str]) -> PromptEmbedding:
    values = np.array([float(caption) for caption in captions], np.float32)
    context = np.tile(values[:, None, None], (1, 6, 4))
    return PromptEmbedding(context, values[:, None], np.arange(6) < 1 + values[:, None])


def embeddings(folder: Path, count: int, encode=encode) -> None:
    items = [(KEYS.key(str(index)), str(index)) for index in range(count)]
    with CacheWriter(folder) as writer:
        progress = Progress("embeddings", count, lambda line: None)
        make_embeddings(items, encode, "lpw", writer, progress, lambda: False, False)


def test_captions_are_encoded_in_batches_with_their_masks(tmp_path: Path) -> None:
    embeddings(tmp_path, 20)
    cache = Cache(tmp_path)
    for index in range(20):
        found, expected = cache.read(KEYS.key(str(index)), "it"), encode([str(index)])
        np.testing.assert_array_equal(found["context"], expected.context[0])
        np.testing.assert_array_equal(found["pooled"], expected.pooled[0])
        np.testing.assert_array_equal(found["mask"] > 0, expected.attended()[0])
        assert cache.shape(KEYS.key(str(index)), "context") == (6, 4)


def test_an_encoder_that_changes_its_mind_is_refused(tmp_path: Path) -> None:
    calls: list[int] = []

    def changing(captions: Sequence[str]) -> PromptEmbedding:
        calls.append(1)
        found = encode(captions)
        return PromptEmbedding(found.context + len(calls), found.pooled, found.mask)

    with pytest.raises(PluginError, match=r"^encode_prompt: lpw: answers otherwise .* leave"):
        embeddings(tmp_path, 2, changing)
    assert len(Cache(tmp_path)) == 0


def test_what_is_missing_or_damaged_is_made_each_key_once(tmp_path: Path) -> None:
    latents(tmp_path, 3)
    (shard,) = tmp_path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    items: list[tuple[Key, int]] = [(KEYS.key(index), index) for index in (0, 4, 2, 1, 4, 2)]
    needed, damaged = missing(Cache(tmp_path), items, lambda index: f"image {index}")
    assert [index for _, index in needed] == [4, 2]
    (line,) = damaged
    assert "image 2 is damaged" in line


def test_about_twenty_lines_with_size_and_time_left() -> None:
    lines: list[str] = []
    with Progress("latents", 1000, lines.append) as progress:
        for _ in range(125):
            progress.add(8, 1_000_000)
    assert 18 <= len(lines) <= 20
    assert lines[-1].startswith("latents 1,000/1,000  125.0 MB  ")
    assert lines[-1].endswith("/s, 0:00 left")


def test_sizes_times_and_captions_in_short() -> None:
    assert [size(n) for n in (500, 12_345, 3_400_000, 1_250_000_000)] == [
        "0.5 kB", "12.3 kB", "3.4 MB", "1.2 GB"
    ]  # fmt: skip
    assert [clock(s) for s in (0, 65.4, 7265)] == ["0:00", "1:05", "2:01:05"]
    assert in_short("a cat") == "'a cat'"
    assert len(in_short("x" * 100)) == 62
