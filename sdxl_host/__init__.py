"""sdxl-host: fine-tune Stable Diffusion XL with MindSpore, with features as pip packages.

The names below are the public interface for plugins and datasets; nothing else is. They load on
first use, so that importing `hookimpl` costs neither numpy nor MindSpore.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_host.data.captioned import Captioned
    from sdxl_host.data.dataset import Text2ImageDataset
    from sdxl_host.data.problems import Listing, Problem
    from sdxl_host.diffusion.conditioning import PromptEmbedding, TextEncoders, encode_truncated
    from sdxl_host.diffusion.distributions import DiscreteDistribution, NoiseDistribution
    from sdxl_host.diffusion.model import DiffusionModel, SamplingDefaults
    from sdxl_host.diffusion.objective import NoiseLevels
    from sdxl_host.diffusion.preconditioning import Preconditioning
    from sdxl_host.diffusion.schedule import NoiseSchedule
    from sdxl_host.errors import DataError, PluginError
    from sdxl_host.hookspecs import hookimpl
    from sdxl_host.plugins.step_result import StepResult, TrainerView
    from sdxl_host.settings.options import option

_HOME = {
    "Captioned": "sdxl_host.data.captioned",
    "DataError": "sdxl_host.errors",
    "DiffusionModel": "sdxl_host.diffusion.model",
    "DiscreteDistribution": "sdxl_host.diffusion.distributions",
    "Listing": "sdxl_host.data.problems",
    "NoiseDistribution": "sdxl_host.diffusion.distributions",
    "TextEncoders": "sdxl_host.diffusion.conditioning",
    "NoiseLevels": "sdxl_host.diffusion.objective",
    "PluginError": "sdxl_host.errors",
    "Problem": "sdxl_host.data.problems",
    "Preconditioning": "sdxl_host.diffusion.preconditioning",
    "PromptEmbedding": "sdxl_host.diffusion.conditioning",
    "SamplingDefaults": "sdxl_host.diffusion.model",
    "NoiseSchedule": "sdxl_host.diffusion.schedule",
    "StepResult": "sdxl_host.plugins.step_result",
    "Text2ImageDataset": "sdxl_host.data.dataset",
    "TrainerView": "sdxl_host.plugins.step_result",
    "encode_truncated": "sdxl_host.diffusion.conditioning",
    "hookimpl": "sdxl_host.hookspecs",
    "option": "sdxl_host.settings.options",
}

__all__ = [
    "Captioned",
    "DataError",
    "DiffusionModel",
    "DiscreteDistribution",
    "Listing",
    "NoiseDistribution",
    "NoiseLevels",
    "NoiseSchedule",
    "PluginError",
    "Preconditioning",
    "Problem",
    "PromptEmbedding",
    "SamplingDefaults",
    "StepResult",
    "Text2ImageDataset",
    "TextEncoders",
    "TrainerView",
    "encode_truncated",
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
