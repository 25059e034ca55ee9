"""Conversions between the states of a value on one mesh axis, with their gradients.

| state  | value on each rank | gradient on each rank |
|--------|--------------------|-----------------------|
| `R`    | whole              | whole, the same on all |
| `S(d)` | slice along dim d  | slice                 |
| `P`    | summand            | whole                 |
| `V`    | whole              | summand               |

A conversion a -> b is a pair of primitives from one table (`facts/moves.py`): forward takes the
value from a to b, backward takes the gradient from b to a.  `Move` is one of them, between places:
a place is `R` (whole), `P` (summands) or a dim, whatever the gradient is.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ...facts.blocks import Block, block
from ...facts.collectives import collective_for, find_collective, received_share
from ...facts.moves import KEPT_MOVES, Primitive, primitive
from ...facts.spec import P, R, State, V
from . import counter, transport
from .counter import Phase
from .keeping import is_keeping
from .layout import from_zigzag, pad_blocks, pad_tail, to_zigzag, trim_blocks
from .move import Move, moves_between
from .opaque import known_as, move_opaquely
from .transfers import TRANSFERS, Transfer


class Groups(Protocol):
    """Who holds the process groups of axes: the mesh."""

    def group(self, name: str) -> ProcessGroup:
        """The group of the axis called `name`."""
        ...


class Axis:
    """One axis of the mesh, or several flattened (the first named is the major one).

    `name`, `size`, `rank` (this rank's index along the axis) and `group`; `sizes` and
    `coordinates` have one entry per flattened axis, `parts` has those axes.  All methods take any
    strides, keep the dtype, and are the identity where the axis has one rank.  Bytes below are
    those that each rank receives for a whole tensor of n bytes over p ranks.
    """

    __slots__ = (
        "name", "size", "rank", "sizes", "coordinates", "mesh", "parts", "known_as", "_by",
        "__weakref__",
    )  # fmt: skip

    def __init__(
        self,
        mesh: Groups,
        name: str,
        sizes: tuple[int, ...],
        coordinates: tuple[int, ...],
        parts: tuple[Axis, ...] = (),
        by: str = "",
    ) -> None:
        self.mesh = mesh
        self.parts = parts
        self._by = by
        self.name = name
        self.sizes = sizes
        self.coordinates = coordinates
        self.size = prod(sizes)
        self.rank = 0
        for ways, index in zip(sizes, coordinates, strict=True):
            self.rank = self.rank * ways + index
        self.known_as = known_as(self, name)  # what operators are told

    def __repr__(self) -> str:
        return f"Axis({self.name}={self.size}, rank={self.rank})"

    @property
    def group(self) -> ProcessGroup:
        """The process group of this axis; held by the mesh, so that no axis outlives it."""
        return self.mesh.group(self.name)

    def block(self, size: int) -> Block:
        """The rows of a dim of `size` that this rank holds."""
        return block(size, list(zip(self.sizes, self.coordinates, strict=True)))

    def by(self, name: str) -> Axis:
        """This axis, whose moves go by the collective `name` where it does them, and back."""
        if not find_collective(name).suits(self.sizes):
            raise ValueError(f"axis `{self.name}`: no `{name}` over axes of {self.sizes}")
        return Axis(self.mesh, self.name, self.sizes, self.coordinates, self.parts, name)

    def collective(self, move: Primitive) -> str:
        """The name of the collective that runs `move` here."""
        return collective_for(move, self._by)

    # --- conversions by name, as generated code calls them ---------------------------------

    def copy(self, x: Tensor) -> Tensor:
        """R -> V. Forward nothing; backward all-reduce, 2(p-1)/p n."""
        return self.convert(x, R, V)

    def own_gradient(self, x: Tensor) -> Tensor:
        """V -> R. Forward nothing; backward the first rank keeps the gradient, others get zeros."""
        return self.convert(x, V, R)

    def all_reduce(
        self, x: Tensor, *, backward: Literal["identity", "all_reduce"] = "identity"
    ) -> Tensor:
        """P -> R. Forward all-reduce, 2(p-1)/p n; backward nothing.

        `backward="all_reduce"` is P -> V: backward all-reduce as well.
        """
        return self.convert(x, P, V if backward == "all_reduce" else R)

    def all_gather(
        self,
        x: Tensor,
        dim: int,
        size: int | None = None,
        *,
        backward: Literal["reduce_scatter", "slice"] = "reduce_scatter",
        zigzag: bool = False,
    ) -> Tensor:
        """S(dim) -> V. Forward all-gather, (p-1)/p n; backward reduce-scatter, (p-1)/p n.

        `backward="slice"` is S(dim) -> R: backward takes its slice of the gradient, 0 bytes.
        `size` is the true size of `dim` where it does not divide by p.  `zigzag`, here and below:
        slices hold the tokens that `layout.zigzag_order` says; the whole is in its natural order.
        """
        target = R if backward == "slice" else V
        return self.convert(x, _front(dim), target, size, (dim,) if zigzag else ())

    def reduce_scatter(self, x: Tensor, dim: int, *, zigzag: bool = False) -> Tensor:
        """P -> S(dim). Forward reduce-scatter, (p-1)/p n; backward all-gather, (p-1)/p n."""
        return self.convert(x, P, _front(dim), zigzag=(dim,) if zigzag else ())

    def shard(
        self,
        x: Tensor,
        dim: int,
        *,
        backward: Literal["all_gather", "pad"] = "all_gather",
        zigzag: bool = False,
    ) -> Tensor:
        """R -> S(dim). Forward takes its slice, 0 bytes; backward all-gather, (p-1)/p n.

        `backward="pad"` is V -> S(dim): backward pads the slice with zeros to the whole, 0 bytes.
        """
        source = V if backward == "pad" else R
        return self.convert(x, source, _front(dim), zigzag=(dim,) if zigzag else ())

    def all_to_all(
        self,
        x: Tensor,
        *,
        gather_dim: int,
        shard_dim: int,
        size: int | None = None,
        zigzag: tuple[int, ...] = (),
    ) -> Tensor:
        """S(gather_dim) -> S(shard_dim). Forward and backward all-to-all, (p-1)/p n/p each.

        `size` is the true size of `gather_dim` where it does not divide by p; `zigzag` names
        those of the two dims whose slices are in zigzag order.
        """
        return self.convert(x, _front(gather_dim), _front(shard_dim), size, zigzag)

    def partial(self, x: Tensor, *, backward: Literal["identity", "mask"] = "identity") -> Tensor:
        """R -> P. The first rank keeps the value, others take zeros; backward nothing.

        `backward="mask"` is V -> P: the gradient, too, stays on the first rank.  0 bytes.
        """
        return self.convert(x, V if backward == "mask" else R, P)

    def pad(self, x: Tensor, dim: int, size: int | None = None, *, zigzag: bool = False) -> Tensor:
        """S(dim) -> P. Forward pads the slice with zeros to the whole; backward slices. 0 bytes.

        `size` is the true size of `dim` where it does not divide by p.
        """
        return self.convert(x, _front(dim), P, size, (dim,) if zigzag else ())

    # --- the general form ------------------------------------------------------------------

    def convert(
        self,
        x: Tensor,
        source: State,
        target: State,
        size: int | None = None,
        zigzag: tuple[int, ...] = (),
    ) -> Tensor:
        """`x` in state `source` as `target` (`R`, `P`, `V` or a dim); any pair is legal.

        `size` is the true size of dim `source` where that is a dim and does not divide; slices of
        the dims in `zigzag` are in zigzag order.
        """
        for dim in (source, target):
            if dim >= x.ndim or dim < V:
                raise ValueError(
                    f"axis `{self.name}`: {tuple(x.shape)} has no dim {dim}; dims count from 0"
                )
        if self.size == 1 or source == target:
            return x
        target_size = x.shape[target] if target >= 0 else None
        forward, backward = moves_between(source, target, size, target_size, zigzag)
        return self.move_with_gradient(x, forward, backward)

    def move_with_gradient(self, x: Tensor, forward: Move, backward: Move) -> Tensor:
        """Run primitive `forward`, whose gradient takes `backward`."""
        if torch.compiler.is_compiling() or (is_keeping() and _as_operator(forward)):
            return move_opaquely(x, self.known_as, forward, backward)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Convert.apply(x, self, forward, backward)
        return self.move(x, forward, "forward")

    def move(self, x: Tensor, move: Move, phase: Phase) -> Tensor:
        """Run one primitive on raw tensors, without gradient."""
        if move.source == move.target:
            return x
        return _RUN[primitive(move.source, move.target)](self, x, move, phase)

    def reduce(
        self, x: Tensor, op: transport.Reduction = "sum", phase: Phase = "forward"
    ) -> Tensor:
        """The sum or maximum of `x` over the axis, without gradient."""
        if self.size == 1:
            return x
        if x.dtype == torch.bool:
            raise TypeError(
                f"axis `{self.name}`: bool tensors cannot be added up over ranks; convert to int"
            )
        if op == "sum":
            return self.start("all_reduce", x, phase).finish()
        self.record("all_reduce", received_share("all_reduce", (self.size,)) * x.nbytes, phase)
        return transport.all_reduce(x, self.group, op)

    def start(
        self, move: Primitive, x: Tensor, phase: Phase, out: Tensor | None = None
    ) -> Transfer:
        """Start the collective that runs `move` on buffer `x`; see `transfers.py`.

        Complex numbers go as the pairs of real ones that they are.
        """
        if x.is_complex():
            pairs = torch.view_as_real(x.resolve_conj())
            place = pairs if out is x or out is None else torch.view_as_real(out)
            under_way = self.start(move, pairs, phase, None if out is None else place)
            result = torch.view_as_complex(under_way.result)
            return Transfer(result, [], pairs, under_way.finish)
        name = self.collective(move)
        n_bytes = x.nbytes * self.size if move == "all_gather" else x.nbytes
        self.record(name, received_share(name, self.sizes) * n_bytes, phase)
        return TRANSFERS[name](x, self, out)

    def record(self, op: str, nbytes: float, phase: Phase) -> None:
        """Tell the active counters of a collective that brings `nbytes` to this rank."""
        counter.record(op, self.name, phase, nbytes, self.sizes)


def _as_operator(move: Move) -> bool:
    """Is a move one operator where a layer keeps a part of what it makes?  The result of a mask is
    then its operand on no rank: all must keep the same."""
    kind = primitive(move.source, move.target)
    return kind in KEPT_MOVES or kind == "mask"


def _front(dim: int) -> int:
    if dim < 0:
        raise ValueError(f"dim {dim}: dims count from the front, from 0")
    return dim


class _Convert(torch.autograd.Function):
    """Primitive `forward` on the value, primitive `backward` on its gradient.

    The gradient of the gradient takes the way of the value, so this can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward: Move, backward: Move) -> Tensor:
        ctx.axis, ctx.forward_move, ctx.backward_move = axis, forward, backward
        return axis.move(x, forward, "forward")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        grad, axis, move = grad_outputs[0], ctx.axis, ctx.backward_move
        if torch.is_grad_enabled() and grad.requires_grad:  # create_graph=True
            return _Convert.apply(grad, axis, move, ctx.forward_move), None, None, None
        return axis.move(grad, move, "backward"), None, None, None


# --- the nine primitives -------------------------------------------------------------------------


def _identity(axis: Axis, x: Tensor, move: Move, phase: Phase) -> Tensor:
    return x


def _slice(axis: Axis, x: Tensor, move: Move, phase: Phase) -> Tensor:
    """Own rows in a buffer of their own, so that the whole can be freed."""
    if move.target in move.zigzag:
        x = to_zigzag(x, move.target, axis.sizes)
    rows = axis.block(x.shape[move.target])
    own = x.narrow(move.target, rows.start, rows.stop - rows.start)
    if rows.stop - rows.start < rows.rows:
        return pad_tail(own, move.target, rows.rows)
    return own.clone(memory_format=torch.contiguous_format)


def _first_keeps(axis: Axis, x: Tensor, move: Move, phase: Phase) -> Tensor:
    return x if axis.rank == 0 else torch.zeros_like(x)


def _gather(axis: Axis, x: Tensor, move: Move, phase: Phase) -> Tensor:
    return join_blocks(axis.start("all_gather", x.contiguous(), phase).finish(), move, axis)


def _exchange(axis: Axis, x: Tensor, move: Move, phase: Phase) -> Tensor:
    rows = split_blocks(x, move, axis).contiguous()
    return join_blocks(axis.start("all_to_all", rows, phase).finish(), move, axis)


def _zero_pad(axis: Axis, x: Tensor, move: Move, phase: Phase) -> Tensor:
    dim = move.source
    size = x.shape[dim] * axis.size if move.size is None else move.size
    rows = axis.block(size)
    shape = list(x.shape)
    shape[dim] = size
    whole = x.new_zeros(shape)
    valid = rows.stop - rows.start
    whole.narrow(dim, rows.start, valid).copy_(x.narrow(dim, 0, valid))
    return from_zigzag(whole, dim, axis.sizes) if dim in move.zigzag else whole


def _all_reduce(axis: Axis, x: Tensor, move: Move, phase: Phase) -> Tensor:
    return axis.reduce(x, "sum", phase)


def _reduce_scatter(axis: Axis, x: Tensor, move: Move, phase: Phase) -> Tensor:
    rows = split_blocks(x, move, axis).contiguous()
    return axis.start("reduce_scatter", rows, phase).finish()


_Run: TypeAlias = Callable[[Axis, Tensor, Move, Phase], Tensor]
_RUN: dict[Primitive, _Run] = {
    "nothing": _identity,
    "slice": _slice,
    "mask": _first_keeps,
    "all_gather": _gather,
    "all_to_all": _exchange,
    "pad": _zero_pad,
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
}


def split_blocks(x: Tensor, move: Move, axis: Axis) -> Tensor:
    """The blocks of `x` along `move.target`, one per rank, stacked along a new first dim: a view
    where the ranks' blocks are whole."""
    dim = move.target
    x = to_zigzag(x, dim, axis.sizes) if dim in move.zigzag else pad_blocks(x, dim, axis.sizes)
    return x.unflatten(dim, (axis.size, x.shape[dim] // axis.size)).movedim(dim, 0)


def join_blocks(rows: Tensor, move: Move, axis: Axis) -> Tensor:
    """Inverse of `split_blocks` along `move.source`; no padding where the size is given."""
    dim = move.source
    whole = rows.movedim(0, dim).flatten(dim, dim + 1)
    if dim in move.zigzag:
        return from_zigzag(whole, dim, axis.sizes)
    return whole if move.size is None else trim_blocks(whole, dim, axis.sizes, move.size)
