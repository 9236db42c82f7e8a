"""What the header of a file says of the weights in it."""

from __future__ import annotations

import json

import pytest
from support.weights import source_of

from sdxl_host.weights.architecture import SDXL_BASE, SDXL_REFINER
from sdxl_host.weights.export import write_single_file
from sdxl_host.weights.metadata import described, markers, objective
from sdxl_host.weights.open import open_weights
from sdxl_host.weights.source import Source

BASE = "1.0.0"


@pytest.fixture
def source(small_model) -> Source:
    return source_of(small_model.arrays)


def test_the_metadata_of_a_released_kind(small_model):
    """Of its training, which the source does not describe, nothing is made up."""
    found = described({}, SDXL_BASE, "mine", "2026-01-02T03:04:05+00:00")
    architecture = json.loads(found.pop("sdxl_host.architecture"))
    assert architecture["unet"]["num_head_channels"] == 64
    assert architecture["encoders"][1] == {
        "kind": "open_clip",
        "width": 1280,
        "layers": 32,
        "heads": 20,
    }
    assert found.pop("sdxl_host.version") >= "0.1"
    assert found == {
        "modelspec.sai_model_spec": BASE,
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "mine",
        "modelspec.date": "2026-01-02T03:04:05+00:00",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "1024x1024",
        "sdxl_host.objective": "eps",
        "sdxl_host.scale_factor": "0.13025",
    }
    refiner = described({}, SDXL_REFINER, "mine", "")
    assert refiner["modelspec.architecture"] == "stable-diffusion-xl-v1-refiner"


def test_what_a_source_says_is_kept():
    """But not what holds no longer, nor what the writer knows better."""
    given = {
        "format": "ms",
        "modelspec.title": "Theirs",
        "modelspec.license": "CreativeML",
        "modelspec.hash_sha256": "0x1234",
        "modelspec.prediction_type": "epsilon",
        "modelspec.architecture": "else",
        "sdxl_host.objective": "v",
        "sdxl_host.plugins": '[{"name": "lpw"}]',
        "sdxl_host.prompts": '{"encode_prompt": "lpw"}',
        "ztsnr": "true",
    }
    found = described(given, SDXL_BASE, "mine", "today")
    assert found["modelspec.title"] == "Theirs"
    assert found["modelspec.license"] == "CreativeML"
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert found["sdxl_host.plugins"] == '[{"name": "lpw"}]'
    assert found["sdxl_host.prompts"] == '{"encode_prompt": "lpw"}'
    assert not {"format", "modelspec.hash_sha256", "ztsnr"} & set(found)


@pytest.mark.parametrize(
    ("metadata", "expected", "marked"),
    [
        ({}, "eps", []),
        ({"v_pred": "true"}, "v", ["v_pred"]),
        ({"modelspec.prediction_type": "v"}, "v", ["v_pred"]),
        ({"modelspec.prediction_type": "epsilon"}, "eps", []),
        ({"sdxl_host.objective": "edm", "v_pred": "true"}, "edm", []),
        ({"sdxl_host.objective": "v", "ztsnr": "true"}, "v", ["v_pred", "ztsnr"]),
        ({"ztsnr": "true"}, "eps", ["ztsnr"]),
    ],
)
def test_the_objective_is_read_from_metadata(metadata, expected, marked):
    assert objective(metadata) == expected
    assert markers(metadata) == marked


def test_an_objective_without_a_name_elsewhere_has_no_prediction_type():
    found = described({"sdxl_host.objective": "edm"}, SDXL_BASE, "", "")
    assert "modelspec.prediction_type" not in found
    assert found["sdxl_host.objective"] == "edm"


def test_metadata_and_markers_come_back(small_model, source, tmp_path):
    path = tmp_path / "out.safetensors"
    said = described({"v_pred": "true", "ztsnr": "true"}, small_model.architecture, "t", "d")
    marked = markers({"v_pred": "true", "ztsnr": "true"})
    write_single_file(path, source, small_model.architecture, metadata=said, markers=marked)
    found = open_weights(path)
    assert found.architecture == small_model.architecture
    assert objective(found.metadata) == "v"
    assert markers(found.metadata) == marked
    assert found.metadata["sdxl_host.architecture"] == said["sdxl_host.architecture"]
