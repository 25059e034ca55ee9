"""Reductions; those that add up may be cut along what they reduce, and give partial sums."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Node
from .forms import call, dims_of, optional
from .operator import Family, Light, Render
from .rule import Rule

FAMILY = Family()


def _reduce(*, additive: bool) -> Callable[[Node], Rule]:
    """A reduction over `dim`; an additive one may be cut along it and gives partial sums."""

    def build(node: Node) -> Rule:
        shape = node.operands[0].type.shape
        named = {name for name, _ in node.args}
        dims = dims_of(node, "dim", len(shape)) if "dim" in named else tuple(range(len(shape)))
        keep = bool(node.arg("keepdim")) if "keepdim" in named else False
        operand = tuple((f"d{i}",) for i in range(len(shape)))
        result: list[tuple[str, ...]] = []
        for i in range(len(shape)):
            if i not in dims:
                result.append((f"d{i}",))
            elif keep:
                result.append(())
        sizes = {f"d{i}": size for i, size in enumerate(shape)}
        reduced = frozenset(f"d{i}" for i in dims)
        adds_up = additive and node.output.type.continuous
        return Rule(
            operands=(operand,),
            results=tuple(tuple(result) for _ in node.outputs),
            sizes=sizes,
            whole=frozenset() if adds_up else reduced,
            linear=(frozenset({0}),) if adds_up else (),
            uneven=frozenset(sizes) - reduced,
        )

    return build


class AlongDims(Light):
    """A sum or mean along some dims."""

    sums_inside = True


def _dims_text(node: Node, render: Render) -> str:
    """`-1`, or `(1, 2)` for several."""
    dims = node.arg("dim")
    return str(dims[0]) if isinstance(dims, tuple) and len(dims) == 1 else render.arg("dim")


def _emit_reduce(name: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        named = {key for key, _ in node.args}
        keep = "True" if "keepdim" in named and node.arg("keepdim") else ""
        dims = _dims_text(node, render) if "dim" in named else ""
        dims = "" if dims == "None" and not keep else dims
        dtype = optional(render, "dtype") if "dtype" in named else ""
        text = call(
            f"{render.arg('self')}.{name}", *([dims] if dims else []), keepdim=keep, dtype=dtype
        )
        if name != "mean":
            return text
        rank = len(node.operands[0].type.shape)
        reduced = dims_of(node, "dim", rank) if "dim" in named else range(rank)
        cut = [axis for i in reduced if (axis := render.axis(f"d{i}"))]
        return text + "".join(f" / {axis}.size" for axis in cut)  # local means average

    return emit


FAMILY.add("aten.sum.dim_IntList", AlongDims(_reduce(additive=True), _emit_reduce("sum")))
FAMILY.add("aten.sum.default", Light(_reduce(additive=True), _emit_reduce("sum")))
FAMILY.add("aten.mean.dim", AlongDims(_reduce(additive=True), _emit_reduce("mean")))
FAMILY.add("aten.mean.default", Light(_reduce(additive=True), _emit_reduce("mean")))
FAMILY.add(
    "aten.amax.default",
    Light(_reduce(additive=False), _emit_reduce("amax"), saves=("self", "result")),
)
FAMILY.add(
    "aten.amin.default",
    Light(_reduce(additive=False), _emit_reduce("amin"), saves=("self", "result")),
)
FAMILY.add("aten.any.dim aten.any.default", Light(_reduce(additive=False), _emit_reduce("any")))
FAMILY.add("aten.all.dim aten.all.default", Light(_reduce(additive=False), _emit_reduce("all")))
FAMILY.add("aten.argmax.default", Light(_reduce(additive=False), _emit_reduce("argmax")))
FAMILY.add("aten.argmin.default", Light(_reduce(additive=False), _emit_reduce("argmin")))
FAMILY.add("aten.max.dim", Light(_reduce(additive=False), _emit_reduce("max"), saves=("result",)))
FAMILY.add("aten.min.dim", Light(_reduce(additive=False), _emit_reduce("min"), saves=("result",)))
FAMILY.add(
    "aten.max.default",
    Light(_reduce(additive=False), _emit_reduce("max"), saves=("self", "result")),
)
FAMILY.add(
    "aten.min.default",
    Light(_reduce(additive=False), _emit_reduce("min"), saves=("self", "result")),
)
FAMILY.add(
    "aten.logsumexp.default",
    Light(_reduce(additive=False), _emit_reduce("logsumexp"), saves=("self", "result")),
)


def _emit_spread(name: str) -> Callable[[Node, Render], str]:
    """Variance or standard deviation; the two overloads say the same in different words."""

    def emit(node: Node, render: Render) -> str:
        named = {key for key, _ in node.args}
        if "unbiased" in named:
            correction = "" if node.arg("unbiased") else "0"
        else:
            correction = "" if node.arg("correction") in (None, 1) else render.arg("correction")
        dims = [_dims_text(node, render)] if node.arg("dim") is not None else []
        keep = "True" if node.arg("keepdim") else ""
        return call(f"{render.arg('self')}.{name}", *dims, correction=correction, keepdim=keep)

    return emit


FAMILY.add(
    "aten.var.correction aten.var.dim",
    Light(_reduce(additive=False), _emit_spread("var"), saves=("self",)),
)
FAMILY.add(
    "aten.std.correction aten.std.dim",
    Light(_reduce(additive=False), _emit_spread("std"), saves=("self", "result")),
)


def _emit_vector_norm(node: Node, render: Render) -> str:
    keep = "True" if node.arg("keepdim") else ""
    return call(
        "torch.linalg.vector_norm",
        render.arg("self"),
        render.arg("ord"),
        dim=optional(render, "dim"),
        keepdim=keep,
        dtype=optional(render, "dtype"),
    )


FAMILY.add(
    "aten.linalg_vector_norm.default",
    Light(_reduce(additive=False), _emit_vector_norm, saves=("self", "result")),
)

FAMILY.called("total", "sum")
FAMILY.called("best", "argmax")

__all__ = ["FAMILY"]
