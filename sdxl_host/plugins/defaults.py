"""The host's own answers to the hooks: plain DDPM training, as a plugin named `host`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdxl_host.hookspecs import hookimpl

if TYPE_CHECKING:
    import numpy as np

    from sdxl_host.diffusion.conditioning import Encoders, PromptEmbedding
    from sdxl_host.diffusion.distributions import Distribution
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.diffusion.objective import Noise

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
    def sample_timesteps(self, model: DiffusionModel) -> Distribution:
        """What the config's sigma sampler draws from: uniform over the 1000 timesteps."""
        return model.distribution

    @hookimpl
    def weight_loss(self, model: DiffusionModel, noise: Noise) -> np.ndarray:
        """The preconditioning's own lambda."""
        return model.preconditioning.loss_weight(noise.sigma)

    @hookimpl
    def encode_prompt(self, prompts: Sequence[str], encoders: Encoders) -> PromptEmbedding:
        """77 tokens; the rest of a prompt is cut off."""
        from sdxl_host.diffusion.conditioning import encode_plain

        return encode_plain(prompts, encoders)
