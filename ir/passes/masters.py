"""Parameters in float32 for products in fewer bits: what mixed precision trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..graph import Graph, Loop, Param

STORED = torch.float32


def with_masters(graph: Graph) -> Graph:
    """The graph whose trained parameters are stored in float32, and used as they were.

    Frozen ones, buffers and constants have no optimizer's step to be exact for, and stay.
    """
    return _with_params(graph, _master)


def _master(param: Param) -> Param:
    value = param.value
    fewer = value.type.dtype.is_floating_point and value.type.dtype.itemsize < STORED.itemsize
    trained = param.kind == "parameter" and value.differentiable
    return replace(param, stored=STORED) if fewer and trained else param


def _with_params(graph: Graph, change: Callable[[Param], Param]) -> Graph:
    def changed(params: tuple[Param, ...]) -> tuple[Param, ...]:
        return tuple(map(change, params))

    def loop_of(loop: Loop) -> Loop:
        blocks = tuple(replace(block, params=changed(block.params)) for block in loop.blocks)
        return replace(loop, blocks=blocks)

    body = tuple(loop_of(item) if isinstance(item, Loop) else item for item in graph.body)
    return replace(graph, params=changed(graph.params), body=body)


__all__ = ["STORED", "with_masters"]
