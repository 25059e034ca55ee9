"""Convolutions over tokens that look back only become one operator, however they are written.

conv1d(x, padding=reach)[..., :t]       ->  causal_convolution
conv1d(pad(x, (reach, 0)))              ->  causal_convolution
"""

from __future__ import annotations

from ..graph import Arg, Graph, Node, Value
from .formulas import Body, Found, with_operators


def causal_convolution(body: Body, node: Node) -> Found | None:
    """The convolution of (b, c, t) that ends in `node`, whose results look back only."""
    if node.op == "aten.conv1d.default":
        return _called(body, node, _padded_before(body, node))
    if node.op != "aten.slice.Tensor":
        return None
    made = body.only(node.arg("self"), "aten.conv1d.default")
    x = made.arg("input") if made else None
    if made is None or not isinstance(x, Value) or len(x.type.shape) != 3:
        return None
    first = (node.arg("dim"), node.arg("start") or 0, node.arg("step")) in ((2, 0, 1), (-1, 0, 1))
    if not first or node.output.type.shape[2] != x.type.shape[2]:
        return None
    return _called(body, made, x if made.arg("padding") == (_reach(made),) else None)


def causal_convolutions(graph: Graph) -> Graph:
    """`graph` with every such convolution as one operator."""
    return with_operators(graph, (causal_convolution,))


def _padded_before(body: Body, conv: Node) -> Arg:
    """What zeros are put before, as many as the convolution looks back."""
    pad = body.by(conv.arg("input"), "aten.pad.default") if conv.arg("padding") == (0,) else None
    if pad is None or pad.arg("mode") != "constant" or pad.arg("value") not in (None, 0):
        return None
    amounts = pad.arg("pad")
    assert isinstance(amounts, tuple)
    before, *others = amounts
    return pad.arg("self") if before == _reach(conv) and not any(others) else None


def _called(body: Body, conv: Node, x: Arg) -> Found | None:
    if not isinstance(x, Value) or len(x.type.shape) != 3 or conv.arg("stride") != (1,):
        return None
    args = (("x", x), ("weight", _plain(body, conv.arg("weight"))), ("bias", conv.arg("bias")))
    return "shardwright.causal_convolution", (*args, ("dilation", _dilation(conv)))


def _plain(body: Body, weight: Arg) -> Arg:
    """A weight (o, 1, k) whose middle dim was taken away and put back."""
    put = body.by(weight, "aten.unsqueeze.default")
    taken = body.by(put.arg("self"), "aten.squeeze.dim") if put else None
    if put is None or taken is None or put.arg("dim") != 1 or taken.arg("dim") != 1:
        return weight
    source = taken.arg("self")
    return source if isinstance(source, Value) and source.type == put.output.type else weight


def _reach(conv: Node) -> int:
    """How many tokens before its own a result sees."""
    return (conv.operands[1].type.shape[2] - 1) * _dilation(conv)


def _dilation(conv: Node) -> int:
    dilation = conv.arg("dilation")
    assert isinstance(dilation, tuple) and isinstance(dilation[0], int)
    return dilation[0]


__all__ = ["causal_convolution", "causal_convolutions"]
