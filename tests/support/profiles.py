"""ICC profiles as tests make them, byte by byte after ICC.1:2010."""

from __future__ import annotations

import struct
from collections.abc import Sequence

__all__ = ["DISPLAY_P3", "DISPLAY_P3_2_2", "GREY_LINEAR", "SRGB", "cmyk_without_black"]

_D50 = (0.9642, 1.0, 0.8249)

# The primaries relative to D50, as Apple's and the ICC's own profiles have them.
_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
_SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))

# The curve of sRGB: a parametric curve of type 3.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def _fixed(numbers: Sequence[float]) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def _xyz(numbers: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(numbers)


def _curve(parameters: Sequence[float]) -> bytes:
    kind = {1: 0, 5: 3}[len(parameters)]
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + _fixed(parameters)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return (
        b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(encoded), 28) + encoded
    )


def _profile(space: bytes, kind: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, data = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    header = struct.pack(
        ">I4sI4s4s4s12s4s4sI4s4sQI12s4s16s28s",
        *(128 + len(body), b"none", 0x04300000, kind, space, pcs, b"\0" * 12, b"acsp", b"\0" * 4),
        *(0, b"\0" * 4, b"\0" * 4, 0, 0, _fixed(_D50), b"none", b"\0" * 16, b"\0" * 28),
    )
    return header + body


def _common(name: str) -> dict[bytes, bytes]:
    return {b"desc": _text(name), b"cprt": _text("none"), b"wtpt": _xyz(_D50)}


def _matrix(
    name: str, primaries: Sequence[Sequence[float]], curve: Sequence[float] = _SRGB_CURVE
) -> bytes:
    columns = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(_xyz, primaries), strict=True))
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(curve))
    return _profile(b"RGB ", b"mntr", b"XYZ ", _common(name) | columns | curves)


DISPLAY_P3 = _matrix("Display P3", _P3)
DISPLAY_P3_2_2 = _matrix("Display P3 with a gamma of 2.2", _P3, [2.2])
SRGB = _matrix("a name that says nothing", _SRGB)
GREY_LINEAR = _profile(b"GRAY", b"mntr", b"XYZ ", _common("linear grey") | {b"kTRC": _curve([1.0])})


def cmyk_without_black() -> bytes:
    """A printer whose colours are L* = 100 (1 - K), a* = b* = 0, whatever C, M and Y are."""
    corners = b""
    for corner in range(16):  # the last channel, K, varies fastest
        lightness = 0 if corner & 1 else 0xFF00
        corners += struct.pack(">3H", lightness, 0x8000, 0x8000)
    ramp = struct.pack(">2H", 0, 65535)
    table = (
        b"mft2\0\0\0\0"
        + struct.pack(">4B", 4, 3, 2, 0)
        + _fixed([1, 0, 0, 0, 1, 0, 0, 0, 1])
        + struct.pack(">2H", 2, 2)
        + ramp * 4
        + corners
        + ramp * 3
    )
    return _profile(b"CMYK", b"prtr", b"Lab ", _common("black alone") | {b"A2B0": table})
