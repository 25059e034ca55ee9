"""Which versions of torch and transformers this package was tried on: the one place that says so.

Both are used beyond their public interfaces (`torch.py` and `transformers.py` have the names), so
that another version may capture a model wrongly or not at all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

# First and last (major, minor) on which all tests passed.  A change here goes with a run of them:
# `make test`, `make test-oldest`; `pytest tests/compat` first, which lists what is missing.
TRIED: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "torch": ((2, 11), (2, 13)),
    "transformers": ((5, 23), (5, 24)),
}


def versions_in_use() -> dict[str, str]:
    """The versions of those packages in `TRIED` that this process has imported."""
    return {name: str(sys.modules[name].__version__) for name in TRIED if name in sys.modules}


def untried(versions: Mapping[str, str]) -> str:
    """One sentence that names the versions outside what was tried; empty if there are none.

    >>> untried({"torch": "2.13.1+cpu", "transformers": "6.0.0"})
    'never tried on transformers 6.0.0 (but on 5.23 to 5.24); `plan verify` tells if it is right'
    """
    found: list[str] = []
    for name, version in versions.items():
        first, last = TRIED[name]
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or not first <= (int(numbers[1]), int(numbers[2])) <= last:
            tried = " to ".join(dict.fromkeys(f"{major}.{minor}" for major, minor in (first, last)))
            found.append(f"{name} {version} (but on {tried})")
    if not found:
        return ""
    return f"never tried on {', '.join(found)}; `plan verify` tells if it is right"


__all__ = ["TRIED", "untried", "versions_in_use"]
