"""Checkpoints of this program as weights, with their objective and plugins as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdxl_host.errors import DataError
from sdxl_host.files.tensors import open_safetensors, over
from sdxl_host.weights.architecture import NETWORK_PREFIX, Architecture, Encoder, embedder_prefix
from sdxl_host.weights.formats.diffusers_names import diffusers_tensors
from sdxl_host.weights.formats.single_file import without_extras
from sdxl_host.weights.metadata import (
    OBJECTIVE,
    PLUGINS,
    PROMPTS,
    RESOLUTION,
    SCALE_FACTOR,
    SCHEDULER,
)
from sdxl_host.weights.shapes import infer
from sdxl_host.weights.source import Source

__all__ = ["open_checkpoint_weights"]

Shapes = Mapping[str, tuple[int, ...]]

_CONDITIONER = "conditioner."


def open_checkpoint_weights(folder: Path, use_ema: bool = True) -> Source:
    """The weights of a checkpoint folder; its files are checked against their hashes.

    use_ema: the EMA weights, where the checkpoint has them, in place of the trained ones. The
    metadata hold the objective, the plugins and their options, which of them encode prompts, and
    the size of the images. Raises DataError, also where plugins have added weights to the network,
    for which no format has names.
    """
    # Imported here, because the other formats are read without it.
    from sdxl_host.checkpoints.layout import EMA_FILE, FROZEN_FILE, NETWORK_FILE
    from sdxl_host.checkpoints.open import open_checkpoint

    checkpoint = open_checkpoint(folder)
    model: dict[str, Any] = checkpoint.settings["model"]["params"]
    merged = over(open_safetensors(folder / FROZEN_FILE), open_safetensors(folder / NETWORK_FILE))
    described = f"{folder} (checkpoint of step {checkpoint.step})"
    if use_ema and checkpoint.has_ema:
        merged = over(merged, open_safetensors(folder / EMA_FILE))
        described = f"{folder} (checkpoint of step {checkpoint.step}, EMA)"
    found = without_extras(merged, described)
    architecture = _architecture(found.shapes, model)
    _refuse_additions(folder, checkpoint.record["hooks"]["build_model"], found.shapes, architecture)
    options: Mapping[str, Any] = checkpoint.settings.get("plugins") or {}
    plugins = [{**each, "options": options.get(each["name"], {})} for each in checkpoint.plugins]
    chain: str = checkpoint.record["hooks"]["encode_prompt"]
    prompts = {
        "encode_prompt": chain,
        "options": {name: options[name] for name in chain.split(" -> ") if name in options},
    }
    height, width = checkpoint.record["size"]
    scheduler = checkpoint.record.get("scheduler")
    return replace(
        found,
        metadata={
            OBJECTIVE: str(checkpoint.record["preconditioning"]),
            PLUGINS: json.dumps(plugins),
            PROMPTS: json.dumps(prompts),
            RESOLUTION: f"{width}x{height}",
            **({SCHEDULER: json.dumps(scheduler)} if scheduler else {}),
            SCALE_FACTOR: str(model.get("scale_factor", 1.0)),
        },
        architecture=architecture,
    )


def _refuse_additions(folder: Path, chain: str, shapes: Shapes, architecture: Architecture) -> None:
    """Raises DataError where the network has more tensors than the architecture.

    chain: the plugins that built the model. Without the weights that they added, the network would
    compute something else.
    """
    known = diffusers_tensors(replace(architecture, autoencoder=None, encoders=()))
    added = [n for n in shapes if n.startswith(NETWORK_PREFIX) and n not in known]
    if added:
        raise DataError(
            f"{folder}: plugins have added {len(added):,} tensors to the network, such as "
            f"{added[0]} (build_model: {chain}), and weights without them would be another model; "
            "use the file that the plugin writes into the folder beside the weights that training "
            "started from, draw with sdxl-host sample --checkpoint, or go on with --resume"
        )


def _architecture(shapes: Shapes, params: Mapping[str, Any]) -> Architecture:
    """Sizes from the shapes; numbers of attention heads, which no shape shows, from the config."""
    network = infer(
        {name: shape for name, shape in shapes.items() if not name.startswith(_CONDITIONER)},
        head_width=params["network_config"]["params"].get("num_head_channels", 64),
    )
    nodes: list[dict[str, Any]] = params["conditioner_config"]["params"]["emb_models"]
    text = [node.get("params") or {} for node in nodes if node.get("input_key") == "txt"]
    return replace(
        network,
        encoders=tuple(_encoder(shapes, index, settings) for index, settings in enumerate(text)),
    )


def _encoder(shapes: Shapes, index: int, settings: Mapping[str, Any]) -> Encoder:
    prefix, first = embedder_prefix(index), embedder_prefix(0)
    alone = {first + n[len(prefix) :]: shape for n, shape in shapes.items() if n.startswith(prefix)}
    if "heads" not in settings:
        return infer(alone).encoders[0]
    return infer(alone, head_width=settings["width"] // settings["heads"]).encoders[0]
