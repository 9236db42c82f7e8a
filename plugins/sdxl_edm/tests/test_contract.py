"""EDM keeps what the host promises of every plugin."""

from __future__ import annotations

from sdxl_host.testing import PluginContract


class TestContract(PluginContract):
    plugin = "edm"
