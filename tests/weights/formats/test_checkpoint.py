"""Checkpoints of this program as weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from sdxl_host.weights.architecture import Encoder
from sdxl_host.weights.open import open_weights

UNET = "model.diffusion_model."
POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
CONFIG = {
    "model": {
        "params": {
            "scale_factor": 0.25,
            "network_config": {"params": {"num_head_channels": 8}},
            "conditioner_config": {
                "params": {
                    "emb_models": [
                        {"input_key": "txt", "params": {"width": 16, "layers": 2, "heads": 2}},
                        {"input_key": "txt", "params": {"width": 32, "layers": 2, "heads": 8}},
                        {"input_key": "original_size_as_tuple", "params": {"outdim": 16}},
                    ]
                }
            },
        }
    },
    "plugins": {"edm": {"sigma_data": 0.7}, "lpw": {"max_length": 225}},
}


RECORD = {
    "preconditioning": "edm",
    "hooks": {"build_model": "edm", "encode_prompt": "lpw"},
    "size": [64, 96],
    "original_size": [64, 96],
}


@pytest.fixture
def checkpoint(small_model, tmp_path) -> Path:
    from sdxl_host.checkpoints.write import Contents, save_checkpoint

    arrays = {n: a for n, a in small_model.arrays.items() if n != POSITIONS}
    contents = Contents(
        step=7,
        config=yaml.safe_dump(CONFIG),
        network={n: a for n, a in arrays.items() if n.startswith(UNET)},
        frozen={n: a for n, a in arrays.items() if not n.startswith(UNET)},
        ema={},
        optimizer={"m": np.zeros(1, np.float32)},
        counts={"skipped": 0, "skipped_in_a_row": 0},
        plugin_states={},
        plugins=[
            {"name": "edm", "distribution": "sdxl-edm", "version": "0.1.0"},
            {"name": "lpw", "distribution": "sdxl-lpw", "version": "0.1.0"},
        ],
        record=RECORD,
    )
    return save_checkpoint(tmp_path / "checkpoints", contents)


def test_a_checkpoint_is_read(assert_equal, checkpoint, small_model):
    """Also through `latest`, the link to the newest."""
    for path in (checkpoint, checkpoint.parent / "latest"):
        source = open_weights(path)
        assert_equal(source, small_model.arrays)
        assert source.description == f"{path} (checkpoint of step 7)"
        assert source.architecture is not None
        assert source.architecture.unet == small_model.architecture.unet
        assert source.architecture.encoders == (
            Encoder("clip", 16, 2, heads=2),
            Encoder("open_clip", 32, 2, heads=8),
        )


def test_a_checkpoint_says_what_it_was_trained_for(checkpoint):
    metadata = dict(open_weights(checkpoint).metadata)
    plugins = json.loads(metadata.pop("sdxl_host.plugins"))
    prompts = json.loads(metadata.pop("sdxl_host.prompts"))
    assert plugins == [
        {
            "name": "edm",
            "distribution": "sdxl-edm",
            "version": "0.1.0",
            "options": {"sigma_data": 0.7},
        },
        {
            "name": "lpw",
            "distribution": "sdxl-lpw",
            "version": "0.1.0",
            "options": {"max_length": 225},
        },
    ]
    assert prompts == {"encode_prompt": "lpw", "options": {"lpw": {"max_length": 225}}}
    assert metadata == {
        "sdxl_host.objective": "edm",
        "sdxl_host.scale_factor": "0.25",
        "modelspec.resolution": "96x64",
    }


def test_a_changed_checkpoint_is_refused(refused, checkpoint):
    file = checkpoint / "frozen.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "frozen.safetensors: was changed or damaged; use an earlier" in refused(checkpoint)
