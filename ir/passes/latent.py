"""Attention whose keys and values are made from a latent caches the latent, and may attend over it.

Multi-head latent attention (DeepSeek-V2 and V3) makes the keys and values of all heads from one
short vector per token, c (r numbers), and adds a rotated part that all heads share:

    k_h = cat(W_uk[h] c, rope)      v_h = W_uv[h] c

A cache of k and v holds all heads.  The absorbed form moves the products to the other side, which
is exact up to rounding, since q . (W c) = (W^T q) . c and sum_j p_j (W c_j) = W (sum_j p_j c_j):

    q'_h  = cat(W_uk[h]^T q_nope_h, q_rope_h)
    k'    = cat(c, rope)            one key head, of r + rope numbers
    out_h = W_uv[h] attention(q', k', the first r numbers of k')

The cache then holds r + rope numbers per token, 576 instead of 40,960 in DeepSeek-V3.  Scores cost
more, 2 (r + rope + r) FLOP per head and pair, but no token's keys are ever made again.  W_uk and
W_uv are views of the one weight, so state dicts and shardings of it stay as they are.

The expanded form has the same cache, but makes k and v of it, as above, whenever it attends.
Scores then cost what they did; each step makes the keys of all cached tokens again, 2 r (d + dv)
FLOP per head and token, which many new tokens share and one cannot.

In training there is no cache, but a sharded sequence has its keys sent, and backward needs them.
In the expanded form latents are sent, with their gradients, and kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TypeAlias

from ..graph import Arg, Block, Graph, Loop, Node, TensorType, Value, values_in
from ..graph.rewrite import producers, with_args
from ..ops.attention import cached_per_head, values_in_keys
from ..ops.live import live_items

_CAT, _SPLIT, _RESHAPE = (
    "aten.cat.default",
    "aten.split_with_sizes.default",
    "aten.reshape.default",
)
_CACHED, _TRAINED = ("shardwright.cached_attention",), ("shardwright.attention",)


def absorbed(graph: Graph) -> Graph:
    """The served `graph`, folded or flat, with every attention over latents in the absorbed form.

    Recognised by structure, at any attention over a cache (for `expanded` also without one, mask
    or dropout) where
    1. k is a cat of two: part of a split, and (b, 1, t, rope) expanded over the heads;
    2. v is the other part of that split, and there are as many query heads as key heads;
    3. what is split is a linear without bias, reshaped to (b, t, heads, both parts), transposed.
    Gives `graph` itself where there is none.
    """
    return _with_latents(graph, _Latent.absorbed, _CACHED)


def expanded(graph: Graph) -> Graph:
    """As `absorbed`, with every attention over latents in the expanded form."""
    return _with_latents(graph, _Latent.expanded, (*_CACHED, *_TRAINED))


def _with_latents(graph: Graph, form: _Form, ops: Sequence[str]) -> Graph:
    """The graph with the nodes of `form` in place of every attention of `ops` over latents."""
    found = False
    body: list[Node | Loop] = []
    flat = [item for item in graph.body if isinstance(item, Node)]
    made = producers(flat)
    for item in graph.body:
        if isinstance(item, Loop):
            blocks = tuple(_block_with_latents(block, form, ops) for block in item.blocks)
            changed = any(a is not b for a, b in zip(blocks, item.blocks, strict=True))
            found |= changed
            body.append(replace(item, blocks=blocks) if changed else item)
            continue
        latent = _latent(item, made, ops)
        found |= latent is not None
        body += [item] if latent is None else form(latent)
    if not found:
        return graph
    read = {output.value.name for output in graph.outputs}
    return replace(graph, body=live_items(body, read))


def _block_with_latents(block: Block, form: _Form, ops: Sequence[str]) -> Block:
    made = producers(block.nodes)
    latents = {node.name: _latent(node, made, ops) for node in block.nodes}
    if not any(latents.values()):
        return block
    nodes: list[Node] = []
    for node in block.nodes:
        latent = latents[node.name]
        nodes += [node] if latent is None else form(latent)
    live = live_items(nodes, {value.name for value in block.outputs})
    return replace(block, nodes=tuple(item for item in live if isinstance(item, Node)))


def _latent(node: Node, made: Mapping[str, Node], ops: Sequence[str]) -> _Latent | None:
    """What `node` attends over, if it is an attention of `ops` over decompressed latents."""
    if node.op not in ops or values_in_keys(node):
        return None
    if node.op in _TRAINED and (node.arg("mask") is not None or node.arg("dropout_p")):
        return None
    q, k, v = node.operands[:3]
    batch, heads, new, _ = k.type.shape
    joined = _made_by(_CAT, k, made)
    if q.type.shape[1] != heads or joined is None or len(joined.operands) != 2:
        return None
    nope, shared = joined.operands
    expand, split = _made_by("aten.expand.default", shared, made), _made_by(_SPLIT, v, made)
    if not _is_last(joined) or expand is None or split is None or not _is_last(split):
        return None
    rope = expand.operands[0]
    if rope.type.shape != (batch, 1, new, shared.type.shape[3]):
        return None
    if len(split.outputs) != 2 or {nope, v} != {*split.outputs}:
        return None
    linear = _linear(split.operands[0], (batch, new, heads), made)
    if linear is None:
        return None
    if len({value.type.dtype for value in (q, k, v, rope, *linear.operands)}) > 1:
        return None
    return _Latent(node, linear, split, nope, rope, _made_by(_CAT, q, made))


def _linear(whole: Value, lead: tuple[int, int, int], made: Mapping[str, Node]) -> Node | None:
    """The linear without bias of which `whole` (b, heads, t, n) is the result, seen by heads."""
    transpose = _made_by("aten.transpose.int", whole, made)
    if transpose is None or {transpose.arg("dim0"), transpose.arg("dim1")} not in (
        {1, 2},
        {-3, -2},
    ):
        return None
    by_heads = transpose.operands[0]
    reshape = _made_by(_RESHAPE, by_heads, made)
    linear = reshape and _made_by("aten.linear.default", reshape.operands[0], made)
    if linear is None or linear.arg("bias") is not None:
        return None
    columns = lead[2] * whole.type.shape[3]
    fits = by_heads.type.shape[:3] == lead and linear.output.type.shape[-1] == columns
    return linear if fits else None


def _made_by(op: str, value: Value, made: Mapping[str, Node]) -> Node | None:
    node = made.get(value.name)
    return node if node is not None and node.op == op else None


def _is_last(node: Node) -> bool:
    """Is `dim` of a cat or split the last one?"""
    return node.arg("dim") in (-1, len(node.operands[0].type.shape) - 1)


@dataclass(frozen=True, slots=True)
class _Latent:
    """An attention over latents that a `linear` decompresses, and the nodes in its place."""

    attention: Node
    linear: Node
    split: Node  # of the linear's result, by heads, into keys and values
    nope: Value  # the keys that are made from the latent (b, heads, t, d)
    rope: Value  # the part that all heads share (b, 1, t, rope)
    joined: Node | None  # the cat that makes the queries, if one does

    def absorbed(self) -> list[Node]:
        """The absorbed form; its last node gives the value that the attention gave."""
        batch, heads, new, _ = self.nope.type.shape
        value_dim, rank = (
            self.attention.output.type.shape[3],
            self.linear.operands[0].type.shape[-1],
        )
        up_keys, up_values, unpacked = self._weights()
        k, cached = self._keys()
        q_nope, q_rope, parted = self._query_parts()
        wide = rank + self.rope.type.shape[3]
        q_latent = self._einsum(
            "q_latent", "bhtd,hdr->bhtr", (q_nope, up_keys), (batch, heads, new, rank)
        )
        q = self._node("q_absorbed", _CAT, (batch, heads, new, wide),
                       tensors=(q_latent.output, q_rope), dim=-1)  # fmt: skip
        attention = self._attention(q.output, k, rank)
        out = self._einsum(
            "out", "bhtr,hvr->bhtv", (attention.output, up_values), (batch, heads, new, value_dim)
        )
        out = replace(out, outputs=self.attention.outputs)
        return [*unpacked, *parted, q_latent, q, *cached, attention, out]

    def expanded(self) -> list[Node]:
        """The expanded form: the attention itself, given the latents and what makes keys of them.

        The rows of `up` (heads, d + dv, r) that make keys come first.
        """
        up, unpacked = self._weight()
        if self.split.outputs[0] != self.nope:
            up_keys, up_values, unpacked = self._weights()
            joined = self._node("up_sorted", _CAT, up.type.shape,
                                tensors=(up_keys, up_values), dim=1)  # fmt: skip
            up, unpacked = joined.output, [*unpacked, joined]
        k, cached = self._keys()
        changed = with_args(self.attention, k=k, v=None, scale=self._scale())
        args = tuple((n, a) for n, a in changed.args if n != "value_dim")
        args = (*args, ("value_dim", up.type.shape[2]), ("up", up))
        return [*unpacked, *cached, replace(changed, args=args)]

    def _keys(self) -> tuple[Value, list[Node]]:
        """What is cached (b, 1, t, r + rope), and the nodes that make it."""
        batch, _, new, rope = self.rope.type.shape
        latent = self.linear.operands[0]
        rank = latent.type.shape[-1]
        nodes: list[Node] = []
        if latent.type.shape != (batch, 1, new, rank):
            shape = (batch, 1, new, rank)
            nodes = [self._node("latent", _RESHAPE, shape, self=latent, shape=shape)]
            latent = nodes[0].output
        k = self._node("k_latent", _CAT, (batch, 1, new, rank + rope),
                       tensors=(latent, self.rope), dim=-1)  # fmt: skip
        return k.output, [*nodes, k]

    def _weight(self) -> tuple[Value, list[Node]]:
        """The linear's weight by heads (heads, d + dv, r), and the node that makes it."""
        weight, heads = self.linear.operands[1], self.nope.type.shape[1]
        rows = sum(out.type.shape[3] for out in self.split.outputs)
        shape = (heads, rows, weight.type.shape[1])
        whole = self._node("up", _RESHAPE, shape, self=weight, shape=shape)
        return whole.output, [whole]

    def _weights(self) -> tuple[Value, Value, list[Node]]:
        """The linear's weight of keys (heads, d, r), that of values, and the nodes of both."""
        whole, nodes = self._weight()
        sizes = [out.type.shape[3] for out in self.split.outputs]
        first = self.split.outputs[0] == self.nope
        names = ("up_keys", "up_values") if first else ("up_values", "up_keys")
        split = self._split(whole, names, sizes, 1)
        by_name = dict(zip(names, split.outputs, strict=True))
        return by_name["up_keys"], by_name["up_values"], [*nodes, split]

    def _query_parts(self) -> tuple[Value, Value, list[Node]]:
        """The queries of the two parts of the keys, and the node that cuts them if one has to."""
        query = self.attention.operands[0]
        sizes = [value.type.shape[3] for value in (self.nope, self.rope)]
        if self.joined is not None and _is_last(self.joined):
            parts = self.joined.operands
            if [part.type.shape[3] for part in parts] == sizes:
                return parts[0], parts[1], []
        split = self._split(query, ("q_nope", "q_rope"), sizes, 3)
        return split.outputs[0], split.outputs[1], [split]

    def _attention(self, q: Value, k: Value, rank: int) -> Node:
        batch, heads, new, _ = self.attention.operands[0].type.shape
        output = self._value("attended", (batch, heads, new, rank))
        changed = with_args(self.attention, q=q, k=k, v=None, scale=self._scale())
        args = tuple((n, a) for n, a in changed.args if n != "value_dim")
        loc = replace(changed.loc, targets=("attended",))
        return replace(changed, args=(*args, ("value_dim", rank)), outputs=(output,), loc=loc)

    def _scale(self) -> Arg:
        """The factor on the heads' scores; it does not depend on the width of a latent."""
        scale = self.attention.arg("scale")
        dim = self.attention.operands[0].type.shape[3]
        return 1.0 / sqrt(dim) if scale is None else scale

    def _einsum(
        self, name: str, equation: str, tensors: tuple[Value, Value], shape: tuple[int, ...]
    ) -> Node:
        op = "aten.einsum.default"
        return self._node(name, op, shape, equation=equation, tensors=tensors, path=None)

    def _split(self, value: Value, names: Sequence[str], sizes: Sequence[int], dim: int) -> Node:
        shape = value.type.shape
        shapes = [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]
        values = (self._value(n, s) for n, s in zip(names, shapes, strict=True))
        outputs = tuple(replace(v, differentiable=value.differentiable) for v in values)
        node = self._node(
            f"{names[0]}_split", _SPLIT, shape, self=value, split_sizes=tuple(sizes), dim=dim
        )
        return replace(node, outputs=outputs, loc=replace(node.loc, targets=tuple(names)))

    def _node(self, name: str, op: str, shape: tuple[int, ...], /, **args: Arg) -> Node:
        given = any(v.differentiable for arg in args.values() for v in values_in(arg))
        output = replace(self._value(name, shape), differentiable=given)
        loc = replace(self.attention.loc, targets=(name,))
        return Node(output.name, op, tuple(args.items()), (output,), loc)

    def _value(self, name: str, shape: tuple[int, ...]) -> Value:
        """A value like the attention's result; nodes of models have no dot in their names."""
        like = self.attention.output
        full = f"{self.attention.name}.{name}"
        return replace(like, name=full, type=TensorType(shape, like.type.dtype))


_Form: TypeAlias = Callable[[_Latent], list[Node]]


def numbers_per_token(graph: Graph) -> int:
    """Numbers of a token that attention caches, or sends and saves, in the layer with most."""
    return max(
        (
            node.operands[1].type.shape[1] * cached_per_head(node)
            for node in graph.nodes
            if node.op in (*_CACHED, *_TRAINED)
        ),
        default=0,
    )


__all__ = ["absorbed", "expanded", "numbers_per_token"]
