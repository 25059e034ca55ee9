"""The registry of ops: everything about an op in one place.

Each op declares its factor rule, how it is written in a generated module, what kind of work it is
and which of its tensors autograd keeps for the backward pass.  Strategies, local shapes, FLOPs,
communication and memory all follow from these.  An op that is not here gets `opaque_rule`: it runs
replicated, and the report names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, Protocol
from weakref import ref

import torch

from ...facts.spec import R, S, V
from ..graph import Node, Value, values_in
from .rule import Algorithm, Dims, Rule, broadcast_rule, opaque_rule, parse_rule, reshape_rule

Kind = Literal["matmul", "attention", "experts", "elementwise", "view"]


class Render(Protocol):
    """What an op needs to know to write itself for one rank."""

    def arg(self, name: str) -> str:
        """Source text of the argument `name`."""
        ...

    def items(self, name: str) -> list[str]:
        """Source texts of the items of the list argument `name`."""
        ...

    def sizes(self) -> list[str]:
        """Source text of the local size of each dim of the first result."""
        ...

    def axis(self, factor: str) -> str:
        """The `Axis` expression that cuts `factor`, or an empty string."""
        ...

    def sharded_axes(self) -> tuple[str, ...]:
        """Names of the mesh axes over which the result is sharded."""
        ...

    def algorithm(self) -> tuple[str, str]:
        """The algorithm that the op runs over an axis, and that axis; empty strings if none."""
        ...

    def order(self) -> str:
        """In which order ranks hold the tokens of a sequence: `contiguous` or `zigzag`."""
        ...


@dataclass(frozen=True, slots=True)
class Op:
    """One op: `emit` is a template over schema names (`F.silu({self})`) or a function."""

    rule: Callable[[Node], Rule]
    emit: str | Callable[[Node, Render], str]
    kind: Kind = "elementwise"
    # schema names that autograd keeps, "result" for the output; `weight if input`: only where the
    # gradient of `input` is needed
    saves: tuple[str, ...] = ()


OPS: dict[str, Op] = {}
_CASTS = (
    "aten.to.dtype aten.to.dtype_layout aten.to.device aten._to_copy.default aten.type_as.default"
)


def register(names: str, op: Op) -> None:
    """Add `op` under one or more space-separated names; a second registration is an error."""
    for name in names.split():
        if name in OPS:
            raise ValueError(f"duplicate registration of op `{name}`")
        OPS[name] = op


def find_op(name: str) -> Op | None:
    """The op called `name`, or None if it has no rule (it then runs replicated)."""
    return OPS.get(name)


def rule_of(node: Node) -> Rule:
    """The factor rule of `node`; an op without one keeps every dim whole.

    A rule is made once per node and forgotten with it.
    """
    known = _rules.get(id(node))
    if known is not None and known[0]() is node:
        return known[1]
    op, key = OPS.get(node.op), id(node)
    rule = op.rule(node) if op else _opaque(node)
    _rules[key] = (ref(node, lambda _: _rules.pop(key, None)), rule)
    return rule


# By identity: hashing a node means hashing every argument, dearer than making its rule anew.
_rules: dict[int, tuple[ref[Node], Rule]] = {}


def kind_of(node: Node) -> Kind:
    """What kind of work the node is; unknown ops count as elementwise."""
    op = OPS.get(node.op)
    return op.kind if op else "elementwise"


def is_view(node: Node) -> bool:
    """Do the outputs share the memory of the first operand?"""
    if not node.operands:
        return False
    same = all(out.type.dtype == node.operands[0].type.dtype for out in node.outputs)
    return same and (kind_of(node) == "view" or node.op in _CASTS.split())


def saved_values(node: Node) -> tuple[Value, ...]:
    """Values that autograd keeps from this node for the backward pass (unknown op: all of them)."""
    if not any(out.differentiable for out in node.outputs):
        return ()
    op = OPS.get(node.op)
    if op is None:
        return (*node.operands, *node.outputs)
    kept: list[Value] = []
    for entry in op.saves:
        name, _, other = entry.partition(" if ")
        if other and not any(value.differentiable for value in values_in(node.arg(other))):
            continue
        if name in ("sinks", "up"):  # nodes of older plans have no such argument
            kept += values_in(dict(node.args).get(name))
            continue
        kept += node.outputs[:1] if name == "result" else values_in(node.arg(name))
    return tuple(kept)


def matmul_dims(node: Node, ways: dict[str, int]) -> tuple[int, int, int, int]:
    """(batch, m, n, k) of a matmul-like node when its factors are cut `ways` times.

    A product of more than two operands counts as if it was computed in one step.
    """
    rule = rule_of(node)
    factors = [_factors(d) for i, d in enumerate(rule.operands) if i not in rule.addends]
    left, right = factors[0], set[str]().union(*factors[1:])
    result = _factors(rule.results[0])

    def size(factors: set[str]) -> int:
        return prod(-(-rule.sizes[f] // ways.get(f, 1)) for f in factors)

    return (
        size(left & right & result),
        size((left - right) & result),
        size((right - left) & result),
        size((left & right) - result),
    )


def attention_dims(node: Node, ways: dict[str, int]) -> tuple[int, int, int, int, int, int]:
    """(batch, query heads, kv heads, query length, kv length, head dim) of a local attention."""
    rule = rule_of(node)

    def size(factor: str) -> int:
        return -(-rule.sizes.get(factor, 1) // ways.get(factor, 1))

    return size("b"), size("n") * size("g"), size("n"), size("q"), size("k"), size("d")


def experts_dims(node: Node, ways: dict[str, int]) -> tuple[int, int, int, int, int, int, int]:
    """Sizes of a local `shardwright.moe`.

    (tokens, choices per token, experts, width in, hidden units of an expert, width out, matrices of
    the first product: 2 with a gate).
    """
    rule = rule_of(node)

    def size(factor: str) -> int:
        return -(-rule.sizes[factor] // ways.get(factor, 1))

    tokens = prod(size(factor) for dim in rule.operands[0][:-1] for factor in dim)
    matrices = 1 if node.arg("gating") == "none" else 2
    return tokens, size("k"), size("e"), size("h"), size("f"), size("o"), matrices


def _factors(dims: Dims) -> set[str]:
    return {factor for dim in dims for factor in dim}


# --- helpers for rules -------------------------------------------------------------------------


def _shapes(values: Sequence[Value]) -> list[tuple[int, ...]]:
    return [value.type.shape for value in values]


def _opaque(node: Node) -> Rule:
    return opaque_rule(_shapes(node.operands), _shapes(node.outputs))


def _text(
    rule: str,
    *,
    sizes: Mapping[str, int] | None = None,
    uneven: str = "",
    inside: str = "",
    addends: Sequence[int] = (),
) -> Callable[[Node], Rule]:
    def build(node: Node) -> Rule:
        operands, results = _shapes(node.operands), _shapes(node.outputs)
        return parse_rule(
            rule, operands, results, sizes=sizes, uneven=uneven, inside=inside, addends=addends
        )

    return build


def _elementwise(*linear: str, passes: bool = False, uneven: bool = True) -> Callable[[Node], Rule]:
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
        shapes, result = _shapes(node.operands), node.output.type.shape
        return broadcast_rule(shapes, result, linear=groups, passes=passes, uneven=uneven)

    return build


def _dim(node: Node, name: str, rank: int) -> int:
    dim = node.arg(name)
    assert isinstance(dim, int)
    return dim % max(rank, 1)


def _dims(node: Node, name: str, rank: int) -> tuple[int, ...]:
    dims = node.arg(name)
    if dims is None or dims == ():
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = (dims,)
    assert isinstance(dims, tuple)
    return tuple(d % max(rank, 1) for d in dims if isinstance(d, int))


def _along(node: Node, dims: Sequence[int], *, linear: bool = False, uneven: bool = True) -> Rule:
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


def _reduce(*, additive: bool) -> Callable[[Node], Rule]:
    """A reduction over `dim`; an additive one may be cut along it and gives partial sums."""

    def build(node: Node) -> Rule:
        shape = node.operands[0].type.shape
        named = {name for name, _ in node.args}
        dims = _dims(node, "dim", len(shape)) if "dim" in named else tuple(range(len(shape)))
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
        floating = node.output.type.dtype.is_floating_point
        return Rule(
            operands=(operand,),
            results=tuple(tuple(result) for _ in node.outputs),
            sizes=sizes,
            whole=frozenset() if additive and floating else reduced,
            linear=(frozenset({0}),) if additive and floating else (),
            uneven=frozenset(sizes) - reduced,
        )

    return build


# --- helpers for emission ----------------------------------------------------------------------


def call(function: str, *args: str, **kwargs: str) -> str:
    """Source of a call; keyword arguments with an empty value are left out."""
    named = [f"{key}={value}" for key, value in kwargs.items() if value]
    return f"{function}({', '.join([*args, *named])})"


def _optional(render: Render, name: str, default: str = "None") -> str:
    text = render.arg(name)
    return "" if text == default else text


# --- elementwise -------------------------------------------------------------------------------


def _unary(table: str, saves: str = "self", *, linear: bool = False, uneven: bool = True) -> None:
    for line in table.strip().splitlines():
        name, template = line.split(maxsplit=1)
        rule = _elementwise(*(["self"] if linear else []), passes=linear, uneven=uneven)
        register(name, Op(rule, template, saves=(saves,) if saves else ()))


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
        register(name, Op(_elementwise(uneven=False), template))


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
    approximate = _optional(render, "approximate", '"none"')
    return call("F.gelu", render.arg("self"), approximate=approximate)


register("aten.gelu.default", Op(_elementwise(), _emit_gelu, saves=("self",)))
register(
    "aten.mul.Tensor aten.mul.Scalar",
    Op(
        _elementwise("self", "other", passes=True),
        "{self} * {other}",
        saves=("self if other", "other if self"),
    ),
)


def _div_rule(node: Node) -> Rule:
    by_number = not isinstance(node.arg("other"), Value)
    return _elementwise("self", passes=True, uneven=by_number)(node)


register(
    "aten.div.Tensor aten.div.Scalar",
    Op(_div_rule, "{self} / {other}", saves=("self if other", "other")),
)


def _emit_div_mode(node: Node, render: Render) -> str:
    mode = render.arg("rounding_mode")
    return call("torch.div", render.arg("self"), render.arg("other"), rounding_mode=mode)


def _div_mode_rule(node: Node) -> Rule:
    if node.arg("rounding_mode") is None:
        return _div_rule(node)
    return _elementwise(uneven=not isinstance(node.arg("other"), Value))(node)


register(
    "aten.div.Tensor_mode aten.div.Scalar_mode",
    Op(_div_mode_rule, _emit_div_mode, saves=("self", "other")),
)
register(
    "aten.maximum.default",
    Op(_elementwise(), "torch.maximum({self}, {other})", saves=("self", "other")),
)
register(
    "aten.minimum.default",
    Op(_elementwise(), "torch.minimum({self}, {other})", saves=("self", "other")),
)


def _power_rule(node: Node) -> Rule:
    exponent = node.arg("exponent")
    whole = isinstance(exponent, int | float) and exponent >= 1 and float(exponent).is_integer()
    return _elementwise(uneven=whole)(node)


def _emit_power(node: Node, render: Render) -> str:
    """`10000.0**x`: no spaces between plain names and numbers, which is how ruff formats it."""
    base, exponent = render.arg("self"), render.arg("exponent")
    plain = all(_PLAIN.fullmatch(text) for text in (base, exponent))
    base = f"({base})" if base.startswith("-") else base
    return f"{base}**{exponent}" if plain else f"{base} ** {exponent}"


_PLAIN = re.compile(r"-?(\w|\.|e-)+")
register("aten.pow.Tensor_Scalar", Op(_power_rule, "{self}.pow({exponent})", saves=("self",)))
register(
    "aten.pow.Tensor_Tensor",
    Op(_power_rule, _emit_power, saves=("self", "exponent", "result")),
)
register("aten.pow.Scalar", Op(_power_rule, _emit_power, saves=("exponent", "result")))


def _emit_clamp(node: Node, render: Render) -> str:
    low, high = (_optional(render, name) for name in ("min", "max"))
    return call("torch.clamp", render.arg("self"), min=low, max=high)


register("aten.clamp.default", Op(_elementwise(), _emit_clamp, saves=("self",)))


def _emit_like(function: str, *names: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        made, given = node.output.type.dtype, node.operands[0].type.dtype
        args = [render.arg(name) for name in ("self", *names)]
        return call(function, *args, dtype=str(made) if made != given else "")

    return emit


register("aten.zeros_like.default", Op(_elementwise(), _emit_like("torch.zeros_like")))
register("aten.ones_like.default", Op(_elementwise(), _emit_like("torch.ones_like")))
register("aten.full_like.default", Op(_elementwise(), _emit_like("torch.full_like", "fill_value")))


def _emit_sum_of(sign: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        scaled = node.arg("alpha") != 1
        other = f"{render.arg('alpha')} * {render.arg('other')}" if scaled else render.arg("other")
        return f"{render.arg('self')} {sign} {other}"

    return emit


_sum_rule = _elementwise("self other", passes=True)
register("aten.add.Tensor aten.add.Scalar", Op(_sum_rule, _emit_sum_of("+")))
register("aten.sub.Tensor aten.sub.Scalar", Op(_sum_rule, _emit_sum_of("-")))


def _emit_rsub(node: Node, render: Render) -> str:
    if node.arg("alpha") != 1:
        return f"{render.arg('other')} - {render.arg('alpha')} * {render.arg('self')}"
    return f"{render.arg('other')} - {render.arg('self')}"


register("aten.rsub.Scalar aten.rsub.Tensor", Op(_elementwise("self other"), _emit_rsub))
register(
    "aten.where.self",
    Op(
        _elementwise("self other", passes=True),
        "torch.where({condition}, {self}, {other})",
        saves=("condition",),
    ),
)
register(
    "aten.where.ScalarOther aten.where.ScalarSelf aten.where.Scalar",
    Op(_elementwise(), "torch.where({condition}, {self}, {other})", saves=("condition",)),
)


def _masked_fill_rule(node: Node) -> Rule:
    value = node.arg("value")
    linear = ["self"] if value == 0 else ["self value"] if isinstance(value, Value) else []
    return _elementwise(*linear, passes=bool(linear))(node)


register(
    "aten.masked_fill.Scalar aten.masked_fill.Tensor",
    Op(_masked_fill_rule, "{self}.masked_fill({mask}, {value})", saves=("mask",)),
)


def _cast_rule(node: Node) -> Rule:
    """A cast moves partial sums only between floating types."""
    floats = (
        node.operands[0].type.dtype.is_floating_point and node.output.type.dtype.is_floating_point
    )
    return (_elementwise("self", passes=True) if floats else _elementwise())(node)


def _emit_cast(node: Node, render: Render) -> str:
    return f"{render.arg('self')}.to({node.output.type.dtype})"


register(_CASTS, Op(_cast_rule, _emit_cast))


def _emit_dropout(node: Node, render: Render) -> str:
    axes = ", ".join(f'"{name}"' for name in render.sharded_axes())
    generator = f"self.generator({axes})"
    return call("ops.dropout", render.arg("input"), render.arg("p"), "self.training", generator)


def _dropout_rule(node: Node) -> Rule:
    shape = node.output.type.shape
    return broadcast_rule([shape], shape, linear=[[0]], passes=True)


register("aten.dropout.default", Op(_dropout_rule, _emit_dropout, saves=("result",)))


# --- along one dim -----------------------------------------------------------------------------


def _dim_rule(*, linear: bool = False) -> Callable[[Node], Rule]:
    def build(node: Node) -> Rule:
        rank = len(node.operands[0].type.shape)
        return _along(node, [_dim(node, "dim", rank)], linear=linear)

    return build


def _emit_softmax(function: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        return call(
            function, render.arg("self"), dim=render.arg("dim"), dtype=_optional(render, "dtype")
        )

    return emit


register("aten.softmax.int", Op(_dim_rule(), _emit_softmax("F.softmax"), saves=("result",)))
register("aten.log_softmax.int", Op(_dim_rule(), _emit_softmax("F.log_softmax"), saves=("result",)))


def _cumsum_rule(node: Node) -> Rule:
    return _dim_rule(linear=node.output.type.dtype == node.operands[0].type.dtype)(node)


def _emit_cumsum(node: Node, render: Render) -> str:
    dtype = _optional(render, "dtype")
    return call(f"{render.arg('self')}.cumsum", render.arg("dim"), dtype=dtype)


register("aten.cumsum.default", Op(_cumsum_rule, _emit_cumsum))
register("aten.cumprod.default", Op(_dim_rule(), "{self}.cumprod({dim})", saves=("self", "result")))
register("aten.glu.default", Op(_dim_rule(), "F.glu({self}, dim={dim})", saves=("self",)))


def _emit_sort(node: Node, render: Render) -> str:
    descending = "True" if node.arg("descending") else ""
    return call(f"{render.arg('self')}.sort", dim=render.arg("dim"), descending=descending)


register("aten.sort.default", Op(_dim_rule(), _emit_sort, saves=("result",)))


def _emit_topk(node: Node, render: Render) -> str:
    flags = {name: "" if node.arg(name) else "False" for name in ("largest", "sorted")}
    return call(f"{render.arg('self')}.topk", render.arg("k"), dim=render.arg("dim"), **flags)


register("aten.topk.default", Op(_dim_rule(), _emit_topk, saves=("result",)))


def _diff_rule(node: Node) -> Rule:
    if len(node.operands) > 1:
        return _opaque(node)  # values to put before or after
    return _dim_rule(linear=node.output.type.dtype.is_floating_point)(node)


def _emit_diff(node: Node, render: Render) -> str:
    return call(
        "torch.diff",
        render.arg("self"),
        n="" if node.arg("n") == 1 else render.arg("n"),
        dim="" if node.arg("dim") == -1 else render.arg("dim"),
        prepend=_optional(render, "prepend"),
        append=_optional(render, "append"),
    )


register("aten.diff.default", Op(_diff_rule, _emit_diff))


def _norm_rule(node: Node) -> Rule:
    shape = node.arg("normalized_shape")
    assert isinstance(shape, tuple)
    whole = " ".join(f"[h{i}]" for i in range(len(shape)))
    operands = ", ".join([f"... {whole}", *[whole] * (len(node.operands) - 1)])
    return _text(f"{operands} -> ... {whole}", uneven="")(node)


def _emit_layer_norm(node: Node, render: Render) -> str:
    args = [render.arg(name) for name in ("input", "normalized_shape")]
    weight, bias = (_optional(render, name) for name in ("weight", "bias"))
    if weight and bias:
        return call("F.layer_norm", *args, weight, bias, eps=render.arg("eps"))
    return call("F.layer_norm", *args, weight=weight, bias=bias, eps=render.arg("eps"))


def _emit_rms_norm(node: Node, render: Render) -> str:
    args = [render.arg(name) for name in ("input", "normalized_shape")]
    weight = _optional(render, "weight")
    return call("F.rms_norm", *args, *([weight] if weight else []), eps=_optional(render, "eps"))


register(
    "aten.layer_norm.default", Op(_norm_rule, _emit_layer_norm, saves=("input", "weight", "bias"))
)
register(
    "aten.rms_norm.default", Op(_norm_rule, _emit_rms_norm, saves=("input", "weight if input"))
)


# --- reductions --------------------------------------------------------------------------------


def _emit_reduce(name: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        named = {key for key, _ in node.args}
        keep = "True" if "keepdim" in named and node.arg("keepdim") else ""
        dims = render.arg("dim") if "dim" in named else ""
        dims = "" if dims == "None" and not keep else dims
        dtype = _optional(render, "dtype") if "dtype" in named else ""
        text = call(
            f"{render.arg('self')}.{name}", *([dims] if dims else []), keepdim=keep, dtype=dtype
        )
        if name != "mean":
            return text
        rank = len(node.operands[0].type.shape)
        reduced = _dims(node, "dim", rank) if "dim" in named else range(rank)
        cut = [axis for i in reduced if (axis := render.axis(f"d{i}"))]
        return text + "".join(f" / {axis}.size" for axis in cut)  # local means average

    return emit


register(
    "aten.sum.dim_IntList aten.sum.default",
    Op(_reduce(additive=True), _emit_reduce("sum")),
)
register(
    "aten.mean.dim aten.mean.default",
    Op(_reduce(additive=True), _emit_reduce("mean")),
)
register(
    "aten.amax.default", Op(_reduce(additive=False), _emit_reduce("amax"), saves=("self", "result"))
)
register(
    "aten.amin.default", Op(_reduce(additive=False), _emit_reduce("amin"), saves=("self", "result"))
)
register("aten.any.dim aten.any.default", Op(_reduce(additive=False), _emit_reduce("any")))
register("aten.all.dim aten.all.default", Op(_reduce(additive=False), _emit_reduce("all")))
register("aten.argmax.default", Op(_reduce(additive=False), _emit_reduce("argmax")))
register("aten.argmin.default", Op(_reduce(additive=False), _emit_reduce("argmin")))
register("aten.max.dim", Op(_reduce(additive=False), _emit_reduce("max"), saves=("result",)))
register("aten.min.dim", Op(_reduce(additive=False), _emit_reduce("min"), saves=("result",)))
register(
    "aten.max.default", Op(_reduce(additive=False), _emit_reduce("max"), saves=("self", "result"))
)
register(
    "aten.min.default", Op(_reduce(additive=False), _emit_reduce("min"), saves=("self", "result"))
)
register(
    "aten.logsumexp.default",
    Op(_reduce(additive=False), _emit_reduce("logsumexp"), saves=("self", "result")),
)


def _emit_spread(name: str) -> Callable[[Node, Render], str]:
    """Variance or standard deviation; the two overloads say the same in different words."""

    def emit(node: Node, render: Render) -> str:
        named = {key for key, _ in node.args}
        if "unbiased" in named:
            correction = "" if node.arg("unbiased") else "0"
        else:
            correction = "" if node.arg("correction") in (None, 1) else render.arg("correction")
        dims = [render.arg("dim")] if node.arg("dim") is not None else []
        keep = "True" if node.arg("keepdim") else ""
        return call(f"{render.arg('self')}.{name}", *dims, correction=correction, keepdim=keep)

    return emit


register(
    "aten.var.correction aten.var.dim",
    Op(_reduce(additive=False), _emit_spread("var"), saves=("self",)),
)
register(
    "aten.std.correction aten.std.dim",
    Op(_reduce(additive=False), _emit_spread("std"), saves=("self", "result")),
)


def _emit_vector_norm(node: Node, render: Render) -> str:
    keep = "True" if node.arg("keepdim") else ""
    return call(
        "torch.linalg.vector_norm",
        render.arg("self"),
        render.arg("ord"),
        dim=_optional(render, "dim"),
        keepdim=keep,
        dtype=_optional(render, "dtype"),
    )


register(
    "aten.linalg_vector_norm.default",
    Op(_reduce(additive=False), _emit_vector_norm, saves=("self", "result")),
)


def _mse_rule(node: Node) -> Rule:
    shape = node.operands[0].type.shape
    if _shapes(node.operands) != [shape, shape] or node.arg("reduction") not in _REDUCTION:
        return _opaque(node)
    return _text("..., ... -> ")(node)


def _emit_mse(node: Node, render: Render) -> str:
    reduction = node.arg("reduction")
    name = _REDUCTION.get(reduction, "none") if isinstance(reduction, int) else "none"
    text = call(
        "F.mse_loss",
        render.arg("self"),
        render.arg("target"),
        reduction="" if name == "mean" else f'"{name}"',
    )
    rank = len(node.operands[0].type.shape) if name == "mean" else 0
    cut = [axis for i in range(rank) if (axis := render.axis(f"i{i}"))]
    return text + "".join(f" / {axis}.size" for axis in cut)  # local means average


_REDUCTION = {1: "mean", 2: "sum"}
register("aten.mse_loss.default", Op(_mse_rule, _emit_mse, saves=("self", "target")))


# --- views -------------------------------------------------------------------------------------


def _view_rule(node: Node) -> Rule:
    return reshape_rule(node.operands[0].type.shape, node.output.type.shape)


def _emit_view(node: Node, render: Render) -> str:
    return call(f"{render.arg('self')}.reshape", *render.sizes())


register(
    "aten.view.default aten.reshape.default aten._unsafe_view.default aten.unsqueeze.default"
    " aten.squeeze.dim aten.squeeze.dims aten.squeeze.default aten.flatten.using_ints"
    " aten.unflatten.int",
    Op(_view_rule, _emit_view, kind="view"),
)


def _permute(node: Node, order: Sequence[int]) -> Rule:
    shape = node.operands[0].type.shape
    operand = tuple((f"d{i}",) for i in range(len(shape)))
    sizes = {f"d{i}": size for i, size in enumerate(shape)}
    return Rule(
        operands=(operand,),
        results=(tuple(operand[i] for i in order),),
        sizes=sizes,
        linear=(frozenset({0}),),
        uneven=frozenset(sizes),
        passes=True,
    )


def _transpose_rule(node: Node) -> Rule:
    rank = len(node.operands[0].type.shape)
    order = list(range(rank))
    a, b = _dim(node, "dim0", rank), _dim(node, "dim1", rank)
    order[a], order[b] = order[b], order[a]
    return _permute(node, order)


def _permute_rule(node: Node) -> Rule:
    return _permute(node, _dims(node, "dims", len(node.operands[0].type.shape)))


register("aten.transpose.int", Op(_transpose_rule, "{self}.transpose({dim0}, {dim1})", kind="view"))
register("aten.permute.default", Op(_permute_rule, "{self}.permute({dims})", kind="view"))


def _pairs(text: str) -> Callable[[Node], Rule]:
    """Complex numbers and the pairs of real ones that they are."""

    def build(node: Node) -> Rule:
        return replace(_text(text)(node), linear=(frozenset({0}),), passes=True)

    return build


register(
    "aten.view_as_complex.default",
    Op(_pairs("... [two] -> ..."), "torch.view_as_complex({self})", kind="view"),
)
register(
    "aten.view_as_real.default",
    Op(_pairs("... -> ... [two]"), "torch.view_as_real({self})", kind="view"),
)
register(
    "aten.polar.default",
    Op(_elementwise(uneven=False), "torch.polar({abs}, {angle})", saves=("result",)),
)


def _reversed_rule(node: Node) -> Rule:
    return _permute(node, list(reversed(range(len(node.operands[0].type.shape)))))


register("aten.t.default", Op(_reversed_rule, "{self}.t()", kind="view"))
register("aten.numpy_T.default", Op(_reversed_rule, "{self}.T", kind="view"))


def _expand_rule(node: Node) -> Rule:
    """New rows of a broadcast dim are a factor of the result alone: each rank makes its own."""
    return broadcast_rule(_shapes(node.operands), node.output.type.shape, linear=[[0]])


def _emit_expand(node: Node, render: Render) -> str:
    return call(f"{render.arg('self')}.expand", *render.sizes())


register("aten.expand.default", Op(_expand_rule, _emit_expand, kind="view"))


def _slice_rule(node: Node) -> Rule:
    return _along(node, [_dim(node, "dim", len(node.operands[0].type.shape))], linear=True)


def _emit_slice(node: Node, render: Render) -> str:
    rank = len(node.operands[0].type.shape)
    dim = _dim(node, "dim", rank)
    size = node.operands[0].type.shape[dim]
    start, end, step = (node.arg(name) for name in ("start", "end", "step"))
    first = "" if start in (None, 0) else str(start)
    last = "" if end is None or (isinstance(end, int) and end >= size) else str(end)
    window = f"{first}:{last}" + (f":{step}" if step not in (None, 1) else "")
    if dim == rank - 1 and rank > 1:
        return f"{render.arg('self')}[..., {window}]"
    return f"{render.arg('self')}[{', '.join([':'] * dim + [window])}]"


register("aten.slice.Tensor", Op(_slice_rule, _emit_slice, kind="view"))


def _select_rule(node: Node) -> Rule:
    shape = node.operands[0].type.shape
    dim = _dim(node, "dim", len(shape))
    operand = tuple((f"d{i}",) for i in range(len(shape)))
    sizes = {f"d{i}": size for i, size in enumerate(shape)}
    return Rule(
        operands=(operand,),
        results=(tuple(d for i, d in enumerate(operand) if i != dim),),
        sizes=sizes,
        whole=frozenset({f"d{dim}"}),
        linear=(frozenset({0}),),
        passes=True,
    )


register("aten.select.int", Op(_select_rule, "{self}.select({dim}, {index})", kind="view"))


def _split_rule(node: Node) -> Rule:
    return _along(node, [_dim(node, "dim", len(node.operands[0].type.shape))], linear=True)


def _emit_split(method: str, how: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        text = call(f"{render.arg('self')}.{method}", render.arg(how), dim=render.arg("dim"))
        return text if len(node.outputs) > 1 else f"{text}[0]"

    return emit


register("aten.chunk.default", Op(_split_rule, _emit_split("chunk", "chunks"), kind="view"))
register("aten.split.Tensor", Op(_split_rule, _emit_split("split", "split_size"), kind="view"))
register(
    "aten.split_with_sizes.default",
    Op(_split_rule, _emit_split("split", "split_sizes"), kind="view"),
)
register("aten.split.sizes", Op(_split_rule, _emit_split("split", "split_size"), kind="view"))


def _unbind_rule(node: Node) -> Rule:
    rule = _select_rule(node)
    return Rule(
        operands=rule.operands,
        results=rule.results * len(node.outputs),
        sizes=rule.sizes,
        whole=rule.whole,
        linear=rule.linear,
        passes=True,
    )


def _emit_unbind(node: Node, render: Render) -> str:
    text = call(f"{render.arg('self')}.unbind", render.arg("dim"))
    return text if len(node.outputs) > 1 else f"{text}[0]"


register("aten.unbind.int", Op(_unbind_rule, _emit_unbind, kind="view"))


def _cat_rule(node: Node) -> Rule:
    shape = node.output.type.shape
    dim = _dim(node, "dim", len(shape))
    sizes = {f"d{i}": size for i, size in enumerate(shape) if i != dim}
    operands: list[Dims] = []
    for k, value in enumerate(node.operands):
        sizes[f"x{k}"] = value.type.shape[dim]
        operands.append(tuple((f"x{k}",) if i == dim else (f"d{i}",) for i in range(len(shape))))
    sizes["y"] = shape[dim]
    result = tuple(("y",) if i == dim else (f"d{i}",) for i in range(len(shape)))
    whole = frozenset({"y", *(f"x{k}" for k in range(len(node.operands)))})
    group = frozenset(range(len(node.operands)))
    return Rule(
        operands=tuple(operands), results=(result,), sizes=sizes, whole=whole, linear=(group,)
    )


register("aten.cat.default", Op(_cat_rule, "torch.cat({tensors}, dim={dim})"))


def _stack_rule(node: Node) -> Rule:
    shape = node.output.type.shape
    dim = _dim(node, "dim", len(shape))
    result = tuple((f"d{i}",) for i in range(len(shape)))
    operand = tuple(d for i, d in enumerate(result) if i != dim)
    n = len(node.operands)
    return Rule(
        operands=(operand,) * n,
        results=(result,),
        sizes={f"d{i}": size for i, size in enumerate(shape)},
        whole=frozenset({f"d{dim}"}),
        linear=(frozenset(range(n)),),
    )


register("aten.stack.default", Op(_stack_rule, "torch.stack({tensors}, dim={dim})"))


def _pad_rule(node: Node) -> Rule:
    pad = node.arg("pad")
    assert isinstance(pad, tuple)
    rank = len(node.operands[0].type.shape)
    dims = [rank - 1 - k for k in range(len(pad) // 2) if pad[2 * k] or pad[2 * k + 1]]
    return _along(node, dims, linear=node.arg("value") in (None, 0))


def _emit_pad(node: Node, render: Render) -> str:
    mode = _optional(render, "mode", '"constant"') if "mode" in dict(node.args) else ""
    value = _optional(render, "value") if node.arg("value") != 0 else ""
    return call("F.pad", render.arg("self"), render.arg("pad"), mode=mode, value=value)


register("aten.pad.default aten.constant_pad_nd.default", Op(_pad_rule, _emit_pad))


def _roll_rule(node: Node) -> Rule:
    rank = len(node.operands[0].type.shape)
    return _along(node, _dims(node, "dims", rank), linear=True)


def _emit_roll(node: Node, render: Render) -> str:
    dims = [render.arg("dims")] if node.arg("dims") else []
    return call(f"{render.arg('self')}.roll", render.arg("shifts"), *dims)


register("aten.roll.default", Op(_roll_rule, _emit_roll))
register("aten.flip.default", Op(_roll_rule, "{self}.flip({dims})"))


def _triangle_rule(node: Node) -> Rule:
    rank = len(node.operands[0].type.shape)
    return _along(node, [rank - 2, rank - 1], linear=True)


def _emit_triangle(function: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        diagonal = [render.arg("diagonal")] if node.arg("diagonal") else []
        return call(function, render.arg("self"), *diagonal)

    return emit


register("aten.tril.default", Op(_triangle_rule, _emit_triangle("torch.tril")))
register("aten.triu.default", Op(_triangle_rule, _emit_triangle("torch.triu")))


def _repeat_interleave_rule(node: Node) -> Rule:
    """`b n s d -> b (n r) s d`: the repeated dim keeps its blocks."""
    shape, result = node.operands[0].type.shape, node.output.type.shape
    if node.arg("dim") is None:
        return _opaque(node)
    dim = _dim(node, "dim", len(shape))
    sizes = {f"d{i}": size for i, size in enumerate(shape)} | {"r": result[dim] // shape[dim]}
    operand = tuple((f"d{i}",) for i in range(len(shape)))
    out = tuple((f"d{i}", "r") if i == dim else (f"d{i}",) for i in range(len(shape)))
    return Rule(
        operands=(operand,), results=(out,), sizes=sizes, whole=frozenset({"r"}),
        linear=(frozenset({0}),), passes=True,
    )  # fmt: skip


register(
    "aten.repeat_interleave.self_int",
    Op(_repeat_interleave_rule, "{self}.repeat_interleave({repeats}, dim={dim})"),
)


def _repeat_rule(node: Node) -> Rule:
    """Dims that are not repeated may be cut; a cut of a repeated one would change the order."""
    shape, result = node.operands[0].type.shape, node.output.type.shape
    lead = len(result) - len(shape)
    sizes: dict[str, int] = {}
    operand: list[tuple[str, ...]] = []
    out: list[tuple[str, ...]] = []
    for i, size in enumerate(result):
        own = shape[i - lead] if i >= lead else 1
        sizes |= {f"r{i}": size // own if own else 1, f"d{i}": own}
        out.append((f"r{i}", f"d{i}"))
        if i >= lead:
            operand.append((f"d{i}",))
    return Rule(
        operands=(tuple(operand),), results=(tuple(out),), sizes=sizes,
        whole=frozenset(f"r{i}" for i in range(len(result))),
        linear=(frozenset({0}),), passes=True,
    )  # fmt: skip


register("aten.repeat.default", Op(_repeat_rule, "{self}.repeat({repeats})"))


# --- picking by index ----------------------------------------------------------------------------


def _index_select_rule(node: Node) -> Rule:
    """`d0 [x1] d2, j -> d0 j d2`."""
    shape, rank = node.operands[0].type.shape, len(node.operands[0].type.shape)
    if rank == 0 or len(node.operands[1].type.shape) != 1:
        return _opaque(node)
    dim = _dim(node, "dim", rank)
    operand = tuple(("x",) if i == dim else (f"d{i}",) for i in range(rank))
    sizes = {d[0]: size for d, size in zip(operand, shape, strict=True)}
    return Rule(
        operands=(operand, (("j",),)),
        results=(tuple(("j",) if i == dim else (f"d{i}",) for i in range(rank)),),
        sizes=sizes | {"j": node.operands[1].type.shape[0]},
        whole=frozenset({"x"}),
        linear=(frozenset({0}),),
    )


register(
    "aten.index_select.default",
    Op(_index_select_rule, "{self}.index_select({dim}, {index})", saves=("index",)),
)


def _gather_rule(node: Node) -> Rule:
    """Dims of equal size in source and index may be cut, and the picked dim of the index."""
    (source, index), sizes = _shapes(node.operands), dict[str, int]()
    if not source or not index:
        return _opaque(node)
    dim = _dim(node, "dim", len(source))
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


register(
    "aten.gather.default",
    Op(_gather_rule, "{self}.gather({dim}, {index})", saves=("self", "index")),
)


def _index_rule(node: Node) -> Rule:
    """`x[:, i, j]`: dims that are not indexed may be cut, and those of the broadcast indices."""
    indices = node.arg("indices")
    assert isinstance(indices, tuple)
    at = [i for i, index in enumerate(indices) if isinstance(index, Value)]
    shape, picks = node.operands[0].type.shape, _shapes(node.operands[1:])
    kinds = {index.type.dtype for index in node.operands[1:]}
    if not at or at != list(range(at[0], at[-1] + 1)) or kinds & {torch.bool, torch.uint8}:
        return _opaque(node)
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


register("aten.index.Tensor", Op(_index_rule, _emit_index, saves=("indices",)))


def _one_hot_rule(node: Node) -> Rule:
    return _text("... -> ... [c]")(node)


register("aten.one_hot.default", Op(_one_hot_rule, "F.one_hot({self}, {num_classes})"))


# --- creation: every rank makes the whole, then slices for free ----------------------------------


def _emit_factory(function: str, *names: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        args = [render.arg(name) for name in names]
        return call(function, *args, dtype=str(node.output.type.dtype), device="self.device")

    return emit


def _emit_arange(node: Node, render: Render) -> str:
    """Counting whole numbers from 0: its length may be that of the sequence, so it is a size."""
    start = node.arg("start") if node.op == "aten.arange.start" else 0
    end = node.arg("end")
    if start != 0 or not isinstance(end, int):
        names = ("end",) if node.op == "aten.arange.default" else ("start", "end")
        return _emit_factory("torch.arange", *names)(node, render)
    dtype = str(node.output.type.dtype)
    return call("torch.arange", render.sizes()[0], dtype=dtype, device="self.device")


register("aten.arange.default aten.arange.start", Op(_opaque, _emit_arange))
register(
    "aten.arange.start_step", Op(_opaque, _emit_factory("torch.arange", "start", "end", "step"))
)


def _sized_factory(function: str, *names: str) -> Op:
    """A constant fill: the result's dims are factors, so that each rank makes its own part."""

    def rule(node: Node) -> Rule:
        """`new_zeros` takes a tensor, of which it reads nothing but the dtype."""
        made = broadcast_rule([], node.output.type.shape, passes=False)
        given = opaque_rule(_shapes(node.operands), [])
        return replace(
            made, operands=given.operands, sizes={**made.sizes, **given.sizes}, whole=given.whole
        )

    def emit(node: Node, render: Render) -> str:
        sizes = render.sizes()
        shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
        args = [shape, *(render.arg(name) for name in names)]
        return call(function, *args, dtype=str(node.output.type.dtype), device="self.device")

    return Op(rule, emit)


register("aten.full.default", _sized_factory("torch.full", "fill_value"))
register("aten.new_full.default", _sized_factory("torch.full", "fill_value"))
register("aten.zeros.default", _sized_factory("torch.zeros"))
register("aten.ones.default", _sized_factory("torch.ones"))
register("aten.new_zeros.default", _sized_factory("torch.zeros"))
register("aten.new_ones.default", _sized_factory("torch.ones"))
register("aten.scalar_tensor.default", Op(_opaque, _emit_factory("torch.tensor", "s")))


# --- matrix products -----------------------------------------------------------------------------


def _linear_rule(node: Node) -> Rule:
    if len(node.operands) == 3:
        return _text("... k, o k, o -> ... o", uneven="o", addends=[2])(node)
    return _text("... k, o k -> ... o", uneven="o")(node)


def _emit_linear(node: Node, render: Render) -> str:
    bias = _optional(render, "bias")
    return call("F.linear", render.arg("input"), render.arg("weight"), *([bias] if bias else []))


register(
    "aten.linear.default",
    Op(
        _linear_rule,
        _emit_linear,
        kind="matmul",
        saves=("input if weight", "weight if input"),
    ),
)


register(
    "shardwright.affine",
    Op(  # the weight is [in, out], as in GPT-2's Conv1D
        _text("... k, k o, o -> ... o", uneven="o", addends=[2]),
        "F.linear({input}, {weight}.T, {bias})",
        kind="matmul",
        saves=("input if weight", "weight if input"),
    ),
)


def _addmm_rule(node: Node) -> Rule:
    bias, left, right = _shapes(node.operands)
    skipped = 2 - len(bias)  # it may have fewer dims, and dims of size 1
    wholes = zip(("m", "o")[skipped:], (left[0], right[1])[skipped:], bias, strict=True)
    names = [name if size == whole else "1" for name, whole, size in wholes]
    uneven = "o" if "o" in names else ""  # a bias that broadcasts would fill the padding
    return _text(f"{' '.join(names)}, m k, k o -> m o", uneven=uneven, addends=[0])(node)


def _emit_addmm(node: Node, render: Render) -> str:
    scale = {name: "" if node.arg(name) == 1 else render.arg(name) for name in ("beta", "alpha")}
    args = [render.arg(name) for name in ("self", "mat1", "mat2")]
    return call("torch.addmm", *args, **scale)


register(
    "aten.addmm.default",
    Op(_addmm_rule, _emit_addmm, kind="matmul", saves=("mat1 if mat2", "mat2 if mat1")),
)
register(
    "aten.mm.default",
    Op(
        _text("m k, k n -> m n"),
        "{self} @ {mat2}",
        kind="matmul",
        saves=("self if mat2", "mat2 if self"),
    ),
)
register(
    "aten.bmm.default",
    Op(
        _text("b m k, b k n -> b m n"),
        "{self} @ {mat2}",
        kind="matmul",
        saves=("self if mat2", "mat2 if self"),
    ),
)


def _matmul_rule(node: Node) -> Rule:
    left, right = _shapes(node.operands)
    if len(right) == 1:
        return _text("... k, k -> ...")(node)
    if len(left) == 1:
        return _text("k, ... k n -> ... n")(node)
    batch = node.output.type.shape[:-2]
    sizes = {f"i{i}": size for i, size in enumerate(batch) if size != 1}
    sizes |= {"m": left[-2], "k": left[-1], "n": right[-1]}

    def dims(shape: Sequence[int], last: tuple[str, str]) -> Dims:
        lead = len(batch) - (len(shape) - 2)
        outer = tuple((f"i{lead + i}",) if n != 1 else () for i, n in enumerate(shape[:-2]))
        return (*outer, (last[0],), (last[1],))

    return Rule(
        operands=(dims(left, ("m", "k")), dims(right, ("k", "n"))),
        results=(dims((*batch, 1, 1), ("m", "n")),),
        sizes=sizes,
    )


register(
    "aten.matmul.default",
    Op(_matmul_rule, "{self} @ {other}", kind="matmul", saves=("self if other", "other if self")),
)


def _einsum_rule(node: Node) -> Rule:
    left, arrow, right = str(node.arg("equation")).replace(" ", "").partition("->")
    if not arrow:  # dims that occur once, in the order of the alphabet
        letters = left.replace(",", "").replace(".", "")
        once = sorted(name for name in letters if letters.count(name) == 1)
        right = "".join(["..." if "." in left else "", *once])
    terms = [*left.split(","), right]
    if any(len(set(names)) < len(names) for names in (t.replace(".", "") for t in terms)):
        return _opaque(node)  # `ii` is a diagonal, which a cut would change
    shapes = [*_shapes(node.operands), *_shapes(node.outputs)]
    spelled = [_einsum_term(term, shape) for term, shape in zip(terms, shapes, strict=True)]
    return _text(f"{', '.join(spelled[:-1])} -> {spelled[-1]}")(node)


def _einsum_term(term: str, shape: Sequence[int]) -> str:
    """`...ij` as the names of its dims, `e1 e0 i j`; dims of size 1 may broadcast."""
    before, _, after = term.partition("...")
    count = len(shape) - len(before) - len(after)
    names = [*before, *(f"e{i}" for i in reversed(range(count))), *after]
    return " ".join("1" if n == 1 else name for name, n in zip(names, shape, strict=True))


def _emit_einsum(node: Node, render: Render) -> str:
    return call("torch.einsum", render.arg("equation"), *render.items("tensors"))


register(
    "aten.einsum.default",
    Op(_einsum_rule, _emit_einsum, kind="matmul", saves=("tensors",)),
)


# --- lookup, attention, loss ---------------------------------------------------------------------


def _emit_embedding(node: Node, render: Render) -> str:
    ids, weight = render.arg("indices"), render.arg("weight")
    padding = "" if node.arg("padding_idx") in (None, -1) else render.arg("padding_idx")
    by_frequency = "True" if node.arg("scale_grad_by_freq") else ""
    axis = render.axis("v")
    if axis:
        rows = str(node.operands[0].type.shape[0])
        return call("ops.vocab_embedding", ids, weight, axis, size=rows, padding_idx=padding)
    return call("F.embedding", ids, weight, padding_idx=padding, scale_grad_by_freq=by_frequency)


def _embedding_rule(node: Node) -> Rule:
    if node.arg("scale_grad_by_freq"):
        return _opaque(node)  # the frequency counts need all tokens
    return _text("v h, ... -> ... h", uneven="v")(node)


register("aten.embedding.default", Op(_embedding_rule, _emit_embedding, saves=("indices",)))


# Query heads of one key head on several ranks, each with a copy of it: tensor parallelism over
# more ranks than there are key heads.
_INNER_HEADS = frozenset({"g"})


def _attention_rule(node: Node) -> Rule:
    query, key = node.operands[:2]
    heads, groups = key.type.shape[1], query.type.shape[1] // key.type.shape[1]
    sizes = {
        "b": query.type.shape[0], "n": heads, "g": groups, "q": query.type.shape[2],
        "k": key.type.shape[2], "d": query.type.shape[3],
    }  # fmt: skip
    mask = node.arg("mask")
    term = ""
    if isinstance(mask, Value):
        names = ("b", "(n g)", "q", "[k]")[4 - len(mask.type.shape) :]
        pairs = zip(names, mask.type.shape, strict=True)
        term = ", " + " ".join("1" if size == 1 else name for name, size in pairs)
    term += ", (n g)" if _sinks(node) is not None else ""
    held = "b n [k] [d], b n [k] [e]"
    if decompressing(node) is not None:
        held, term = "b n [k] [w]", f"{term}, (n g) [u] [r]"
    text = f"b (n g) q [d], {held}{term} -> b (n g) q [e]"
    rule = replace(_text(text, sizes=sizes)(node), algorithms=_attention_algorithms(node))
    return replace(rule, inner=_INNER_HEADS)


def _sinks(node: Node) -> Value | None:
    """The scores of attention sinks; nodes of older plans have no such argument."""
    sinks = dict(node.args).get("sinks")
    return sinks if isinstance(sinks, Value) else None


def _attention_algorithms(node: Node) -> dict[str, Algorithm]:
    """Ways to run self-attention over an axis that cuts queries, keys and values alike.

    Dropout would need the weights of all ranks, and a mask its rows and columns: neither is known
    to these.  Latents, which are one key head, are only sent whole.
    """
    query, key = node.operands[:2]
    heads = query.type.shape[1]
    masked = isinstance(node.arg("mask"), Value)
    if masked or node.arg("dropout_p") or query.type.shape[2] != key.type.shape[2]:
        return {}
    sinks = () if _sinks(node) is None else (V,)
    latents = decompressing(node) is not None
    held = (S(2), *sinks, V) if latents else (S(2), S(2), *sinks)
    way = Algorithm(("q", "k"), (S(2), *held), (S(2),))
    found = {"ring": way, "gather": way}
    if latents:
        return found
    if heads % key.type.shape[1] == 0:
        found["ulysses"] = replace(way, fits=_heads_divide)
    if node.arg("window") and node.arg("causal"):
        found["window"] = way
    return found


def _heads_divide(sizes: Mapping[str, int], ranks: int) -> bool:
    """Do all ranks get as many query heads, and need as many key heads?"""
    heads, kv_heads = sizes["n"] * sizes["g"], sizes["n"]
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


_ATTENTION = {
    "ring": "ring_attention",
    "gather": "gather_kv_attention",
    "ulysses": "ulysses_attention",
    "window": "window_attention",
}


def _emit_attention(node: Node, render: Render) -> str:
    if dict(node.args).get("chunk"):
        raise ValueError(f"{node.loc}: attention in chunks is only known over a cache")
    query = render.arg("q")
    kwargs = {
        "scale": render.arg("scale"),
        "causal": "True" if node.arg("causal") else "",
        "window": render.arg("window") if node.arg("window") else "",
        "softcap": render.arg("softcap") if node.arg("softcap") else "",
        "sinks": "" if _sinks(node) is None else render.arg("sinks"),
        "up": "" if decompressing(node) is None else render.arg("up"),
    }
    name, axis = render.algorithm()
    if name:
        layout = f"ops.Layout.{render.order()}({query}.size(2) * {axis}.size, {axis}.size)"
        kwargs = {"group": axis, **kwargs, "layout": layout}
        return call(f"ops.{_ATTENTION[name]}", query, render.arg("k"), render.arg("v"), **kwargs)
    axis = render.axis("q") if node.arg("causal") or node.arg("window") else ""
    kwargs["query_start"] = f"{axis}.rank * {query}.size(2)" if axis else ""
    if node.arg("dropout_p"):
        axes = ", ".join(f'"{name}"' for name in render.sharded_axes())
        kwargs["dropout_p"] = f"{render.arg('dropout_p')} if self.training else 0.0"
        kwargs["generator"] = f"self.generator({axes})"
    mask = _optional(render, "mask")
    args = [query, render.arg("k"), render.arg("v"), *([mask] if mask else [])]
    return call("ops.attention", *args, **kwargs)


register(
    "shardwright.attention",
    Op(
        _attention_rule,
        _emit_attention,
        kind="attention",
        saves=("q", "k", "v", "sinks", "up", "result"),
    ),
)


def _cached_attention_rule(node: Node) -> Rule:
    """New tokens over a cache; `c` counts all tokens of a sequence, and stands in no operand.

    Without the operand v the values are the first `value_dim` numbers of the keys.  Behind the
    positions come sinks, if there are any, which join once where keys are cut, and `up`, which
    makes keys and values of latents; both are cut with the query heads.
    """
    query, key = node.operands[:2]
    context = node.arg("context")
    assert isinstance(context, int)
    heads, new = key.type.shape[1], query.type.shape[2]
    groups = query.type.shape[1] // heads
    values = "" if values_in_keys(node) else " b n [k] [e],"
    sink, more = ("", ()) if _sinks(node) is None else (", (n g)", (V,))
    key_dim, up = "d", ""
    if decompressing(node) is not None:
        key_dim, up, more = "w", ", (n g) [u] [r]", (*more, V)
    text = f"b (n g) [q] [d], b n [k] [{key_dim}],{values} b [q]{sink}{up} -> b (n g) [q] [e]"
    rule = _text(text, sizes={"n": heads, "g": groups})(node)
    tensors = 2 if values_in_keys(node) else 3  # that have tokens in dim 2
    cut = (S(2),) * tensors + (S(1),)
    shared = Algorithm(("q", "k", "c"), (*cut, *more), (S(2),))
    whole = Algorithm(("c",), (R,) * len(node.operands), (R,), label="s")
    return replace(
        rule,
        sizes={**rule.sizes, "c": context + new},
        uneven=frozenset({"c"}),
        inner=_INNER_HEADS,
        algorithms={"ring": shared, "gather": shared, "pass_q": shared, "tree": whole},
    )


def values_in_keys(node: Node) -> bool:
    """Does an attention read its values from the keys, or make them of these, and have no others?

    Nodes of older plans have no argument `value_dim`: theirs are an operand.
    """
    return bool(dict(node.args).get("value_dim"))


def cached_per_head(node: Node) -> int:
    """Numbers that an attention caches, or sends and saves, per token and key head."""
    stored = node.operands[1:2] if values_in_keys(node) else node.operands[1:3]
    return sum(value.type.shape[3] for value in stored)


def decompressing(node: Node) -> Value | None:
    """The weight (heads, d + dv, r) with which an attention makes keys and values of latents.

    Only the expanded form of `ir.latent` has one.
    """
    up = dict(node.args).get("up")
    return up if isinstance(up, Value) else None


def _emit_cached_attention(node: Node, render: Render) -> str:
    name, axis = render.algorithm()
    return call(
        "ops.cached_attention",
        *(render.arg(tensor) for tensor in ("q", "k", "v")),
        f"self.{node.arg('cache')}",
        render.arg("positions"),
        algorithm=f'"{name}"' if name else "",
        axis=axis,
        scale=render.arg("scale"),
        window=render.arg("window") if node.arg("window") else "",
        softcap=render.arg("softcap") if node.arg("softcap") else "",
        sinks="" if _sinks(node) is None else render.arg("sinks"),
        chunk=render.arg("chunk") if dict(node.args).get("chunk") else "",
        up="" if decompressing(node) is None else render.arg("up"),
    )


register(
    "shardwright.cached_attention",
    Op(_cached_attention_rule, _emit_cached_attention, kind="attention", saves=("q", "k", "v")),
)


def _emit_last_token(node: Node, render: Render) -> str:
    return call("ops.last_token", render.arg("x"), render.arg("positions"), axis=render.axis("s"))


register(
    "shardwright.last_token", Op(_text("b s ..., b s -> b 1 ..."), _emit_last_token, saves=("x",))
)


def _cross_entropy_rule(node: Node) -> Rule:
    if node.arg("reduction") not in _REDUCTION:
        return _opaque(node)
    vocabulary = "v" if node.arg("label_smoothing") == 0 else "[v]"
    return _text(f"... {vocabulary}, ... -> ", uneven="v", inside="v")(node)


def _emit_cross_entropy(node: Node, render: Render) -> str:
    reduction = node.arg("reduction")
    logits = node.operands[0].type.shape
    assert isinstance(reduction, int)
    if reduction not in _REDUCTION:
        raise ValueError(
            f"{node.loc}: cross_entropy with reduction='none' is not supported in a generated "
            "module; reduce with 'mean' or 'sum'"
        )
    tokens = [axis for i in range(len(logits) - 1) if (axis := render.axis(f"i{i}"))]
    vocab = render.axis("v")
    return call(
        "ops.cross_entropy",
        render.arg("logits"),
        render.arg("labels"),
        ignore_index="" if node.arg("ignore_index") == -100 else render.arg("ignore_index"),
        reduction="" if reduction == 1 else f'"{_REDUCTION[reduction]}"',
        label_smoothing="" if node.arg("label_smoothing") == 0 else render.arg("label_smoothing"),
        vocab_axis=vocab,
        vocab_size=str(logits[-1]) if vocab else "",
        token_axes=f"({', '.join(tokens)},)" if tokens else "",
    )


register(
    "shardwright.cross_entropy",
    Op(_cross_entropy_rule, _emit_cross_entropy, saves=("logits", "labels")),
)


# --- routing: experts, and what their routers use -------------------------------------------------


def _scatter_rule(node: Node) -> Rule:
    """Dims other than that written along may be cut, where index and source are as long."""
    shapes = _shapes(node.operands)
    rank = len(shapes[0])
    dim = _dim(node, "dim", rank)
    sizes: dict[str, int] = {}
    whole: set[str] = set()
    operands: list[Dims] = []
    for number, shape in enumerate(shapes):
        dims: list[tuple[str, ...]] = []
        for i, size in enumerate(shape):
            shared = i != dim and all(other[i] == shapes[0][i] for other in shapes)
            name = f"d{i}" if shared else f"x{number}_{i}"
            sizes[name] = size
            whole |= set() if shared else {name}
            dims.append((name,))
        operands.append(tuple(dims))
    return Rule(
        operands=tuple(operands), results=(operands[0],), sizes=sizes, whole=frozenset(whole)
    )


register(
    "aten.scatter.src",
    Op(_scatter_rule, "{self}.scatter({dim}, {index}, {src})", saves=("index",)),
)
register(
    "aten.scatter_add.default",
    Op(_scatter_rule, "{self}.scatter_add({dim}, {index}, {src})", saves=("index",)),
)
register(
    "aten.scatter.value",
    Op(_scatter_rule, "{self}.scatter({dim}, {index}, {value})", saves=("index",)),
)


def _moe_rule(node: Node) -> Rule:
    """Tokens, experts, each expert's hidden units, or the width of the result.

    Cutting experts (`e`) keeps the tokens whole: each rank adds up what its own experts give.  The
    algorithms `dispatch_i0`, ... cut experts and a dim of the tokens, and send tokens to experts.
    Of gate and up in one matrix, the hidden units can be cut where the two alternate (`pairs`);
    where they lie one after another, one cut would give a rank one without the other.
    """
    gating, transposed = node.arg("gating"), bool(node.arg("transposed"))
    rows = {"halves": "(two f)", "pairs": "(f two)"}.get(str(gating), "f")
    up = f"e [h] {rows}" if transposed else f"e {rows} [h]"
    down = "e f o" if transposed else "e o f"
    terms = {
        "x": "... [h]", "indices": "... [k]", "weights": "... [k]",
        "up": up, "gate": up, "down": down,
        "up_bias": f"e {rows}", "gate_bias": f"e {rows}", "down_bias": "e o",
    }  # fmt: skip
    present = [name for name in terms if isinstance(node.arg(name), Value)]
    fused = gating in ("halves", "pairs")
    rule = parse_rule(
        f"{', '.join(terms[name] for name in present)} -> ... o",
        _shapes(node.operands),
        _shapes(node.outputs),
        sizes={"two": 2} if fused else {},
        addends=[present.index("down_bias")] if "down_bias" in present else [],
    )
    whole = rule.whole | {"two"} if fused else rule.whole
    return replace(rule, whole=whole, algorithms=_dispatches(rule))


def _dispatches(rule: Rule) -> dict[str, Algorithm]:
    """Tokens cut along one dim, experts cut, all-to-all inside: one for each dim of the tokens."""
    stacked = (S(0),) * (len(rule.operands) - _TOKEN_OPERANDS)
    return {
        f"{_DISPATCH}{factor}": Algorithm(
            (factor, "e"),
            ((S(dim),) * _TOKEN_OPERANDS + stacked),
            (S(dim),),
            joint=True,
            alone=("e",),
        )
        for dim, (factor,) in enumerate(rule.operands[0][:-1])
        if rule.sizes[factor] > 1
    }


_DISPATCH = "dispatch_"
_TOKEN_OPERANDS = 3  # x, indices, weights


def _emit_moe(node: Node, render: Render) -> str:
    """Options are written where they differ from those of `runtime.moe`."""
    named = {
        name: _optional(render, name) for name in ("gate", "up_bias", "gate_bias", "down_bias")
    }
    usual = {
        "gating": "halves", "activation": "silu", "alpha": 1.0, "limit": 0.0, "offset": 0.0,
        "transposed": False, "weigh_input": False,
    }  # fmt: skip
    for name, value in usual.items():
        named[name] = "" if node.arg(name) == value else render.arg(name)
    _, axis = render.algorithm()
    if partial := render.axis("e"):
        axis = partial
    args = [render.arg(name) for name in ("x", "indices", "weights", "up", "down")]
    return call("ops.moe", *args, **named, expert_axis=axis, partial="True" if partial else "")


register(
    "shardwright.moe",
    Op(
        _moe_rule,
        _emit_moe,
        kind="experts",
        saves=("x", "indices", "weights", "up", "gate", "down"),
    ),
)
