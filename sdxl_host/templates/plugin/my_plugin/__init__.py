"""A plugin of sdxl-host. Its formulas are examples: put your own in their places."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sdxl_host import (
    DiffusionModel,
    NoiseDistribution,
    NoiseLevels,
    PromptEmbedding,
    StepResult,
    TextEncoders,
    TrainerView,
    encode_truncated,
    hookimpl,
    option,
)

__all__ = ["MyPlugin", "Options"]


@dataclass
class Options:
    """Each is a flag and a key of the config; the README names them."""

    # [build_model]
    part: str = option("attn2", help="train the parameters whose names contain this")
    # [sample_timesteps]
    tilt: float = option(
        2.0, help="how much more often the noisiest timestep is drawn than the cleanest", above=0.0
    )
    # [weight_loss]
    gamma: float = option(5.0, help="what the weight nears where there is little noise", above=0.0)
    # [encode_prompt]
    prefix: str = option("an image of", help="words in front of every prompt")
    # [on_step_end]
    memory: float = option(
        0.9, help="share of the mean so far in the running mean", minimum=0.0, maximum=1.0
    )
    # [end]


class MyPlugin:
    """A method under @hookimpl is a hook. It names those of the hook's arguments that it uses."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        # [sample_timesteps]
        self._given_and_tilted: tuple[NoiseDistribution, NoiseDistribution] | None = None
        # [on_step_end]
        self.mean: float | None = None
        # [end]

    # [build_model]
    @hookimpl(wrapper=True)
    def build_model(self) -> Generator[None, DiffusionModel, DiffusionModel]:
        """Adapts the model, whoever built it. Example: a part of the network is trained alone.

        A plugin that must change the network, as LoRA does, does so in the first argument.
        """
        model = yield
        return model.with_network(lambda network: None, trainable=self.is_trained)

    def is_trained(self, name: str) -> bool:
        """Whether the parameter is trained: `name` is as in the released file, `...to_k.weight`."""
        return self.options.part in name

    # [sample_timesteps]
    @hookimpl(wrapper=True)
    def sample_timesteps(self) -> Generator[None, NoiseDistribution, NoiseDistribution]:
        """Adapts the distribution of noise levels, whoever answered with it.

        One object as long as it is given one object, because the host keeps tables by identity.
        """
        distribution = yield
        if self._given_and_tilted is None or self._given_and_tilted[0] is not distribution:
            weights = self.timestep_weights(len(distribution.schedule))
            self._given_and_tilted = distribution, distribution.reweighted(weights)
        return self._given_and_tilted[1]

    def timestep_weights(self, count: int) -> np.ndarray:
        """How much more often timestep t is drawn, float64 (count,); only the ratios matter.

        Example: tilt^(t / (count - 1)), from 1 at the cleanest to tilt at the noisiest.
        """
        return self.options.tilt ** np.linspace(0.0, 1.0, count)

    # [weight_loss]
    @hookimpl
    def weight_loss(self, noise: NoiseLevels) -> np.ndarray:
        """Claims lambda, the weight on |D - z|^2 of each sample: float64 (G,), as is noise.snr.

        Example: soft Min-SNR (Crowson et al. 2024, arXiv 2401.11605), SNR gamma / (SNR + gamma).
        """
        snr, gamma = noise.snr, self.options.gamma
        return snr * gamma / (snr + gamma)

    # [encode_prompt]
    @hookimpl
    def encode_prompt(self, prompts: Sequence[str], encoders: TextEncoders) -> PromptEmbedding:
        """Claims what B prompts become: context (B, L, C) and pooled (B, P), both float32.

        A pure function of the prompts. Example: words in front of each, then the host's encoding.
        """
        return encode_truncated([f"{self.options.prefix} {prompt}" for prompt in prompts], encoders)

    # [on_step_end]
    @hookimpl
    def on_step_end(self, trainer: TrainerView, result: StepResult) -> None:
        """Observes. Example: logs a running mean of the loss, which survives a resume."""
        if result.skipped:  # its loss may not be finite
            return
        before = result.loss if self.mean is None else self.mean
        memory = self.options.memory
        self.mean = memory * before + (1 - memory) * result.loss
        trainer.log("my_plugin_mean_loss", self.mean)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts, None, numpy arrays, lists and dicts of them."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.mean = state["mean"]

    # [end]
