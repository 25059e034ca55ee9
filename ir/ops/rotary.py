"""Rotary position embeddings: numbers of a vector turned in planes, by angles of its position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..graph import Node
from .forms import call
from .operator import Family, Light, Render, shapes_of
from .rule import Dims, Rule
from .sizes import Size, Sizes

FAMILY = Family()


class Rotary(Light):
    """x (..., d) turned by angles whose `cos` and `sin` (..., d or d/2) broadcast against it.

    `pairing` says which two numbers span a plane: those in the same place of both `halves` of the
    vector, or `pairs` of neighbours; `pairs_to_halves` takes pairs and gives halves.
    """

    shows = True

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """The rotation on whole tensors."""
        return rotated(**args)


def _rule(node: Node) -> Rule:
    """Elementwise, with broadcasting, but for the last dim, which stays whole."""
    rank = len(node.output.type.shape)
    sizes = {f"d{i}": size for i, size in enumerate(node.output.type.shape[:-1]) if size != 1}
    whole: dict[str, int] = {}

    def dims(number: int, shape: tuple[int, ...]) -> Dims:
        lead = rank - len(shape)
        outer = tuple((f"d{lead + i}",) if size != 1 else () for i, size in enumerate(shape[:-1]))
        whole[f"w{number}"] = shape[-1]
        return (*outer, (f"w{number}",))

    operands = tuple(dims(number, shape) for number, shape in enumerate(shapes_of(node.operands)))
    return Rule(
        operands=operands,
        results=((*operands[0][:-1], ("w0",)),),
        sizes=sizes | whole,
        whole=frozenset(whole),
        linear=(frozenset({0}),),
        uneven=frozenset(sizes),
        passes=True,
    )


def _ties(sizes: Sizes, node: Node) -> None:
    """The vector is two coordinates wide, and so are the angles if they are not one."""
    plane = Size(node.output.type.shape[-1] // 2)
    for value in node.operands:
        last = sizes.dim(value, -1)
        sizes.ratio(last, last.size // plane.size, plane)


def _emit(node: Node, render: Render) -> str:
    pairing = node.arg("pairing")
    args = [render.arg(name) for name in ("x", "cos", "sin")]
    return call("ops.rotary", *args, pairing="" if pairing == "halves" else f'"{pairing}"')


FAMILY.add("shardwright.rotary", Rotary(_rule, _emit, saves=("cos", "sin", "x if cos"), ties=_ties))


def rotated(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """The reference: x cos + (x after a quarter turn) sin, as most models write it."""
    if pairing == "pairs_to_halves":  # pairs to halves, then as halves
        x, pairing = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), "halves"
    pairs = pairing == "pairs"
    if cos.shape[-1] != x.shape[-1]:  # once for each coordinate of a plane
        cos, sin = (
            t.repeat_interleave(2, -1) if pairs else torch.cat((t, t), -1) for t in (cos, sin)
        )
    a, b = x.unflatten(-1, (-1, 2) if pairs else (2, -1)).unbind(-1 if pairs else -2)
    quarter = torch.stack((-b, a), -1 if pairs else -2).flatten(-2)
    return x * cos + quarter * sin


__all__ = ["FAMILY", "Rotary", "rotated"]
