"""EDM keeps what the host promises of every plugin."""

from __future__ import annotations

from sdxl_host.testing import PluginContract


class TestContract(PluginContract):
    plugin = "edm"
    pairings = ("snr", "timestep_bias")  # each pair of the four is tried once, by either of its two
