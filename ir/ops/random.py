"""Operators that draw random numbers: ranks that hold copies draw the same, others on their own.

Each draws from the generator of the axes that cut its result (`runtime.mesh.Mesh.generator`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from ..graph import Arg, Node
from .forms import along, broadcasting, call
from .operator import Family, Light, Render, opaque
from .rule import Rule, broadcast_rule

FAMILY = Family()


class Dropout(Light):
    """Zeros at random places while training."""

    shows = True
    in_eval: Mapping[str, Arg] = MappingProxyType({"train": False})


class Draw(Light):
    """Random numbers, in eval mode too where the graph has them."""

    draws = True


def _generator(render: Render) -> str:
    """`self.generator("dp")`: copies of the result are drawn alike."""
    return call("self.generator", *(f'"{name}"' for name in render.sharded_axes()))


def _emit_dropout(node: Node, render: Render) -> str:
    tensor, p = render.arg("input"), render.arg("p")
    return call("ops.dropout", tensor, p, "self.training", _generator(render))


def _dropout_rule(node: Node) -> Rule:
    shape = node.output.type.shape
    return broadcast_rule([shape], shape, linear=[[0]], passes=True)


FAMILY.add("aten.dropout.default", Dropout(_dropout_rule, _emit_dropout, saves=("result",)))


def _made(function: str, *names: str) -> Callable[[Node, Render], str]:
    """`function(names..., shape)`: reads nothing but the shape of an operand."""

    def emit(node: Node, render: Render) -> str:
        sizes = render.sizes()
        shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
        args = [*(render.arg(name) for name in names), shape]
        dtype = str(node.output.type.dtype)
        generator = _generator(render)
        return call(function, *args, dtype=dtype, device="self.device", generator=generator)

    return emit


def _filled(function: str, *names: str) -> Callable[[Node, Render], str]:
    """`function(names...)`, of tensors on this rank's device."""

    def emit(node: Node, render: Render) -> str:
        args = [render.arg(name) for name in names]
        return call(function, *args, generator=_generator(render))

    return emit


def _emit_order(node: Node, render: Render) -> str:
    dtype, generator = str(node.output.type.dtype), _generator(render)
    size = render.arg("n")
    return call("torch.randperm", size, dtype=dtype, device="self.device", generator=generator)


def _of_size(node: Node) -> Rule:
    """The result's dims are factors, so that each rank draws its own part."""
    return broadcast_rule([], node.output.type.shape, passes=False)


def _by_rows(node: Node) -> Rule:
    """Each row of probabilities by itself; padding has none that could be drawn by."""
    return along(node, [len(node.operands[0].type.shape) - 1], uneven=False)


_like = broadcasting()
for _name, _names in (
    ("rand.default", ()),
    ("randn.default", ()),
    ("randint.low", ("low", "high")),
    ("randint.default", ("high",)),
    ("normal.float_float", ("mean", "std")),
):
    _function = f"torch.{_name.split('.')[0]}"
    FAMILY.add(f"aten.{_name}", Draw(_of_size, _made(_function, *_names)))
for _name, _names in (
    ("rand_like.default", ()),
    ("randn_like.default", ()),
    ("randint_like.low_dtype", ("low", "high")),
    ("randint_like.default", ("high",)),
):
    _function = f"torch.{_name.split('_')[0]}"
    FAMILY.add(f"aten.{_name}", Draw(_like, _made(_function, *_names)))
for _name, _names in (
    ("uniform.default", ("self", "from", "to")),
    ("exponential.default", ("self", "lambd")),
    ("normal_functional.default", ("self", "mean", "std")),
    ("bernoulli.default", ("self",)),
    ("bernoulli.p", ("self", "p")),
):
    FAMILY.add(f"aten.{_name}", Draw(_like, _filled(f"torch.ops.aten.{_name}", *_names)))
FAMILY.add(
    "aten.multinomial.default",
    Draw(_by_rows, _filled("torch.multinomial", "self", "num_samples", "replacement")),
)
FAMILY.add("aten.randperm.default", Draw(opaque, _emit_order))

FAMILY.called("noise", "rand randn rand_like randn_like normal uniform exponential")
FAMILY.called("noise", "normal_functional")
FAMILY.called("drawn", "randint randint_like bernoulli multinomial")
FAMILY.called("order", "randperm")

_PACKETS = {name.split(".")[1] for name, found in FAMILY.items() if found.draws}


def is_draw(op: str) -> bool:
    """Does the operator `aten.rand.default`, or `aten.uniform_.default`, draw numbers as these do?

    Attention and dropout have random numbers of their own.
    """
    space, packet, *_ = op.split(".")
    return space == "aten" and packet.rstrip("_") in _PACKETS


def draws_otherwise(node: Node) -> bool:
    """Does an operator of torch draw random numbers that is none of these?"""
    space, _, rest = node.op.partition(".")
    packet, _, overload = rest.partition(".")
    target = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if space != "aten" or target is None or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = dict(node.args)
    off = any(given.get(name) is False for name in ("train", "training"))
    return node.op not in FAMILY and not (off or given.get("dropout") == 0)


__all__ = ["FAMILY", "draws_otherwise", "is_draw"]
