"""Operators that treat the numbers of their operands one by one, and casts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..graph import Node, Value
from .forms import broadcasting, call, factors, optional
from .operator import Family, Light, Render, opaque
from .rule import Rule

FAMILY = Family()


def _unary(table: str, saves: str = "self", *, linear: bool = False, uneven: bool = True) -> None:
    for line in table.strip().splitlines():
        name, template = line.split(maxsplit=1)
        rule = broadcasting(*(["self"] if linear else []), passes=linear, uneven=uneven)
        FAMILY.add(name, Light(rule, template, saves=(saves,) if saves else ()))


_unary(
    """
    aten.relu.default       F.relu({self})
    aten.tanh.default       torch.tanh({self})
    aten.sigmoid.default    torch.sigmoid({self})
    aten.exp.default        torch.exp({self})
    aten.exp2.default       torch.exp2({self})
    aten.expm1.default      torch.expm1({self})
    """,
    saves="result",
)


class Softcap(Light):
    """Numbers kept between -cap and cap: cap * tanh(x / cap)."""

    shows = True

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """As models write it."""
        return (args["x"] / args["cap"]).tanh() * args["cap"]


FAMILY.add(
    "shardwright.softcap",
    Softcap(broadcasting(), "ops.softcap({x}, {cap})", saves=("result",)),
)


class Replaced(Light):
    """Numbers of `new`, whose gradient is that of the parameter `old`, which holds them then."""

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """By a sum, so that no function of the runtime is needed."""
        return args["old"] + (args["new"] - args["old"]).detach()


FAMILY.add(
    "shardwright.replaced",
    Replaced(broadcasting(), "ops.replaced({old}, {new})"),
)
_unary(
    """
    aten.rsqrt.default      torch.rsqrt({self})
    aten.sqrt.default       torch.sqrt({self})
    aten.reciprocal.default torch.reciprocal({self})
    """,
    saves="result",
    uneven=False,
)
_unary(
    """
    aten.log.default        torch.log({self})
    aten.log2.default       torch.log2({self})
    aten.log10.default      torch.log10({self})
    aten.log1p.default      torch.log1p({self})
    """,
    uneven=False,
)
_unary(
    """
    aten.silu.default       F.silu({self})
    aten.cos.default        torch.cos({self})
    aten.sin.default        torch.sin({self})
    aten.abs.default        torch.abs({self})
    aten.erf.default        torch.erf({self})
    aten.softplus.default   F.softplus({self}, {beta}, {threshold})
    aten.log_sigmoid.default F.logsigmoid({self})
    aten.elu.default        F.elu({self}, {alpha})
    aten.hardswish.default  F.hardswish({self})
    aten.hardsigmoid.default F.hardsigmoid({self})
    aten.leaky_relu.default F.leaky_relu({self}, {negative_slope})
    aten.clamp_min.default  torch.clamp({self}, min={min})
    aten.clamp_max.default  torch.clamp({self}, max={max})
    aten.square.default     torch.square({self})
    aten.hardtanh.default   F.hardtanh({self}, {min_val}, {max_val})
    aten.mish.default       F.mish({self})
    """
)
_unary(
    """
    aten.neg.default        -{self}
    aten.clone.default      {self}.clone()
    aten.contiguous.default {self}.contiguous()
    aten.alias.default      {self}
    aten.detach.default     {self}.detach()
    aten.lift_fresh_copy.default {self}.clone()
    aten.real.default       torch.real({self})
    aten.imag.default       torch.imag({self})
    aten._conj.default      torch.conj({self})
    aten.conj_physical.default torch.conj_physical({self})
    aten.resolve_conj.default torch.resolve_conj({self})
    """,
    saves="",
    linear=True,
)
_unary(
    """
    aten.eq.Scalar          {self} == {other}
    aten.ne.Scalar          {self} != {other}
    aten.lt.Scalar          {self} < {other}
    aten.le.Scalar          {self} <= {other}
    aten.gt.Scalar          {self} > {other}
    aten.ge.Scalar          {self} >= {other}
    aten.logical_not.default torch.logical_not({self})
    aten.bitwise_not.default ~{self}
    aten.floor.default      torch.floor({self})
    aten.ceil.default       torch.ceil({self})
    aten.round.default      torch.round({self})
    aten.trunc.default      torch.trunc({self})
    aten.sign.default       torch.sign({self})
    aten.isnan.default      torch.isnan({self})
    aten.isinf.default      torch.isinf({self})
    aten.isfinite.default   torch.isfinite({self})
    aten.floor_divide.Scalar {self} // {other}
    aten.remainder.Scalar   {self} % {other}
    aten.bitwise_and.Scalar {self} & {other}
    aten.bitwise_or.Scalar  {self} | {other}
    aten.bitwise_xor.Scalar {self} ^ {other}
    """,
    saves="",
)


def _binary(table: str) -> None:
    for line in table.strip().splitlines():
        name, template = line.split(maxsplit=1)
        FAMILY.add(name, Light(broadcasting(uneven=False), template))


_binary(
    """
    aten.eq.Tensor          {self} == {other}
    aten.ne.Tensor          {self} != {other}
    aten.lt.Tensor          {self} < {other}
    aten.le.Tensor          {self} <= {other}
    aten.gt.Tensor          {self} > {other}
    aten.ge.Tensor          {self} >= {other}
    aten.bitwise_and.Tensor {self} & {other}
    aten.bitwise_or.Tensor  {self} | {other}
    aten.bitwise_xor.Tensor {self} ^ {other}
    aten.logical_and.default torch.logical_and({self}, {other})
    aten.logical_or.default torch.logical_or({self}, {other})
    aten.logical_xor.default torch.logical_xor({self}, {other})
    aten.floor_divide.default {self} // {other}
    aten.remainder.Tensor   {self} % {other}
    aten.__and__.Tensor     {self} & {other}
    aten.__or__.Tensor      {self} | {other}
    """
)


def _emit_gelu(node: Node, render: Render) -> str:
    approximate = optional(render, "approximate", '"none"')
    return call("F.gelu", render.arg("self"), approximate=approximate)


FAMILY.add("aten.gelu.default", Light(broadcasting(), _emit_gelu, saves=("self",)))
FAMILY.add(
    "aten.mul.Tensor aten.mul.Scalar",
    Light(
        broadcasting("self", "other", passes=True),
        "{self} * {other}",
        saves=("self if other", "other if self"),
    ),
)


def _div_rule(node: Node) -> Rule:
    by_number, by_zero = not isinstance(node.arg("other"), Value), node.arg("other") == 0
    linear = [] if by_zero else ["self"]  # parts of a sum would be infinite, and their sum NaN
    return broadcasting(*linear, passes=not by_zero, uneven=by_number and not by_zero)(node)


FAMILY.add(
    "aten.div.Tensor aten.div.Scalar",
    Light(_div_rule, "{self} / {other}", saves=("self if other", "other")),
)


def _emit_div_mode(node: Node, render: Render) -> str:
    mode = render.arg("rounding_mode")
    return call("torch.div", render.arg("self"), render.arg("other"), rounding_mode=mode)


def _div_mode_rule(node: Node) -> Rule:
    if node.arg("rounding_mode") is None:
        return _div_rule(node)
    return broadcasting(uneven=not isinstance(node.arg("other"), Value))(node)


FAMILY.add(
    "aten.div.Tensor_mode aten.div.Scalar_mode",
    Light(_div_mode_rule, _emit_div_mode, saves=("self", "other")),
)
FAMILY.add("aten.fill.Tensor", Light(broadcasting(), "torch.fill({self}, {value})"))
FAMILY.add(
    "aten.maximum.default",
    Light(broadcasting(), "torch.maximum({self}, {other})", saves=("self", "other")),
)
FAMILY.add(
    "aten.minimum.default",
    Light(broadcasting(), "torch.minimum({self}, {other})", saves=("self", "other")),
)


def _power_rule(node: Node) -> Rule:
    exponent = node.arg("exponent")
    whole = isinstance(exponent, int | float) and exponent >= 1 and float(exponent).is_integer()
    return broadcasting(uneven=whole)(node)


def _emit_power(node: Node, render: Render) -> str:
    """`10000.0**x`: no spaces between plain names and numbers, which is how ruff formats it."""
    base, exponent = render.arg("self"), render.arg("exponent")
    plain = all(_PLAIN.fullmatch(text) for text in (base, exponent))
    base = f"({base})" if base.startswith("-") else base
    return f"{base}**{exponent}" if plain else f"{base} ** {exponent}"


_PLAIN = re.compile(r"-?(\w|\.|e-)+")
FAMILY.add("aten.pow.Tensor_Scalar", Light(_power_rule, "{self}.pow({exponent})", saves=("self",)))
FAMILY.add(
    "aten.pow.Tensor_Tensor",
    Light(_power_rule, _emit_power, saves=("self", "exponent", "result")),
)
FAMILY.add("aten.pow.Scalar", Light(_power_rule, _emit_power, saves=("exponent", "result")))


def _emit_clamp(node: Node, render: Render) -> str:
    low, high = (optional(render, name) for name in ("min", "max"))
    return call("torch.clamp", render.arg("self"), min=low, max=high)


FAMILY.add("aten.clamp.default", Light(broadcasting(), _emit_clamp, saves=("self",)))
FAMILY.add("aten.clamp.Tensor", Light(broadcasting(), _emit_clamp, saves=("self", "min", "max")))
for _bound in ("min", "max"):
    _text = f"torch.clamp({{self}}, {_bound}={{{_bound}}})"
    FAMILY.add(f"aten.clamp_{_bound}.Tensor", Light(broadcasting(), _text, saves=("self", _bound)))


def _emit_like(function: str, *names: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        made, given = node.output.type.dtype, node.operands[0].type.dtype
        args = [render.arg(name) for name in ("self", *names)]
        return call(function, *args, dtype=str(made) if made != given else "")

    return emit


FAMILY.add("aten.zeros_like.default", Light(broadcasting(), _emit_like("torch.zeros_like")))
FAMILY.add("aten.ones_like.default", Light(broadcasting(), _emit_like("torch.ones_like")))
FAMILY.add("aten.empty_like.default", Light(broadcasting(), _emit_like("torch.empty_like")))
FAMILY.add(
    "aten.full_like.default", Light(broadcasting(), _emit_like("torch.full_like", "fill_value"))
)


def _emit_sum_of(sign: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        scaled = node.arg("alpha") != 1
        other = f"{render.arg('alpha')} * {render.arg('other')}" if scaled else render.arg("other")
        return f"{render.arg('self')} {sign} {other}"

    return emit


_sum_rule = broadcasting("self other", passes=True)


class Sum(Light):
    """A sum; positions begin at 2 in some models."""

    def shift(self, node: Node) -> int | None:
        """A whole number that is added."""
        other, times = node.arg("other"), node.arg("alpha")
        sign = -1 if node.op.startswith("aten.sub") else 1
        return sign * times * other if isinstance(other, int) and isinstance(times, int) else None


FAMILY.add("aten.add.Tensor aten.add.Scalar", Sum(_sum_rule, _emit_sum_of("+")))
FAMILY.add("aten.sub.Tensor aten.sub.Scalar", Sum(_sum_rule, _emit_sum_of("-")))


def _emit_rsub(node: Node, render: Render) -> str:
    if node.arg("alpha") != 1:
        return f"{render.arg('other')} - {render.arg('alpha')} * {render.arg('self')}"
    return f"{render.arg('other')} - {render.arg('self')}"


FAMILY.add("aten.rsub.Scalar aten.rsub.Tensor", Light(broadcasting("self other"), _emit_rsub))
FAMILY.add(
    "aten.where.self",
    Light(
        broadcasting("self other", passes=True),
        "torch.where({condition}, {self}, {other})",
        saves=("condition",),
    ),
)
FAMILY.add(
    "aten.where.ScalarOther aten.where.ScalarSelf aten.where.Scalar",
    Light(broadcasting(), "torch.where({condition}, {self}, {other})", saves=("condition",)),
)


def _masked_fill_rule(node: Node) -> Rule:
    value = node.arg("value")
    linear = ["self"] if value == 0 else ["self value"] if isinstance(value, Value) else []
    return broadcasting(*linear, passes=bool(linear))(node)


FAMILY.add(
    "aten.masked_fill.Scalar aten.masked_fill.Tensor",
    Light(_masked_fill_rule, "{self}.masked_fill({mask}, {value})", saves=("mask",)),
)


class Cast(Light):
    """To a dtype, which may be that of the operand."""

    aliases = True
    shows = True

    def shift(self, node: Node) -> int | None:
        """Whole numbers are as they were."""
        return 0


def _cast_rule(node: Node) -> Rule:
    """A cast moves partial sums only between real and complex types."""
    sums = node.operands[0].type.continuous and node.output.type.continuous
    return (broadcasting("self", passes=True) if sums else broadcasting())(node)


def _emit_cast(node: Node, render: Render) -> str:
    return f"{render.arg('self')}.to({node.output.type.dtype})"


FAMILY.add(
    "aten.to.dtype aten.to.dtype_layout aten.to.device aten._to_copy.default aten.type_as.default",
    Cast(_cast_rule, _emit_cast),
)


FAMILY.add(
    "aten.polar.default",
    Light(broadcasting(uneven=False), "torch.polar({abs}, {angle})", saves=("result",)),
)
FAMILY.add("aten.sgn.default", Light(broadcasting(), "torch.sgn({self})", saves=("self", "result")))
FAMILY.add("aten.angle.default", Light(broadcasting(), "torch.angle({self})", saves=("self",)))
FAMILY.add(
    "aten.complex.default",
    Light(
        broadcasting("real imag", passes=True),
        "torch.complex({real}, {imag})",
        saves=("real", "imag"),
    ),
)

for _name in ("contiguous", "clone", "detach", "clamp"):
    FAMILY[f"aten.{_name}.default"].shows = True

FAMILY.called("mask", "eq ne lt le gt ge logical_and logical_or logical_not")
FAMILY.called("mask", "bitwise_and bitwise_or bitwise_not __and__ __or__")
FAMILY.called("activated", "silu gelu relu elu leaky_relu mish hardswish softplus")
FAMILY.called("power", "pow square")
FAMILY.called("clamped", "clamp clamp_min clamp_max")
FAMILY.called("total", "add")
FAMILY.called("difference", "sub rsub")
FAMILY.called("quotient", "div floor_divide")
FAMILY.called("zeros", "zeros_like")
FAMILY.called("ones", "ones_like")
FAMILY.called("filled", "full_like")
FAMILY.called("scaled", "mul")
FAMILY.called("negative", "neg")
FAMILY.called("chosen", "where")


def _masked_scatter_rule(node: Node) -> Rule:
    """Rows of the source in their order; columns can be cut where a mask is of whole rows."""
    x, mask, source = (value.type.shape for value in node.operands)
    rows = len(x) == len(mask) > 1 and mask[-1] == 1 and source[-1:] == x[-1:] != (1,)
    if not rows:
        return opaque(node)
    lead = [f"[x{i}]" if size > 1 else "1" for i, size in enumerate(x[:-1])]
    masked = [name if size > 1 else "1" for name, size in zip(lead, mask[:-1], strict=True)]
    taken = [f"[n{i}]" if size > 1 else "1" for i, size in enumerate(source[:-1])]
    text = f"{' '.join(lead)} h, {' '.join(masked)} 1, {' '.join(taken)} h -> {' '.join(lead)} h"
    return factors(text)(node)


FAMILY.add(
    "aten.masked_scatter.default",
    Light(_masked_scatter_rule, "{self}.masked_scatter({mask}, {source})", saves=("mask",)),
)

FAMILY.called("masked", "masked_fill masked_scatter")
FAMILY.called("gate", "sigmoid")
FAMILY.called("conjugate", "_conj conj_physical")
FAMILY.called("inverse_root", "rsqrt")

__all__ = ["FAMILY"]
