"""Formulas that a model writes out become one operator each, as their structure tells.

    x32 * rsqrt(mean(x32 ** 2, -1) + eps)           ->  rms_norm, with its casts and weight
    (x - mean(x)) / sqrt(var(x) + eps) * w + b      ->  layer_norm
    x * cos + cat(-second half, first half) * sin   ->  rotary, in halves or in pairs
    0.5 * x * (1 + tanh(0.797885 * (x + ...)))      ->  gelu
    cross_entropy(float32(linear(x, weight)))       ->  linear_cross_entropy (`losses.py`)

One operator is one kernel, keeps less for backward than its parts do, and is one statement of the
generated module.  Half-precision norms are rounded once instead of after each step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isclose, pi, sqrt

from ..graph import Arg, Graph, Node, Value
from .convolutions import causal_convolution
from .formulas import Body, Formula, Found, with_operators
from .losses import cross_entropy, softcap

_ADD = "aten.add.Tensor"
_MUL = "aten.mul.Tensor"
_CAST = "aten.to.dtype"


def raised(graph: Graph) -> Graph:
    """`graph`, folded or flat, with every formula that is known replaced by its operator."""
    return with_operators(graph, _FORMULAS)


# --- norms -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Norm:
    """`x` divided by its root mean square, or, `centred`, by its standard deviation."""

    x: Value
    eps: float
    centred: bool

    def called(self, weight: Arg = None, bias: Arg = None) -> Found:
        """The operator with its arguments."""
        width = (self.x.type.shape[-1],)
        args: list[tuple[str, Arg]] = [("input", self.x), ("normalized_shape", width)]
        args.append(("weight", weight))
        if not self.centred:
            return "aten.rms_norm.default", (*args, ("eps", self.eps))
        args += [("bias", bias), ("eps", self.eps), ("cudnn_enable", True)]
        return "aten.layer_norm.default", tuple(args)

    def takes(self, weight: Arg) -> bool:
        """May `weight` be its weight: a vector along the last dim, in the dtype of `x`?"""
        if not isinstance(weight, Value):
            return False
        kind = self.x.type
        return weight.type.shape == kind.shape[-1:] and weight.type.dtype == kind.dtype


def _norm(body: Body, node: Node) -> Found | None:
    """A norm that ends in `node`: with weight and bias, with its weight, or bare."""
    ends: list[tuple[Node, Arg]] = [(node, None)]
    for product, bias in body.pairs(node, _ADD):
        if (made := body.only(product, _MUL)) is not None:
            ends.append((made, bias))
    for end, bias in ends:
        for weight, value in body.pairs(end, _MUL):
            norm = _normed(body, value) if body.read_once(value) else None
            if norm is None or not norm.takes(weight):
                continue
            if bias is None or (norm.centred and norm.takes(bias)):
                return norm.called(weight, bias)
    bare = _normed(body, node.output)
    return bare.called() if bare else None


def _normed(body: Body, value: Arg) -> _Norm | None:
    """The norm that `value` is, where `x` is cast before and the result is cast back, too."""
    cast = body.by(value, _CAST)
    if cast is None:
        return _divided(body, value)
    norm = _divided(body, cast.arg("self")) if body.read_once(cast.arg("self")) else None
    wide = body.by(norm.x, _CAST) if norm else None
    source = wide.arg("self") if wide else None
    if norm is None or not isinstance(source, Value):
        return None
    same = source.type.dtype == cast.output.type.dtype
    return replace(norm, x=source) if same else None


def _divided(body: Body, value: Arg) -> _Norm | None:
    """The norm that `value` is in the dtype that it is computed in."""
    node = body.node(value)
    if node is None:
        return None
    tries = [(x, body.only(scale, "aten.rsqrt.default")) for x, scale in body.pairs(node, _MUL)]
    if node.op == "aten.div.Tensor":
        tries.append((node.arg("self"), body.only(node.arg("other"), "aten.sqrt.default")))
    for x, root in tries:
        total = body.only(root.arg("self"), _ADD) if root else None
        eps = total.arg("other") if total else None
        if total and isinstance(x, Value) and isinstance(eps, float):
            centre = _centred(body, x)
            if _is_mean_square(body, total.arg("self"), x, centre):
                return _Norm(centre or x, eps, centre is not None)
    return None


def _is_mean_square(body: Body, spread: Arg, x: Value, centre: Value | None) -> bool:
    """Is `spread` the mean of the squares of `x`, or the variance of what `x` was, uncentred?"""
    mean = body.only(spread, "aten.mean.dim")
    if mean and _over_last(mean):
        return _squared(body, mean.arg("self")) == x
    variance = body.only(spread, "aten.var.correction") or body.only(spread, "aten.var.dim")
    if variance is None or centre is None or variance.arg("self") != centre:
        return False
    args = dict(variance.args)
    return args.get("correction", args.get("unbiased")) in (0, False) and _over_last(variance)


def _centred(body: Body, x: Value) -> Value | None:
    """`y` where `x` is y - mean(y) over the last dim."""
    difference = body.by(x, "aten.sub.Tensor")
    mean = body.only(difference.arg("other"), "aten.mean.dim") if difference else None
    if not (difference and mean and _over_last(mean) and difference.arg("alpha") == 1):
        return None
    y = difference.arg("self")
    return y if isinstance(y, Value) and mean.arg("self") == y else None


def _squared(body: Body, value: Arg) -> Arg:
    """`x` where `value` is x ** 2 or x * x."""
    power = body.only(value, "aten.pow.Tensor_Scalar")
    if power and power.arg("exponent") == 2:
        return power.arg("self")
    product = body.only(value, _MUL)
    return product.arg("self") if product and product.arg("self") == product.arg("other") else None


def _over_last(node: Node) -> bool:
    """Is a reduction over the last dim alone, which is kept, in the operand's dtype?"""
    rank = len(node.operands[0].type.shape)
    last = node.arg("dim") in ((-1,), (rank - 1,))
    return last and bool(node.arg("keepdim")) and dict(node.args).get("dtype") is None


# --- rotary embeddings -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Turn:
    """`x` rotated in planes that its two halves span, or its `pairs` of neighbours.

    `apart`: of pairs, the first coordinates come first in the result, then the second ones.
    """

    x: Value
    cos: Arg
    sin: Arg
    pairs: bool
    apart: bool = False


def _rotary(body: Body, node: Node) -> Found | None:
    """`x` rotated by angles whose cosine and sine are given, per number of x or per plane."""
    turn = _rotary_sum(body, node) or _rotary_planes(body, node)
    if turn is None or not isinstance(turn.cos, Value) or not isinstance(turn.sin, Value):
        return None
    kind, width = turn.x.type, turn.x.type.shape[-1]
    fits = turn.cos.type == turn.sin.type and turn.cos.type.shape[-1:] in ((width,), (width // 2,))
    if not fits or node.output.type.shape != kind.shape:
        return None
    pairing = "halves" if not turn.pairs else "pairs_to_halves" if turn.apart else "pairs"
    args = (("x", turn.x), ("cos", turn.cos), ("sin", turn.sin), ("pairing", pairing))
    return "shardwright.rotary", args


def _rotary_sum(body: Body, node: Node) -> _Turn | None:
    """x * cos + (x after a quarter turn) * sin."""
    for a, b in body.pairs(node, _ADD):
        plain, crossed = body.only(a, _MUL), body.only(b, _MUL)
        if plain is None or crossed is None:
            continue
        for turned, sin in body.pairs(crossed, _MUL):
            quarter = _quarter_turn(body, turned)
            for x, cos in body.pairs(plain, _MUL) if quarter else ():
                if quarter and x == quarter[0]:
                    return _Turn(quarter[0], cos, sin, quarter[1])
    return None


def _quarter_turn(body: Body, value: Arg) -> tuple[Value, bool] | None:
    """(x, in pairs?) where `value` has minus the second coordinate of x first, then the first."""
    parts = _joined(body, body.node(value)) if body.read_once(value) else None
    negative = body.only(parts[0], "aten.neg.default") if parts else None
    if parts is None or negative is None:
        return None
    first, second = _coordinate(body, parts[1]), _coordinate(body, negative.arg("self"))
    if first is None or second is None or first[0] != second[0]:
        return None
    spelt = (first[1:], second[1:]) == ((0, parts[2]), (1, parts[2]))
    return (first[0], parts[2]) if spelt else None


def _rotary_planes(body: Body, node: Node) -> _Turn | None:
    """a * cos - b * sin beside b * cos + a * sin, of the coordinates a and b of x."""
    parts = _joined(body, node)
    if parts is None:
        return None
    low, high = body.only(parts[0], "aten.sub.Tensor"), body.only(parts[1], _ADD)
    if low is None or high is None or low.arg("alpha") != 1:
        return None
    ends = body.only(low.arg("self"), _MUL), body.only(low.arg("other"), _MUL)
    for a, cos in body.pairs(ends[0], _MUL) if ends[0] else ():
        for b, sin in body.pairs(ends[1], _MUL) if ends[1] else ():
            first, second = _coordinate(body, a), _coordinate(body, b)
            if first is None or second is None or (first[0], first[2]) != (second[0], second[2]):
                continue
            known = (first[1], second[1]) == (0, 1) and (first[2] or not parts[2])
            if known and _is_sum_of(body, high, (b, cos), (a, sin)):
                return _Turn(first[0], cos, sin, first[2], apart=first[2] and not parts[2])
    return None


def _is_sum_of(body: Body, node: Node, one: tuple[Arg, Arg], other: tuple[Arg, Arg]) -> bool:
    """Is `node` the sum of the products `one` and `other`?"""
    for a, b in body.pairs(node, _ADD):
        products = body.only(a, _MUL), body.only(b, _MUL)
        if products[0] and products[1]:
            if one in body.pairs(products[0], _MUL) and other in body.pairs(products[1], _MUL):
                return True
    return False


def _joined(body: Body, node: Node | None) -> tuple[Arg, Arg, bool] | None:
    """(first, second, in pairs?) where `node` puts two coordinates together in the last dim."""
    pairs = node is not None and node.op == "aten.reshape.default"
    if node is not None and pairs:
        node = body.only(node.arg("self"), "aten.stack.default")
    op = "aten.stack.default" if pairs else "aten.cat.default"
    parts = node.arg("tensors") if node is not None and node.op == op else None
    if node is None or not isinstance(parts, tuple) or len(parts) != 2:
        return None
    rank = len(node.output.type.shape)
    return (parts[0], parts[1], pairs) if node.arg("dim") in (-1, rank - 1) else None


def _coordinate(body: Body, value: Arg) -> tuple[Value, int, bool] | None:
    """(x, 0 or 1, in pairs?) where `value` has the first or second coordinates of x."""
    node = body.node(value)
    if not isinstance(value, Value) or node is None:
        return None
    if node.op not in ("aten.chunk.default", "aten.slice.Tensor"):
        return None
    x = node.operands[0]
    width = x.type.shape[-1]
    if node.arg("dim") not in (-1, len(x.type.shape) - 1) or width % 2:
        return None
    if node.op == "aten.chunk.default":
        return (x, node.outputs.index(value), False) if len(node.outputs) == 2 else None
    start, end, step = node.arg("start") or 0, node.arg("end"), node.arg("step")
    stop = min(end, width) if isinstance(end, int) else width
    ways = {
        (0, width // 2, 1): (0, False),
        (width // 2, width, 1): (1, False),
        (0, width, 2): (0, True),
        (1, width, 2): (1, True),
    }
    found = next((is_ for way, is_ in ways.items() if way == (start, stop, step)), None)
    return (x, *found) if found else None


# --- activations -----------------------------------------------------------------------------


def _gelu(body: Body, node: Node) -> Found | None:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))."""
    for half, bracket in body.pairs(node, _MUL):
        one = body.only(bracket, _ADD)
        halved = body.only(half, _MUL)
        if one is None or halved is None or one.arg("other") != 1 or halved.arg("other") != 0.5:
            continue
        tanh = body.only(one.arg("self"), "aten.tanh.default")
        scaled = body.only(tanh.arg("self"), _MUL) if tanh else None
        if scaled is None or not _is_close(scaled.arg("other"), sqrt(2 / pi)):
            continue
        x = halved.arg("self")
        if _has_cube(body, body.only(scaled.arg("self"), _ADD), x):
            return "aten.gelu.default", (("self", x), ("approximate", "tanh"))
    return None


def _has_cube(body: Body, node: Node | None, x: Arg) -> bool:
    """Is `node` x + 0.044715 * x ** 3?"""
    for other, term in body.pairs(node, _ADD) if node else ():
        product = body.only(term, _MUL)
        cube = body.only(product.arg("self"), "aten.pow.Tensor_Scalar") if product else None
        if product and cube and other == x and _is_close(product.arg("other"), 0.044715):
            return cube.arg("self") == x and cube.arg("exponent") == 3
    return False


def _is_close(arg: Arg, number: float) -> bool:
    return isinstance(arg, float) and isclose(arg, number, rel_tol=1e-6)


_FORMULAS: tuple[Formula, ...] = (
    _norm, _rotary, _gelu, causal_convolution, cross_entropy, softcap,
)  # fmt: skip

__all__ = ["raised"]
