"""Lists and ranges of numbers on a command line: `8,16,64`, `8..64`, `4M`."""

from __future__ import annotations

import re

MOST = 10_000  # values of one list: more is a typing error

_NUMBER = re.compile(r"(\d{1,15})([kMGT]?)")
_SCALE = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_count(option: str, text: str) -> int:
    """A whole number above 0, with k, M, G or T for thousands, millions and so on.

    Raises ValueError naming the option.

    >>> parse_count("--tokens-per-step", "4M")
    4000000
    """
    found = _NUMBER.fullmatch(text.strip())
    value = int(found[1]) * _SCALE[found[2]] if found else 0
    if not 0 < value < 2**53:
        raise ValueError(f"{option}: `{text}` is no whole number above 0, as 8 or 4M")
    return value


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """Numbers between commas, each once; `8..64` are 8, 16, 32 and 64: each twice the one before.

    The end of a range is in it where doubling comes to it.  Raises ValueError naming the option.

    >>> parse_counts("--gpus", "8..32,96")
    (8, 16, 32, 96)
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if dots and not (first.strip() and last.strip()):
            raise ValueError(f"{option} {text}: a range has two ends, as 8..64")
        least = parse_count(option, first)
        most = parse_count(option, last) if dots else least
        if most < least:
            raise ValueError(f"{option} {text}: {part.strip()} ends before it begins")
        while least <= most:
            found[least] = None
            least *= 2
    if len(found) > MOST:
        raise ValueError(f"{option} {text}: {len(found)} values are too many; at most {MOST}")
    return tuple(found)


def parse_names(option: str, text: str) -> tuple[str, ...]:
    """Names between commas, each once.  Raises ValueError for an empty one."""
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise ValueError(f"{option} `{text}`: a name is empty; give them as h100,h200")
    return tuple(dict.fromkeys(names))


def parse_price(text: str) -> tuple[str, float]:
    """`h100=2.5`: a cluster, and what a GPU hour costs.  Raises ValueError."""
    name, sign, cost = text.partition("=")
    found = re.fullmatch(r"\d{1,9}(\.\d{0,9})?", cost.strip())
    if not (sign and name.strip() and found and float(cost) > 0):
        raise ValueError(f"--price `{text}`: expected a cluster and a cost, as in h100=2.5")
    return name.strip(), float(cost)


__all__ = ["parse_count", "parse_counts", "parse_names", "parse_price"]
