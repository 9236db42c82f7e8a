"""`--task cache`: what changed is made again and nothing else, and nothing whole is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support import cache as small

from sdxl_host.cli import main
from sdxl_host.data import cache as store
from sdxl_host.data.cache import Cache
from sdxl_host.errors import ConfigError, DataError, PluginError
from sdxl_host.models.first_stage import AutoencoderKLInferenceWrapper
from sdxl_host.training.cache_task import make_cache
from sdxl_host.training.distributed import Ranks

pytestmark = pytest.mark.usefixtures("device")

OTHER_OPTION = ["--lpw_convention", "kohya"]


@pytest.fixture(scope="module")
def weights(device: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of the same weights but for one tensor: by the part that it is of, "" for none."""
    folder = tmp_path_factory.mktemp("weights")
    images = small.write_images(folder / "images")
    run = small.train(folder / "run", "--data_path", str(images), "data.total_step=1")
    changes = {"": "", "vae": "first_stage_model.", "text": "conditioner.embedders.1."}
    return {
        name: str(small.single_file(run, folder / f"{name or 'all'}.safetensors", change))
        for name, change in changes.items()
    }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return small.write_images(tmp_path / "images")


@pytest.fixture
def words(images: Path, tmp_path: Path, weights: dict[str, str]) -> list[str]:
    given = ["--data_path", str(images), "--cache_path", str(tmp_path / "cache")]
    return [*given, "--weight", weights[""]]


def entries(words: list[str]) -> dict[bytes, dict[str, bytes]]:
    """What is in the cache, by key."""
    found = Cache(Path(words[words.index("--cache_path") + 1]))
    assert found.damaged == []
    return {
        key: {name: array.tobytes() for name, array in found.read(key, "it").items()}
        for key in found._places
    }


def replaced(words: list[str], flag: str, value: str) -> list[str]:
    words = list(words)
    words[words.index(flag) + 1] = value
    return words


def test_exactly_what_changed_is_made_again(
    words: list[str], images: Path, weights: dict[str, str]
) -> None:
    """Each change on top of the same cache, which goes on holding what was made before."""
    assert small.counts(*words) == (10, 5)
    assert small.counts(*words) == (0, 0)
    # What does not enter an entry may change.
    assert small.counts(*words, "data.total_step=9", "--per_batch_size", "1", "--lpw") == (0, 0)

    pixels = np.full((20, 40, 3), 7, np.uint8)
    Image.fromarray(pixels).save(images / "3.png")
    assert small.counts(*words) == (2, 0)
    (images / "2.txt").write_text("another one")
    assert small.counts(*words) == (0, 1)
    size = "data.dataset_config.params.transforms[0].params.size"
    target = "data.dataset_config.params.target_size"
    assert small.counts(*words, f"{size}=12", f"{target}=12") == (10, 0)
    assert small.counts(*words, *OTHER_OPTION) == (0, 5)
    assert small.counts(*replaced(words, "--weight", weights["vae"])) == (10, 0)
    assert small.counts(*replaced(words, "--weight", weights["text"])) == (0, 5)
    assert small.counts(*words, "--seed", "7") == (10, 0)
    assert small.counts(*words, "--cache_dtype", "float16") == (10, 5)
    before = len(entries(words))
    assert small.counts(*words) == (0, 0)
    assert len(entries(words)) == before == 10 + 5 + 2 + 1 + 10 + 5 + 10 + 5 + 10 + 15


def test_an_image_of_another_name_has_crops_of_its_own(words: list[str], images: Path) -> None:
    small.counts(*words)
    os.rename(images / "1.png", images / "9.png")
    os.rename(images / "1.txt", images / "9.txt")
    assert small.counts(*words) == (2, 0)


def test_the_old_content_is_found_again(words: list[str], images: Path) -> None:
    """An entry is what its content says, so what was changed back needs nothing made."""
    small.counts(*words)
    (images / "2.txt").write_text("another one")
    small.counts(*words)
    (images / "2.txt").write_text("image 2")
    assert small.counts(*words) == (0, 0)


@pytest.mark.parametrize(
    ("flag", "made"), [("--cache_latent", (10, 0)), ("--cache_text_embedding", (0, 5))]
)
def test_a_switch_makes_its_part_alone(words: list[str], flag: str, made: Any) -> None:
    assert small.counts(*words, flag, "True") == made


def test_a_flipped_byte_is_named_and_its_entry_made_anew(words: list[str], tmp_path: Path) -> None:
    small.counts(*words)
    whole = entries(words)
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"'image 4' is damaged.*sdxl-host cache .* makes it anew"):
        small.train(tmp_path / "run", *words, *small.READ)
    said: list[str] = []
    assert small.make(*words, said=said) == 0
    assert any(f"{shard}: 'image 4' is damaged" in line.replace("\n", " ") for line in said)
    assert any("embeddings  1 to make, 4 are there" in line for line in said)
    assert entries(words) == whole
    small.train(tmp_path / "again", *words, *small.READ)


def test_a_shard_without_its_index_is_named_and_made_anew(words: list[str], tmp_path: Path) -> None:
    small.counts(*words)
    whole = entries(words)
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"10 of 10 latents are missing .*cut short"):
        small.train(tmp_path / "run", *words, *small.READ)
    said: list[str] = []
    assert small.make(*words, said=said) == 0
    assert any("cut short" in line for line in said)
    shard.unlink()
    assert entries(words) == whole


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard for each entry."""
    monkeypatch.setattr(store, "_SHARD_BYTES", 1)


def test_an_interrupted_caching_continues(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a signal the batch in hand is kept, and the next call makes the rest to the same
    entries."""
    expected = tmp_path / "expected"
    small.counts(*replaced(words, "--cache_path", str(expected)))
    real = AutoencoderKLInferenceWrapper.moments

    def interrupted(self: Any, pixels: np.ndarray) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, pixels)

    monkeypatch.setattr(AutoencoderKLInferenceWrapper, "moments", interrupted)
    said: list[str] = []
    assert small.make(*words, said=said) == 128 + signal.SIGINT
    text = " ".join(" ".join(said).split())
    assert "SIGINT: what is made is kept; once more ends at once" in text
    assert "made 8 of 15 entries" in text
    assert "run the same command again" in text
    monkeypatch.undo()
    assert small.counts(*words) == (2, 5)
    assert entries(words) == entries(replaced(words, "--cache_path", str(expected)))


@pytest.mark.usefixtures("small_shards")
def test_an_error_in_the_middle_loses_nothing_that_was_made(words: list[str], images: Path) -> None:
    (images / "4.png").write_bytes((images / "4.png").read_bytes()[:300])
    with pytest.raises(DataError, match=r"4\.png"):
        small.make(*words)
    small.write_images(images)
    assert small.counts(*words)[1] == 5


@pytest.mark.usefixtures("small_shards")
def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    written = 0

    def full_after_three(path: Path, content: Any) -> None:
        nonlocal written
        if path.suffix == ".safetensors":
            written += 1
            if written > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    real = store.write_file
    monkeypatch.setattr(store, "write_file", full_after_three)
    assert main(["cache", *small.WORDS, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sdxl-host: error: --cache_path {tmp_path / 'cache'}: can't be written")
    assert "No space left" in line
    assert line.endswith("run the same command again")
    monkeypatch.undo()
    assert small.counts(*words) == (7, 5)


def test_too_small_a_disk_is_refused_before_anything_is_made(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5000))
    with pytest.raises(DataError, match=r"188\.3 kB are needed and 5\.0 kB are free; free"):
        small.make(*words)
    assert not (tmp_path / "cache").exists()


def test_what_is_needed_is_about_what_is_written(words: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    small.make(*words, said=said)
    (row,) = (line for line in said if line.startswith("room"))
    needed = float(row.split()[1]) * {"MB": 1e6, "kB": 1e3}[row.split()[2]]
    written = sum(shard.stat().st_size for shard in (tmp_path / "cache").glob("*.safetensors"))
    assert 0.9 * written <= needed <= 1.3 * written


def test_ranks_share_the_work(words: list[str], tmp_path: Path) -> None:
    from sdxl_host.config.load import load

    alone = replaced(words, "--cache_path", str(tmp_path / "alone"))
    small.counts(*alone)
    config = load([*small.WORDS, "--task", "cache", *words])
    for rank in range(2):
        assert make_cache(config, lambda fact: None, Ranks(rank, 2)) == 0
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    kept = [{name.split(".")[0] for name in load_file(shard)} for shard in shards]
    assert [len(keys) for keys in kept] == [3 * 2 + 3, 2 * 2 + 2]
    assert entries(words) == entries(alone)
    assert small.counts(*words) == (0, 0)


# ---- what is missing or refused


def test_a_training_names_what_is_missing_and_the_command_that_makes_it(
    words: list[str], images: Path, tmp_path: Path
) -> None:
    small.counts(*words)
    for index in (1, 2):
        (images / f"{index}.png").write_bytes((images / "3.png").read_bytes())
    (images / "2.txt").write_text("another one")
    with pytest.raises(ConfigError) as error:
        small.train(tmp_path / "run", *words, *small.READ)
    assert str(error.value) == (
        f"--cache_path {tmp_path / 'cache'}: 4 of 10 latents are missing (1.png, 2.png); 1 of 5 "
        "embeddings are missing ('another one'); sdxl-host cache with the same arguments makes "
        "what is missing, and nothing else"
    )
    small.counts(*words)
    small.train(tmp_path / "again", *words, *small.READ)


def test_a_run_can_t_be_continued_by_making_a_cache(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--task cache: .*leave --resume"):
        small.make(*words, "--resume", "latest")


def test_a_folder_that_can_t_be_made(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^--cache_path .*can't be made \(.*\); give another"):
        small.make(*replaced(words, "--cache_path", str(tmp_path / "file" / "cache")))


def test_an_encoder_that_answers_otherwise_when_asked_again_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host.plugins.hooks import Hooks

    real, generator = Hooks.encode_prompt, np.random.default_rng(0)

    def noisy(self: Hooks, prompts: Any, encoders: Any) -> Any:
        encoded = real(self, prompts, encoders)
        noise = generator.standard_normal(encoded.pooled.shape).astype(np.float32)
        return type(encoded)(encoded.context, encoded.pooled + noise, encoded.mask)

    monkeypatch.setattr(Hooks, "encode_prompt", noisy)
    with pytest.raises(PluginError, match=r"^encode_prompt: lpw: answers otherwise when"):
        small.make(*words, "--cache_text_embedding", "True")


@pytest.fixture
def commands(here: Path) -> Iterator[Path]:
    yield here
    assert sorted(path.name for path in here.iterdir()) == ["cache_data", "runs"]


def test_the_commands_of_the_training_guide_run(commands: Path, capsys: Any) -> None:
    """As they are printed there, but for the config."""
    given = ["--config", small.TINY, *small.READ, "--cache_path", "./cache_data"]
    assert main(["train", *given, "--task", "cache"]) == 0
    assert "made 128 of 128 entries" in capsys.readouterr().out
    assert main(["cache", *given]) == 0
    assert "made 0 of 0 entries" in capsys.readouterr().out
    assert main(["train", *given]) == 0
    text = capsys.readouterr().out
    assert "latents of 1 crop an image and embeddings of 64 captions from cache_data" in text
    assert "cache_latent: each image has one fixed crop" in text
