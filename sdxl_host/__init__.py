"""sdxl-host: fine-tune Stable Diffusion XL with MindSpore, with features as pip packages.

The names below are the public interface for plugins; nothing else is. They load on first use, so
that importing `hookimpl` costs neither numpy nor MindSpore.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_host.diffusion.distributions import DiscreteDistribution, Distribution
    from sdxl_host.diffusion.objective import Noise
    from sdxl_host.diffusion.preconditioning import Preconditioning
    from sdxl_host.diffusion.schedule import Schedule
    from sdxl_host.errors import PluginError
    from sdxl_host.hookspecs import hookimpl
    from sdxl_host.model import DiffusionModel, Sampling
    from sdxl_host.options import option
    from sdxl_host.prompts import Encoders, PromptEmbedding, encode_plain
    from sdxl_host.training.result import StepResult, TrainerView

_HOME = {
    "DiffusionModel": "sdxl_host.model",
    "DiscreteDistribution": "sdxl_host.diffusion.distributions",
    "Distribution": "sdxl_host.diffusion.distributions",
    "Encoders": "sdxl_host.prompts",
    "Noise": "sdxl_host.diffusion.objective",
    "PluginError": "sdxl_host.errors",
    "Preconditioning": "sdxl_host.diffusion.preconditioning",
    "PromptEmbedding": "sdxl_host.prompts",
    "Sampling": "sdxl_host.model",
    "Schedule": "sdxl_host.diffusion.schedule",
    "StepResult": "sdxl_host.training.result",
    "TrainerView": "sdxl_host.training.result",
    "encode_plain": "sdxl_host.prompts",
    "hookimpl": "sdxl_host.hookspecs",
    "option": "sdxl_host.options",
}

__all__ = [
    "DiffusionModel",
    "DiscreteDistribution",
    "Distribution",
    "Encoders",
    "Noise",
    "PluginError",
    "Preconditioning",
    "PromptEmbedding",
    "Sampling",
    "Schedule",
    "StepResult",
    "TrainerView",
    "encode_plain",
    "hookimpl",
    "option",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sdxl_host' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
