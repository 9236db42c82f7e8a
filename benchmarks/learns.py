"""Does it learn? Trains on 16 carried images and asks for each of them by its caption.

    python benchmarks/learns.py [--plugins none edm edm,snr] [--steps N] [--out DIR]

For each plugin list: a fresh run of configs/learn_demo.yaml, then a sample from each caption with
guidance, from pure noise whose seeds training never used. A sample counts as learned when, of the
16 training images, its own is the nearest by the distance of their pixels. The same count with
the captions shifted by one is the control: it shows that the caption, not chance, chose.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CONFIG = "configs/learn_demo.yaml"


def train(plugins: str, folder: Path, steps: int | None) -> float:
    """Trains in a process of its own; returns the seconds it took, compiling included."""
    command = [sys.executable, "-m", "sdxl_host", "train", "--config", CONFIG]
    command += ["--plugins", plugins, "--save_path", str(folder), "--save_path_with_time", "False"]
    if steps is not None:
        command += [f"data.total_step={steps}"]
    start = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - start


def measure(folder: Path, steps: int, guidance_scale: float, seed: int) -> dict[str, object]:
    """How many of the images of the run in `folder` are drawn from their captions."""
    from sdxl_host.config.load import restore
    from sdxl_host.data.dataset import make_dataset
    from sdxl_host.device import prepare_device
    from sdxl_host.randomness import Stream, generator

    prepare_device()
    from sdxl_host.sampling.grid import save_grid
    from sdxl_host.sampling.load import restore_sampler

    dataset = make_dataset(restore(folder / "config.yaml").data)
    samples = [
        dataset.sample(index, generator(0, Stream.CROP, 0, index)) for index in range(len(dataset))
    ]
    images = np.stack([sample.pixels for sample in samples])
    captions = [variants[0] for _, variants in dataset.all_captions()]
    sampler, _ = restore_sampler(folder / "checkpoints" / "latest")
    drawn = sampler.draw(captions, steps, guidance_scale, seed)
    save_grid(folder / "learned.png", drawn, captions)
    save_grid(folder / "images.png", images, captions)
    difference = np.clip(drawn, -1, 1)[:, None] - images[None]
    distance = np.sqrt(np.mean(difference**2, axis=(2, 3, 4)))
    nearest = distance.argmin(axis=1)
    own = np.arange(len(captions))
    return {
        "learned": int((nearest == own).sum()),
        "rotated": int((nearest == np.roll(own, 1)).sum()),
        "of": len(captions),
        "median_distance_to_own": float(np.median(distance[own, own])),
        "grid": str(folder / "learned.png"),
    }


def main() -> None:
    """Prints one line of JSON a plugin list."""
    parser = argparse.ArgumentParser(description="Does it learn 16 images?")
    parser.add_argument("--plugins", nargs="+", default=["none", "edm", "edm,snr"])
    parser.add_argument("--steps", type=int, help="training steps instead of the config's")
    parser.add_argument("--sampling_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=1_000_003, help="of the sampled noise")
    parser.add_argument("--out", type=Path, default=Path("runs/learns"))
    parser.add_argument("--measure-only", action="store_true", help="runs in --out are there")
    options = parser.parse_args()
    for plugins in options.plugins:
        folder = options.out / plugins.replace(",", "_")
        seconds = None
        if not options.measure_only:
            seconds = round(train(plugins, folder, options.steps))
        found = measure(folder, options.sampling_steps, options.guidance_scale, options.seed)
        print(json.dumps({"plugins": plugins, "training_seconds": seconds, **found}), flush=True)


if __name__ == "__main__":
    main()
