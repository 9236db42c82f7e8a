"""Trains adapters on a diffusers folder's weights, and writes what the U-Net computes with them.

    python tests/parity/train_lora.py PIPELINE OUT

PIPELINE is what make_pipeline.py wrote. OUT gets `run/`, three steps of the plugins lora, edm and
snr, and `expected.npz` with the keys that check_lora.py lists. Needs examples/plugins/lora
installed. Exit 1 where an adapter is what it was before training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from round_trip import SETTINGS, unet_outputs
from safetensors.numpy import load_file

from sdxl_host.cli import main as command
from sdxl_host.device import prepare_device
from sdxl_host.sampling.load import restore_sampler

# A scale alpha / rank of 1.5, which a reader that leaves alpha out would not apply.
PLUGINS = ["--plugins", "lora,edm,snr", "--lora_rank", "4", "--lora_alpha", "6"]


def train(pipeline: Path, folder: Path) -> Path:
    """Three steps from the pipeline's weights; the checkpoint."""
    words = [*SETTINGS, *PLUGINS, "--weight", str(pipeline), "--save_path", str(folder)]
    words += ["--save_path_with_time", "False", "--total_step", "3", "--sample_steps", "1"]
    if command(["train", *words, "train.sample_count=1"]):
        raise SystemExit("train_lora: the steps failed")
    return folder / "checkpoints" / "latest"


def outputs(checkpoint: Path) -> dict[str, np.ndarray]:
    """Inputs, and what the checkpoint's U-Net with its adapters makes of them."""
    model = restore_sampler(checkpoint)[0].model
    return unet_outputs(model, np.random.default_rng(11))


def main() -> int:
    """Train and compute; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    prepare_device("CPU")
    checkpoint = train(options.pipeline, options.out / "run")
    for name, array in load_file(checkpoint / "lora.safetensors").items():
        if name.endswith(".lora_up.weight") and not array.any():
            print(f"train_lora: {name} is 0, as it was before training")
            return 1
    np.savez(options.out / "expected.npz", **outputs(checkpoint))
    return 0


if __name__ == "__main__":
    sys.exit(main())
