"""Runs commands of sdxl-host one after the other in this process: see `dry_run`.

    python commands.py COMMANDS.json

COMMANDS.json: a list of lists of words. Before each command, a line `COMMAND n` goes to the
standard output and to the file of calls, and its exit code after it. What ends with a traceback
ends the process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np


def answer_for_the_device() -> None:
    """Every number of the simulated device is 0, "all was finite" too; a run would end there. So
    a truth value that is read back is True."""
    from mindspore import Tensor

    read = Tensor.asnumpy

    def asnumpy(self: Tensor) -> np.ndarray:
        found = read(self)
        return np.ones_like(found) if found.dtype == bool and found.shape == () else found

    Tensor.asnumpy = asnumpy


def main() -> int:
    from sdxl_host.cli import main as command_line

    commands = json.loads(Path(sys.argv[1]).read_text())
    for number, words in enumerate(commands):
        print(f"COMMAND {number}", flush=True)
        with open(os.environ["CANN_STUB_CALLS"], "a") as calls:
            calls.write(f"COMMAND {number}\n")
        if number == 0:
            answer_for_the_device()
        print(f"EXIT {command_line(words)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
