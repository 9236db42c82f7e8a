"""Config files that the tests of this folder write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_host.config.yaml_files import DEFAULT_CONFIG, packaged_configs


@pytest.fixture
def default() -> dict[str, Any]:
    """The sections of the default config."""
    return yaml.safe_load((packaged_configs() / DEFAULT_CONFIG).read_text("utf-8"))


@pytest.fixture
def write(tmp_path: Path, default: dict[str, Any]) -> Callable[..., list[str]]:
    """Writes a config file and gives the arguments that name it.

    Text is written as it is; keywords replace sections of the default config (None removes one).
    """

    def write(text: str | bytes | None = None, **sections: Any) -> list[str]:
        file = tmp_path / "mine.yaml"
        if text is None:
            tree = {**default, **sections}
            text = yaml.safe_dump({k: v for k, v in tree.items() if v is not None}, sort_keys=False)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(file)]

    return write
