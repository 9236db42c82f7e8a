"""Golden arrays from diffusers, transformers and torch, for the tests that have none of them.

    python -m pip install -r tests/golden/requirements.txt
    python tests/golden/make_golden.py            # writes tests/golden/*.npz
    python tests/golden/make_golden.py --check    # recomputes them; exit 1 where one differs

Nothing of the project and no MindSpore is imported here: what is compared later shares with this
script the names of the weights, deterministic.py, and nothing else.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Processors with different vector units round differently (measured: up to 5e-6 in a U-Net's
# output), so the code path that all of them have is chosen, before torch is loaded.
os.environ["ATEN_CPU_CAPABILITY"] = "default"
os.environ["MKL_CBWR"] = "COMPATIBLE"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from autoencoders import golden_autoencoder
from formulas import golden_min_snr, golden_schedule, golden_timestep_embedding
from loading import Arrays
from optimizers import golden_adamw
from samplers import golden_dpmpp_2m, golden_euler, golden_euler_a, golden_heun
from schedules import golden_learning_rates
from text_encoders import golden_clip_l, golden_open_clip_g, golden_tokenizer
from unets import golden_unet_a, golden_unet_b, golden_unet_c, golden_unet_d

HERE = Path(__file__).resolve().parent

GENERATORS: dict[str, Callable[[], Arrays]] = {
    "unet_a": golden_unet_a,
    "unet_b": golden_unet_b,
    "unet_c": golden_unet_c,
    "unet_d": golden_unet_d,
    "autoencoder": golden_autoencoder,
    "clip_l": golden_clip_l,
    "open_clip_g": golden_open_clip_g,
    "timestep_embedding": golden_timestep_embedding,
    "schedule": golden_schedule,
    "euler": golden_euler,
    "euler_a": golden_euler_a,
    "heun": golden_heun,
    "dpmpp_2m": golden_dpmpp_2m,
    "min_snr": golden_min_snr,
    "tokenizer": golden_tokenizer,
    "learning_rates": golden_learning_rates,
    "adamw": golden_adamw,
}


def compare(name: str, stored: np.ndarray, made: np.ndarray) -> Iterator[str]:
    """What differs between two arrays, as sentences that begin with `name`; none where equal."""
    if (stored.shape, stored.dtype) != (made.shape, made.dtype):
        yield f"{name}: stored {stored.dtype}{stored.shape}, made {made.dtype}{made.shape}"
    elif stored.dtype.kind != "f":
        if not np.array_equal(stored, made):
            yield f"{name}: {np.count_nonzero(stored != made)} of {made.size} entries differ"
    else:
        worst = float(np.abs(stored.astype(np.float64) - made).max())
        peak = float(np.abs(made).max())
        # The second bound is for gradients, which are so small that the first would pass a zero.
        allowed = min(1e-5 * max(1.0, peak), 1e-3 * peak)
        if not worst <= allowed:
            yield f"{name}: differs by up to {worst:.3g}; at most {allowed:.3g} is allowed"


def check_file(path: Path, made: Arrays) -> Iterator[str]:
    """What differs between the file at `path` and the arrays just made."""
    if not path.exists():
        yield f"{path.name}: not there; run make_golden.py without --check"
        return
    with np.load(path) as file:
        stored = dict(file)
    for key in sorted(stored.keys() ^ made.keys()):
        yield f"{path.name}/{key}: only in the {'file' if key in stored else 'recomputed set'}"
    for key in sorted(stored.keys() & made.keys()):
        yield from compare(f"{path.name}/{key}", stored[key], made[key])


def check(folder: Path) -> list[str]:
    """Everything that differs between `folder` and what this script makes now."""
    orphans = sorted(path for path in folder.glob("*.npz") if path.stem not in GENERATORS)
    problems = [f"{path.name}: nothing in make_golden.py makes this file" for path in orphans]
    for name, generate in GENERATORS.items():
        problems += check_file(folder / f"{name}.npz", generate())
    return problems


def main() -> int:
    """Write the files, or compare them; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the .npz files")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if options.check:
        problems = check(options.out)
        print("\n".join(problems) or f"{len(GENERATORS)} golden files are as recomputed")
        return 1 if problems else 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name, generate in GENERATORS.items():
        np.savez_compressed(options.out / f"{name}.npz", **generate())
    return 0


if __name__ == "__main__":
    sys.exit(main())
