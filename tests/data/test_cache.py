"""The store of a cache: entries by a digest of what makes them, in shards that are whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdxl_host.data import cache
from sdxl_host.data.cache import Arrays, Cache, CacheWriter, Recipe, in_16_bits
from sdxl_host.errors import DataError

ONE = Recipe("latents", {"size": 16, "weights": "ab"})


def entry(seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "moments": generator.standard_normal((8, 2, 3)).astype(np.float32),
        "half": generator.standard_normal(5).astype(np.float16),
        "sizes.original": np.array([20 + seed, 30]),
        "sizes.score": np.array([6.5]),
    }


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder with four entries in two shards."""
    for numbers in ((0, 1), (2, 3)):
        with CacheWriter(tmp_path) as writer:
            for number in numbers:
                writer.add(ONE.key(number), entry(number))
    return tmp_path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_entries_come_back_as_they_were(filled: Path) -> None:
    found = Cache(filled)
    assert len(found) == 4
    assert found.damaged == []
    for number in range(4):
        assert_equal(found.read(ONE.key(number), "it"), entry(number))
    assert ONE.key(4) not in found
    assert found.shape(ONE.key(0), "moments") == (8, 2, 3)
    assert found.shape(ONE.key(0), "mask") is None
    assert found.length(ONE.key(0)) == sum(array.nbytes for array in entry(0).values())


def test_a_shard_is_a_safetensors_file_that_others_read(filled: Path) -> None:
    arrays = load_file(shards(filled)[0])
    assert len(arrays) == 8
    np.testing.assert_array_equal(arrays[f"{ONE.key(1).hex()}.moments"], entry(1)["moments"])


@pytest.mark.parametrize(
    "other",
    [
        Recipe("embeddings", {"size": 16, "weights": "ab"}),
        Recipe("latents", {"size": 17, "weights": "ab"}),
        Recipe("latents", {"size": 16, "weights": "abc"}),
        Recipe("latents", {"size": 16}),
    ],
)
def test_whatever_makes_an_entry_is_in_its_key(other: Recipe) -> None:
    assert other.key("a", 1) != ONE.key("a", 1)


def test_a_key_tells_apart_what_an_entry_has_of_its_own() -> None:
    own = [("a", 1), ("a", 2), ("b", 1), ("a1",), ("a",), (1, "a"), ("\udce4", 1), ("ä", 1)]
    assert len({ONE.key(*values) for values in own}) == len(own)
    assert ONE.key("a", 1) == Recipe("latents", {"weights": "ab", "size": 16}).key("a", 1)


def test_a_flipped_byte_of_an_entry_is_named_and_the_others_stay_good(filled: Path) -> None:
    flip(shards(filled)[0], -1)
    found = Cache(filled)
    assert found.damaged == []
    assert found.fault(ONE.key(0), "a.png") is None
    with pytest.raises(DataError, match=r"a\.png is damaged, its bytes from \d+ to .* anew$"):
        found.read(ONE.key(1), "a.png")
    assert "is damaged" in str(found.fault(ONE.key(1), "a.png"))


def test_what_is_made_anew_is_found_in_place_of_what_is_damaged(filled: Path) -> None:
    flip(shards(filled)[0], -1)
    with CacheWriter(filled) as writer:
        writer.add(ONE.key(1), entry(1))
    assert_equal(Cache(filled).read(ONE.key(1), "it"), entry(1))


def test_an_entry_is_verified_once(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = Cache(filled), []
    real = cache._checksum
    monkeypatch.setattr(cache, "_checksum", lambda *parts: seen.append(1) or real(*parts))
    for _ in range(3):
        found.read(ONE.key(0), "it")
    found.read(ONE.key(1), "it")
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: flip(file, 5), "its index can't be used"),
        (lambda file: flip(file, 40), "its index can't be used"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "the file is cut short"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "it is cut short"),
        (lambda file: file.write_bytes(b""), "its index can't be used"),
    ],
)
def test_a_shard_whose_index_is_damaged_is_named_and_left_out(
    filled: Path, damage, said: str
) -> None:
    broken = shards(filled)[0]
    damage(broken)
    found = Cache(filled)
    (line,) = found.damaged
    assert line.startswith(f"{broken}: ")
    assert said in line
    assert [ONE.key(number) in found for number in range(4)] == [False, False, True, True]
    assert_equal(found.read(ONE.key(2), "it"), entry(2))


def test_every_byte_of_the_index_counts(filled: Path) -> None:
    """No changed byte is read as something else."""
    file = shards(filled)[0]
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(8, len(whole[:header].rstrip(b" "))):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 2]) + whole[position + 1 :])
        found = Cache(filled)
        for number in (0, 1):
            if ONE.key(number) in found:
                assert_equal(found.read(ONE.key(number), "it"), entry(number))


def test_a_shard_is_written_when_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(array.nbytes for array in entry(0).values())
    monkeypatch.setattr(cache, "_SHARD_BYTES", 2 * size)
    with CacheWriter(tmp_path) as writer:
        counts = []
        for number in range(5):
            writer.add(ONE.key(number), entry(number))
            counts.append(len(shards(tmp_path)))
    assert counts == [0, 1, 1, 2, 2]
    assert len(Cache(tmp_path)) == 5


def test_what_was_made_before_an_error_is_kept(tmp_path: Path) -> None:
    def fail_after_one() -> None:
        with CacheWriter(tmp_path) as writer:
            writer.add(ONE.key(0), entry(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_one()
    assert ONE.key(0) in Cache(tmp_path)


def test_a_full_disk_is_one_line_and_loses_nothing_that_was_whole(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in filled.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    writer = CacheWriter(filled)
    writer.add(ONE.key(9), entry(9))
    with pytest.raises(DataError, match=r"^--cache_path .*No space left .* same command again$"):
        writer.flush()
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in filled.iterdir()} == before


def test_writers_beside_each_other_share_nothing(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, 0) as one, CacheWriter(tmp_path, 1) as other:
        for number in range(6):
            (one, other)[number % 2].add(ONE.key(number), entry(number))
    assert len(shards(tmp_path)) == 2
    found = Cache(tmp_path)
    for number in range(6):
        assert_equal(found.read(ONE.key(number), "it"), entry(number))


def test_16_bits_where_every_number_fits() -> None:
    fits, too_large = np.float32([1.0, -30.0, 65504.0]), np.float32([1.0, 70000.0])
    assert in_16_bits(fits).dtype == np.float16
    np.testing.assert_array_equal(in_16_bits(fits), fits)
    assert in_16_bits(too_large) is too_large


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert len(Cache(tmp_path / "nowhere")) == 0
