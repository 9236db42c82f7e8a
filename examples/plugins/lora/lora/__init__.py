"""Low-rank adapters on the attention projections (Hu et al. 2021, "LoRA: Low-Rank Adaptation of
Large Language Models", arXiv 2106.09685).

Each projection W of the U-Net's self- and cross-attention becomes W + alpha / rank * up @ down
(section 4.1), and only up and down are trained. Every checkpoint holds them in `lora.safetensors`
too, which diffusers, ComfyUI and A1111 load beside the weights that training started from.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sdxl_host import DiffusionModel, hookimpl, option

__all__ = ["FILE", "LoRA", "Options"]

FILE = "lora.safetensors"
NETWORK = "model.diffusion_model."  # what the names of the network's parameters begin with


@dataclass
class Options:
    rank: int = option(16, help="of the matrix that is added to each projection", minimum=1)
    alpha: float = option(16.0, help="scales what is added, by alpha / rank", above=0.0)
    seed: int = option(0, help="of the numbers that the adapters start from", minimum=0)


class LoRA:
    """Adapts `build_model`: adapters on to_q, to_k, to_v and to_out, which alone are trained."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self.untrained = False

    @hookimpl(wrapper=True)
    def build_model(self, config: Any) -> Generator[None, DiffusionModel, DiffusionModel]:
        self.untrained = not (config.train.weight or config.train.resume)
        model = yield
        return model.with_network(self.adapt, trainable=is_adapter, export=self.export)

    def notes(self) -> list[str]:
        """What the user is told at the start of a run."""
        if not self.untrained:
            return []
        return [
            "an untrained network answers 0 whatever its attention does, so adapters on it learn "
            "nothing; start from weights, with --weight FILE"
        ]

    def adapt(self, network: Any) -> None:
        """Puts an adapted layer in the place of every projection of the network's attention."""
        # Late, because it imports MindSpore.
        from lora.layers import AdaptedDense

        scale = self.options.alpha / self.options.rank

        def adapted(path: str, dense: Any) -> AdaptedDense:
            return AdaptedDense(dense, self.start(path, dense.in_channels), scale)

        for path, cell in list(network.cells_and_names()):
            if path.endswith((".attn1", ".attn2")):
                for name in ("to_q", "to_k", "to_v"):
                    setattr(cell, name, adapted(f"{path}.{name}", getattr(cell, name)))
                cell.to_out[0] = adapted(f"{path}.to_out.0", cell.to_out[0])

    def start(self, path: str, inputs: int) -> np.ndarray:
        """`down` (rank, inputs) of the layer at `path`: uniform in +-1 / sqrt(inputs), the Kaiming
        uniform numbers of the paper's code, and a function of the seed and the path alone."""
        generator = np.random.default_rng([self.options.seed, *path.encode()])
        bound = inputs**-0.5
        return generator.uniform(-bound, bound, (self.options.rank, inputs)).astype(np.float32)

    def export(self, parameters: Mapping[str, np.ndarray], folder: Path) -> None:
        """Writes the adapters under the names of kohya's sd-scripts, which most programs read.

        A layer's `alpha` stands beside its matrices, so that every reader scales alike.
        """
        from safetensors.numpy import save

        tensors: dict[str, np.ndarray] = {}
        for name in filter(is_adapter, parameters):
            path, _, part = name.removeprefix(NETWORK).partition(".lora_")
            layer = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{layer}.lora_{part}"] = parameters[name]
            tensors[f"{layer}.alpha"] = np.array(self.options.alpha, np.float32)
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.options.rank),
            "ss_network_alpha": str(self.options.alpha),
        }
        (folder / FILE).write_bytes(save(tensors, metadata))


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's two matrices."""
    return ".lora_down." in name or ".lora_up." in name
