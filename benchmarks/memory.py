"""Resident memory of the demo run: does it grow with the steps?

    python benchmarks/memory.py [STEPS]     (500 steps take about seven minutes on two cores)

Runs `sdxl-host train --plugins edm,snr` with a checkpoint every 100 steps, and prints for each
tenth of the run the median of what was resident when a step was told, and the peak until then,
which knows of what came and went between two steps too. Both are the kernel's figures.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_STEP = re.compile(r"step (\d+)/")


def memory(process: int) -> tuple[float, float]:
    """Resident memory of a process now, and its peak so far, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    now, peak = (re.search(rf"{name}:\s*(\d+) kB", status) for name in ("VmRSS", "VmHWM"))
    assert now is not None
    assert peak is not None
    return int(now[1]) / 1024, int(peak[1]) / 1024


def main() -> None:
    """Runs and prints."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "-m", "sdxl_host", "train", "--plugins", "edm,snr",
                   f"data.total_step={steps}", "--save_path", folder, "--save_ckpt_interval", "100",
                   "--max_num_ckpt", "2"]  # fmt: skip
        seen: list[tuple[int, float, float]] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                match = _STEP.match(line)
                if match:
                    seen.append((int(match[1]), *memory(process.pid)))
        if process.returncode:
            sys.exit(f"the run ended with {process.returncode}")
    print("steps           resident MiB   peak MiB")
    for part in np.array_split(np.array(seen), min(10, len(seen))):
        (first, *_), (last, *_) = part[0], part[-1]
        print(f"{first:5.0f} to {last:5.0f}   {np.median(part[:, 1]):10.0f} {part[-1, 2]:10.0f}")


if __name__ == "__main__":
    main()
