"""Loads an export with diffusers and compares what it computes with what our networks computed.

    python tests/parity/check_export.py FOLDER SINGLE_FILE CONFIG_FOLDER EXPECTED.npz

FOLDER is the export as a diffusers folder, SINGLE_FILE as one .safetensors file, CONFIG_FOLDER a
diffusers folder whose configs and tokenizers describe the model (`make_pipeline.py` makes it).
Exit 1, with a line for each, where a tensor is missing, unexpected or misshapen, a library warns
while it loads, the two exports hold different weights, or an output differs from EXPECTED by more
than 1e-4 of its largest value. Needs tests/golden/requirements.txt and no network.

EXPECTED.npz holds the inputs and outputs of our forward with the exported weights, all float32 but
the ids, which are int64, and the prompt:

    unet_x          (B, 4, H, W)            unet_timesteps  (B,)
    unet_context    (B, L, D1 + D2)         unet_pooled     (B, D2)
    unet_time_ids   (B, 6)                  unet_out        (B, 4, H, W)
    vae_pixels      (B, 3, 8 H, 8 W)        vae_moments     (B, 8, H, W)
    vae_z           (B, 4, H, W) unscaled   vae_decoded     (B, 3, 8 H, 8 W)
    ids_1, ids_2    (B, 77)                 pooled_2        (B, D2)
    hidden_1        (B, 77, D1)             hidden_2        (B, 77, D2)

    sample_noise    (1, 4, H, W) unit       sample_latents  (1, 4, H, W) scaled
    sample_sigma    () of the first step    sample_prompt, sample_steps, sample_guidance_scale

sample_latents are what our sampler makes of the noise; the folder's own pipeline and scheduler must
make the same of it. time_ids are original size, crop and target size, each height first; ids_1 goes
to CLIP-L and ids_2 to bigG; hidden is the output of the last layer but one, without the final norm.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils

# As diffusers loads where accelerate is not installed; it is there because peft needs it.
WHOLE: dict[str, Any] = {"low_cpu_mem_usage": False}
TOLERANCE = 1e-4  # of the largest value of an output
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


class Collector(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage().strip()}")


@contextmanager
def watched(problems: list[str], label: str) -> Iterator[None]:
    """Adds to `problems` what goes wrong while loading.

    from_single_file leaves out a missing tensor without a word: it loads with strict=False and
    looks at the unexpected ones only. So each such call is watched, and accelerate, which would
    bypass it, is kept out of sight.
    """
    original = torch.nn.Module.load_state_dict

    def load_state_dict(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        result = original(module, *arguments, **options)
        kind = type(module).__name__
        # A buffer of positions 0..76 that the original file has and newer libraries don't keep.
        unexpected = [key for key in result.unexpected_keys if not key.endswith("position_ids")]
        if result.missing_keys or unexpected:
            problems.append(
                f"{label}: {kind} misses {result.missing_keys}, does not expect {unexpected}"
            )
        return result

    collector = Collector()
    loggers = [diffusers.utils.logging.get_logger(), transformers.utils.logging.get_logger()]
    for logger in loggers:
        logger.addHandler(collector)
    try:
        with (
            mock.patch.object(torch.nn.Module, "load_state_dict", load_state_dict),
            mock.patch.object(single_file_utils, "is_accelerate_available", return_value=False),
        ):
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(collector)
    problems += [f"{label}: {line}" for line in collector.lines]


def load_folder(folder: Path, problems: list[str]) -> StableDiffusionXLPipeline:
    """The pipeline of a diffusers folder, each network's tensors accounted for."""
    with watched(problems, "folder"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, **WHOLE)
    for name in NETWORKS:
        loaded = type(getattr(pipeline, name))
        options = WHOLE if issubclass(loaded, diffusers.ModelMixin) else {}
        _, found = loaded.from_pretrained(folder / name, output_loading_info=True, **options)
        problems += [f"folder: {name}: {key}: {what}" for key, what in found.items() if what]
    return pipeline


def load_single_file(file: Path, configs: Path, problems: list[str]) -> StableDiffusionXLPipeline:
    """The pipeline of a single file, whose structure is that of `configs`."""
    with watched(problems, "single file"):
        return StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(configs), local_files_only=True, **WHOLE
        )


def different_weights(
    one: StableDiffusionXLPipeline, other: StableDiffusionXLPipeline
) -> Iterator[str]:
    """Every tensor that the two don't share bit for bit."""
    for name in NETWORKS:
        first, second = (getattr(pipeline, name).state_dict() for pipeline in (one, other))
        for key in sorted(first.keys() ^ second.keys()):
            yield f"{name}: {key} is in one of the exports only"
        for key in sorted(first.keys() & second.keys()):
            if not torch.equal(first[key], second[key]):
                yield f"{name}: {key} differs between the exports"


def outputs(pipeline: StableDiffusionXLPipeline, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the pipeline's networks give for EXPECTED's inputs, by the keys of the outputs."""
    t = {k: torch.from_numpy(v) for k, v in given.items() if not k.startswith("sample_")}
    with torch.no_grad():
        first = pipeline.text_encoder(t["ids_1"], output_hidden_states=True)
        second = pipeline.text_encoder_2(t["ids_2"], output_hidden_states=True)
        return {
            "unet_out": pipeline.unet(
                t["unet_x"],
                t["unet_timesteps"],
                encoder_hidden_states=t["unet_context"],
                added_cond_kwargs={
                    "text_embeds": t["unet_pooled"],
                    "time_ids": t["unet_time_ids"],
                },
            ).sample,
            "vae_moments": pipeline.vae.encode(t["vae_pixels"]).latent_dist.parameters,
            "vae_decoded": pipeline.vae.decode(t["vae_z"]).sample,
            "hidden_1": first.hidden_states[-2],
            "hidden_2": second.hidden_states[-2],
            "pooled_2": second.text_embeds,
        }


def sampled(
    pipeline: StableDiffusionXLPipeline, given: dict[str, np.ndarray]
) -> dict[str, torch.Tensor]:
    """The latents that the pipeline's own scheduler makes of the given noise."""
    noise = torch.from_numpy(given["sample_noise"])
    height, width = (8 * side for side in noise.shape[2:])
    # The pipeline scales what it is given; EDM's scale is sqrt(sigma^2 + 1), ours sigma.
    scale = float(given["sample_sigma"]) / float(pipeline.scheduler.init_noise_sigma)
    latents = pipeline(
        prompt=str(given["sample_prompt"]),
        height=height,
        width=width,
        original_size=(height, width),
        target_size=(height, width),
        num_inference_steps=int(given["sample_steps"]),
        guidance_scale=float(given["sample_guidance_scale"]),
        latents=noise * scale,
        output_type="latent",
    ).images
    return {"sample_latents": latents}


def compare(label: str, made: dict[str, Any], expected: dict[str, np.ndarray]) -> Iterator[str]:
    """A line for every output, printed; those that are too far off are yielded."""
    for key in made:
        ours, theirs = expected[key], made[key].numpy()
        if ours.shape != theirs.shape:
            yield f"{label}: {key}: {ours.shape} here, {theirs.shape} in diffusers"
            continue
        error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        print(f"{label:12} {key:12} {error:.1e} of the largest value")
        if not error <= TOLERANCE:
            yield f"{label}: {key}: differs by {error:.3g} of its largest value"


def main() -> int:
    """Load, compare; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("single_file", type=Path)
    parser.add_argument("config_folder", type=Path)
    parser.add_argument("expected", type=Path)
    options = parser.parse_args()
    with np.load(options.expected) as file:
        expected = dict(file)
    problems: list[str] = []
    pipelines = {
        "folder": load_folder(options.folder, problems),
        "single file": load_single_file(options.single_file, options.config_folder, problems),
    }
    problems += different_weights(*pipelines.values())
    for label, pipeline in pipelines.items():
        problems += compare(label, outputs(pipeline, expected), expected)
    problems += compare("folder", sampled(pipelines["folder"], expected), expected)
    print("\n".join(problems) or "both exports load whole and compute what our networks compute")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
