"""Lets the plugins' tests run from a checkout in which they are not installed."""

from __future__ import annotations

import sys
from pathlib import Path

for _folder in sorted(Path(__file__).parent.glob("sdxl_*")):
    # Appended, so that an installed plugin comes first.
    sys.path.append(str(_folder))
