"""How much memory a step adds to this process at its peak (Linux)."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def give_back_freed_blocks() -> None:
    """From now on freed blocks of 64 KiB and more go back to the system: resident is alive."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 65536)
    libc.mallopt(_M_TRIM_THRESHOLD, 65536)


def resident_bytes() -> int:
    """What is resident now, garbage collected."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def start_peak() -> None:
    """Let the peak begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most that was resident since `start_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")
