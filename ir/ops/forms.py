"""What declarations are made of: common forms of rules, and of calls in a generated module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..graph import Node, values_in
from .operator import Render, shapes_of
from .rule import Dims, Rule, broadcast_rule, parse_rule
from .sizes import Sizes


def factors(
    rule: str,
    *,
    sizes: Mapping[str, int] | None = None,
    uneven: str = "",
    inside: str = "",
    addends: Sequence[int] = (),
) -> Callable[[Node], Rule]:
    """A rule written as in an einsum; the arguments are those of `parse_rule`."""

    def build(node: Node) -> Rule:
        operands, results = shapes_of(node.operands), shapes_of(node.outputs)
        return parse_rule(
            rule, operands, results, sizes=sizes, uneven=uneven, inside=inside, addends=addends
        )

    return build


def broadcasting(*linear: str, passes: bool = False, uneven: bool = True) -> Callable[[Node], Rule]:
    """Broadcasting; each item of `linear` names the args in which the op is jointly linear.

    `uneven` must be False where the op or its derivative is infinite or undefined at 0: there
    the padding would become NaN, and 0 * NaN spoils sums over the dim in the backward pass.
    """

    def build(node: Node) -> Rule:
        position: dict[str, list[int]] = {}
        at = 0
        for name, arg in node.args:
            count = len(list(values_in(arg)))
            position[name] = list(range(at, at + count))
            at += count
        groups: list[list[int]] = []
        for names in linear:
            parts = [position.get(name, []) for name in names.split()]
            if all(parts):  # a scalar in a sum is not linear: P + 1 would add it on every rank
                groups.append([i for part in parts for i in part])
        shapes, result = shapes_of(node.operands), node.output.type.shape
        return broadcast_rule(shapes, result, linear=groups, passes=passes, uneven=uneven)

    return build


def dim_of(node: Node, name: str, rank: int) -> int:
    """The argument `name`, a dim of a tensor of `rank` dims, counted from the front."""
    dim = node.arg(name)
    assert isinstance(dim, int)
    return dim % max(rank, 1)


def dims_of(node: Node, name: str, rank: int) -> tuple[int, ...]:
    """The argument `name`, one or more dims, counted from the front; all dims if it is None."""
    dims = node.arg(name)
    if dims is None or dims == ():
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = (dims,)
    assert isinstance(dims, tuple)
    return tuple(d % max(rank, 1) for d in dims if isinstance(d, int))


def along(node: Node, dims: Sequence[int], *, linear: bool = False, uneven: bool = True) -> Rule:
    """One operand, same rank out: elementwise except along `dims`, which stay whole."""
    operand, results = node.operands[0], node.outputs
    sizes: dict[str, int] = {}
    whole: set[str] = set()

    def label(shape: Sequence[int], tag: str) -> Dims:
        out: list[tuple[str, ...]] = []
        for i, size in enumerate(shape):
            name = f"{tag}{i}" if i in dims else f"d{i}"
            if i in dims:
                whole.add(name)
            sizes[name] = size
            out.append((name,))
        return tuple(out)

    operand_dims = label(operand.type.shape, "x")
    result_dims = tuple(label(r.type.shape, f"y{k}_") for k, r in enumerate(results))
    return Rule(
        operands=(operand_dims,),
        results=result_dims,
        sizes=sizes,
        whole=frozenset(whole),
        linear=(frozenset({0}),) if linear else (),
        uneven=frozenset(sizes) - whole if uneven else frozenset(),
        passes=linear,
    )


def along_dim(*, linear: bool = False) -> Callable[[Node], Rule]:
    """Elementwise except along the argument `dim`, which stays whole."""

    def build(node: Node) -> Rule:
        rank = len(node.operands[0].type.shape)
        return along(node, [dim_of(node, "dim", rank)], linear=linear)

    return build


def same_shape(sizes: Sizes, node: Node) -> None:
    """The result has the shape of the operand."""
    sizes.alike(node.operands[0], node.output)


def call(function: str, *args: str, **kwargs: str) -> str:
    """Source of a call; keyword arguments with an empty value are left out."""
    named = [f"{key}={value}" for key, value in kwargs.items() if value]
    return f"{function}({', '.join([*args, *named])})"


def optional(render: Render, name: str, default: str = "None") -> str:
    """Source text of an argument, empty where it is the default."""
    text = render.arg(name)
    return "" if text == default else text


__all__ = [
    "along", "along_dim", "broadcasting", "call", "dim_of", "dims_of", "factors", "optional",
    "same_shape",
]  # fmt: skip
