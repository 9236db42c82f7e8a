"""The host's own answers to the hooks: plain DDPM training, as a plugin named `host`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdxl_host.hookspecs import hookimpl

if TYPE_CHECKING:
    import numpy as np

    from sdxl_host.diffusion.conditioning import PromptEmbedding, TextEncoders
    from sdxl_host.diffusion.distributions import NoiseDistribution
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.diffusion.objective import NoiseLevels

__all__ = ["Defaults"]


class Defaults:
    """Answers a hook wherever no plugin claims it."""

    @hookimpl
    def build_model(self, config: Any) -> DiffusionModel:
        """The model of the config's `model` section."""
        from omegaconf import OmegaConf

        from sdxl_host.settings.targets import build

        section = OmegaConf.to_container(config.model, resolve=True)
        return build(section, "model", "model").model

    @hookimpl
    def sample_timesteps(self, model: DiffusionModel) -> NoiseDistribution:
        """What the config's sigma sampler draws from: uniform over the 1000 timesteps."""
        return model.distribution

    @hookimpl
    def weight_loss(self, model: DiffusionModel, noise: NoiseLevels) -> np.ndarray:
        """The preconditioning's own lambda."""
        return model.preconditioning.loss_weight(noise.sigma)

    @hookimpl
    def encode_prompt(self, prompts: Sequence[str], encoders: TextEncoders) -> PromptEmbedding:
        """77 tokens; the rest of a prompt is cut off."""
        from sdxl_host.diffusion.conditioning import encode_truncated

        return encode_truncated(prompts, encoders)
