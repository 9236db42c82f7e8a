"""The house keeps its shape: few modules at the top, and files that are read in one sitting."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Tables, which grow with what they list.
TABLES = {
    "sdxl_host/settings/declarations.py": "every setting",
    "sdxl_host/weights/formats/diffusers_configs.py": "every key of diffusers' configs",
    "tests/plugins/test_broken_plugins.py": "every kind of broken plugin",
}


def test_the_top_of_the_host_holds_at_most_ten_modules() -> None:
    assert len(list((ROOT / "sdxl_host").glob("*.py"))) <= 10


@pytest.mark.parametrize("folder", ["sdxl_host", "plugins", "examples", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    """At most 400 lines, and 500 of tests."""
    long = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        path = file.relative_to(ROOT)
        lines = len(file.read_text("utf-8").splitlines())
        most = 500 if "tests" in path.parts else 400
        if lines > most and path.as_posix() not in TABLES:
            long[path.as_posix()] = lines
    assert not long
