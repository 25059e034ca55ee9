"""Passes that bring a flat graph to canonical form: one way to say each thing.

Every pass is a pure function Graph -> Graph and keeps the meaning exactly; `canonicalise` runs
them in order.  Each docstring shows a graph before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from ..graph import Arg, Graph, Node, TensorType, Value
from ..graph.rewrite import flat, producers, with_args, with_body, with_operands
from ..ops.live import remove_dead
from ..reference.evaluate import Constants, describe_mask
from .dense_experts import whole_experts
from .four_dims import in_four_dims
from .written import written_whole

_RESHAPES = frozenset(
    {
        "aten.view.default",
        "aten.reshape.default",
        "aten._unsafe_view.default",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
        "aten.view_as.default",
        "aten.reshape_as.default",
    }
)
_COPIES = frozenset(
    {"aten.clone.default", "aten.contiguous.default", "aten.lift_fresh_copy.default"}
)
RESHAPE = "aten.reshape.default"


def canonicalise(graph: Graph) -> Graph:
    """All passes of this module, and `whole_experts`, in order."""
    for canonical_pass in (
        unify,
        remove_identities,
        written_whole,
        whole_attention,
        constant_masks,
        unrepeated_heads,
        whole_experts,
        keep_tokens_apart,
        whole_cross_entropy,
        join_reshapes,
        remove_identities,
    ):
        graph = remove_dead(canonical_pass(graph))
    return without_unused_constants(graph)


def without_unused_constants(graph: Graph) -> Graph:
    """Drop constants that no node reads; parameters and buffers stay, state dicts have them."""
    used = {value.name for node in flat(graph) for value in node.operands}
    used |= {output.value.name for output in graph.outputs}
    kept = tuple(p for p in graph.params if p.kind != "constant" or p.value.name in used)
    return replace(graph, params=kept)


# ---- names -------------------------------------------------------------------------------------


def unify(graph: Graph) -> Graph:
    """One name for ops that mean the same.

        view(x, [-1, 8])          ->  reshape(x, shape=(32, 8))
        expand_as(x, y)           ->  expand(x, size of y)   (as in `F.normalize`)
        broadcast_tensors([x, y]) ->  expand(x, size of both), y   (as in `F.mse_loss`)
        numpy_T(x), t(x)          ->  transpose(x, dim0=0, dim1=1)   (2-D)
        x.__and__(y)              ->  bitwise_and(x, y)
        multiply(x, y)            ->  mul(x, y)            (and other second names)
        shardwright.attention.default -> shardwright.attention     (and shardwright.moe)

    Reshapes get their whole target shape, without -1; dims of transposes count from the front.
    """
    same: dict[str, Value] = {}
    nodes = [
        _unified(with_operands(one, same))
        for node in flat(graph)
        for one in _each_alone(node, same)
    ]
    return with_body(graph, nodes, same)


def _each_alone(node: Node, same: dict[str, Value]) -> list[Node]:
    """A node for each of several tensors that one broadcasts together, but for those that have the
    size of all, which are the `same` as before."""
    if node.op != "aten.broadcast_tensors.default":
        return [node]
    alone: list[Node] = []
    for value, out in zip(node.operands, node.outputs, strict=True):
        if value.type.shape == out.type.shape:
            same[out.name] = same.get(value.name, value)
        else:
            args = (("self", value), ("size", out.type.shape), ("implicit", False))
            alone.append(Node(out.name, "aten.expand.default", args, (out,), node.loc))
    return alone


def _unified(node: Node) -> Node:
    if node.op in _RESHAPES:
        return _reshape(node, node.operands[0], node.name, node.output)
    if node.op in ("shardwright.attention.default", "shardwright.moe.default"):
        return replace(node, op=node.op.removesuffix(".default"))
    if node.op in ("aten.t.default", "aten.numpy_T.default", "aten.transpose.int"):
        value = node.operands[0]
        rank = len(value.type.shape)
        if node.op == "aten.transpose.int":
            dim0, dim1 = (node.int_arg(name) % rank for name in ("dim0", "dim1"))
        elif rank == 2:
            dim0, dim1 = 0, 1
        else:
            return node
        args = (("self", value), ("dim0", dim0), ("dim1", dim1))
        return replace(node, op="aten.transpose.int", args=args)
    if node.op == "aten.expand_as.default":
        size = node.output.type.shape
        args = (("self", node.operands[0]), ("size", size), ("implicit", False))
        return replace(node, op="aten.expand.default", args=args)
    return replace(node, op=_OTHER_NAMES.get(node.op, node.op))


# ops that torch has under two names
_OTHER_NAMES = {
    f"aten.{other}": f"aten.{name}"
    for other, name in {
        "__and__.Tensor": "bitwise_and.Tensor",
        "__or__.Tensor": "bitwise_or.Tensor",
        "absolute.default": "abs.default",
        "concat.default": "cat.default",
        "concatenate.default": "cat.default",
        "divide.Tensor": "div.Tensor",
        "divide.Scalar": "div.Scalar",
        "greater.Tensor": "gt.Tensor",
        "greater.Scalar": "gt.Scalar",
        "greater_equal.Tensor": "ge.Tensor",
        "greater_equal.Scalar": "ge.Scalar",
        "less.Tensor": "lt.Tensor",
        "less.Scalar": "lt.Scalar",
        "less_equal.Tensor": "le.Tensor",
        "less_equal.Scalar": "le.Scalar",
        "max.other": "maximum.default",
        "min.other": "minimum.default",
        "multiply.Tensor": "mul.Tensor",
        "multiply.Scalar": "mul.Scalar",
        "negative.default": "neg.default",
        "not_equal.Tensor": "ne.Tensor",
        "not_equal.Scalar": "ne.Scalar",
        "subtract.Tensor": "sub.Tensor",
        "subtract.Scalar": "sub.Scalar",
        "true_divide.Tensor": "div.Tensor",
        "true_divide.Scalar": "div.Scalar",
    }.items()
}


def _reshape(origin: Node, value: Value, name: str, output: Value) -> Node:
    """A reshape of `value` to the shape of `output`, at the place of `origin`."""
    args = (("self", value), ("shape", output.type.shape))
    return replace(origin, name=name, op=RESHAPE, args=args, outputs=(output,))


# ---- identities --------------------------------------------------------------------------------


def remove_identities(graph: Graph) -> Graph:
    """Drop what returns its operand unchanged.

    reshape(x, shape of x), expand(x, shape of x), x[0:], clone(x), x + 0 (same dtype)  ->  x
    transpose(transpose(x, 1, 2), 1, 2)       ->  x
    cat((x, x[..., d:]))  where x has d entries, so that the second is empty  ->  x
    """
    by: dict[str, Value] = {}
    made: dict[str, Node] = {}
    nodes: list[Node] = []
    for node in flat(graph):
        node = with_operands(node, by)
        same = _identity(node) or _undone(node, made)
        if same is not None:
            by[node.output.name] = same
            continue
        made.update({value.name: node for value in node.outputs})
        nodes.append(node)
    return with_body(graph, nodes, by)


def _identity(node: Node) -> Value | None:
    """The value that `node` returns unchanged, if it does."""
    if not node.operands or len(node.outputs) != 1:
        return None
    value, output = node.operands[0], node.output
    if node.op == "aten.cat.default":
        full = [operand for operand in node.operands if operand.type.numel]
        if len(full) != 1:
            return None
        value = full[0]
    if value.type != output.type or value.differentiable != output.differentiable:
        return None
    if node.op == "aten.cat.default":
        return value
    if node.op in _COPIES or node.op in (RESHAPE, "aten.expand.default", "aten.slice.Tensor"):
        step = node.arg("step") if node.op == "aten.slice.Tensor" else 1
        return value if step == 1 else None
    if node.op in ("aten.add.Tensor", "aten.sub.Tensor") and node.arg("other") == 0:
        return value if not isinstance(node.arg("other"), Value) else None
    if node.op in ("aten.mul.Tensor", "aten.div.Tensor") and node.arg("other") == 1:
        return value if not isinstance(node.arg("other"), Value) else None
    return None


def _undone(node: Node, made: dict[str, Node]) -> Value | None:
    """x for transpose(transpose(x)) over the same dims."""
    source = made.get(node.operands[0].name) if node.op == "aten.transpose.int" else None
    if source is None or source.op != node.op:
        return None
    dims = {node.arg("dim0"), node.arg("dim1")}
    return source.operands[0] if {source.arg("dim0"), source.arg("dim1")} == dims else None


def join_reshapes(graph: Graph) -> Graph:
    """A reshape of a reshape is one reshape.

    reshape(reshape(x, (32, 8)), (4, 64))     ->  reshape(x, (4, 64))
    """
    made: dict[str, Node] = {}
    nodes: list[Node] = []
    for node in flat(graph):
        source = made.get(node.operands[0].name) if node.op == RESHAPE else None
        if source is not None and source.op == RESHAPE:
            node = _reshape(node, source.operands[0], node.name, node.output)
        made.update({value.name: node for value in node.outputs})
        nodes.append(node)
    return with_body(graph, nodes, {})


# ---- attention ---------------------------------------------------------------------------------


def whole_attention(graph: Graph) -> Graph:
    """`aten.scaled_dot_product_attention` becomes `shardwright.attention`.

        scaled_dot_product_attention(q, k, v, m, 0.1, is_causal=False, scale=None)
        ->  attention(q, k, v, mask=m, scale=d ** -0.5, causal=False, window=0, softcap=0.0,
                      dropout_p=0.1)

    Operands of other ranks get four dims before, the result its own after (`four_dims.py`).
    """
    nodes: list[Node] = []
    for node in flat(graph):
        if node.op != "aten.scaled_dot_product_attention.default":
            nodes.append(node)
            continue
        for each in in_four_dims(node):
            if each.op == node.op:
                q, k, v = (each.arg(name) for name in ("query", "key", "value"))
                assert isinstance(q, Value)
                mask, scale = each.arg("attn_mask"), each.arg("scale")
                scale = q.type.shape[-1] ** -0.5 if scale is None else scale
                causal, dropout = bool(each.arg("is_causal")), each.arg("dropout_p")
                each = _attention(each, (q, k, v, mask), (scale, causal, 0, 0.0, dropout))
            nodes.append(each)
    return with_body(graph, nodes, {})


def _attention(node: Node, tensors: Sequence[Arg], options: Sequence[Arg]) -> Node:
    names = ("q", "k", "v", "mask", "scale", "causal", "window", "softcap", "dropout_p")
    args = (*zip(names, (*tensors, *options), strict=True), ("sinks", None))
    return replace(node, op="shardwright.attention", args=args)


def constant_masks(graph: Graph) -> Graph:
    """A mask that is known when the model is captured is said in numbers.

        attention(q, k, v, mask=tril(ones(s, s)), causal=False)  ->  attention(q, k, v, mask=None,
                                                                                causal=True)
        attention(q, k, v, mask=ones(b, 1, 1, s), ...)           ->  attention(q, k, v, mask=None)

    also for a causal mask with a window, as bool or as an additive 0 / -inf.  Masks that depend
    on inputs or parameters, or are neither causal, windowed nor empty, stay.
    """
    nodes = flat(graph)
    constants = Constants(graph)
    result: list[Node] = []
    for node in nodes:
        mask = node.arg("mask") if node.op == "shardwright.attention" else None
        tensor = constants.value(mask) if isinstance(mask, Value) else None
        if tensor is not None:
            q, k = node.operands[:2]
            window, sizes = node.arg("window"), (q.type.shape[2], k.type.shape[2])
            assert isinstance(window, int)
            band = describe_mask(tensor, *sizes, bool(node.arg("causal")), window)
            if band is not None:
                node = with_args(node, mask=None, causal=band[0], window=band[1])
        result.append(node)
    return with_body(graph, result, {})


def unrepeated_heads(graph: Graph) -> Graph:
    """Attention reads key and value heads once, not repeated for each group of query heads.

        k2 = reshape(expand(unsqueeze(k, 2), (b, h, g, s, d)), (b, h * g, s, d))
        attention(q, k2, v2, ...)                 ->  attention(q, k, v, ...)

    also with `repeat_interleave(k, g, dim=1)`, and with the repeat before a transpose.
    """
    nodes = flat(graph)
    made = producers(nodes)
    result: list[Node] = []
    extra: dict[str, Node] = {}
    for node in nodes:
        if node.op == "shardwright.attention":
            k, v = node.arg("k"), node.arg("v")
            assert isinstance(k, Value) and isinstance(v, Value)
            new_k, new_v = _before_repeat(k, made, extra), _before_repeat(v, made, extra)
            if new_k is not None and new_v is not None:
                if new_k.type.shape[1] == new_v.type.shape[1]:
                    for value in (new_k, new_v):
                        if value.name in extra:
                            result.append(extra.pop(value.name))
                    node = with_args(node, k=new_k, v=new_v)
        result.append(node)
    return with_body(graph, result, {})


def _before_repeat(value: Value, made: dict[str, Node], extra: dict[str, Node]) -> Value | None:
    """The value whose dim 1 was repeated to give `value`, or None.

    Where the repeat stands before a transpose, a transpose of the unrepeated value is put into
    `extra`.
    """
    node = made.get(value.name)
    if node is None:
        return None
    if node.op == "aten.transpose.int" and {node.arg("dim0"), node.arg("dim1")} == {1, 2}:
        source = _repeated(node.operands[0], 2, made)
        if source is None:
            return None
        b, s, h, d = source.type.shape
        name = f"{source.name}_heads_{node.name}"
        output = Value(name, TensorType((b, h, s, d), source.type.dtype), source.differentiable)
        args = (("self", source), ("dim0", 1), ("dim1", 2))
        extra[name] = replace(node, name=name, args=args, outputs=(output,))
        return output
    return _repeated(value, 1, made)


def _repeated(value: Value, dim: int, made: dict[str, Node]) -> Value | None:
    """x, if `value` is x with each index of `dim` repeated; x has the rank of `value`."""
    node = made.get(value.name)
    if node is None:
        return None
    source = node.operands[0] if node.operands else value
    if node.op == "aten.repeat_interleave.self_int":
        rank = len(value.type.shape)
        at = node.arg("dim")
        return source if isinstance(at, int) and at % rank == dim else None
    expand = made.get(source.name)
    if node.op != RESHAPE or expand is None or expand.op != "aten.expand.default":
        return None
    unsqueezed = expand.operands[0]
    unsqueeze = made.get(unsqueezed.name)
    if unsqueeze is None or unsqueeze.op not in ("aten.unsqueeze.default", RESHAPE):
        return None
    x = unsqueeze.operands[0]
    shape = x.type.shape
    with_one = (*shape[: dim + 1], 1, *shape[dim + 1 :])
    groups = source.type.shape[dim + 1] if len(source.type.shape) == len(with_one) else 0
    expanded = (*shape[: dim + 1], groups, *shape[dim + 1 :])
    merged = (*shape[:dim], shape[dim] * groups, *shape[dim + 1 :])
    shapes = (unsqueezed.type.shape, source.type.shape, value.type.shape)
    return x if shapes == (with_one, expanded, merged) else None


# ---- loss --------------------------------------------------------------------------------------


def whole_cross_entropy(graph: Graph) -> Graph:
    """Cross entropy on logits and labels as the model has them, not flattened to tokens.

        cross_entropy_loss(reshape(logits, (b * s, v)), reshape(labels, (b * s,)))
        ->  shardwright.cross_entropy(logits, labels, dtype=None, reduction=1,
                                      ignore_index=-100, label_smoothing=0.0)

    for class indices (not probabilities), without class weights, reduced to a mean or a sum.
    2-D logits become `shardwright.cross_entropy` as they are; others, with classes in dim 1, are
    taken as they were before the model put them there.  reduction: 1 mean, 2 sum.
    """
    nodes = flat(graph)
    made = producers(nodes)
    return with_body(graph, [new for node in nodes for new in _cross_entropy(node, made)], {})


def _cross_entropy(node: Node, made: dict[str, Node]) -> list[Node]:
    if node.op != "aten.cross_entropy_loss.default":
        return [node]
    logits, labels = node.arg("self"), node.arg("target")
    assert isinstance(logits, Value) and isinstance(labels, Value)
    reduction = node.arg("reduction")
    plain = node.arg("weight") is None and not labels.type.dtype.is_floating_point
    if not plain or reduction not in (1, 2) or len(logits.type.shape) < 2:
        return [node]
    turned: list[Node] = []
    if len(logits.type.shape) > 2:
        logits, turned = _classes_last(logits, node, made)
    else:
        whole, whole_labels = (_before_reshape(value, made) for value in (logits, labels))
        leading = whole.type.shape[:-1]
        if leading == whole_labels.type.shape and whole.type.shape[-1] == logits.type.shape[-1]:
            logits, labels = whole, whole_labels
    args: tuple[tuple[str, Arg], ...] = (
        ("logits", logits),
        ("labels", labels),
        ("dtype", None),
        ("reduction", reduction),
        ("ignore_index", node.arg("ignore_index")),
        ("label_smoothing", node.arg("label_smoothing")),
    )
    return [*turned, replace(node, op="shardwright.cross_entropy", args=args)]


def _classes_last(logits: Value, loss: Node, made: dict[str, Node]) -> tuple[Value, list[Node]]:
    """(b, v, ...) as (b, ..., v), and the node that makes it, unless it was there before."""
    dims = (0, *range(2, len(logits.type.shape)), 1)
    node = made.get(logits.name)
    if node is not None and (order := _order(node)) is not None:
        if tuple(order[dim] for dim in dims) == tuple(range(len(dims))):
            return node.operands[0], []
    kind = replace(logits.type, shape=tuple(logits.type.shape[dim] for dim in dims))
    last = replace(logits, name=f"{loss.name}_classes_last", type=kind)
    args: tuple[tuple[str, Arg], ...] = (("self", logits), ("dims", dims))
    loc = replace(loss.loc, targets=())
    return last, [Node(last.name, "aten.permute.default", args, (last,), loc)]


def _order(node: Node) -> tuple[int, ...] | None:
    """Which dim of its operand each dim of a transpose or permute is; None for other nodes."""
    order = list(range(len(node.output.type.shape)))
    if node.op == "aten.permute.default":
        dims = node.arg("dims")
        assert isinstance(dims, tuple)
        return tuple(dim % len(order) for dim in dims if isinstance(dim, int))
    if node.op == "aten.transpose.int":
        a, b = node.int_arg("dim0"), node.int_arg("dim1")
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return None


def _before_reshape(value: Value, made: dict[str, Node]) -> Value:
    node = made.get(value.name)
    return node.operands[0] if node is not None and node.op == RESHAPE else value


# ---- tokens ------------------------------------------------------------------------------------


def keep_tokens_apart(graph: Graph) -> Graph:
    """Ops that treat tokens alike run on (b, s, ...) instead of on merged (b * s, ...).

        y = reshape(x, (b * s, h))                y = affine(x, w, bias)      # (b, s, n)
        z = addmm(bias, y, w)              ->     z = gelu(y)                 # (b, s, n)
        r = reshape(gelu(z), (b, s, n))           (the reshapes are gone)

    A merge of leading dims moves down through such ops: each runs on its operand's unmerged twin
    and is followed by the merge, which is dead where every reader takes the twin.  `addmm` becomes
    `shardwright.affine` (input @ weight + bias), `mm` becomes `aten.matmul.default`.
    """
    twins: dict[str, Value] = {}
    nodes: list[Node] = []
    for node in flat(graph):
        if node.op == RESHAPE:
            source = node.operands[0]
            if source.name in twins:
                node = _reshape(node, twins[source.name], node.name, node.output)
                source = twins[source.name]
            whole = _split_tokens(source.type.shape, node.output.type.shape)
            if whole is not None and whole != source.type.shape:
                tokens = _tokens(node.output, whole)
                nodes.append(_reshape(node, source, tokens.name, tokens))
                node, source = _reshape(node, tokens, node.name, node.output), tokens
            if whole is not None:
                twins[node.output.name] = source
            nodes.append(node)
            continue
        split = _on_twins(node, twins)
        if split is None:
            nodes.append(node)
            continue
        nodes.append(split)
        for merged, whole in zip(node.outputs, split.outputs, strict=True):
            twins[merged.name] = whole
            name = node.name if len(node.outputs) == 1 else merged.name
            nodes.append(_reshape(node, whole, name, merged))
    return with_body(graph, nodes, {})


def _split_tokens(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of `after` with the leading dims that a reshape merges kept apart, or None.

    (b, s, h) to (b * s, h) gives (b, s, h); (b, s, n, d) to (b * s, n * d) gives (b, s, n * d).
    Where s is 1, (b, s, n, d) to (b, s, n * d) merges no tokens.
    """
    if not after:
        return None
    for merged in range(2, len(before) + 1):
        if after[:merged] == before[:merged]:
            continue
        if prod(before[:merged]) == after[0] and prod(before[merged:]) == prod(after[1:]):
            return (*before[:merged], *after[1:])
    return None


def _tokens(value: Value, shape: tuple[int, ...]) -> Value:
    """The unmerged twin of `value`."""
    return replace(value, name=f"{value.name}_tokens", type=TensorType(shape, value.type.dtype))


def _on_twins(node: Node, twins: dict[str, Value]) -> Node | None:
    """`node` on the unmerged twins of its operands, if it treats tokens alike; else None."""
    merged = [value for value in node.operands if value.name in twins]
    if not merged:
        return None
    leads = {_lead(value, twins[value.name]) for value in merged}
    rank = len(merged[0].type.shape)
    if len(leads) != 1 or any(len(value.type.shape) != rank for value in merged):
        return None
    lead = next(iter(leads))
    converted = _tokenwise(node, twins, rank)
    if converted is None:
        return None
    op, args = converted
    outputs = tuple(_tokens(value, (*lead, *value.type.shape[1:])) for value in node.outputs)
    return replace(node, name=f"{node.name}_tokens", op=op, args=args, outputs=outputs)


def _lead(merged: Value, twin: Value) -> tuple[int, ...]:
    """The dims of `twin` that are merged into dim 0 of `merged`."""
    return twin.type.shape[: len(twin.type.shape) - len(merged.type.shape) + 1]


def _tokenwise(
    node: Node, twins: dict[str, Value], rank: int
) -> tuple[str, tuple[tuple[str, Arg], ...]] | None:
    """Op and arguments of `node` on unmerged operands, or None if it mixes tokens."""
    args = with_operands(node, twins).args
    named = dict(args)
    merged = {name for name, arg in node.args if isinstance(arg, Value) and arg.name in twins}
    if node.op == "aten.addmm.default":
        bias = node.arg("self")
        scaled = node.arg("beta") != 1 or node.arg("alpha") != 1
        if merged != {"mat1"} or scaled or not isinstance(bias, Value) or len(bias.type.shape) != 1:
            return None
        operands = (("input", named["mat1"]), ("weight", named["mat2"]), ("bias", bias))
        return "shardwright.affine", operands
    if node.op == "aten.mm.default" and merged == {"self"}:
        return "aten.matmul.default", (("self", named["self"]), ("other", named["mat2"]))
    if node.op in ("aten.linear.default", "aten.layer_norm.default", "aten.rms_norm.default"):
        normalised = named.get("normalized_shape", (0,))
        keeps = isinstance(normalised, tuple) and len(normalised) < rank
        return (node.op, args) if merged == {"input"} and keeps else None
    if node.op == "aten.embedding.default":
        return (node.op, args) if merged == {"indices"} else None
    if node.op == "aten.dropout.default" or node.op in _LIKE:
        return node.op, args
    if node.op == "shardwright.moe":
        return (node.op, args) if merged == {"x", "indices", "weights"} else None
    if node.op == "aten.expand.default":
        return _expanded(node, twins)
    if node.op in _ALONG_DIM:
        every = {name for name, arg in node.args if isinstance(arg, Value)}
        return _along_dims(node, args, rank) if merged == every else None
    if _is_pointwise(node.op):
        return (node.op, args) if _only_broadcast(node, twins, rank) else None
    return None


# ops that work along the dims in the argument of that name, and treat the others alike
_ALONG_DIM = {
    "aten.softmax.int": "dim",
    "aten._softmax.default": "dim",
    "aten.log_softmax.int": "dim",
    "aten.mean.dim": "dim",
    "aten.sum.dim_IntList": "dim",
    "aten.chunk.default": "dim",
    "aten.split.Tensor": "dim",
    "aten.split_with_sizes.default": "dim",
    "aten.slice.Tensor": "dim",
    "aten.cumsum.default": "dim",
    "aten.topk.default": "dim",
    "aten.gather.default": "dim",
    "aten.scatter.src": "dim",
    "aten.scatter.value": "dim",
    "aten.unsqueeze.default": "dim",
}
# ops that read nothing but the shape of their operand
_LIKE = frozenset({"aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default"})


def _expanded(
    node: Node, twins: dict[str, Value]
) -> tuple[str, tuple[tuple[str, Arg], ...]] | None:
    """An expand that keeps the token dim."""
    value, output = node.operands[0], node.output
    shape = value.type.shape
    if len(shape) != len(output.type.shape) or shape[0] != output.type.shape[0]:
        return None
    size = (*_lead(value, twins[value.name]), *output.type.shape[1:])
    return node.op, with_args(with_operands(node, twins), size=size).args


def _along_dims(
    node: Node, args: tuple[tuple[str, Arg], ...], rank: int
) -> tuple[str, tuple[tuple[str, Arg], ...]] | None:
    """The op with dims counted from the end, if none of them is the token dim."""
    dim = node.arg(_ALONG_DIM[node.op])
    dims = dim if isinstance(dim, tuple) else (dim,)
    rank += node.op == "aten.unsqueeze.default"  # its dim counts those of the result
    numbers = [d % rank for d in dims if isinstance(d, int)]
    if not numbers or len(numbers) != len(dims) or 0 in numbers:
        return None
    from_end = tuple(d - rank for d in numbers)
    new: Arg = from_end if isinstance(dim, tuple) else from_end[0]
    return node.op, tuple((k, new if k == _ALONG_DIM[node.op] else v) for k, v in args)


def _is_pointwise(op: str) -> bool:
    """Does torch itself declare the op as elementwise?"""
    namespace, _, rest = op.partition(".")
    packet, _, overload = rest.rpartition(".")
    if namespace != "aten" or not hasattr(torch.ops.aten, packet):
        return False
    if op == "aten.to.dtype":
        return True
    function = getattr(getattr(torch.ops.aten, packet), overload, None)
    return function is not None and torch.Tag.pointwise in function.tags


def _only_broadcast(node: Node, twins: dict[str, Value], rank: int) -> bool:
    """Do all operands without a twin broadcast over the tokens?"""
    if any(len(value.type.shape) != rank for value in node.outputs):
        return False
    others = [value for value in node.operands if value.name not in twins]
    return all(len(value.type.shape) < rank for value in others)


__all__ = [
    "canonicalise", "constant_masks", "keep_tokens_apart", "remove_identities", "unify",
    "unrepeated_heads", "whole_attention", "whole_cross_entropy",
]  # fmt: skip
