"""The images that the package carries."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from sdxl_host.config.yaml_files import packaged_configs
from sdxl_host.data.dataset import DEMO_IMAGES, Text2ImageDataset
from sdxl_host.randomness import Stream, generator


def draw(position: int = 0) -> np.random.Generator:
    return generator(42, Stream.CROP, 1, position)


def check(data: Text2ImageDataset) -> None:
    with ThreadPoolExecutor(2) as threads:
        data.check(threads)


@pytest.fixture(scope="module")
def demo() -> Text2ImageDataset:
    node = yaml.safe_load((packaged_configs() / "default.yaml").read_text("utf-8"))
    return Text2ImageDataset(**node["data"]["dataset_config"]["params"])


def test_the_carried_images_are_64_with_captions_of_their_own(demo):
    assert demo.is_demo
    assert len(demo) == 64
    assert len({image.text for image in demo.images}) == 64
    lines = (DEMO_IMAGES / "metadata.jsonl").read_text("utf-8").splitlines()
    captions = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    assert {image.name: image.text for image in demo.images} == captions
    assert captions["red_apple.png"].endswith("a red apple")
    assert {f.name for f in DEMO_IMAGES.glob("*.png")} == {p.name for p in demo.images}


def test_the_carried_images_load_and_are_small(demo):
    check(demo)
    assert demo.typical_size() == (64, 64)
    pixels = np.stack([demo.sample(index, draw()).pixels for index in range(64)])
    assert pixels.shape == (64, 3, 32, 32)
    assert -1.0 <= pixels.min() < -0.5
    assert pixels.max() == 1.0  # they lie on white
    assert len({array.tobytes() for array in pixels}) == 64
    assert sum(file.stat().st_size for file in DEMO_IMAGES.iterdir()) < 1 << 20


def test_the_carried_images_name_their_source_and_licence():
    notice = (DEMO_IMAGES / "NOTICE.md").read_text("utf-8")
    for word in ("Fluent Emoji", "Microsoft", "MIT License", "Permission is hereby granted"):
        assert word in notice


def test_the_demo_configs_names_are_carried():
    node = yaml.safe_load((packaged_configs() / "learn_demo.yaml").read_text("utf-8"))
    data = Text2ImageDataset(**node["data"]["dataset_config"]["params"])
    assert len(data) == len({image.name for image in data.images}) == 16


def test_the_learning_run_takes_the_images_that_differ_most():
    """demo16.txt, which the script that makes the images writes, and the config agree."""
    root = Path(__file__).parents[2]
    config = OmegaConf.load(root / "configs" / "learn_demo.yaml")
    chosen = (root / "sdxl_host" / "data" / "demo16.txt").read_text().split()
    assert list(config.data.dataset_config.params.only) == chosen
