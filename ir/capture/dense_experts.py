"""Experts that a model computes for all tokens, as experts of a few tokens each.

Some models multiply every token by its score for every expert, run all experts on all tokens and
add up.  A router that gives all but a few experts a score of zero makes most of that a sum of
zeros: an expert without biases gives zero for zero.  `whole_experts` finds it by its structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..graph import Graph, Node, TensorType, Value
from ..graph.rewrite import flat, producers, with_body
from ..ops.experts import Form

_RESHAPE = "aten.reshape.default"
_ACTIVATIONS = {
    "aten.silu.default": "silu",
    "aten.gelu.default": "gelu",
    "aten.relu.default": "relu",
}
# elementwise, and zero for minus infinity
_VANISHING = frozenset({"aten.sigmoid.default", "aten.exp.default"})


def whole_experts(graph: Graph) -> Graph:
    """Experts on all tokens, weighed by scores that are mostly zero, become `shardwright.moe`.

    top, i = topk(logits, k)                                      # (t, k)
    scores = sigmoid(scatter(full_like(logits, -inf), 1, i, top)) # (t, e)
    x2 = repeat(x, (e, 1)) * reshape(transpose(scores), (e * t, 1))
    g, u = chunk(bmm(reshape(x2, (e, t, h)), up), 2)              # up (e, h, 2f)
    y = sum(bmm(u * silu(g), down), 0)                            # (t, h)
    ->
    w = gather(scores, 1, i)
    y = moe(x, i, w, up, down, transposed=True, weigh_input=True)
    """
    nodes = flat(graph)
    made = producers(nodes)
    result: list[Node] = []
    for node in nodes:
        found = _experts(node, made)
        if found is None:
            result.append(node)
        else:
            result += found
    return with_body(graph, result, {})


def _experts(total: Node, made: Mapping[str, Node]) -> tuple[Node, Node] | None:
    """The nodes that give what `total`, a sum over experts, gives."""
    second = _product(total, made) if _sums_over_first(total) else None
    hidden = None if second is None else _hidden(second.operands[0], made)
    first = None if hidden is None else _node(hidden.source, made, "aten.bmm.default")
    if second is None or hidden is None or first is None:
        return None
    up, down = first.operands[1], second.operands[1]
    weighed = _weighed(first.operands[0], made)
    if weighed is None or any(value.name in made for value in (up, down)):
        return None
    tokens, scores = weighed
    router = _router(scores, made)
    if router is None or tokens.type.shape[-1] != up.type.shape[1]:
        return None
    return _nodes(total, tokens, scores, router, up, down, hidden.activation)


def _nodes(
    total: Node,
    tokens: Value,
    scores: Value,
    indices: Value,
    up: Value,
    down: Value,
    activation: str,
) -> tuple[Node, Node]:
    """The look-up of the chosen scores, and the operator."""
    weights = Value(
        f"{total.name}_weights",
        TensorType(indices.type.shape, scores.type.dtype),
        scores.differentiable,
    )
    look_up = replace(
        total,
        name=weights.name,
        op="aten.gather.default",
        args=(("self", scores), ("dim", 1), ("index", indices), ("sparse_grad", False)),
        outputs=(weights,),
    )
    form = Form(activation=activation, transposed=True, weigh_input=True)
    tensors = (
        ("x", tokens), ("indices", indices), ("weights", weights), ("up", up), ("gate", None),
        ("down", down), ("up_bias", None), ("gate_bias", None), ("down_bias", None),
    )  # fmt: skip
    operator = replace(total, op="shardwright.moe", args=(*tensors, *form.arguments()))
    return look_up, operator


# ---- the parts of the structure ----------------------------------------------------------------


def _node(value: Value, made: Mapping[str, Node], *ops: str) -> Node | None:
    """What makes `value`, if it is one of `ops`."""
    node = made.get(value.name)
    return node if node is not None and node.op in ops else None


def _before_reshapes(value: Value, made: Mapping[str, Node]) -> Value:
    """`value` before all reshapes."""
    while (node := _node(value, made, _RESHAPE)) is not None:
        value = node.operands[0]
    return value


def _sums_over_first(node: Node) -> bool:
    """sum(x, 0) of (e, t, h), in the dtype of x."""
    if node.op != "aten.sum.dim_IntList" or node.arg("keepdim") or node.arg("dim") != (0,):
        return False
    source = node.operands[0].type
    return len(source.shape) == 3 and source.dtype == node.output.type.dtype


def _product(total: Node, made: Mapping[str, Node]) -> Node | None:
    """The product of all experts whose sum `total` is."""
    summed = total.operands[0]
    node = _node(_before_reshapes(summed, made), made, "aten.bmm.default")
    return node if node is not None and node.output.type == summed.type else None


@dataclass(frozen=True, slots=True)
class _Hidden:
    """u * activation(g), with (g, u) the halves of `source`."""

    source: Value
    activation: str


def _hidden(value: Value, made: Mapping[str, Node]) -> _Hidden | None:
    """How the hidden units `value` come from the first product."""
    product = _node(value, made, "aten.mul.Tensor")
    if product is None or len(product.operands) != 2:
        return None
    for one, other in (product.operands, product.operands[::-1]):
        active = _node(one, made, *_ACTIVATIONS)
        if active is None or dict(active.args).get("approximate", "none") not in ("none", "tanh"):
            continue
        tanh = dict(active.args).get("approximate") == "tanh"
        halves = _node(active.operands[0], made, "aten.chunk.default")
        parts = () if halves is None else halves.outputs
        in_order = len(parts) == 2 and parts == (active.operands[0], other)
        rank = len(value.type.shape)
        if halves is not None and in_order and halves.arg("dim") in (-1, rank - 1):
            name = "gelu_tanh" if tanh else _ACTIVATIONS[active.op]
            return _Hidden(halves.operands[0], name)
    return None


def _weighed(value: Value, made: Mapping[str, Node]) -> tuple[Value, Value] | None:
    """(x (t, h), scores (t, e)), if `value` (e, t, h) is x times its score for each expert."""
    product = _node(_before_reshapes(value, made), made, "aten.mul.Tensor")
    if product is None or len(value.type.shape) != 3 or len(product.operands) != 2:
        return None
    count, tokens, width = value.type.shape
    if product.output.type.shape != (count * tokens, width):
        return None
    for one, other in (product.operands, product.operands[::-1]):
        repeat = _node(one, made, "aten.repeat.default")
        turned = _node(_before_reshapes(other, made), made, "aten.transpose.int")
        if repeat is None or turned is None or other.type.shape != (count * tokens, 1):
            continue
        x, scores = repeat.operands[0], turned.operands[0]
        if x.type.shape == (tokens, width) and scores.type.shape == (tokens, count):
            return x, scores
    return None


def _router(scores: Value, made: Mapping[str, Node]) -> Value | None:
    """The experts (t, k) that each token chose, if `scores` (t, e) are zero for all others.

    The choices are those of a `topk`, so that no expert is chosen twice.
    """
    vanishing = 0
    while (node := _node(scores, made, "aten.to.dtype", *_VANISHING)) is not None:
        vanishing += node.op in _VANISHING
        scores = node.operands[0]
    if vanishing != 1:  # sigmoid(sigmoid(-inf)) is one half
        return None
    written = _node(scores, made, "aten.scatter.src")
    if written is None or written.arg("dim") not in (1, -1):
        return None
    base, indices, source = written.operands
    nothing = _node(base, made, "aten.full_like.default")
    chosen = _node(indices, made, "aten.topk.default")
    if nothing is None or chosen is None or nothing.arg("fill_value") != float("-inf"):
        return None
    fits = indices == chosen.outputs[1] and chosen.arg("dim") in (1, -1)
    return indices if fits and source.type.shape == indices.type.shape else None


__all__ = ["whole_experts"]
