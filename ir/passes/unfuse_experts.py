"""Experts whose gate and up are one stacked matrix: a parameter for each.

    moe(x, i, w, up=gate_up (e, 2f, h), gating="halves")
    ->  moe(x, i, w, up=gate_up[:, f:], gate=gate_up[:, :f], gating="separate")

In one matrix the gate's rows come before those of up, so that an axis that cuts the dim gives some
ranks gates and others ups.  Apart, the hidden units of each expert can be cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..graph import Arg, Block, Graph, Loop, Node, Param, Part, TensorType, Value
from ..graph.rewrite import with_args


def unfuse_experts(graph: Graph) -> Graph:
    """`graph`, folded or flat, with gate and up apart where nothing else reads their parameter.

    Gives `graph` itself where there are no such experts.
    """
    params, body = _apart(graph.params, graph.body)
    loops = [_loop(item) if isinstance(item, Loop) else item for item in body]
    if params is graph.params and all(a is b for a, b in zip(loops, graph.body, strict=True)):
        return graph
    return replace(graph, params=params, body=tuple(loops))


def _loop(loop: Loop) -> Loop:
    """The loop with the experts of its blocks taken apart."""
    blocks: list[Block] = []
    for block in loop.blocks:
        params, items = _apart(block.params, block.nodes)
        nodes = tuple(item for item in items if isinstance(item, Node))
        same = params is block.params
        blocks.append(block if same else replace(block, params=params, nodes=nodes))
    same = all(a is b for a, b in zip(blocks, loop.blocks, strict=True))
    return loop if same else replace(loop, blocks=tuple(blocks))


def _apart(
    params: tuple[Param, ...], items: Sequence[Node | Loop]
) -> tuple[tuple[Param, ...], Sequence[Node | Loop]]:
    """Parameters and nodes of one scope; the same objects where there is nothing to do."""
    owned = _owned(params, items)
    parts: dict[str, tuple[Param, Param]] = {}
    made: list[Node | Loop] = []
    for item in items:
        if isinstance(item, Node) and _fused(item, owned):
            changes: dict[str, Arg] = {"gating": "separate"}
            for name, other in (("up", "gate"), ("up_bias", "gate_bias")):
                value = item.arg(name)
                if isinstance(value, Value):
                    dim = 2 if name == "up" and item.arg("transposed") else 1
                    gate, up = parts[value.name] = _halves(owned[value.name], dim)
                    changes |= {name: up.value, other: gate.value}
            made.append(with_args(item, **changes))
        else:
            made.append(item)
    if not parts:
        return params, items
    return tuple(new for p in params for new in parts.get(p.value.name, (p,))), made


def _owned(params: Sequence[Param], items: Sequence[Node | Loop]) -> dict[str, Param]:
    """The parameters that are read once, by the names of their values."""
    reads: Counter[str] = Counter()
    for item in items:
        values = item.operands if isinstance(item, Node) else (*item.carried, *item.invariants)
        reads.update(value.name for value in values)
    return {
        p.value.name: p
        for p in params
        if p.kind == "parameter" and p.part is None and reads[p.value.name] == 1
    }


def _fused(node: Node, owned: dict[str, Param]) -> bool:
    """Are these experts with gate and up in one parameter of their own?"""
    if node.op != "shardwright.moe" or node.arg("gating") != "halves":
        return False
    values = [node.arg(name) for name in ("up", "up_bias")]
    return all(value.name in owned for value in values if isinstance(value, Value))


def _halves(param: Param, dim: int) -> tuple[Param, Param]:
    """The parameters of gate and up, the halves of `param` along `dim`."""
    shape = list(param.value.type.shape)
    shape[dim] //= 2

    def half(suffix: str, start: int) -> Param:
        kind = TensorType(tuple(shape), param.value.type.dtype)
        value = replace(param.value, name=f"{param.value.name}_{suffix}", type=kind)
        part = Part(param.name, dim, start)
        return replace(param, name=f"{param.name}_{suffix}", value=value, part=part)

    return half("gate", 0), half("up", shape[dim])


__all__ = ["unfuse_experts"]
