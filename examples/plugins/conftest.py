"""Lets the examples' tests run from a checkout in which they are not installed."""

from __future__ import annotations

import sys
from pathlib import Path

for _pyproject in sorted(Path(__file__).parent.glob("*/pyproject.toml")):
    # Appended, so that an installed plugin comes first.
    sys.path.append(str(_pyproject.parent))
