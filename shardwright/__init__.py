"""Shardwright: plan how to cut a transformer over GPUs, and write the module that runs it so.

    import shardwright as sw

    plan = sw.plan(model, inputs, gpus=8, cluster="h100")
    print(plan)
    plan.write_module("sharded_model.py")

The names below are loaded when they are first used: `import shardwright.runtime` in a rank
brings in neither the planner nor a solver, and `plan --help` no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import Plan, load_plan, plan
    from .ir.ops.experts import experts, moe
    from .ir.ops.user_rules import rule
    from .sweeping import Sweep, sweep

__version__ = "0.1.0"

_LAZY = {  # name -> module
    "Plan": ".api",
    "load_plan": ".api",
    "plan": ".api",
    "experts": ".ir.ops.experts",
    "moe": ".ir.ops.experts",
    "rule": ".ir.ops.user_rules",
    "Sweep": ".sweeping",
    "sweep": ".sweeping",
}

__all__ = [
    "Plan", "Sweep", "__version__", "experts", "load_plan", "moe", "plan", "rule", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
