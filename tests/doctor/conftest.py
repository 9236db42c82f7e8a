"""Fake packages that hide the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest


class Fakes:
    """A folder that stands before everything else on the import path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str, source: str) -> str:
        """Writes a module and returns its file."""
        file = self.folder / f"{name}.py"
        file.write_text(source, "utf-8")
        return str(file)

    def package(self, name: str, version: str, top_level: str = "") -> None:
        """Writes the metadata of a distribution."""
        information = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8"
        )
        (information / "top_level.txt").write_text(top_level, "utf-8")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """What is written here is found first, by this process and by its children."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return Fakes(folder)
