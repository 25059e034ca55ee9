"""A whole tensor that every rank has, and this rank's part of it: there and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from ...facts.blocks import block, blocks
from ...facts.spec import R, Spec
from .layout import to_zigzag
from .mesh import Mesh


def cuts(spec: Spec, mesh: Mesh, dim: int) -> list[int]:
    """Sizes of the axes that cut a dim, major to minor."""
    return [size for state, size in zip(spec, mesh.sizes, strict=True) if state == dim]


def ways(spec: Spec, mesh: Mesh, dim: int) -> int:
    """Into how many parts `spec` cuts a dim."""
    return prod(cuts(spec, mesh, dim))


def own_part(whole: Tensor, spec: Spec, mesh: Mesh, zigzag: Sequence[int] = ()) -> Tensor:
    """This rank's part of what all ranks have, without padding; a view if no dim is in zigzag.

    Dims in `zigzag` are cut in zigzag order.  `spec` may cut further dims than `whole` has: of
    lengths (b,) or positions (b, t) a cache's spec takes this rank's sequences.
    """
    if mesh.size == 1:
        return whole
    for dim in zigzag:
        whole = to_zigzag(whole, dim, cuts(spec, mesh, dim))
    own = blocks(whole.shape, spec, mesh.sizes, mesh.coordinates)
    return whole[tuple(slice(part.start, part.stop) for part in own)]


def gather_whole(
    x: Tensor, spec: Spec, shape: Sequence[int], mesh: Mesh, zigzag: tuple[int, ...] = ()
) -> Tensor:
    """The whole tensor of `shape` from this rank's part in `spec` (states R, V and S).

    Every rank has it, and must give it the same gradient: of that its part gets its own.  `zigzag`
    names the dims that are cut in zigzag order.
    """
    states = list(zip(spec, mesh.sizes, strict=True))
    for number in reversed(range(len(states))):  # the minor-most axis on a dim goes first
        dim, _ = states[number]
        axis = mesh.axes[number]
        if dim < 0:
            x = axis.convert(x, dim, R)
            continue
        majors = [(size, 0) for state, size in states[:number] if state == dim]
        rows = block(shape[dim], majors).rows
        x = axis.convert(x, dim, R, rows, zigzag)
    return x
