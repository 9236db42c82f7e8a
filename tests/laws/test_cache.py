"""Law 6: a run from the cache is the run without it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image
from support import cache as small

from sdxl_host.models.first_stage import AutoencoderKLInferenceWrapper
from sdxl_host.training import data_sink

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plain(device: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without the cache."""
    return small.train(tmp_path_factory.mktemp("plain"), "--data_path", str(images))


@pytest.fixture(scope="module")
def cache(device: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two crops of each image and every caption."""
    folder = tmp_path_factory.mktemp("cache")
    assert small.make("--data_path", str(images), "--cache_path", str(folder)) == 0
    return folder


def words(images: Path, cache: Path) -> list[str]:
    return [*small.READ, "--data_path", str(images), "--cache_path", str(cache)]


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are not encoded any more."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the first stage was asked to encode")

    monkeypatch.setattr(AutoencoderKLInferenceWrapper, "moments", refuse)


@pytest.mark.usefixtures("no_encoding")
def test_law_a_run_from_the_cache_is_the_run_without_it(
    images: Path, plain: Path, cache: Path, tmp_path: Path
) -> None:
    """With an autoencoder whose posterior is sampled, EDM, min-SNR, long prompts, crops and caption
    dropout: the same losses and weights, bit for bit."""
    run = small.train(tmp_path, *words(images, cache))
    assert small.losses(run) == small.losses(plain)
    assert len(set(small.losses(run))) == 6
    for name in ("network", "frozen"):
        assert small.weights(run, name) == small.weights(plain, name)


FLIPPED = (
    "data.dataset_config.params.transforms=[{target: sdxl_host.Resize, params: {size: 16}}, "
    "{target: sdxl_host.Rescaler}, {target: sdxl_host.RandomHorizontalFlip}, "
    "{target: sdxl_host.AddOriginalImageSizeAsTupleAndCropToSquare}, "
    "{target: sdxl_host.Transpose}]"
)


def test_law_thirty_steps_with_buckets_and_flips_are_the_same_from_the_cache(
    images: Path, tmp_path: Path
) -> None:
    """Of images of two shapes."""
    folder = shutil.copytree(images, tmp_path / "images")
    for index in (7, 8):
        Image.new("RGB", (25, 24), (40 * index % 256, 90, 20)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a square, {index}")
    given = ["--data_path", str(folder), "--buckets", "True", FLIPPED, "--total_step", "30"]
    kept = ["--cache_path", str(tmp_path / "cache")]
    plain = small.train(tmp_path / "plain", *given)
    assert small.make(*given, *kept) == 0
    run = small.train(tmp_path / "run", *small.READ, *given, *kept)
    assert len(small.losses(run)) == 30
    assert small.losses(run) == small.losses(plain)
    assert small.weights(run, "network") == small.weights(plain, "network")


def test_in_16_bits_losses_are_within_their_rounding(
    images: Path, plain: Path, tmp_path: Path
) -> None:
    """Each kept number is off by 2^-11 of itself at most."""
    given = ["--data_path", str(images), "--cache_path", str(tmp_path / "cache")]
    given += ["--cache_dtype", "float16"]
    assert small.make(*given) == 0
    run = small.train(tmp_path / "run", *small.READ, *given)
    assert small.losses(run) != small.losses(plain)
    np.testing.assert_allclose(small.losses(run), small.losses(plain), rtol=2e-3)


@pytest.mark.usefixtures("no_encoding")
def test_a_resumed_run_from_the_cache_goes_on_as_if_it_had_not_ended(
    images: Path, plain: Path, cache: Path, tmp_path: Path
) -> None:
    """What no step needs stays in the checkpoint's file until the last grid is drawn."""
    small.train(tmp_path, *words(images, cache), "--total_step", "3")
    checkpoint = tmp_path / "checkpoints" / "step_00000003"
    made = small.trainer(tmp_path, *words(images, cache), "--resume", str(checkpoint))
    left = made.state.networks.rest.left
    assert {name.split(".")[0] for name in left} == {"first_stage_model", "conditioner"}
    assert len(left) == len(made.state.networks.frozen)
    made.run()
    assert not left
    assert small.losses(tmp_path) == small.losses(plain)
    for name in ("network", "frozen"):
        assert small.weights(tmp_path, name) == small.weights(plain, name)


def test_one_part_may_come_from_the_cache_alone(
    images: Path, plain: Path, cache: Path, tmp_path: Path
) -> None:
    for flag in small.READ[::2]:
        given = ["--data_path", str(images), "--cache_path", str(cache), flag, "True"]
        assert small.losses(small.train(tmp_path / flag, *given)) == small.losses(plain)


@pytest.mark.usefixtures("no_encoding")
@pytest.mark.parametrize("embeddings", ["True", "False"])
def test_the_data_sink_runs_from_the_cache_to_the_same_bits(
    images: Path, plain: Path, cache: Path, tmp_path: Path, embeddings: str
) -> None:
    """Two steps a call; embeddings of the cache, or of captions that are encoded beforehand."""

    def loop(step: Any, rows: Any, *_: Any) -> Any:
        def call() -> None:
            for _ in range(step.size):
                step(*map(Tensor, next(rows)))

        return call

    given = [*words(images, cache), "--data_sink", "True", "--sink_size", "2"]
    given[given.index("--cache_text_embedding") + 1] = embeddings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_sink, "on_ascend", lambda: True)
        patch.setattr(data_sink, "device_queue", loop)
        # Everything that the data sink asks for is looked at, but that steps are compiled.
        run = small.train(tmp_path, *given, "train.ms_mode=0")
    assert small.losses(run) == small.losses(plain)
    assert small.weights(run) == small.weights(plain)
