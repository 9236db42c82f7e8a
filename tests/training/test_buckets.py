"""A run on images of several shapes: each shape is one graph, and a step has one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.images import image
from support.mixed_folder import bad_files, good_files

from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load
from sdxl_host.errors import DataError
from sdxl_host.training.build import make_trainer
from sdxl_host.training.observers import FiniteGuard

NETWORK = "model.params.network_config.params"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three wide images and two square ones."""
    made = tmp_path_factory.mktemp("shapes")
    for index, size in enumerate([(40, 20)] * 3 + [(30, 30)] * 2):
        image(made / f"{index}.png", *size)
        (made / f"{index}.txt").write_text(f"number {index}")
    return made


def words(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["--config", "tiny.yaml", "--plugins=none", "--data_path", str(folder)]
    given += ["--buckets", "True", "--save_path", str(out), "--guidance_scale", "1"]
    given += [f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]"]
    return [*given, *more]


def test_each_shape_is_compiled_once(
    device: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    results: list[Any] = []
    guard = FiniteGuard.on_step_end

    def noted(self: Any, trainer: Any, result: Any) -> None:
        results.append(result)
        guard(self, trainer, result)

    monkeypatch.setattr(FiniteGuard, "on_step_end", noted)
    graphs = tmp_path / "graphs"
    given = ["--ms_mode", "0", "--compile_cache", str(graphs), "--total_step", "8"]
    trainer = make_trainer(
        load(words(folder, tmp_path / "run", *given)),
        say=lambda fact: said.extend(lines_of(fact)),
    )
    trainer.run()
    text = "\n".join(said)
    assert "buckets" in text
    assert "2, each a shape of its own that is compiled once" in text
    assert "16x16: 2 images, of which cropping takes 0.0%" in text
    square = [{"3.png", "4.png"} >= set(result.sample_ids) for result in results]
    wide = [{"0.png", "1.png", "2.png"} >= set(result.sample_ids) for result in results]
    assert [a != b for a, b in zip(square, wide, strict=True)] == [True] * 8
    assert any(square) and any(wide)
    assert len(list(graphs.glob("*.mindir"))) == 2 + 1  # and the sampler of the grid
    metrics = (trainer.save_path / "metrics.jsonl").read_text().splitlines()
    assert len({json.loads(line)["loss"] for line in metrics}) == 8


def test_a_folder_of_everything_is_trained_on_at_its_own_shapes(
    device: str, tmp_path: Path
) -> None:
    """Formats, modes, profiles, hidden and linked folders, names in two forms of Unicode, bad
    files; what the network is told of sizes is as computed by hand."""
    source, linked = tmp_path / "source", tmp_path / "linked"
    for folder in (source, linked, source / "__MACOSX", source / ".ipynb_checkpoints"):
        folder.mkdir()
    (source / "more").symlink_to(linked)
    sizes, bad = good_files(source), bad_files(source)
    image(linked / "wide.jpg", 40, 10)
    sizes["more/wide.jpg"] = (10, 40)
    composed, decomposed = "\u00e4.png", "a\u0308.txt"
    image(source / composed, 20, 20)
    sizes[composed] = (20, 20)
    (source / decomposed).write_text("an umlaut")
    for name in {*sizes, *bad} - {composed}:
        (source / name).with_suffix(".txt").write_text(f"an image of {name}")
    image(source / "._tall.png")
    image(source / "__MACOSX" / "tall.png")
    image(source / "alone.png")

    out, said = tmp_path / "run", list[str]()
    given = words(source, out, "--total_step", "2", "--save_path_with_time", "False")
    with pytest.raises(DataError, match=r"data\.max_bad_fraction"):
        make_trainer(load(given), say=lambda fact: None)
    trainer = make_trainer(
        load([*given, "data.max_bad_fraction=0.5"]), say=lambda fact: said.extend(lines_of(fact))
    )
    dataset = trainer.dataset
    assert {entry.name for entry in dataset.images} == set(sizes)
    # At 16 pixels SDXL's sizes are 8x32 to 32x8; these are nearest to 2:3, 3:2, 1:4, 4:1 and 1:1.
    shapes = {(20, 30): (13, 19), (30, 20): (19, 13), (10, 40): (8, 32), (40, 10): (32, 8)}
    shapes |= {(1, 800): (8, 32), (20, 20): (16, 16)}
    for index, entry in enumerate(dataset.images):
        found = dataset.sample(index, np.random.default_rng(index))
        height, width = target = shapes[sizes[entry.name]]
        assert found.pixels is not None and found.pixels.shape == (3, *target), entry.name
        assert found.sizes["original_size_as_tuple"] == sizes[entry.name]
        assert found.sizes["target_size_as_tuple"] == target
        original = sizes[entry.name]
        scale = max(height / original[0], width / original[1])
        top, left = found.sizes["crop_coords_top_left"]
        assert 0 <= top <= round(original[0] * scale) - height
        assert 0 <= left <= max(round(original[1] * scale), width) - width
    trainer.run()
    lines = (out / "skipped.jsonl").read_text().splitlines()
    rows = {row["name"]: row["kind"] for row in map(json.loads, lines)}
    # The listing itself passes over what is no file.
    no_files = {
        f"{name}.{end}": kind
        for name in ("pipe", "zero")
        for end, kind in (
            ("png", "an image that is no file"),
            ("txt", "a caption without an image"),
        )
    }
    assert rows == bad | no_files | {"alone.png": "an image without a caption"}
    assert any(line.startswith("set aside   13") for line in said)
