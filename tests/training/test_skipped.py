"""What is set aside is listed once, and a run goes on without it, resumed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.images import captioned

from sdxl_host.cli import main
from sdxl_host.data.problems import Problem
from sdxl_host.errors import DataError
from sdxl_host.training import build
from sdxl_host.training.skipped import SKIPPED, SkippedImages, began_without

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
ARGUMENTS = [
    *("--config", TINY, "--save_path_with_time=False", "--per_batch_size=1", "--plugins=none"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]", "--guidance_scale=1"),
    *("data.shuffle=False", "--save_ckpt_interval=2", "data.max_bad_fraction=0.2"),
]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SKIPPED).read_text("utf-8").splitlines()]


EMPTY, CUT = Problem("empty", "a.png"), Problem("cut", "b.png", "it breaks off")


def test_the_start_is_written_and_what_breaks_later_is_added_and_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    skipped = SkippedImages(tmp_path, [EMPTY], 0, said.append)
    skipped.add(3, [CUT, EMPTY])
    skipped.add(9, [CUT])
    assert lines(tmp_path) == [
        {"kind": "empty", "name": "a.png", "detail": ""},
        {"kind": "cut", "name": "b.png", "detail": "it breaks off", "step": 3},
    ]
    assert said == [
        "step 3: b.png is set aside, because it can't be read any more (cut: it breaks off); the "
        "next image in order is taken instead"
    ]
    assert skipped.count == 1
    assert began_without(tmp_path) == {"a.png"}


def test_a_resumed_run_adds_to_the_file_and_a_new_one_begins_it(tmp_path: Path) -> None:
    SkippedImages(tmp_path, [EMPTY], 0, print)
    with open(tmp_path / SKIPPED, "a") as file:
        file.write('{"kind": "cu')  # a crash has cut this line short
    SkippedImages(tmp_path, [EMPTY, CUT], 7, print)
    assert [(line["name"], line.get("step")) for line in lines(tmp_path)] == [
        ("a.png", None),
        ("b.png", 7),
    ]
    assert began_without(tmp_path) == {"a.png"}
    SkippedImages(tmp_path, [], 0, print)
    assert lines(tmp_path) == []


def test_a_run_that_sets_nothing_aside_writes_no_file(tmp_path: Path) -> None:
    SkippedImages(tmp_path, [], 0, print)
    assert not (tmp_path / SKIPPED).exists()
    assert began_without(tmp_path) == set()


def test_a_file_that_cant_be_written_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / SKIPPED).mkdir()
    with pytest.raises(DataError, match=rf"{SKIPPED}: can't be written \(.*; free some space"):
        SkippedImages(tmp_path, [EMPTY], 0, print)
    with pytest.raises(DataError, match=rf"{SKIPPED}: can't be read \("):
        began_without(tmp_path)


@pytest.fixture(scope="module")
def runs(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on images a to f, of which b is empty and d breaks when the run has looked at it:
    `whole`, of 4 steps, and `resumed`, of 2 and then 2 more. What they print is in `*.txt`."""
    folder = tmp_path_factory.mktemp("runs")
    original = build.check_data

    def train(name: str, *words: str, breaks: bool) -> None:
        def check(*given: Any) -> None:
            original(*given)
            if breaks:
                (folder / "data" / "d.png").write_bytes(b"no image")

        with pytest.MonkeyPatch.context() as patch, open(folder / f"{name}.txt", "a") as text:
            patch.setattr(build, "check_data", check)
            patch.setattr("sys.stdout", text)
            arguments = [*ARGUMENTS, "--save_path", str(folder / name), *words]
            assert main(["train", *arguments, "--data_path", str(folder / "data")]) == 0

    for name in ("whole", "resumed"):
        captions = {letter: f"a {letter}" for letter in "abcdef"} | {"c": "cat " * 100}
        captioned(folder / "data", **captions)
        (folder / "data" / "b.png").write_bytes(b"")
        if name == "whole":
            train(name, "--total_step=4", breaks=True)
        else:
            train(name, "--total_step=2", breaks=True)
            train(name, "--total_step=4", "--resume=latest", breaks=False)
    return folder


def test_a_run_goes_on_with_the_next_image_and_says_it_once(runs: Path) -> None:
    """Without shuffling the steps take a, c, e for d, and e: four steps over four images."""
    text = (runs / "whole.txt").read_text()
    assert "data        5 captioned images" in text
    assert f"set aside   1, all listed in {runs}/whole/{SKIPPED}" in text
    assert "            1 x an empty image file (b.png: it is empty)" in text
    assert text.count("step 3: d.png is set aside, because it can't be read any more") == 1
    assert "set aside   1 image that broke" in text
    assert [(line["name"], line.get("step")) for line in lines(runs / "whole")] == [
        ("b.png", None),
        ("d.png", 3),
    ]


def test_what_is_cut_of_captions_is_said_at_the_start(runs: Path) -> None:
    """Of the images that are used, each with two tokens but for one with a hundred."""
    note = (
        "note        1 of the 5 captions are longer than host encodes; 25 of their 108 tokens are "
        "lost, most in c.png (25 of 100); --lpw True keeps them\n"
    )
    assert note in (runs / "whole.txt").read_text()


def test_a_resumed_run_is_the_same_as_one_that_was_not_interrupted(runs: Path) -> None:
    """Although d, which the first run had not met yet, was broken when it was resumed."""
    whole, resumed = ((runs / name / "metrics.jsonl").read_text() for name in ("whole", "resumed"))
    assert whole == resumed
    assert len(whole.splitlines()) == 4
    assert [(line["name"], line.get("step")) for line in lines(runs / "resumed")] == [
        ("b.png", None),
        ("d.png", 2),
    ]
