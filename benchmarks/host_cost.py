"""What a step costs beside the device: hooks, coefficients and noise, with all four plugins.

    python benchmarks/host_cost.py

SDXL's latent of 4 x 128 x 128 at batch 4, `edm,snr,timestep_bias,lpw`. Encoding of prompts is not
among it: its result is remembered, and its cost is the text encoders'. Prints the median and the
90th percentile of 300 steps.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from sdxl_host.config.load import load
from sdxl_host.diffusion.objective import NoiseLevels, coefficients
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.randomness import Stream, normals, uniforms

BATCH, LATENT, SEED = 4, (4, 128, 128), 42
PLUGINS = [
    "--plugins", "edm,snr,timestep_bias,lpw",
    "--timestep_bias_strategy", "later", "--timestep_bias_multiplier", "2",
    "--timestep_bias_importance_correction", "True",
]  # fmt: skip


def main() -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    config = load(PLUGINS)
    hooks = make_hooks(config.plugins)
    model = hooks.build_model(config.tree)
    seconds: dict[str, list[float]] = {"hooks and coefficients": [], "noise": []}
    for step in range(1, steps + 11):
        u = uniforms(SEED, Stream.NOISE_LEVEL, step, range(BATCH))
        started = time.perf_counter()
        distribution = hooks.sample_timesteps(model, step)
        noise = NoiseLevels.at(distribution.quantile(u), model.schedule, distribution)
        weights = hooks.weight_loss(model, noise, step)
        coefficients(model.preconditioning, noise.sigma, weights).stacked()
        between = time.perf_counter()
        normals(SEED, Stream.NOISE, step, range(BATCH), LATENT)
        ended = time.perf_counter()
        if step > 10:  # the first ones fill the plugins' tables
            seconds["hooks and coefficients"].append(between - started)
            seconds["noise"].append(ended - between)
    for name, values in seconds.items():
        milliseconds = np.percentile(values, [50, 90]) * 1e3
        print(f"{name:<24}{milliseconds[0]:7.3f} ms, 90 % below {milliseconds[1]:.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
