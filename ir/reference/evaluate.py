"""Values that are known when a model is captured, computed for passes that look at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph import Arg, Graph, Node, Value
from ..graph.rewrite import flat, producers
from ..ops.registry import operator_of

# Larger tensors are not computed: 2 ** 28 bools are 256 MiB.
_LIMIT = 2**28


class Constants:
    """Values of a flat graph that depend on neither inputs nor parameters nor buffers."""

    def __init__(self, graph: Graph) -> None:
        self._made = producers(flat(graph))
        self._known: dict[str, Tensor | None] = {}
        for param in graph.params:
            if param.kind == "constant" and param.data is not None:
                dtype = param.value.type.dtype
                self._known[param.value.name] = torch.tensor(param.data, dtype=dtype)

    def value(self, value: Value) -> Tensor | None:
        """The tensor, or None if it is not known or too large."""
        pending = [value.name]
        while pending:
            name = pending[-1]
            node = self._made.get(name)
            if name in self._known or node is None:
                self._known.setdefault(name, None)
                pending.pop()
                continue
            missing = [v.name for v in node.operands if v.name not in self._known]
            if missing:
                pending += missing
                continue
            self._run(node)
            pending.pop()
        return self._known[value.name]

    def _run(self, node: Node) -> None:
        """Compute the outputs of a node whose operands are settled."""
        known = all(self._known[v.name] is not None for v in node.operands)
        small = all(v.type.numel <= _LIMIT for v in node.outputs)
        if not (known and small and _deterministic(node.op)):
            self._known.update({v.name: None for v in node.outputs})
            return
        args = {name: self._real(arg) for name, arg in node.args}
        result = operator_of(node).evaluate(node.op, args)
        results = result if isinstance(result, (tuple, list)) else [result]
        for value, tensor in zip(node.outputs, results, strict=True):
            self._known[value.name] = tensor

    def _real(self, arg: Arg) -> Any:
        if isinstance(arg, Value):
            return self._known[arg.name]
        return [self._real(item) for item in arg] if isinstance(arg, tuple) else arg


def _deterministic(op: str) -> bool:
    """Does the op draw no random numbers?"""
    packet, _, overload = op.removeprefix("aten.").rpartition(".")
    function = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    return function is not None and torch.Tag.nondeterministic_seeded not in function.tags


def describe_mask(
    mask: Tensor, queries: int, keys: int, causal: bool, window: int
) -> tuple[bool, int] | None:
    """(causal, window) that say the same as a mask on top of the given ones; None if none do.

    `mask` is bool (True = attend) or additive, broadcastable to (b, h, queries, keys).
    """
    if mask.dtype == torch.bool:
        seen = mask
    elif mask.dtype.is_floating_point:
        seen = mask == 0
        if not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()):
            return None
    else:
        return None
    if seen.dim() > 2:
        first = seen[(0,) * (seen.dim() - 2)]
        if not bool((seen == first).all()):
            return None
        seen = first
    seen = seen.expand(queries, keys)
    if bool(seen.all()):
        return causal, window
    seen = seen & _band(queries, keys, causal, window)
    if not bool(seen.any(-1).all()):
        return None  # a query that sees nothing
    width = int(seen[-1].sum())
    for candidate in ((True, 0), (True, width)):
        if torch.equal(seen, _band(queries, keys, *candidate)):
            return candidate
    return None


def _band(queries: int, keys: int, causal: bool, window: int) -> Tensor:
    """Which keys each query sees: (queries, keys) bool."""
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    return seen.triu(1 - window) if window > 0 else seen


__all__ = ["Constants", "describe_mask"]
