"""The PNG file that a command draws to, as its flag `--out` names it."""

from __future__ import annotations

from pathlib import Path

from sdxl_host.errors import ConfigError, DataError

__all__ = ["check_out", "unwritable"]


def check_out(out: Path) -> None:
    """Sees that the image can be written, before what takes long. Raises HostError."""
    from sdxl_host.files.atomic import check_writable

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: must end with .png")
    try:
        check_writable(out)
    except OSError as error:
        raise unwritable(out, error) from error


def unwritable(out: Path, error: OSError) -> DataError:
    """What is said where the image can't be written."""
    return DataError(f"--out {out}: can't be written ({error.strerror}); give another place")
