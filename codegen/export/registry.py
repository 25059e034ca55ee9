"""All targets, by name."""

from __future__ import annotations

import difflib

from ...planner.errors import PlanError
from .data import Data
from .dtensor import Dtensor
from .megatron import Megatron
from .mlir import SDY, SHARD
from .serving import Sglang, Vllm
from .target import Target
from .torchtitan import Torchtitan

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Dtensor(),
        Torchtitan(),
        Megatron(),
        Vllm(),
        Sglang(),
        SHARD,
        SDY,
        Data(),
    )  # fmt: skip
}


def find_target(name: str) -> Target:
    """The target of that name.  Raises PlanError, with the nearest name, if there is none."""
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, n=1)
        hint = f", did you mean `{near[0]}`?" if near else ";"
        raise PlanError(f"plans are not exported to `{name}`{hint} There are {', '.join(TARGETS)}")
    return TARGETS[name]


__all__ = ["TARGETS", "find_target"]
