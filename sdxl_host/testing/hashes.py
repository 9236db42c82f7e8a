"""Whether a plugin's numbers are the same in another process, where hash() and the order of sets
are others. No MindSpore."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sdxl_host.diffusion.objective import NoiseLevels
from sdxl_host.errors import HostError, PluginError
from sdxl_host.processes import run_child, tell
from sdxl_host.testing.checks import levels_of
from sdxl_host.testing.parts import tiny_encoders
from sdxl_host.testing.prompt_checks import PROMPTS
from sdxl_host.testing.subject import Subject

__all__ = ["answer", "check_hashes", "digests"]

_DRAWS = (np.arange(256) + 0.5) / 256
_SEEDS = ("1", "2")  # of PYTHONHASHSEED
_PATIENCE = 120.0  # seconds that a process may take


def check_hashes(subject: Subject) -> None:
    """Its hooks answer the same in two processes, each with a PYTHONHASHSEED of its own."""
    folder = subject.folder / "hashes"
    with ThreadPoolExecutor(len(_SEEDS)) as threads:
        one, other = threads.map(lambda seed: _ask_child(subject, folder / seed, seed), _SEEDS)
    for hook, digest in one.items():
        if other[hook] != digest:
            raise subject.fault(
                f"{hook} answers otherwise in another process with the same seed",
                "sort what comes of a set (sorted(...)), and take zlib.crc32 or hashlib in the "
                "place of hash(), whose results no two processes share",
            )


def digests(subject: Subject) -> dict[str, str]:
    """What the hooks with numpy answers give, as a SHA-256 by hook."""
    hooks = subject.hooks()
    model = subject.model(hooks)
    distribution = hooks.sample_timesteps(model, 1)
    noise = NoiseLevels.at(levels_of(subject, model), model.schedule, distribution)
    encoded = hooks.encode_prompt(list(PROMPTS), tiny_encoders())
    answers = {
        "sample_timesteps": [distribution.quantile(_DRAWS)],
        "weight_loss": [hooks.weight_loss(model, noise, 1)],
        "encode_prompt": [encoded.context, encoded.pooled, encoded.attended()],
    }
    return {
        hook: hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()
        for hook, arrays in answers.items()
    }


def _ask_child(subject: Subject, folder: Path, seed: str) -> dict[str, str]:
    asked = json.dumps([subject.name, str(folder), subject.options])
    call = f"answer({asked!r})"
    child = run_child("testing.hashes", call, _PATIENCE, {"PYTHONHASHSEED": seed})
    if child.end or not child.records:
        told = child.cause or "ended without a word"
        raise subject.fault(f"a process that calls its hooks {told}", "mend it")
    (found,) = child.records
    if "error" in found:
        raise PluginError(found["error"])
    return found


def answer(text: str) -> None:
    """In the child: tells the digests of the subject in `text`, as JSON, and ends Python."""
    name, folder, options = json.loads(text)
    try:
        told = digests(Subject(name, Path(folder), options))
    except HostError as error:
        told = {"error": str(error)}
    tell(**told)
    os._exit(0)  # threads that the plugin has started end here too
