"""Writing weights for other programs: a single safetensors file, or a diffusers folder.

Streaming: one tensor is in memory at a time. A target is whole or not there (see `files.atomic`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sdxl_host.errors import DataError
from sdxl_host.files.atomic import new_folder, write_file, write_new
from sdxl_host.files.tensors import DTYPES, SAFETENSORS_NAMES
from sdxl_host.weights.architecture import (
    AUTOENCODER_PREFIX,
    NETWORK_PREFIX,
    Architecture,
    embedder_prefix,
)
from sdxl_host.weights.compare import compare
from sdxl_host.weights.formats.diffusers_configs import DIFFUSERS_VERSION, diffusers_configs
from sdxl_host.weights.formats.diffusers_names import diffusers_tensors, split, split_shapes
from sdxl_host.weights.metadata import LOGIT_SCALE, SDXL_SCALE_FACTOR
from sdxl_host.weights.shapes import expected_shapes
from sdxl_host.weights.source import Source

__all__ = ["SHARD_BYTES", "write_diffusers", "write_single_file"]

# diffusers' own limit of one file (`max_shard_size` of `save_pretrained`).
SHARD_BYTES = 10 * 10**9

_FLOATS = ("fp16", "bf16", "fp32", "fp64")
_TOKENIZER = Path(__file__).parents[1] / "models" / "clip_tokenizer"
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "NOTICE.md")
_MARGIN = 10**7  # bytes for headers, configs and tokenizers

_REMEDY = "give all parts of one model, several files as A,B"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Group:
    """Tensors that are made together, from one tensor of the source.

    tensors: (name, shape) in the order in which `make` returns them. dtype: a key of `DTYPES`.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str
    make: Callable[[], Sequence[np.ndarray]]

    @property
    def nbytes(self) -> int:
        numbers = sum(math.prod(shape) for _, shape in self.tensors)
        return numbers * DTYPES[self.dtype].itemsize


class _Meter:
    """Counts the bytes written, and reports them and their total to a function."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self.progress = progress

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def write_single_file(
    path: Path,
    source: Source,
    architecture: Architecture,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    markers: Sequence[str] = (),
    progress: Progress | None = None,
) -> int:
    """Writes the original single-file layout; returns the bytes of its tensors.

    dtype: "fp16", "bf16" or "fp32"; None keeps each tensor as the source has it. metadata: for the
    header. markers: of `metadata.MARKERS`. progress: called with bytes done and bytes in all.

    Raises DataError when the tensors are not those of a whole architecture, when the target is
    there already, when the disk is too small or fails, or when a value does not fit `dtype`.
    """
    expected = _expected(source, architecture)
    groups = [_single(name, source, dtype) for name in expected]
    groups += [_Group(((name, (0,)),), "fp32", _nothing) for name in markers]
    total = sum(group.nbytes for group in groups)
    meter = _Meter(total, progress)
    with _checked(path, total):
        write_file(path, lambda file: _write_safetensors(file, groups, metadata or {}, meter))
    return total


def write_diffusers(
    folder: Path,
    source: Source,
    architecture: Architecture,
    dtype: str | None = None,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    scheduler: Mapping[str, Any] | None = None,
    scale_factor: float = SDXL_SCALE_FACTOR,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> int:
    """Writes a folder that diffusers' `from_pretrained` takes; returns the bytes of its tensors.

    prediction_type: "epsilon" or "v_prediction". scheduler: the config of another one than SDXL's,
    with its `_class_name`. scale_factor: of the latents. metadata: for the header of the U-Net's
    file. shard_bytes: a part that is larger is cut into files of at most
    this, with an index. The rest as in `write_single_file`.
    """
    _expected(source, architecture)
    configs = diffusers_configs(architecture, prediction_type, scale_factor)
    if scheduler is not None:
        configs["scheduler"] = {"_diffusers_version": DIFFUSERS_VERSION, **scheduler}
        configs["model_index"]["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if zero_terminal_snr:
        # What such a model needs of a sampler: arXiv 2305.08891, sections 3.1 and 3.3.
        configs["scheduler"] |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    components = _components(source, architecture, dtype)
    total = sum(group.nbytes for groups in components.values() for group in groups)
    meter = _Meter(total, progress)
    headers = _component_metadata(source, components, dict(metadata or {}), dtype)
    with _checked(folder, total), new_folder(folder) as partial:
        for component, groups in components.items():
            (partial / component).mkdir()
            stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
            _write_component(
                partial / component, stem, groups, headers[component], shard_bytes, meter
            )
        for key, config in configs.items():
            _write_config(partial, key, config)
    return total


# ---- which tensors are written


def _expected(source: Source, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole model. Raises DataError unless the source holds just those."""
    lacking = [
        f"{what} ({prefix}*)"
        for what, prefix, part in (
            ("U-Net", NETWORK_PREFIX, architecture.unet),
            ("autoencoder", AUTOENCODER_PREFIX, architecture.autoencoder),
            ("text encoder", embedder_prefix(0), architecture.encoders),
        )
        if not part
    ]
    if lacking:
        raise DataError(f"{source.description}: has no {' and no '.join(lacking)}; {_REMEDY}")
    expected = expected_shapes(architecture)
    compare(expected, source, _REMEDY)
    return expected


def _single(name: str, source: Source, dtype: str | None) -> _Group:
    precision = _precision(source.dtypes[name], dtype)
    return _Group(
        ((name, tuple(source.shapes[name])),),
        precision,
        lambda: [_converted(name, source.read(name), precision)],
    )


def _components(
    source: Source, architecture: Architecture, dtype: str | None
) -> dict[str, list[_Group]]:
    """Each component of the folder, and its tensors."""
    components: dict[str, list[_Group]] = {}
    for name, targets in diffusers_tensors(architecture).items():
        if not targets:
            continue
        shapes = split_shapes(name, tuple(source.shapes[name]))
        names = [tensor.name for tensor in targets]
        precision = _precision(source.dtypes[name], dtype)

        def make(name: str = name, precision: str = precision) -> list[np.ndarray]:
            return split(name, _converted(name, source.read(name), precision))

        group = _Group(tuple(zip(names, shapes, strict=True)), precision, make)
        components.setdefault(targets[0].component, []).append(group)
    return components


def _component_metadata(
    source: Source,
    components: Mapping[str, list[_Group]],
    metadata: dict[str, str],
    dtype: str | None,
) -> dict[str, dict[str, str]]:
    """The metadata of each component's file.

    The U-Net's file carries `metadata`, that of the second text encoder carries `logit_scale`, for
    which diffusers has no tensor.
    """
    headers: dict[str, dict[str, str]] = {component: {} for component in components}
    headers["unet"] = metadata
    for name in source.shapes:
        if name.endswith(".logit_scale") and "text_encoder_2" in headers:
            precision = _precision(source.dtypes[name], dtype)
            number = float(_converted(name, source.read(name), precision))
            value = {"dtype": precision, "value": number}
            headers["text_encoder_2"][LOGIT_SCALE] = json.dumps(value)
    return headers


def _nothing() -> list[np.ndarray]:
    return [np.zeros(0, np.float32)]


def _precision(stored: str, dtype: str | None) -> str:
    """A tensor's precision in the target; integers keep theirs."""
    return stored if dtype is None or stored not in _FLOATS else dtype


def _converted(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in another precision, rounded to the nearest. Raises DataError on overflow."""
    target = DTYPES[dtype]
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        changed = array.astype(target)
    if bool((np.isinf(changed) & ~np.isinf(array)).any()):
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise DataError(
            f"{name}: holds {largest:.4g}, which {dtype} can't hold; use --dtype bf16 or fp32"
        )
    return changed


# ---- files


@contextmanager
def _checked(target: Path, total: int) -> Iterator[None]:
    """Raises DataError when the target is there, or when the disk is too small for `total` bytes or
    fails while they are written."""
    if target.exists() or target.is_symlink():
        raise DataError(f"{target}: is there already, and is not overwritten; give another name")
    existing = next(folder for folder in target.absolute().parents if folder.is_dir())
    try:
        free = shutil.disk_usage(existing).free
        if free < total + _MARGIN:
            raise DataError(
                f"{target}: needs {_gigabytes(total + _MARGIN)} and its disk has "
                f"{_gigabytes(free)} free; free some space or choose another place"
            )
        yield
    except OSError as error:
        raise DataError(
            f"{target}: can't be written ({error.strerror or error}); nothing was left behind; "
            "free some space or choose another place"
        ) from error


def _write_component(
    folder: Path,
    stem: str,
    groups: Sequence[_Group],
    metadata: Mapping[str, str],
    shard_bytes: int,
    meter: _Meter,
) -> None:
    """One file, or several with an index where they are more than `shard_bytes`."""
    shards: list[list[_Group]] = [[]]
    filled = 0
    for group in groups:
        if shards[-1] and filled + group.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(group)
        filled += group.nbytes
    if len(shards) == 1:
        write_new(
            folder / f"{stem}.safetensors",
            lambda file: _write_safetensors(file, groups, metadata, meter),
        )
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_new(
            folder / name,
            lambda file, shard=shard: _write_safetensors(file, shard, metadata, meter),
        )
        weight_map |= {tensor: name for group in shard for tensor, _ in group.tensors}
    size = sum(group.nbytes for group in groups)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_safetensors(
    file: BinaryIO, groups: Sequence[_Group], metadata: Mapping[str, str], meter: _Meter
) -> None:
    """Writes a safetensors file: the header's length, the header, the tensors.

    The largest numbers come first, so that each tensor begins at a multiple of its precision,
    which torch needs.
    """
    ordered = sorted(groups, key=lambda group: -DTYPES[group.dtype].itemsize)
    # transformers refuses a file that does not say for which framework it is.
    header: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    at = 0
    for group in ordered:
        for name, shape in group.tensors:
            end = at + math.prod(shape) * DTYPES[group.dtype].itemsize
            header[name] = {
                "dtype": SAFETENSORS_NAMES[group.dtype],
                "shape": list(shape),
                "data_offsets": [at, end],
            }
            at = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for group in ordered:
        for (name, shape), array in zip(group.tensors, group.make(), strict=True):
            if array.shape != shape or array.dtype != DTYPES[group.dtype]:
                raise AssertionError(f"{name}: made as {array.dtype} {array.shape}")
            file.write(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
        meter.add(group.nbytes)


def _write_config(folder: Path, key: str, config: Mapping[str, Any]) -> None:
    """One of `diffusers_configs`, and with a tokenizer's its vocabulary."""
    if key == "model_index":
        _write_json(folder / "model_index.json", config)
        return
    (folder / key).mkdir(exist_ok=True)
    if key == "scheduler":
        _write_json(folder / key / "scheduler_config.json", config)
    elif key.startswith("tokenizer"):
        _write_json(folder / key / "tokenizer_config.json", config)
        for name in _TOKENIZER_FILES:
            write_new(folder / key / name, (_TOKENIZER / name).read_bytes())
    else:
        _write_json(folder / key / "config.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_new(path, (json.dumps(content, indent=2) + "\n").encode("utf-8"))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
