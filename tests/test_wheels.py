"""What the wheels carry."""

from __future__ import annotations

import zipfile
from pathlib import Path


def wheel(dist: Path, name: str) -> zipfile.ZipFile:
    (found,) = dist.glob(f"{name}-*.whl")
    return zipfile.ZipFile(found)


def test_every_wheel_carries_its_licence(dist: Path) -> None:
    for package in ("sdxl_host", "sdxl_edm", "sdxl_snr", "sdxl_timestep_bias", "sdxl_lpw"):
        with wheel(dist, package) as archive:
            names = archive.namelist()
            assert any(name.endswith("/licenses/LICENSE") for name in names), package


def test_the_hosts_wheel_carries_configs_images_tokenizer_and_their_notices(dist: Path) -> None:
    with wheel(dist, "sdxl_host") as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        requirements = archive.read(metadata).decode()
    for file in (
        "configs/default.yaml",
        "configs/learn_demo.yaml",
        "configs/tiny.yaml",
        "data/demo/metadata.jsonl",
        "data/demo/red_apple.png",
        "data/demo/NOTICE.md",
        "models/clip_tokenizer/vocab.json",
        "models/clip_tokenizer/merges.txt",
        "models/clip_tokenizer/NOTICE.md",
        "templates/plugin/README.md",
        "templates/plugin/pyproject.toml",
        "templates/plugin/my_plugin/__init__.py",
        "templates/plugin/my_plugin/py.typed",
        "templates/plugin/tests/test_my_plugin.py",
    ):
        assert f"sdxl_host/{file}" in names
    assert not [name for name in names if name.startswith(("tests/", "plugins/"))]
    assert "Requires-Dist: numpy<2,>=1.26" in requirements
    assert "Requires-Python: <3.13,>=3.10" in requirements
