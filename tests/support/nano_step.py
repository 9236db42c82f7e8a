"""A training step of a network so small that its gradients can be followed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.training.optimizer import AdamW, Optimizer
from sdxl_host.training.step import TrainStep
from sdxl_host.training.update_table import update_table

BATCH = 3
CHANNELS, HEIGHT, WIDTH = 2, 4, 5
TOKENS, CONTEXT, VECTOR = 4, 3, 2
SCHEDULE = NoiseSchedule.scaled_linear()

Arrays = dict[str, np.ndarray]


class Nano(nn.Cell):
    """86 parameters that use every input, of each kind of layer that the U-Net has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 3, 3, pad_mode="pad", padding=1, has_bias=True)
        self.dense = nn.Dense(VECTOR + 2, 3)
        self.norm = nn.LayerNorm((3,), epsilon=1e-5)
        self.out = nn.Conv2d(3, CHANNELS, 1, has_bias=True)

    def construct(self, x, c_noise, context, vector, mask):
        text = (context.mean(axis=2) * mask).mean(axis=1, keep_dims=True)
        known = ops.concat((vector, c_noise.expand_dims(1), text), axis=1)
        level = self.norm(self.dense(known)).expand_dims(-1).expand_dims(-1)
        return self.out(ops.silu(self.conv(x) + level))


def nano_output(weights: Arrays, x, c_noise, context, vector, mask) -> np.ndarray:
    """Nano in numpy float64."""
    text = (context.mean(axis=2) * mask).mean(axis=1, keepdims=True)
    known = np.concatenate([vector, c_noise[:, None], text], axis=1)
    level = known @ weights["dense.weight"].T + weights["dense.bias"]
    spread = np.sqrt(level.var(axis=1, keepdims=True) + 1e-5)
    level = (level - level.mean(axis=1, keepdims=True)) / spread
    level = level * weights["norm.gamma"] + weights["norm.beta"]
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    h = np.einsum("bchwij,ocij->bohw", windows, weights["conv.weight"])
    h = h + (weights["conv.bias"] + level)[:, :, None, None]
    h = h / (1 + np.exp(-h))
    out = np.einsum("bchw,oc->bohw", h, weights["out.weight"][:, :, 0, 0])
    return out + weights["out.bias"][:, None, None]


def nano_losses(weights: Arrays, batch: Arrays) -> np.ndarray:
    """(B,) mean squared errors of F(p z + q n) against a z + b n, in numpy float64."""
    latents, noise, six, context, vector, mask = (v.astype(np.float64) for v in batch.values())
    p, q, a, b = six[:4, :, None, None, None]
    output = nano_output(weights, p * latents + q * noise, six[5], context, vector, mask)
    return ((output - (a * latents + b * noise)) ** 2).mean(axis=(1, 2, 3))


def make_batch(seed: int = 0, w: float | None = None) -> Arrays:
    """Inputs of a step in its order; coefficients of no particular objective unless w is given."""
    generator = np.random.default_rng(seed)
    latent = (BATCH, CHANNELS, HEIGHT, WIDTH)
    six = generator.uniform(0.3, 1.5, (6, BATCH))
    if w is not None:
        six[4] = w
    batch = {
        "latents": generator.standard_normal(latent),
        "noise": generator.standard_normal(latent),
        "coefficients": six,
        "context": generator.standard_normal((BATCH, TOKENS, CONTEXT)),
        "vector": generator.standard_normal((BATCH, VECTOR)),
        "mask": generator.integers(0, 2, (BATCH, TOKENS)),
    }
    return {name: values.astype(np.float32) for name, values in batch.items()}


def tensors(batch: Arrays) -> list[Tensor]:
    return [Tensor(values) for values in batch.values()]


def make_nano(seed: int = 5) -> Nano:
    network = Nano()
    generator = np.random.default_rng(seed)
    for parameter in network.get_parameters():
        values = generator.standard_normal(parameter.shape) * 0.5 + 0.1
        parameter.set_data(Tensor(values.astype(np.float32)))
    return network


def make_step(
    network: nn.Cell | None = None,
    optimizer: Optimizer | None = None,
    rates: Sequence[float] = (0.01,) * 30,
    max_grad_norm: float | None = None,
    parameters: list[Parameter] | None = None,
) -> TrainStep:
    network = network or make_nano()
    optimizer = optimizer or AdamW(weight_decay=0.1)
    parameters = parameters or list(network.get_parameters())
    step = TrainStep(network, parameters)
    step.load_rows(update_table(optimizer, np.asarray(rates), max_grad_norm))
    return step


def run(step: Callable[..., Any], batch: Arrays) -> tuple[Any, ...]:
    """loss, losses, norm, finite, learning rate and loss scale, as numpy."""
    return tuple(output.asnumpy() for output in step(*tensors(batch)))
