"""What the tests of this folder share."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdxl_host.errors import DataError
from sdxl_host.files.tensors import DTYPES, Tensors
from sdxl_host.weights.formats.diffusers_configs import diffusers_configs
from sdxl_host.weights.formats.diffusers_names import diffusers_tensors, split
from sdxl_host.weights.open import open_weights

Arrays = dict[str, np.ndarray]


POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"


def assert_equal(source: Tensors, arrays: Mapping[str, np.ndarray]) -> None:
    """Names, shapes, precisions and bits."""
    assert set(source.shapes) == set(source.dtypes) == set(arrays)
    for name, expected in arrays.items():
        read = source.read(name)
        assert read.dtype == expected.dtype == DTYPES[source.dtypes[name]], name
        assert read.shape == source.shapes[name] == expected.shape, name
        assert read.tobytes() == expected.tobytes(), name


@pytest.fixture(name="assert_equal")
def _assert_equal():
    return assert_equal


def refused(path: Path) -> str:
    """The error that opening gives, which begins with what was opened."""
    with pytest.raises(DataError) as raised:
        open_weights(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(name="refused")
def _refused():
    return refused


def rewritten(file: Path, change: Callable[[Arrays], object]) -> None:
    """Changes the tensors of a safetensors file."""
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)


@pytest.fixture(name="rewritten")
def _rewritten():
    return rewritten


def edited(file: Path, change: Callable[[dict], object]) -> None:
    """Changes a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture(name="edited")
def _edited():
    return edited


@pytest.fixture
def single(small_model, tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(small_model.arrays, path)
    return path


def torch_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")


@pytest.fixture(name="torch_zip")
def _torch_zip():
    return torch_zip


NORM = re.compile(
    r"((in_layers|out_layers)\.0|\.out\.0|\.norm\d?|norm_out|layer_norm\d?|\.ln_(\d|final))\.\w+$"
)


def mindone_name(name: str) -> str:
    """As MindONE's cells call it: MindSpore's names of norms and embeddings."""
    start, _, last = name.rpartition(".")
    if start.endswith("_embedding"):
        return f"{start}.embedding_table"
    if NORM.search(name):
        return f"{start}.{ {'weight': 'gamma', 'bias': 'beta'}[last] }"
    return name


def save_mindspore(path: Path, arrays: Mapping[str, np.ndarray], **options) -> Path:
    """With MindSpore's own function, under MindONE's names and without `position_ids`."""
    import mindspore as ms

    rows = [
        {"name": mindone_name(name), "data": ms.Tensor(array)}
        for name, array in arrays.items()
        if name != POSITIONS
    ]
    ms.save_checkpoint(rows, str(path), **options)
    path.chmod(0o600)
    return path


@pytest.fixture(name="save_mindspore")
def _save_mindspore():
    return save_mindspore


def save_diffusers(folder: Path, model, arrays: Arrays, suffix: str = "") -> Path:
    """A folder with the library's own writer. suffix: ".fp16" of the variant."""
    for key, config in diffusers_configs(model.architecture, "epsilon").items():
        if key == "model_index":
            target = folder / "model_index.json"
        elif key == "scheduler":
            target = folder / key / "scheduler_config.json"
        else:
            target = folder / key / "config.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config))
    components: dict[str, Arrays] = {}
    for name, targets in diffusers_tensors(model.architecture).items():
        for place, part in zip(targets, split(name, arrays[name]), strict=True):
            components.setdefault(place.component, {})[place.name] = np.ascontiguousarray(part)
    for component, tensors in components.items():
        save_file(tensors, folder / component / f"{stem(component)}{suffix}.safetensors")
    return folder


@pytest.fixture(name="save_diffusers")
def _save_diffusers():
    return save_diffusers


def stem(component: str) -> str:
    return "model" if component.startswith("text") else "diffusion_pytorch_model"


@pytest.fixture
def folder(small_model, tmp_path) -> Path:
    return save_diffusers(tmp_path / "pipeline", small_model, small_model.arrays)
