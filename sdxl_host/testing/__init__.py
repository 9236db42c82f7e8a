"""For the tests of plugins: a contract to subclass, runs of seconds, and a model of numbers alone.

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
    from sdxl_host.testing.contract import PluginContract
    from sdxl_host.testing.parts import noise_levels, tiny_encoders, tiny_model
    from sdxl_host.testing.runs import TinyRun, tiny_run

_HOME = {
    "PluginContract": "sdxl_host.testing.contract",
    "TinyRun": "sdxl_host.testing.runs",
    "noise_levels": "sdxl_host.testing.parts",
    "tiny_encoders": "sdxl_host.testing.parts",
    "tiny_model": "sdxl_host.testing.parts",
    "tiny_run": "sdxl_host.testing.runs",
}

__all__ = [
    "PluginContract",
    "TinyRun",
    "noise_levels",
    "tiny_encoders",
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
