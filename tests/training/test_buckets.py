"""A run on images of several shapes: each shape is one graph, and a step has one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.images import image

from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load
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
