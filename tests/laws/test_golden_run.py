"""Law 12, the golden run: 20 steps at a fixed seed give the stored losses on any CPU.

After a change that is meant to change the numbers, `python scripts/golden.py --write-losses` writes
tests/golden/losses.json anew.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "golden.py"
_SPEC = importlib.util.spec_from_file_location("golden_script", SCRIPT)
assert _SPEC is not None and _SPEC.loader is not None
golden_script = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden_script)

# CPUs add float32 numbers in different orders. Instruction sets from SSE4.1 to AVX-512, one core or
# two, and eager or compiled steps changed these losses by at most 1e-6 of their size.
TOLERANCE = 1e-4


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", golden_script.LONG, ids=lambda case: case.name)
def test_losses_are_the_stored_ones(case, tmp_path: Path) -> None:
    stored = json.loads(golden_script.LOSSES.read_text("utf-8"))[case.name]
    losses = golden_script.eager_losses(case, tmp_path)
    np.testing.assert_allclose(losses, stored, rtol=TOLERANCE)
