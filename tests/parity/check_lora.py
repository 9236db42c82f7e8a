"""Loads trained adapters with diffusers and compares what it computes with what our U-Net computed.

    python tests/parity/check_lora.py PIPELINE LORA.safetensors EXPECTED.npz

PIPELINE is the diffusers folder that training started from, LORA.safetensors the file in the run's
checkpoint. Exit 1, with a line for each, where a library warns while it loads, an adapter is left
out, the output differs from EXPECTED by more than 1e-4 of its largest value, or the output without
the adapters does not differ by 100 times as much. Needs tests/golden/requirements.txt and no
network.

EXPECTED.npz holds the inputs and the output of our forward with the adapters, all float32:

    unet_x          (B, 4, H, W)            unet_timesteps  (B,)
    unet_context    (B, L, D1 + D2)         unet_pooled     (B, D2)
    unet_time_ids   (B, 6)                  unet_out        (B, 4, H, W)
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from check_export import TOLERANCE, Collector, compare, load_folder
from diffusers import StableDiffusionXLPipeline
from diffusers.utils.logging import get_logger
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

# diffusers says so of each text encoder, which the adapters leave alone.
EXPECTED_WARNING = "No LoRA keys associated to CLIPTextModel"


def load_lora(
    pipeline: StableDiffusionXLPipeline, lora: Path, problems: list[str]
) -> StableDiffusionXLPipeline:
    """The pipeline with the adapters, each of which is accounted for."""
    collector = Collector()
    get_logger().addHandler(collector)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    get_logger().removeHandler(collector)
    problems += [line for line in collector.lines if EXPECTED_WARNING not in line]
    adapted = sum(isinstance(module, LoraLayer) for module in pipeline.unet.modules())
    with safe_open(lora, "np") as file:
        held = sum(name.endswith(".alpha") for name in file.keys())  # noqa: SIM118
    if adapted != held:
        problems.append(f"lora: {held} layers in the file, {adapted} in the U-Net")
    return pipeline


def output(pipeline: StableDiffusionXLPipeline, given: dict[str, np.ndarray]) -> torch.Tensor:
    """What the pipeline's U-Net gives for EXPECTED's inputs."""
    t = {key: torch.from_numpy(array) for key, array in given.items()}
    added = {"text_embeds": t["unet_pooled"], "time_ids": t["unet_time_ids"]}
    with torch.no_grad():
        return pipeline.unet(
            t["unet_x"],
            t["unet_timesteps"],
            encoder_hidden_states=t["unet_context"],
            added_cond_kwargs=added,
        ).sample


def main() -> int:
    """Load, compare; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("lora", type=Path)
    parser.add_argument("expected", type=Path)
    options = parser.parse_args()
    with np.load(options.expected) as file:
        expected = dict(file)
    problems: list[str] = []
    pipeline = load_folder(options.pipeline, problems)
    without = output(pipeline, expected).numpy()
    adapted = load_lora(pipeline, options.lora, problems)
    problems += compare("lora", {"unet_out": output(adapted, expected)}, expected)
    change = float(np.abs(expected["unet_out"] - without).max() / np.abs(without).max())
    print(f"{'lora':12} the adapters change the output by {change:.1e} of the largest value")
    if change < 100 * TOLERANCE:
        problems.append(f"lora: the adapters change the output by {change:.3g} only")
    print("\n".join(problems) or "the adapters load whole and compute what our network computes")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
