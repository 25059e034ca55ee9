"""Which labels count in the mean losses of a graph, so that means of parts can be weighed.

The labels of a loss are what comes of an input on the way there: shifted, padded, flattened.  That
way is run on numbers that tell where each of them came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import Arg, Graph, Node, Value
from .indices import index_limits
from .registry import operator_of

_BASE = 10**6  # no constant that stands among labels is so large, or less than its negative


@dataclass(frozen=True, slots=True)
class Counted:
    """Of the last dim of `input` columns from `first` on are labels, each once; `ignored` ones do
    not count."""

    input: str
    first: int
    ignored: int


def counted_labels(graph: Graph) -> Counted | str | None:
    """The input whose labels count in the mean that is the graph's loss.

    None where there is none, or every row has as many; a sentence where that is not known.
    """
    divided = _divided(graph)
    if divided is not None:
        return f"the loss is computed at {divided.loc} with a number that depends on the batch"
    found = [
        _counted(graph, node, name, limit.ignored)
        for node in graph.nodes
        for name, limit in operator_of(node).limits(node).items()
        if limit.averaged and limit.ignored is not None
    ]
    unknown = [each for each in found if isinstance(each, str)]
    if unknown or any(each != found[0] for each in found):
        return unknown[0] if unknown else "losses have different labels"
    return found[0] if found else None


def _divided(graph: Graph) -> Node | None:
    """A node that takes the loss, or a part of it, and a number without gradient that depends on
    inputs, such as how many labels count."""
    depends = {each.value.name for each in graph.inputs}
    for item in graph.body:
        given = item.operands if isinstance(item, Node) else (*item.carried, *item.invariants)
        if any(value.name in depends for value in given):
            depends |= {value.name for value in item.outputs}
    scalars = [o.value for o in graph.outputs if o.value.differentiable and not o.value.type.shape]
    if not scalars:
        return None
    for node in _leading_to(graph, scalars[0].name):
        if isinstance(node, Node) and node.output.differentiable and node.output.type.numel == 1:
            for value in node.operands:
                alone = value.type.numel == 1 and not value.differentiable
                if alone and value.name in depends:
                    return node
    return None


def _leading_to(graph: Graph, name: str) -> list[Any]:
    """The nodes and loops of the body that a value needs, in their order."""
    needed, found = {name}, list[Any]()
    for item in reversed(graph.body):
        if any(value.name in needed for value in item.outputs):
            given = item.operands if isinstance(item, Node) else (*item.carried, *item.invariants)
            needed |= {value.name for value in given}
            found.append(item)
    return found[::-1]


def _counted(graph: Graph, node: Node, name: str, ignored: int) -> Counted | str | None:
    """As `counted_labels`, of the argument `name` of one loss."""
    labels, what = node.arg(name), f"labels of the loss at {node.loc}"
    if not isinstance(labels, Value) or node not in graph.body:
        return f"the loss at {node.loc} is part of a layer"
    way = _leading_to(graph, labels.name)
    read = {labels.name, *(v.name for each in way if isinstance(each, Node) for v in each.operands)}
    inputs = [each for each in graph.inputs if each.value.name in read]
    computed = any(not isinstance(each, Node) or _computes(each) for each in way)
    if computed or len(inputs) > 1:
        names = " and ".join(f"`{each.name}`" for each in inputs)
        return f"{what} are computed" + (f" from {names}" if names else "")
    if not inputs:
        return None
    if ignored < 0 and index_limits(graph, inputs[0].name)[1] is None:
        return None  # tokens, none of which can be the number that is ignored
    constants = {
        each.value.name: torch.tensor(each.data, dtype=each.value.type.dtype)
        for each in graph.params
        if each.value.name in read and each.kind == "constant"
    }
    source = inputs[0].value
    first = _first_column(source, way, labels, ignored, constants)
    if first is None:
        return f"{what} are not those of `{inputs[0].name}` from some column on"
    return Counted(inputs[0].name, first, ignored)


def _computes(node: Node) -> bool:
    """May it give others than the whole numbers that it takes?"""
    kinds = [value.type.dtype for value in (*node.operands, *node.outputs)]
    return any(kind == torch.bool or kind.is_floating_point or kind.is_complex for kind in kinds)


def _first_column(
    source: Value,
    way: Sequence[Node],
    labels: Value,
    ignored: int,
    constants: Mapping[str, Tensor],
) -> int | None:
    """From which column on all rows of the input are labels, each once; None if it is not so."""
    shape = source.type.shape
    places = torch.arange(source.type.numel)
    marked = (places + _BASE).to(source.type.dtype).view(shape)
    there = [
        _run(way, labels.name, {source.name: sign * marked, **constants}).long().flatten() * sign
        for sign in (1, -1)
    ]
    moved = there[0] >= _BASE
    if not torch.equal(there[0][moved], there[1][moved]):
        return None
    rest = [x[~moved] * sign for x, sign in zip(there, (1, -1), strict=True)]
    if any(bool((x != ignored).any()) for x in rest):
        return None
    found = there[0][moved] - _BASE
    if (found >= len(places)).any():
        return None
    times = torch.bincount(found, minlength=len(places))
    columns = shape[-1] if len(shape) > 1 else 1
    first = int(times.argmax()) % columns
    wanted = (places % columns >= first).long()
    return first if torch.equal(times, wanted) else None


def _run(way: Sequence[Node], name: str, known: Mapping[str, Tensor]) -> Tensor:
    """The value of that name, where these nodes lead to it."""
    values = dict(known)
    for node in way:
        args = {key: _real(arg, values) for key, arg in node.args}
        result = operator_of(node).evaluate(node.op, args)
        results = result if isinstance(result, (tuple, list)) else [result]
        values |= dict(zip((value.name for value in node.outputs), results, strict=True))
    return values[name]


def _real(arg: Arg, values: Mapping[str, Tensor]) -> Any:
    if isinstance(arg, Value):
        return values[arg.name]
    return [_real(item, values) for item in arg] if isinstance(arg, tuple) else arg


__all__ = ["Counted", "counted_labels"]
