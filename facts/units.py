"""Seconds and bytes as people read them: three digits and a unit."""

from __future__ import annotations


def format_seconds(s: float) -> str:
    """`1.23 s`, `45.6 ms`, `789 us`; what is too short to be known is `<0.1 us`.

    >>> format_seconds(0.0456)
    '45.6 ms'
    """
    if 0 < s < 1e-7:
        return "<0.1 us"
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if s * scale >= 1.0:
            return f"{s * scale:.3g} {unit}"
    return f"{s * 1e6:.3g} us"


def format_bytes(n: float) -> str:
    """`67.1 MB`, decimal units.

    >>> format_bytes(67_100_000)
    '67.1 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
