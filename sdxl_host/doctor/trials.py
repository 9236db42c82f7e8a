"""What the doctor tries in processes of their own, so that a crash or a hang takes down none of its
findings.

Like `diagnosis` it imports nothing but the standard library until a child is told to.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_host.errors import HostError, one_line
from sdxl_host.processes import Child, run_child, tell

__all__ = [
    "SDXL_CONFIG",
    "Need",
    "Trial",
    "try_mindspore",
    "try_packages",
]

TIMEOUT = 180.0  # seconds that a process may take; MindSpore's first import reads a gigabyte
SMALL_CONFIG = "configs/default.yaml"
SDXL_CONFIG = "configs/training/sd_xl_base_finetune_910b.yaml"
_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # where they are not named as their package


# ---- packages


@dataclass(frozen=True)
class Trial:
    """What importing a package showed: its version and file, or why it failed."""

    version: str | None = None
    file: str | None = None
    error: str | None = None


def try_packages(names: Sequence[str]) -> dict[str, Trial]:
    """Imports packages, as sdxl-host would; one that takes the process down is told apart."""
    found: dict[str, Trial] = {}
    left = list(names)
    while left:
        child = run_child("doctor.trials", f"import_packages({left!r})", TIMEOUT)
        for record in child.records:
            name = record.pop("name")
            found[name] = Trial(**record)
        left = [name for name in left if name not in found]
        if left:
            # The first that said nothing is the one at which the process ended.
            found[left.pop(0)] = Trial(error=child.cause or "ended without a word")
    return found


def import_packages(names: Iterable[str]) -> None:
    """In a child: tells of each package what importing it shows."""
    # Its advice that a deep-learning framework is missing does not apply to a tokenizer.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in names:
        module = _MODULES.get(name, name.replace("-", "_"))
        try:
            if name == "mindspore":
                # It is started in a process of its own; here is only looked where it lies.
                found = importlib.util.find_spec(module)
                if found is None:
                    raise ModuleNotFoundError(f"No module named {module!r}")
                tell(name=name, file=found.origin)
                continue
            imported: Any = importlib.import_module(module)
            if name == "transformers":
                _ = imported.CLIPTokenizer  # imported when it is asked for
        except Exception as error:
            tell(name=name, file=_origin(module), error=one_line(error))
            continue
        version = getattr(imported, "__version__", None)
        file = getattr(imported, "__file__", None)
        tell(name=name, version=version if isinstance(version, str) else None, file=file)


def _origin(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return found.origin if found else None


# ---- MindSpore


@dataclass(frozen=True)
class Need:
    """What training a config takes, in bytes, as `sdxl-host plan` estimates it.

    memory: of the device, without activations. checkpoint: of the disk.
    """

    config: str
    memory: int
    checkpoint: int


def try_mindspore() -> tuple[dict[str, Any], Child]:
    """Starts MindSpore in a child: what it told, and how it went."""
    child = run_child("doctor.trials", "start_mindspore()", TIMEOUT)
    told: dict[str, Any] = {}
    for record in child.records:
        told |= record
    return told, child


def start_mindspore() -> None:
    """In a child: what a run would do with MindSpore, and what the packaged configs need."""
    from sdxl_host.device import prepare_device

    try:
        chosen = prepare_device()
    except HostError as error:
        seen, _, remedy = str(error).rpartition("; ")
        tell(error=seen, remedy=remedy)
        return
    except Exception as error:
        tell(error=one_line(error))
        return
    import mindspore as ms

    folder = Path(str(ms.__file__)).parent
    build = folder / ".commit_id"
    commit = re.search(r"sha1\]:(\w+)", build.read_text("utf-8")) if build.is_file() else None
    has_ascend = any(folder.glob("**/plugin/libmindspore_ascend.so*"))
    tell(
        version=ms.__version__,
        build=commit[1] if commit else "unknown",
        backends=["CPU", "Ascend"] if has_ascend else ["CPU"],
        device=chosen,
    )
    try:
        right = (ms.Tensor([1.0, 2.0], ms.float32) + 1.0).asnumpy().tolist() == [2.0, 3.0]
    except Exception as error:
        tell(error=f"1 operation failed: {one_line(error)}")
        return
    if not right:
        tell(error="1 operation gave a wrong result")
        return
    tell(operation="right")
    try:
        tell(attention=attention_by_level(chosen))
        tell(needs=packaged_needs())
    except Exception as error:
        tell(needs_error=one_line(error))


def attention_by_level(chosen: str) -> dict[str, str]:
    """What SDXL's self-attention runs as, in float32 and in mixed precision."""
    from sdxl_host.models.attention import attention_in_use
    from sdxl_host.models.precision import is_half
    from sdxl_host.weights.architecture import SDXL_BASE

    assert SDXL_BASE.unet is not None
    width = SDXL_BASE.unet["num_head_channels"]
    return {
        level: attention_in_use("flash-attention", chosen, is_half(level), width)
        for level in ("O0", "O2")
    }


def packaged_needs() -> list[tuple[str, int, int]]:
    """(config, bytes of memory, bytes of a checkpoint) of the smallest and the largest use."""
    from sdxl_host.config.load import load
    from sdxl_host.planning import memory as planning
    from sdxl_host.plugins.hooks import make_hooks

    needs = []
    for name in (SMALL_CONFIG, SDXL_CONFIG):
        config = load(["--config", name, "--plugins", "none"])
        parts = planning.model_parts(make_hooks(config.plugins).build_model(config.tree))
        sizes = {what: size for what, _, size in planning.memory(parts)}
        # Gradients are not saved.
        needs.append((name, sum(sizes.values()), sum(sizes.values()) - sizes["gradients"]))
    return needs
