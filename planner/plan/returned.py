"""What each rank returns of a model's outputs, in words."""

from __future__ import annotations

from ...facts.nested import dotted
from ...facts.spec import format_spec, is_shard
from ...facts.updated import updated_buffer
from ...ir.ops.registry import operator_of
from .plan import PlanData
from .program import Program

_SHOWN = 6


def told_outputs(plan: PlanData) -> str:
    """`Each rank returns all of loss, and its part of logits (S0,R): ...`.

    Empty where a module with a KV cache is served, whose logits are whole in any case.
    """
    if any(operator_of(node).remembers for node in plan.graph.nodes) or plan.mesh.ranks == 1:
        return ""
    whole: list[str] = []
    cut: list[str] = []
    program = plan.program
    for out in plan.graph.outputs:
        if updated_buffer(out.path):
            continue
        name = dotted(out.path) if out.path else "its result"
        spec = plan.decisions.outputs[out.value.name]
        if any(map(is_shard, spec)):
            cut.append(f"{name} ({spec_text(program, out.value.name, format_spec(spec))})")
        else:
            whole.append(name)
    parts = [f"all of {_listed(whole)}"] * bool(whole) + [f"its part of {_listed(cut)}"] * bool(cut)
    text = f"Each rank returns {', and '.join(parts)}" if parts else ""
    if not cut:
        return f"{text}." if text else ""
    outside = ", with gradients, for a loss outside of the module" if plan.training else ""
    return f"{text}; `model.gather_outputs(out)` makes all of it{outside}."


def spec_text(program: Program, name: str, spec: str) -> str:
    """`S0,Z1` for a value in spec `S0,S1` whose dim 1 is cut in zigzag order."""
    for dim in program.zigzag.get(name, ()):
        spec = spec.replace(f"S{dim}", f"Z{dim}")
    return spec


def _listed(names: list[str]) -> str:
    """At most `_SHOWN` of them."""
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


__all__ = ["spec_text", "told_outputs"]
