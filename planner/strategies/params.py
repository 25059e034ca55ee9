"""The parameters of a graph, with the names that reports and pins know."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.graph import Graph, Param
from .regions import scopes


@dataclass(frozen=True, slots=True)
class ParamRef:
    """A parameter with the name that reports and pins know, and how many layers have it."""

    param: Param
    name: str
    weight: int
    trainable: bool


def all_params(graph: Graph) -> list[ParamRef]:
    """Every parameter, buffer and constant; those of a loop once, as `path.*.rest`."""
    refs = [ParamRef(p, p.name, 1, p.value.differentiable) for p in graph.params]
    for scope in scopes(graph):
        if scope.block is not None and scope.loop is not None:
            refs += [
                ParamRef(p, f"{scope.loop.path}.*.{p.name}", scope.weight, p.value.differentiable)
                for p in scope.block.params
            ]
    return refs


__all__ = ["ParamRef", "all_params"]
