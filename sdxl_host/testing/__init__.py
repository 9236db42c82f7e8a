"""For the tests of plugins: a contract to subclass, runs of seconds, and hooks of numbers alone.

    from sdxl_host.testing import PluginContract

    class TestContract(PluginContract):
        plugin = "my_weight"

`pip install 'sdxl-host[testing]'` brings pytest, and pytest then knows the fixtures of
`sdxl_host.testing.fixtures`. The names below are public; they load on first use, so that a pytest
run that needs none of them imports nothing for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_host.diffusion.objective import coefficients, denoise
    from sdxl_host.errors import HostError
    from sdxl_host.sampling.samplers import SAMPLERS, sample
    from sdxl_host.testing.contract import PluginContract
    from sdxl_host.testing.hooks import TinyHooks, make_options, tiny_hooks
    from sdxl_host.testing.parts import noise_levels, sampling_sigmas, tiny_encoders, tiny_model
    from sdxl_host.testing.runs import TinyRun, tiny_run

_HOME = {
    "HostError": "sdxl_host.errors",
    "PluginContract": "sdxl_host.testing.contract",
    "SAMPLERS": "sdxl_host.sampling.samplers",
    "TinyHooks": "sdxl_host.testing.hooks",
    "TinyRun": "sdxl_host.testing.runs",
    "coefficients": "sdxl_host.diffusion.objective",
    "denoise": "sdxl_host.diffusion.objective",
    "make_options": "sdxl_host.testing.hooks",
    "noise_levels": "sdxl_host.testing.parts",
    "sample": "sdxl_host.sampling.samplers",
    "sampling_sigmas": "sdxl_host.testing.parts",
    "tiny_encoders": "sdxl_host.testing.parts",
    "tiny_hooks": "sdxl_host.testing.hooks",
    "tiny_model": "sdxl_host.testing.parts",
    "tiny_run": "sdxl_host.testing.runs",
}

__all__ = [
    "SAMPLERS",
    "HostError",
    "PluginContract",
    "TinyHooks",
    "TinyRun",
    "coefficients",
    "denoise",
    "make_options",
    "noise_levels",
    "sample",
    "sampling_sigmas",
    "tiny_encoders",
    "tiny_hooks",
    "tiny_model",
    "tiny_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sdxl_host.testing' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
