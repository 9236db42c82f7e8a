"""The original single file in safetensors, and what other programs add to it."""

from __future__ import annotations

from pathlib import Path

from sdxl_host.files.tensors import Tensors, open_safetensors
from sdxl_host.weights.metadata import MARKERS, read_architecture
from sdxl_host.weights.source import Source

__all__ = ["open_single_file", "without_extras"]

# Beginnings of names, and why such tensors are not weights of the model.
_EXTRAS = {
    "model_ema.": "a running average of the U-Net; the U-Net itself is read",
    "denoiser.sigmas": "the noise schedule, which the config describes",
}


def open_single_file(path: Path) -> Source:
    """The weights of a safetensors file under the single file's names. Raises DataError.

    Averages and schedules are left out, and ComfyUI's markers become metadata, each with a note.
    """
    return without_extras(open_safetensors(path), f"{path} (single file)")


def without_extras(tensors: Tensors, description: str) -> Source:
    """Tensors under the single file's names, without those that are no weights of the model."""
    metadata = dict(tensors.metadata)
    notes = []
    dropped: set[str] = set()
    for start, reason in _EXTRAS.items():
        names = [name for name in tensors.shapes if name.startswith(start)]
        if names:
            what = f"{len(names):,} tensors {start}*" if start.endswith(".") else names[0]
            notes.append(f"{what} left out: {reason}")
        dropped.update(names)
    for marker in MARKERS:
        if marker in tensors.shapes:
            metadata[marker] = "true"
            notes.append(f"{marker} is there: {_MEANINGS[marker]}")
            dropped.add(marker)
    return Source(
        shapes={name: shape for name, shape in tensors.shapes.items() if name not in dropped},
        dtypes={name: dtype for name, dtype in tensors.dtypes.items() if name not in dropped},
        read=tensors.read,
        metadata=metadata,
        description=description,
        architecture=read_architecture(metadata, description),
        notes=tuple(notes),
    )


_MEANINGS = {
    "v_pred": "the network predicts v",
    "ztsnr": "trained to a terminal signal-to-noise ratio of zero",
}
