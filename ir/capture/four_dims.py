"""Attention over tensors of any rank, written as one over (b, heads, s, d)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch

from ..graph import Arg, Node, TensorType, Value
from ..graph.rewrite import with_args

_Shape = tuple[int, ...]


def in_four_dims(node: Node) -> list[Node]:
    """`node`, an `aten.scaled_dot_product_attention`, with what gives its operands four dims.

    The dims before the last three are one batch, that of (n, s, d) is n; operands that torch would
    broadcast are expanded, but for key heads that several query heads share.  The result has the
    shape and name of `node`'s.
    """
    tensors = [node.arg(name) for name in ("query", "key", "value")]
    q, k, v = (x for x in tensors if isinstance(x, Value))
    lead = torch.broadcast_shapes(*(x.type.shape[:-3] for x in (q, k, v)))
    heads = [x.type.shape[-3] if len(x.type.shape) > 2 else 1 for x in (q, k, v)]
    shared = heads[1] == heads[2] and heads[0] % heads[1] == 0
    if not shared:
        heads = [max(heads)] * 3
    flat = all(len(x.type.shape) == 3 for x in (q, k, v)) and heads[0] == heads[1]
    mask = node.arg("attn_mask")
    # queries that all have keys of their own are as many sequences of one head
    batch, dims = ((heads[0],), [1] * 3) if flat else (lead, heads)
    made: list[Node] = []
    changed: dict[str, Arg] = {}
    for name, x, own in zip(("query", "key", "value"), (q, k, v), dims, strict=True):
        whole = (*batch, *x.type.shape[-2:]) if flat else (*lead, own, *x.type.shape[-2:])
        changed[name] = _shaped(node, name, x, whole, (prod(batch), own), made)
    if isinstance(mask, Value) and len(mask.type.shape) > 2:
        rows = mask.type.shape[-2:]
        some = flat or len(lead) != 1
        whole = (*batch, *rows) if flat else (*lead, max(heads), *rows)
        if some:
            own = 1 if flat else max(heads)
            changed["attn_mask"] = _shaped(node, "mask", mask, whole, (prod(batch), own), made)
    four = (prod(batch), dims[0], *node.output.type.shape[-2:])
    if four == node.output.type.shape:
        return [*made, with_args(node, **changed)]
    inner = Value(
        f"{node.name}_heads", TensorType(four, node.output.type.dtype), node.output.differentiable
    )
    args = (("self", inner), ("shape", node.output.type.shape))
    return [
        *made,
        replace(with_args(node, **changed), name=inner.name, outputs=(inner,)),
        replace(node, op="aten.reshape.default", args=args),
    ]


def _shaped(
    origin: Node, name: str, x: Value, whole: _Shape, lead: Sequence[int], made: list[Node]
) -> Value:
    """`x` expanded to `whole`, as (b, heads, ., .), the first two of which are `lead`."""
    for step, op, given, shape in _steps(x.type.shape, whole, (*lead, *whole[-2:])):
        value = Value(
            f"{origin.name}_{name}_{step}", TensorType(shape, x.type.dtype), x.differentiable
        )
        args = (("self", x), *given)
        made.append(replace(origin, name=value.name, op=op, args=args, outputs=(value,)))
        x = value
    return x


def _steps(
    shape: _Shape, whole: _Shape, four: _Shape
) -> Iterator[tuple[str, str, tuple[tuple[str, Arg], ...], _Shape]]:
    if shape != whole and prod(shape) != prod(whole):
        yield "whole", "aten.expand.default", (("size", whole), ("implicit", False)), whole
        shape = whole
    if shape != four:
        yield "dims", "aten.reshape.default", (("shape", four),), four


__all__ = ["in_four_dims"]
