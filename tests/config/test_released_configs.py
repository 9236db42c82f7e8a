"""Configs of the real SDXL: the old trainer's and ours load, build at full size, and train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters
from omegaconf import OmegaConf

from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load
from sdxl_host.config.yaml_files import packaged_configs
from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.errors import ConfigError
from sdxl_host.models.layers import sinusoids
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.settings.targets import build
from sdxl_host.training.build import make_trainer
from sdxl_host.weights.architecture import (
    AUTOENCODER_PREFIX,
    NETWORK_PREFIX,
    SDXL_BASE,
    SDXL_REFINER,
)
from sdxl_host.weights.names import single_file_parameters
from sdxl_host.weights.shapes import expected_shapes

OLD = Path(__file__).parents[1] / "configs"
OURS = "configs/training/sd_xl_base_finetune_910b.yaml"
EDM = "configs/training/sd_xl_base_finetune_910b_edm.yaml"
REFINER = "configs/training/sd_xl_refiner_finetune_910b.yaml"
BASES = [
    str(OLD / "guide.yaml"), str(OLD / "mindone_sd_xl_base_finetune_910b.yaml"), OURS, EDM
]  # fmt: skip

# The same config at a width that a test can train: 32 channels, 2 + 2 text layers, 64 pixels.
_ENCODER = "model.params.conditioner_config.params.emb_models"
NARROW = [
    "model.params.network_config.params.model_channels=32",
    "model.params.network_config.params.num_head_channels=16",
    "model.params.network_config.params.transformer_depth=[1,1,1]",
    "model.params.first_stage_config.params.ddconfig.ch=32",
    "data.dataset_config.params.target_size=64",
    "data.dataset_config.params.transforms[0].params.size=64",
    *[f"{_ENCODER}[{index}].params.outdim=8" for index in (2, 3, 4)],
]
NARROW_BASE = [
    *NARROW,
    "model.params.network_config.params.context_dim=32",
    "model.params.network_config.params.adm_in_channels=64",
    *[
        f"{_ENCODER}[{index}].params.{key}={value}"
        for index in (0, 1)
        for key, value in {"width": 16, "layers": 2, "heads": 2}.items()
    ],
    f"{_ENCODER}[0].params.layer_idx=1",
]
SHORT = [
    "--ms_mode", "1", "--total_step", "1", "--clip_grad", "False", "--sample_steps", "1",
    "train.sample_count=1", "train.guidance_scale=1.0",
]  # fmt: skip


def full_size(config: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of the config's model, which are given no memory."""
    settings = load(["--config", config])
    model = make_hooks(settings.plugins).build_model(settings.tree)
    with no_init_parameters():
        cells = {NETWORK_PREFIX: model.network, AUTOENCODER_PREFIX: model.first_stage.cell}
        for index, encoder in enumerate(model.encoders):
            cells[f"conditioner.embedders.{index}."] = encoder.cell
    return {
        name: tuple(parameter.shape)
        for prefix, cell in cells.items()
        for name, parameter in single_file_parameters(cell, prefix).items()
    }


def trained(config: str, folder: Path, *more: str) -> tuple[dict[str, Any], list[str]]:
    """One step of the config; its line in metrics.jsonl, and what the run said."""
    said: list[str] = []
    words = ["--config", config, "--save_path", str(folder), *more, *SHORT]
    trainer = make_trainer(load(words), lambda fact: said.extend(lines_of(fact)))
    trainer.run()
    lines = (trainer.save_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1
    return json.loads(lines[0]), said


@pytest.mark.parametrize("config", [*BASES, "configs/inference/sd_xl_base.yaml"])
def test_a_base_config_is_the_released_model(config: str, device: str, tmp_path: Path) -> None:
    if "inference" in config:
        # What it lacks, because it draws only, is taken from the training config.
        whole = (packaged_configs() / OURS.removeprefix("configs/")).read_text()
        text = (packaged_configs() / config.removeprefix("configs/")).read_text()
        file = tmp_path / "whole.yaml"
        file.write_text(text + whole[whole.index("\noptim:") : whole.index("\ntrain:")])
        config = str(file)
    expected = expected_shapes(SDXL_BASE)
    del expected["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]
    assert full_size(config) == expected


def test_the_refiner_config_is_the_released_model(device: str) -> None:
    assert full_size(REFINER) == expected_shapes(SDXL_REFINER)


@pytest.mark.parametrize("config", BASES)
def test_a_base_config_trains(config: str, device: str, tmp_path: Path) -> None:
    # Float16 is slow on a CPU; one config is trained as it stands.
    level = [] if config != EDM else ["--ms_amp_level", "O0"]
    line, said = trained(config, tmp_path, *NARROW_BASE, *level)
    assert np.isfinite(line["loss"])
    assert line["loss"] > 0.1
    attention = next(text for text in said if text.startswith("attention"))
    assert ("flash-attention needs an Ascend device" in attention) == ("mindone" not in config)
    assert ("loss_scale" in line) == (config == OURS)
    assert any("edm" in text for text in said[:3]) == (config == EDM)


def test_keys_without_effect_are_named(device: str, tmp_path: Path) -> None:
    notices = load(["--config", BASES[1]]).notices
    for key in (
        "version", "use_ema", "input_key", "monitor", "lossconfig", "ddconfig.resolution",
        "ddconfig.decoder_attn_dtype", "do_append_zero", "quantize_c_noise", "keep_loss_fp32",
    ):  # fmt: skip
        assert any(key in notice for notice in notices), key


NARROW_REFINER = [
    *[word for word in NARROW if "transformer_depth" not in word and "[4]" not in word],
    "model.params.network_config.params.transformer_depth=1",
    "model.params.network_config.params.context_dim=16",
    f"model.params.network_config.params.adm_in_channels={16 + 8 * 5}",
    *[
        f"{_ENCODER}[0].params.{key}={value}"
        for key, value in {"width": 16, "layers": 2, "heads": 2}.items()
    ],
    f"{_ENCODER}[1].params.outdim=8",
]


def test_the_refiner_trains(device: str, tmp_path: Path) -> None:
    line, _ = trained(REFINER, tmp_path, *NARROW_REFINER, "--ms_amp_level", "O0")
    assert line["loss"] > 0.1


def test_the_refiner_is_told_the_score(device: str) -> None:
    """Its vector is bigG's pooled output, four numbers of sizes, and the dataset's score."""
    words = ["--config", REFINER, *NARROW_REFINER]
    settings = load([*words, "data.dataset_config.params.aesthetic_score=4.5"])
    conditioner = make_hooks(settings.plugins).build_model(settings.tree).conditioner
    dataset = build(OmegaConf.to_container(settings.tree.data.dataset_config), "dataset", "data")
    told = dataset.sample(0, np.random.default_rng(0)).sizes
    sizes = {key: np.asarray([values]) for key, values in told.items()}
    embedding = PromptEmbedding(np.zeros((1, 77, 16)), np.ones((1, 16)))
    vector = conditioner.vector(embedding, sizes)
    assert vector.shape == (1, 16 + 8 * 5)
    assert conditioner.vector_width == vector.shape[1]
    np.testing.assert_allclose(vector[0, -8:], sinusoids(np.asarray(4.5), 8))
    _, dropped = conditioner.drop(embedding, vector, np.asarray([0.5]))
    np.testing.assert_array_equal(dropped, vector)  # nothing is dropped at rate 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("network_config.params.context_dim", 40, "context_dim: 40 does not fit the text encoders"),
        ("network_config.params.adm_in_channels", 8, "adm_in_channels: 8 does not fit the embedd"),
        ("first_stage_config.params.embed_dim", 8, "in_channels: 4 does not fit the first stage"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    key: str, value: int, message: str, device: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(OURS, tmp_path, *NARROW_BASE, f"model.params.{key}={value}")


def test_a_size_that_cannot_be_halved_is_named(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target_size 48x48: .* multiples of 32"):
        trained(OURS, tmp_path, *NARROW_BASE, "data.dataset_config.params.target_size=48")
