"""Resident memory of the demo run: does it grow with the steps?

    python benchmarks/memory.py [STEPS]     (500 steps take about seven minutes on two cores)

Runs `sdxl-host train --plugins edm,snr` with a checkpoint every 100 steps, reads the process's
resident memory from the kernel as steps are made, and prints its median in each tenth of the run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_STEP = re.compile(r"step (\d+)/")


def resident(process: int) -> float:
    """Resident memory of a process, in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Runs and prints."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "-m", "sdxl_host", "train", "--plugins", "edm,snr",
                   f"data.total_step={steps}", "--save_path", folder, "--save_ckpt_interval", "100",
                   "--max_num_ckpt", "2"]  # fmt: skip
        seen: list[tuple[int, float]] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                match = _STEP.match(line)
                if match:
                    seen.append((int(match[1]), resident(process.pid)))
        if process.returncode:
            sys.exit(f"the run ended with {process.returncode}")
    print("steps          resident MiB")
    for first in range(0, steps, steps // 10):
        own = [size for step, size in seen if first < step <= first + steps // 10]
        if own:
            print(f"{first + 1:5d} to {first + steps // 10:5d}   {np.median(own):8.0f}")


if __name__ == "__main__":
    main()
