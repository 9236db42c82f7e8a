"""What the tests of this folder share."""

from __future__ import annotations

import pytest


@pytest.fixture
def folder(tmp_path):
    """An empty folder for images."""
    found = tmp_path / "images"
    found.mkdir()
    return found
