"""The contract of the examples is kept by `make soak`: each starts dozens of runs. Their own tests
run with the others."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "examples/" in item.path.as_posix() and "TestContract" in item.nodeid:
            item.add_marker(pytest.mark.soak)
