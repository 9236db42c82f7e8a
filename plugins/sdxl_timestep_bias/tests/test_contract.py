"""Timestep bias keeps what the host promises of every plugin."""

from __future__ import annotations

from sdxl_host.testing import PluginContract


class TestContract(PluginContract):
    plugin = "timestep_bias"
    options = {"strategy": "later", "multiplier": 2.0, "importance_correction": True}
