"""Running sums over tokens go on from a state: what the tokens so far add up to.

    y = cumsum(x, 1)        ->  before = state(zeros); y = cumsum(x, 1) + before
                                new_state(before, y[:, -1:])

What is padding becomes zeros before it is added up (`recurrences.py`), so that the last row is the
sum behind the last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..graph import Arg, Block, Loop, Node, TensorType, Value
from .steps import Stepped


def with_running_sums(stepped: Stepped, shape: tuple[int, ...]) -> Stepped:
    """The same with states for sums over the tokens of inputs (b, t) of this shape."""
    inner, ends = set(stepped.inner), set(stepped.ends)
    picks, gives = dict(stepped.picks), dict(stepped.gives)

    def rewritten(nodes: Sequence[Node]) -> Iterator[Node]:
        for node in nodes:
            if (dim := _summed_dim(node, shape)) is None or node.name in stepped.inner:
                yield node
                continue
            made = _with_state(node, dim)
            summed = made[0]
            inner.update(new.name for new in made)
            picks[summed.name] = dim
            ends.add(summed.name)
            gives[node.output.name] = dim
            yield from made

    def block(old: Block) -> Block:
        return replace(old, nodes=tuple(rewritten(old.nodes)))

    body: list[Node | Loop] = []
    for item in stepped.graph.body:
        if isinstance(item, Loop):
            body.append(replace(item, blocks=tuple(map(block, item.blocks))))
        else:
            body += rewritten([item])
    graph = replace(stepped.graph, body=tuple(body))
    return Stepped(graph, frozenset(inner), picks, frozenset(ends), gives)


def _summed_dim(node: Node, shape: tuple[int, ...]) -> int | None:
    """Along which dim, as long as there are tokens, the node adds up values (b, ...)."""
    if node.op != "aten.cumsum.default":
        return None
    sizes = node.output.type.shape
    if len(sizes) < 2:
        return None
    dim = node.int_arg("dim") % len(sizes)
    return dim if dim > 0 and (sizes[0], sizes[dim]) == shape else None


def _with_state(node: Node, dim: int) -> list[Node]:
    """The sum of what is new, the state, both together, and the new state."""
    total, loc = node.output, replace(node.loc, targets=())
    kind = total.type
    one = TensorType(tuple(1 if i == dim else n for i, n in enumerate(kind.shape)), kind.dtype)

    def named(what: str, kind: TensorType) -> Value:
        return Value(f"{node.name}_{what}", kind)

    def made(op: str, value: Value, **args: Arg) -> Node:
        return Node(value.name, op, tuple(args.items()), (value,), loc)

    new, initial, before = named("new", kind), named("initial", one), named("before", one)
    last, kept = named("last", one), named("kept", one)
    tokens = kind.shape[dim]
    return [
        replace(node, name=new.name, outputs=(new,), loc=loc),
        made(
            "aten.zeros.default", initial, size=one.shape, dtype=kind.dtype, layout=None,
            device=None, pin_memory=None,
        ),
        made("shardwright.state", before, initial=initial),
        Node(
            total.name, "aten.add.Tensor", (("self", new), ("other", before), ("alpha", 1)),
            (total,), node.loc,
        ),
        made(
            "aten.slice.Tensor", last, self=total, dim=dim, start=tokens - 1, end=tokens, step=1
        ),
        made("shardwright.new_state", kept, before=before, after=last),
    ]  # fmt: skip


__all__ = ["with_running_sums"]
