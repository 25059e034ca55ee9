"""Lookups: rows of tables and parts of tensors, picked by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...facts.traffic import Traffic
from ...facts.work import Kernels, Stream
from ..graph import Arg, Node, Value
from .forms import call, dim_of, factors
from .local import Local
from .operator import Family, Leaf, Light, Limit, Operator, Render, named_values, opaque, shapes_of
from .rule import Choice, Dims, Rule
from .sizes import Resizing, Sizes

FAMILY = Family()
_POSITION_BYTES = 8  # positions are int64


def _rows_read(local: Local) -> Kernels:
    """A lookup in the first operand reads the rows that it returns, not the table."""
    needs, gives = local.specs()
    operands = list(zip(local.node.operands, needs, strict=True))
    moved = sum(local.bytes(value, spec) for value, spec in operands[1:])
    moved += 2 * sum(map(local.bytes, local.node.outputs, gives))
    if not local.backward:
        return Kernels(((Stream(float(moved)),),))
    back = moved + sum(local.bytes(*one) for one in operands if one[0].differentiable)
    return Kernels(((Stream(float(moved)),),), ((Stream(float(back)),),))


class Embedding(Operator):
    """Rows of a table; the table may be cut by its rows, each rank then looks up its own."""

    words: Mapping[str, str] = MappingProxyType({"v": "vocabulary", "h": "hidden"})
    names_module = True

    def rule(self, node: Node) -> Rule:
        """The table's rows `v` and numbers `h`, and the dims of the indices."""
        if node.arg("scale_grad_by_freq"):
            return opaque(node)  # the frequency counts need all tokens
        return factors("v h, ... -> ... h", uneven="v")(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """The indices."""
        return named_values(node, ("indices",))

    def limits(self, node: Node) -> Mapping[str, Limit]:
        """Indices are numbers of rows."""
        return {"indices": Limit(node.operands[0], 0, read=True)}

    def resized(self, node: Node, new: Resizing) -> dict[str, Arg]:
        """The padding's row is still there."""
        padding = node.arg("padding_idx")
        if not isinstance(padding, int):
            return {}
        return {"padding_idx": min(padding, new.shape(node.operands[0])[0] - 1)}

    def holds(self, node: Node, choices: Sequence[Choice]) -> tuple[Value, ...]:
        """Nothing as it is where rows are cut: indices are made anew, into the rows kept here."""
        return () if "v" in choices else self.saves(node)

    def work(self, local: Local) -> Kernels:
        """Reads rows, writes them; in backward the table's gradient."""
        return _rows_read(local)

    def leaf(self, node: Node, choices: Sequence[Choice]) -> Leaf | None:
        """An embedding of the columns that are here, if all rows are."""
        if "v" in choices or node.arg("scale_grad_by_freq"):
            return None
        padding = node.arg("padding_idx")
        options = () if padding in (None, -1) else (("padding_idx", padding),)
        return Leaf("Embedding", "indices", options)

    def emit(self, node: Node, render: Render) -> str:
        """`F.embedding`, or over a table cut by its rows `ops.vocab_embedding`."""
        ids, weight = render.arg("indices"), render.arg("weight")
        padding = "" if node.arg("padding_idx") in (None, -1) else render.arg("padding_idx")
        by_frequency = "True" if node.arg("scale_grad_by_freq") else ""
        axis = render.axis("v")
        if axis:
            rows = str(node.operands[0].type.shape[0])
            return call("ops.vocab_embedding", ids, weight, axis, size=rows, padding_idx=padding)
        return call(
            "F.embedding", ids, weight, padding_idx=padding, scale_grad_by_freq=by_frequency
        )


FAMILY.add("aten.embedding.default", Embedding())


class LastToken(Operator):
    """The row of the highest position of each sequence; `s` may be cut, one rank then has it."""

    heavy = False

    def rule(self, node: Node) -> Rule:
        """Sequences, their tokens, and whatever a row has."""
        return factors("b s ..., b s -> b 1 ...")(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """What it takes the rows from."""
        return named_values(node, ("x",))

    def work(self, local: Local) -> Kernels:
        """Reads a row of each sequence, and writes it."""
        return _rows_read(local)

    def traffic(self, local: Local) -> tuple[Traffic, ...]:
        """Which rank has the last token of a sequence."""
        axes = local.axes("s")
        return (Traffic("all_reduce", axes, local.size("b") * _POSITION_BYTES),) if axes else ()

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """x (b, s, ...) and positions (b, s) -> (b, 1, ...)."""
        x: Tensor = args["x"]
        positions: Tensor = args["positions"]
        last = positions.argmax(1).reshape(-1, *[1] * (x.ndim - 1))
        return x.gather(1, last.expand(-1, 1, *x.shape[2:]))

    def emit(self, node: Node, render: Render) -> str:
        """`ops.last_token`, told which axis cuts the tokens."""
        axis = render.axis("s")
        return call("ops.last_token", render.arg("x"), render.arg("positions"), axis=axis)


FAMILY.add("shardwright.last_token", LastToken())


def _index_select_rule(node: Node) -> Rule:
    """`d0 [x1] d2, j -> d0 j d2`."""
    shape, rank = node.operands[0].type.shape, len(node.operands[0].type.shape)
    if rank == 0 or len(node.operands[1].type.shape) != 1:
        return opaque(node)
    dim = dim_of(node, "dim", rank)
    operand = tuple(("x",) if i == dim else (f"d{i}",) for i in range(rank))
    sizes = {d[0]: size for d, size in zip(operand, shape, strict=True)}
    return Rule(
        operands=(operand, (("j",),)),
        results=(tuple(("j",) if i == dim else (f"d{i}",) for i in range(rank)),),
        sizes=sizes | {"j": node.operands[1].type.shape[0]},
        whole=frozenset({"x"}),
        linear=(frozenset({0}),),
    )


FAMILY.add(
    "aten.index_select.default",
    Light(_index_select_rule, "{self}.index_select({dim}, {index})", saves=("index",)),
)


def _gather_rule(node: Node) -> Rule:
    """Dims of equal size in source and index may be cut, and the picked dim of the index."""
    (source, index), sizes = shapes_of(node.operands), dict[str, int]()
    if not source or not index:
        return opaque(node)
    dim = dim_of(node, "dim", len(source))
    whole: set[str] = set()
    left: list[tuple[str, ...]] = []
    right: list[tuple[str, ...]] = []
    for i, (a, b) in enumerate(zip(source, index, strict=True)):
        if i != dim and a == b:
            left.append((f"d{i}",))
            right.append((f"d{i}",))
            sizes[f"d{i}"] = a
            continue
        left.append((f"x{i}",))
        right.append((f"j{i}",))
        sizes |= {f"x{i}": a, f"j{i}": b}
        whole |= {f"x{i}"} if i == dim else {f"x{i}", f"j{i}"}
    return Rule(
        operands=(tuple(left), tuple(right)),
        results=(tuple(right),),
        sizes=sizes,
        whole=frozenset(whole),
        linear=(frozenset({0}),),
    )


def _tie_gather(sizes: Sizes, node: Node) -> None:
    """The result is shaped like the indices; the dim that is read keeps its rows."""
    source, index = node.operands
    dim = node.int_arg("dim") % len(source.type.shape)
    for i in range(len(source.type.shape)):
        sizes.equate([sizes.dim(index, i)], [sizes.dim(node.output, i)])
        x, y = sizes.dim(source, i), sizes.dim(index, i)
        if i == dim or x.size != y.size:
            sizes.fix(x)
        else:
            sizes.equate([x], [y])


FAMILY.add(
    "aten.gather.default",
    Light(_gather_rule, "{self}.gather({dim}, {index})", saves=("self", "index"), ties=_tie_gather),
)


def _index_rule(node: Node) -> Rule:
    """`x[:, i, j]`: dims that are not indexed may be cut, and those of the broadcast indices."""
    indices = node.arg("indices")
    assert isinstance(indices, tuple)
    at = [i for i, index in enumerate(indices) if isinstance(index, Value)]
    shape, picks = node.operands[0].type.shape, shapes_of(node.operands[1:])
    kinds = {index.type.dtype for index in node.operands[1:]}
    if not at or at != list(range(at[0], at[-1] + 1)) or kinds & {torch.bool, torch.uint8}:
        return opaque(node)
    rank = max(len(pick) for pick in picks)
    result = node.output.type.shape[at[0] : at[0] + rank]
    sizes = {f"j{k}": size for k, size in enumerate(result) if size != 1}

    def pick_dims(pick: Sequence[int]) -> Dims:
        lead = rank - len(pick)
        return tuple((f"j{lead + k}",) if size != 1 else () for k, size in enumerate(pick))

    operand = tuple((f"x{i}",) if i in at else (f"d{i}",) for i in range(len(shape)))
    sizes |= {d[0]: size for d, size in zip(operand, shape, strict=True)}
    return Rule(
        operands=(operand, *(pick_dims(pick) for pick in picks)),
        results=((*operand[: at[0]], *pick_dims(result), *operand[at[-1] + 1 :]),),
        sizes=sizes,
        whole=frozenset(f"x{i}" for i in at),
        linear=(frozenset({0}),),
    )


def _emit_index(node: Node, render: Render) -> str:
    items = [":" if text == "None" else text for text in render.items("indices")]
    return f"{render.arg('self')}[{', '.join(items)}]"


FAMILY.add("aten.index.Tensor", Light(_index_rule, _emit_index, saves=("indices",)))

FAMILY.called("picked", "gather index index_select embedding")

__all__ = ["FAMILY", "Embedding", "LastToken"]
