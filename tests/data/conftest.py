"""What the tests of this folder share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Where what is found in shards is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def folder(tmp_path):
    """An empty folder for images."""
    found = tmp_path / "images"
    found.mkdir()
    return found
