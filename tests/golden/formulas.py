"""Golden formulas: sinusoids, the noise schedule, Min-SNR weights."""

from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.training_utils import compute_snr
from loading import Arrays

SDXL_BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
MIN_SNR_GAMMA = 5.0


def golden_timestep_embedding() -> Arrays:
    """Sinusoids (5, 16) and (5, 320) float32, cosines first, of fractional values."""
    values = np.array([0.0, 0.5, 999.0, 999.3, 4099.0])
    arrays: Arrays = {"values": values}
    for width in (16, 320):
        embedding = get_timestep_embedding(
            torch.from_numpy(values), width, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        arrays[f"embedding_{width}"] = embedding.numpy()
    return arrays


def golden_schedule() -> Arrays:
    """All sigmas (1000,) ascending in t, and those of 10 and 25 sampling steps with the final 0.

    float64 in type; diffusers computes them in float32, and 1 - abar loses 4 digits near t = 0.
    """
    scheduler = EulerDiscreteScheduler(**SDXL_BETAS, timestep_spacing="trailing")
    # As built, the scheduler holds them descending and followed by the final 0.
    arrays: Arrays = {"sigmas": scheduler.sigmas.numpy()[-2::-1].astype(np.float64)}
    for steps in (10, 25):
        scheduler.set_timesteps(steps)
        arrays[f"trailing_{steps}"] = scheduler.sigmas.numpy().astype(np.float64)
        arrays[f"timesteps_{steps}"] = scheduler.timesteps.numpy().astype(np.float64)
    return arrays


def golden_min_snr() -> Arrays:
    """Min-SNR weights (1000,) on the network's own squared error, as in the training scripts.

    min(snr, 5) / snr for epsilon, min(snr, 5) / (snr + 1) for v.
    """
    snr = compute_snr(DDPMScheduler(**SDXL_BETAS), torch.arange(1000))
    clipped = torch.stack([snr, MIN_SNR_GAMMA * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    return {
        "gamma": np.array(MIN_SNR_GAMMA),
        "snr": snr.numpy(),
        "epsilon": (clipped / snr).numpy(),
        "v_prediction": (clipped / (snr + 1)).numpy(),
    }
