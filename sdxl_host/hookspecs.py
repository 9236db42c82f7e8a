"""The five hooks: everything a plugin can change, and the whole of what the host calls.

A plain implementation *claims* a hook and answers in the host's place; at most one plugin may. A
wrapper (`@hookimpl(wrapper=True)`, ``result = yield``) *adapts* the answer; any number may, in the
order of `--plugins`. `on_step_end` is observed, by any number. An implementation names only the
arguments it wants. Arguments may be added here in later versions, never removed or renamed.

Importing this module loads neither numpy nor MindSpore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import numpy as np

    from sdxl_host.diffusion.conditioning import PromptEmbedding, TextEncoders
    from sdxl_host.diffusion.distributions import NoiseDistribution
    from sdxl_host.diffusion.model import DiffusionModel
    from sdxl_host.diffusion.objective import NoiseLevels
    from sdxl_host.plugins.step_result import StepResult, TrainerView

__all__ = ["HOOKS", "PROJECT", "hookimpl"]

PROJECT = "sdxl_host"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

HOOKS = ("build_model", "sample_timesteps", "weight_loss", "encode_prompt", "on_step_end")


@hookspec(firstresult=True)
def build_model(config: Any) -> DiffusionModel:  # type: ignore[empty-body]
    """Called once: the model, built from the config's `model` section.

    config: the resolved configuration, a read-only OmegaConf mapping. Most plugins adapt:

        @hookimpl(wrapper=True)
        def build_model(self):
            model = yield
            return model.with_preconditioning(MyPreconditioning(model.schedule))
    """


@hookspec(firstresult=True)
def sample_timesteps(model: DiffusionModel, step: int) -> NoiseDistribution:  # type: ignore[empty-body]
    """Called each step: the distribution that noise levels are drawn from.

    step: the update about to be made, from 1. Return the same object while nothing changed: its
    tables are kept by identity. An adapter that favours the noisier half:

        @hookimpl(wrapper=True)
        def sample_timesteps(self):
            distribution = yield
            return distribution.reweighted(self.weights)    # (1000,) over timesteps
    """


@hookspec(firstresult=True)
def weight_loss(model: DiffusionModel, noise: NoiseLevels, step: int) -> np.ndarray:  # type: ignore[empty-body]
    """Called each step: lambda, the weight on |D - z|^2 for each sample, shape (G,), not negative.

    noise: sigma, snr and timestep, each float64 (G,), and their distribution; G is the global
    batch. D is the denoised latent, so a weight means the same whatever the network predicts:

        @hookimpl
        def weight_loss(self, noise):
            return np.minimum(noise.snr, self.options.gamma)
    """


@hookspec(firstresult=True)
def encode_prompt(prompts: Sequence[str], encoders: TextEncoders) -> PromptEmbedding:  # type: ignore[empty-body]
    """Called for each batch, in training and in sampling: what the prompts become.

    prompts: B strings. encoders: the frozen text encoders. A pure function of the prompts, because
    each rank calls it for its part of the global batch. A claim that encodes lower-case text:

        @hookimpl
        def encode_prompt(self, prompts, encoders):
            return encode_truncated([prompt.lower() for prompt in prompts], encoders)
    """


@hookspec
def on_step_end(trainer: TrainerView, result: StepResult) -> None:
    """Called after each step, for every plugin that observes; returns nothing.

    trainer: step, total_steps, save_path, is_main_process, model, log(name, value), stop(reason).
    result: loss, per_sample_loss (G,), loss_weight, noise, learning_rate, gradient_norm, skipped,
    sample_ids:

        @hookimpl
        def on_step_end(self, trainer, result):
            trainer.log("loss_of_noisiest", result.per_sample_loss[result.noise.sigma.argmax()])
    """
