"""Arguments of the smaller commands."""

from __future__ import annotations

import argparse
from typing import Any

from sdxl_host.errors import ConfigError

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are the program's own: one line, exit code 2.

    Flags are written in full, so that a new one changes what no old call means.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; {self.prog} --help tells how to call it")
