"""Loads a diffusers folder, trains it one step, exports it, and writes what its networks compute.

    python tests/parity/round_trip.py PIPELINE OUT OBJECTIVE

PIPELINE is what make_pipeline.py wrote. OBJECTIVE is what the step trains for: eps, v or edm. OUT
gets `run/`, the export as `folder/` (diffusers) and `single.safetensors`, and `expected.npz` with
the keys that check_export.py lists. Exit 1 where the step left the weights as they were, or where a
single file is written of an objective that it can't name.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# As the program sets it itself, where it is what imports MindSpore first.
os.environ.setdefault("GLOG_v", "3")

import numpy as np

from sdxl_host.cli import main as command
from sdxl_host.config.load import load
from sdxl_host.device import prepare_device
from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.randomness import Stream, normals
from sdxl_host.sampling.load import restore_sampler
from sdxl_host.sampling.samplers import noise_levels
from sdxl_host.weights.networks import build_networks
from sdxl_host.weights.open import open_weight_setting

if TYPE_CHECKING:
    from sdxl_host.diffusion.model import DiffusionModel

_EMBEDDERS = "model.params.conditioner_config.params.emb_models"
# The packaged config of SDXL's base at the widths of make_pipeline.py.
SETTINGS = [
    "--config", "configs/training/sd_xl_base_finetune_910b.yaml",
    "model.params.network_config.params.model_channels=32",
    "model.params.network_config.params.num_head_channels=16",
    "model.params.network_config.params.transformer_depth=[1,1,2]",
    "model.params.network_config.params.context_dim=96",
    "model.params.network_config.params.adm_in_channels=160",
    "model.params.first_stage_config.params.ddconfig.ch=32",
    "model.params.first_stage_config.params.ddconfig.ch_mult=[1,1,2,2]",
    *[
        f"{_EMBEDDERS}[{index}].params.{key}={value}"
        for index, width in enumerate((32, 64))
        for key, value in {"width": width, "layers": 3, "heads": width // 16}.items()
    ],
    f"{_EMBEDDERS}[0].params.layer_idx=2",
    *[f"{_EMBEDDERS}[{index}].params.outdim=16" for index in (2, 3, 4)],
    "data.dataset_config.params.target_size=64",
    "data.dataset_config.params.transforms[0].params.size=64",
    "optim.base_learning_rate=0.01",
    "optim.scheduler_config=null",
    "--ms_mode", "1", "--ms_amp_level", "O0",
]  # fmt: skip


_DENOISER = "model.params.denoiser_config.params"
OBJECTIVES = {
    "eps": [],
    "v": [
        f"{_DENOISER}.scaling_config.target=sdxl_host.VScaling",
        f"{_DENOISER}.weighting_config.target=sdxl_host.VWeighting",
    ],
    "edm": ["--plugins", "edm"],
}
PROMPT, STEPS, GUIDANCE = "a photo of a cat", 4, 5.0


def train(pipeline: Path, folder: Path, objective: str) -> Path:
    """One step from the pipeline's weights; the checkpoint."""
    words = [
        *SETTINGS,
        *OBJECTIVES[objective],
        "--weight",
        str(pipeline),
        "--save_path",
        str(folder),
    ]
    words += ["--save_path_with_time", "False", "--total_step", "1", "--sample_steps", "1"]
    if command(["train", *words, "train.sample_count=1"]):
        raise SystemExit("round_trip: the step failed")
    return folder / "checkpoints" / "latest"


def unet_outputs(model: DiffusionModel, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs of the U-Net, and what it makes of them."""
    from mindspore import Tensor

    time_ids = np.asarray([[64, 96, 0, 8, 64, 96], [512, 512, 3, 0, 256, 384]], np.float32)
    arrays = {
        "unet_x": _normal(generator, 2, 4, 8, 12),
        "unet_timesteps": np.asarray([17.0, 801.0], np.float32),
        "unet_context": _normal(generator, 2, 77, 96),
        "unet_pooled": _normal(generator, 2, 64),
        "unet_time_ids": time_ids,
    }
    told = PromptEmbedding(arrays["unet_context"], arrays["unet_pooled"])
    sizes = dict(zip(model.conditioner.size_keys, np.split(time_ids, 3, axis=1), strict=True))
    given = [arrays["unet_x"], arrays["unet_timesteps"], arrays["unet_context"]]
    given += [model.conditioner.vector(told, sizes), np.ones((2, 77), np.float32)]
    return {**arrays, "unet_out": model.network(*map(Tensor, given)).asnumpy()}


def outputs(weights: Path) -> dict[str, np.ndarray]:
    """Inputs, and what the networks with these weights make of them."""
    from mindspore import Tensor

    settings = load(SETTINGS)
    model = make_hooks(settings.plugins).build_model(settings.tree)
    build_networks(model, 0, open_weight_setting(str(weights)))
    generator = np.random.default_rng(7)
    arrays = unet_outputs(model, generator)
    arrays["vae_pixels"] = _normal(generator, 1, 3, 64, 96)
    arrays["vae_z"] = _normal(generator, 1, 4, 8, 12)
    prompts = ["", "a photo of a cat", "an owl on a red bicycle, " * 20]
    for number, encoder in enumerate(model.encoders, 1):
        rows = []
        for prompt in prompts:
            kept = encoder.tokenize(prompt)[:75]
            row = [encoder.begin, *kept, encoder.end]
            rows.append(row + [encoder.pad] * (77 - len(row)))
        ids = np.asarray(rows, np.int64)
        hidden, pooled = encoder.encode(ids)
        arrays |= {f"ids_{number}": ids, f"hidden_{number}": hidden}
        if pooled is not None:
            arrays[f"pooled_{number}"] = pooled
    cell = model.first_stage.cell
    arrays["vae_moments"] = cell.moments(Tensor(arrays["vae_pixels"])).asnumpy()
    arrays["vae_decoded"] = cell.decode_latents(Tensor(arrays["vae_z"])).asnumpy()
    return arrays


def _normal(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape).astype(np.float32)


def sampled(checkpoint: Path) -> dict[str, np.ndarray]:
    """The latents of a few Euler steps, and the noise they start from."""
    size, seed = (64, 96), 11
    sampler, _ = restore_sampler(checkpoint, size=size, original_size=size)
    latents: list[np.ndarray] = []
    first_stage = sampler.model.first_stage
    first_stage.decode = lambda x: latents.append(x) or np.zeros((1, 3, *size), np.float32)
    sampler.draw([PROMPT], STEPS, GUIDANCE, seed, sampler="euler")
    model = sampler.model
    return {
        "sample_noise": normals(seed, Stream.SAMPLING, 0, [0], latents[0].shape[1:]),
        "sample_sigma": noise_levels(model.sampling, model.schedule, STEPS)[0],
        "sample_latents": latents[0],
        "sample_prompt": np.asarray(PROMPT),
        "sample_steps": np.asarray(STEPS),
        "sample_guidance_scale": np.asarray(GUIDANCE),
    }


def main() -> int:
    """Train, export and compute; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("objective", choices=list(OBJECTIVES))
    options = parser.parse_args()
    prepare_device("CPU")
    checkpoint = train(options.pipeline, options.out / "run", options.objective)
    exports = [options.out / "folder", options.out / "single.safetensors"]
    for export in exports:
        words = ["convert", str(checkpoint), str(export)]
        if options.objective == "edm" and export.suffix:
            if command(words) != 2:
                print("round_trip: an objective that a single file can't name was not refused")
                return 1
            words.append("--allow_unmarked_objective")
        if command(words):
            return 1
    before = open_weight_setting(str(options.pipeline))
    after = open_weight_setting(str(exports[1]))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    if np.array_equal(before.read(name), after.read(name)):
        print(f"round_trip: {name} is what it was before the step")
        return 1
    np.savez(options.out / "expected.npz", **outputs(exports[1]), **sampled(checkpoint))
    return 0


if __name__ == "__main__":
    sys.exit(main())
