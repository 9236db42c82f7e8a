"""A small run with an autoencoder, long prompts and crops, whose latents and embeddings can be
kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NETWORK = "model.params.network_config.params"
AUTOENCODER = (
    "model.params.first_stage_config={target: sdxl_host.AutoencoderKL, params: {embed_dim: 4, "
    "ddconfig: {double_z: true, z_channels: 4, in_channels: 3, out_ch: 3, ch: 32, "
    "ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}}}"
)
WORDS = [
    *("--config", TINY, "--plugins", "edm,snr,lpw", AUTOENCODER, "data.total_step=6"),
    *(f"{NETWORK}.in_channels=4", f"{NETWORK}.out_channels=4", f"{NETWORK}.channel_mult=[1]"),
    *(f"{NETWORK}.transformer_depth=[1]", "--guidance_scale", "1", "--crops_per_image", "2"),
    *("--save_path_with_time", "False"),
]
READ = ["--cache_latent", "True", "--cache_text_embedding", "True"]
LONG = "a small image of something " * 20


def write_images(folder: Path, count: int = 5) -> Path:
    """Images wider than high, so that they are cropped by chance; one caption is over 77 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        caption = f"image {index}" if index else LONG
        (folder / f"{index}.txt").write_text(caption, "utf-8")
    return folder


def make(*words: str, said: list[str] | None = None) -> int:
    """`sdxl-host cache` with the words; `said` gets the lines that are shown."""
    from sdxl_host.training.cache_task import make_cache

    lines = [] if said is None else said
    return make_cache(
        load([*WORDS, "--task", "cache", *words]), lambda fact: lines.extend(lines_of(fact))
    )


def counts(*words: str) -> tuple[int, int]:
    """How many latents and embeddings `sdxl-host cache` made."""
    said: list[str] = []
    assert make(*words, said=said) == 0
    rows = {line.split()[0]: line.split() for line in said if " to make, " in line}
    return tuple(int(rows[what][1]) if what in rows else 0 for what in ("latents", "embeddings"))  # type: ignore[return-value]


def trainer(folder: Path, *words: str, say: Callable[[Any], None] = lambda fact: None) -> Any:
    """A trainer with the words that saves into `folder`."""
    from sdxl_host.training.build import make_trainer

    return make_trainer(load([*WORDS, *words, "--save_path", str(folder)]), say)


def train(folder: Path, *words: str) -> Path:
    made = trainer(folder, *words)
    made.run()
    return made.save_path


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(run: Path, name: str = "network") -> dict[str, bytes]:
    arrays = load_file(run / "checkpoints" / "latest" / f"{name}.safetensors")
    return {key: array.tobytes() for key, array in arrays.items()}


def single_file(run: Path, file: Path, change: str = "") -> Path:
    """The weights of a run's last checkpoint in one file; `change`: the beginning of the names of
    those that are other ones."""
    latest = run / "checkpoints" / "latest"
    arrays = {
        **load_file(latest / "network.safetensors"),
        **load_file(latest / "frozen.safetensors"),
    }
    if change:
        name = next(name for name in sorted(arrays) if name.startswith(change))
        arrays[name] = arrays[name] + np.float32(0.5)
    save_file(arrays, file)
    return file
