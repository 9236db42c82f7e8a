"""The packages as users install them: wheels, a fresh environment, an empty folder.

One environment serves all tests of this file, and those of the tutorial, which leave it as it was.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

# A run of the embedded default, as short as can be.
SHORT = ["data.total_step=2", "train.ms_mode=1", "train.sample_count=1", "train.sample_steps=1"]


def run(environment: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`sdxl-host ARGUMENTS` of the fresh environment, in `folder`, with no checkout in sight."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(environment / "sdxl-host"), *arguments],
        cwd=folder,
        env=kept,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def wheel(dist: Path, name: str) -> zipfile.ZipFile:
    (found,) = dist.glob(f"{name}-*.whl")
    return zipfile.ZipFile(found)


def test_every_wheel_carries_its_licence(dist: Path) -> None:
    for package in ("sdxl_host", "sdxl_edm", "sdxl_snr", "sdxl_timestep_bias", "sdxl_lpw"):
        with wheel(dist, package) as archive:
            names = archive.namelist()
            assert any(name.endswith("/licenses/LICENSE") for name in names), package


def test_the_hosts_wheel_carries_configs_pictures_tokenizer_and_their_notices(dist: Path) -> None:
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


def test_the_extras_install_what_they_name_and_nothing_else(
    environment: Path, tmp_path: Path
) -> None:
    listed = run(environment, tmp_path, "plugins")
    assert listed.returncode == 0
    rows = [line.split() for line in listed.stdout.splitlines()[1:]]
    assert rows == [["edm", "sdxl-edm", "0.1.0", "ok"], ["snr", "sdxl-snr", "0.1.0", "ok"]]


def test_it_trains_in_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    done = run(environment, tmp_path, "train", "--plugins", "edm,snr", *SHORT)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "samples",
    }
    for line in ("edm (sdxl-edm 0.1.0): adapts build_model", "snr (sdxl-snr 0.1.0): claims"):
        assert line in done.stdout
    assert f"{folder.relative_to(tmp_path)}/samples/step_00000002.png" in done.stdout
    drawn = run(
        environment,
        tmp_path,
        "sample",
        "--checkpoint",
        str(folder / "checkpoints" / "latest"),
        "--prompt",
        "an owl",
        "--steps=2",
    )
    assert drawn.returncode == 0, drawn.stderr
    assert "objective   edm, spacing karras" in drawn.stdout
    assert (tmp_path / "grid.png").is_file()


def test_packaged_configs_are_found_by_their_path(environment: Path, tmp_path: Path) -> None:
    done = run(
        environment, tmp_path, "train", "--config", "configs/learn_demo.yaml", "optim.base_lr=1"
    )
    assert done.returncode == 2
    assert "optim.base_lr: there is no such option" in done.stderr


def test_a_plugin_that_is_not_installed_is_named_with_the_remedy(
    environment: Path, tmp_path: Path
) -> None:
    done = run(environment, tmp_path, "train", "--plugins", "edm,lpw")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sdxl-host: error: plugin lpw is not installed; pip install sdxl-lpw\n"
