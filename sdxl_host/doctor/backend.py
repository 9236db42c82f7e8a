"""Whether MindSpore works: it runs one operation in a process of its own, which may crash or hang.

Here too only the standard library is imported, but in that process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdxl_host.doctor.finding import Finding
from sdxl_host.doctor.packages import wanted
from sdxl_host.errors import HostError, one_line
from sdxl_host.processes import Child, run_child, tell

__all__ = ["device", "mindspore", "start"]

TIMEOUT = 180.0  # seconds; MindSpore's first import reads a gigabyte
SMALL_CONFIG = "configs/default.yaml"
SDXL_CONFIG = "configs/training/sd_xl_base_finetune_910b.yaml"
DEVICES = Path("/dev")
CANN_FOLDERS = tuple(
    folder / name
    for folder in (Path("/usr/local/Ascend"), Path(os.path.expanduser("~/Ascend")))
    for name in ("cann", "ascend-toolkit/latest")
)


def start() -> tuple[dict[str, Any], Child]:
    """Starts MindSpore in a child: everything it reported, and how it ended."""
    child = run_child("doctor.backend", "report_mindspore()", TIMEOUT)
    report: dict[str, Any] = {}
    for record in child.records:
        report |= record
    return report, child


def report_mindspore() -> None:
    """In a child: reports what a run would do with MindSpore, and what packaged configs need."""
    from sdxl_host.device import prepare_device

    try:
        chosen = prepare_device()
        import mindspore as ms

        tell(version=ms.__version__, device=chosen)
        total = (ms.Tensor([1.0, 2.0], ms.float32) + 1.0).asnumpy().tolist()
    except HostError as error:
        seen, _, remedy = str(error).rpartition("; ")
        tell(error=seen, remedy=remedy)
        return
    except Exception as error:
        tell(error=one_line(error))
        return
    if total != [2.0, 3.0]:
        tell(error=f"[1, 2] + 1 gave {total}")
        return
    tell(works=True)
    try:
        tell(needs=packaged_needs())
    except Exception as error:
        tell(needs_error=one_line(error))


def packaged_needs() -> list[tuple[str, int, int]]:
    """(config, bytes of memory, bytes of a checkpoint) of the smallest config and of SDXL's.

    They are those that `sdxl-host plan` shows: of the device's memory, without activations.
    """
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


def mindspore(report: dict[str, Any], child: Child) -> Finding:
    """MindSpore, by the operation it ran."""
    if report.get("works"):
        seen = f"{report['version']}: 1 operation ran on {report['device']}"
        return Finding("mindspore", "ok", seen)
    seen = report.get("error") or f"1 operation did not end well: {child.cause or 'no result'}"
    again = f"pip install --force-reinstall {wanted('mindspore')} {wanted('numpy')}"
    return Finding("mindspore", "fault", seen, report.get("remedy") or again)


def device(report: dict[str, Any], child: Child) -> Finding:
    """Where a run would compute, and why not on Ascend."""
    chosen = report.get("device", "not known, as MindSpore does not start")
    seen = f"{chosen}; {_cann()}"
    if chosen == "Ascend":
        return Finding("device", "ok", seen)
    if any(DEVICES.glob("davinci[0-9]*")):
        seen += f"; MindSpore does not use the Ascend device in {DEVICES}"
        if child.last:
            seen += f", and its last message is: {child.last}"
        remedy = (
            "install CANN, source its set_env.sh, and check that MindSpore supports its version"
        )
        return Finding("device", "warning", seen, remedy)
    seen += f", no Ascend device in {DEVICES}"
    if "device" in report:
        return Finding("device", "ok", seen)
    return Finding("device", "warning", seen, "mend MindSpore first")


def _cann() -> str:
    """The version and folder of CANN."""
    home = os.environ.get("ASCEND_HOME_PATH", "")
    folder = Path(home) if home else next((f for f in CANN_FOLDERS if f.is_dir()), None)
    if folder is None:
        return "no CANN"
    file = folder / "compiler" / "version.info"  # which MindSpore itself reads
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    numbers = [line.partition("=")[2] for line in lines if line.startswith("Version=")]
    loaded = "" if home else ", whose set_env.sh was not sourced"
    return f"CANN {numbers[0] if numbers else 'of unknown version'} at {folder}{loaded}"
