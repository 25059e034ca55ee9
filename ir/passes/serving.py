"""From the graph of a forward pass to that of serving: new tokens over a cache.

Prefill, decode and append are one graph in different sizes.  Every op but attention treats tokens
one by one; attention stores the new keys and values, and attends to everything cached.  What
stands where is told by positions, an input (b, t): a token's index in its own sequence, -1 for
padding.  Of the logits only those after each sequence's last new token are wanted.

Operators that look back without attention (`Operator.continued_by`) keep a state of fixed size.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ..graph import Arg, Block, Graph, Input, Loc, Loop, Node, Output, TensorType, Value, reads
from ..graph.names import is_path
from ..graph.rewrite import with_operands
from ..ops.indices import index_limits
from ..ops.live import live_items
from ..ops.registry import find_op, operator_of, rule_of
from .convolutions import causal_convolutions
from .mixing import Followed, follow, has_state
from .recurrences import Zeros, home_of, recurrences
from .steps import FEWEST, Stepped, by_steps, fewest_tokens
from .sums import with_running_sums

POSITIONS = ("position_ids", "positions")  # what models call the input


class ServingError(ValueError):
    """The model cannot be served; the message says why and what to do."""


def is_decoder(graph: Graph) -> bool:
    """Does this graph look back, by attention that is causal or with a state?"""
    nodes = causal_convolutions(graph).nodes
    attentions = [node for node in nodes if operator_of(node).attends]
    states = any(operator_of(node).continued_by for node in nodes)
    shape = _positions(graph).type.shape
    looks = bool(attentions) or states or bool(_stepped(graph, shape).inner)
    return looks and all(_why_not(node) is None for node in attentions)


def _stepped(graph: Graph, shape: tuple[int, ...]) -> Stepped:
    """`graph` of inputs (b, t) of this shape, with states for recurrences and running sums."""
    return with_running_sums(by_steps(graph, shape[1]), shape)


def with_own_positions(graph: Graph) -> Graph | None:
    """A graph without positions (b, t) with an input for them, which says what is padding.

    None if no layer keeps a state: then positions must tell attention where tokens stand.
    """
    tokens = next((item for item in graph.inputs if len(item.value.type.shape) == 2), None)
    if tokens is None:
        return None
    stepped = _stepped(causal_convolutions(graph), tokens.value.type.shape)
    if not any(operator_of(node).continued_by for node in stepped.graph.nodes):
        return None
    kind = TensorType(tokens.value.type.shape, torch.int64)
    given = Input("position_ids", Value("position_ids", kind), tokens.labels)
    return replace(graph, inputs=(*graph.inputs, given))


def serving_graph(graph: Graph, context: int) -> Graph:
    """`graph`, of new tokens, with attention over a cache and logits (b, 1, v).

        attention(q, k, v, causal)  ->  cached_attention(q, k, v, positions, cache="kv")
        causal_convolution(x, w)    ->  cached_convolution(x, w, positions, state="state")
        logits = lm_head(x)         ->  logits = lm_head(last_token(x, positions))
        arange(t)                   ->  positions

    `context` is the number of tokens that are cached before.  Raises ServingError where the model
    has no input for positions or too few of them, no output `logits`, or another
    attention than a causal one, counts tokens in a way that is not known, or mixes them elsewhere
    than in attention.
    """
    graph = causal_convolutions(graph)
    positions = _positions(graph)
    _check_length(graph, positions, context)
    stepped = _stepped(graph, positions.type.shape)
    graph = stepped.graph
    followed = _followed(stepped, positions)
    pass_ = _Pass(positions, context, followed.padded)
    known = replace(positions, name=f"{positions.name}_known")
    clamp = _known(positions, known)
    body: list[Node | Loop] = [clamp]
    counted = _Counted(known)
    for item in graph.body:
        if isinstance(item, Loop):
            counted.check(item)
            body.append(pass_.loop(item, known))
        else:
            for node in counted.told(with_operands(item, {positions.name: known})):
                body += pass_.nodes(node, positions)
    cached = _without_unread(replace(graph, body=tuple(body)), clamp)
    served = _named_inputs(_last_logits(cached, positions), positions)
    _check_mixing(graph, followed)
    return served


def _named_inputs(graph: Graph, positions: Value) -> Graph:
    """The two inputs of every served model, called `input_ids` and `position_ids`."""
    others = [item for item in graph.inputs if item.value.name != positions.name]
    if len(others) != 1 or others[0].value.type.shape != positions.type.shape:
        names = ", ".join(f"`{item.name}`" for item in others) or "none"
        raise ServingError(
            f"{graph.name} takes the inputs {names} besides positions; to be served it must take"
            " tokens (batch, tokens) alone"
        )
    renamed = tuple(
        replace(i, name="position_ids" if i.value.name == positions.name else "input_ids")
        for i in graph.inputs
    )
    return replace(graph, inputs=renamed)


def _positions(graph: Graph) -> Value:
    for item in graph.inputs:
        if item.name in POSITIONS and len(item.value.type.shape) == 2:
            return item.value
    raise ServingError(
        f"{graph.name} has no input `position_ids` (batch, tokens), so it cannot tell where new"
        " tokens stand in their sequences; add the keyword `position_ids` to `forward` and use it"
        " in place of torch.arange"
    )


def _check_length(graph: Graph, positions: Value, context: int) -> None:
    rows, _ = index_limits(graph, positions.name)
    tokens = positions.type.shape[1]
    if rows and context + tokens > min(rows):
        raise ServingError(
            f"{graph.name} has {min(rows)} positions, but {context} cached tokens and {tokens} new"
            f" ones need {context + tokens}; plan with a shorter sequence or context"
        )


def _followed(stepped: Stepped, positions: Value) -> Followed:
    """The way of the tokens to the logits."""
    graph = stepped.graph
    logits = _logits(graph).path
    read = [out.value.name for out in graph.outputs if out.path == logits]
    live = replace(graph, body=live_items(graph.body, read))
    return follow(live, positions.type.shape, recurrences(replace(stepped, graph=live)))


def _check_mixing(graph: Graph, followed: Followed) -> None:
    """Raise ServingError if a node mixes tokens on the way to the logits."""
    node = followed.mixing
    if node is not None and operator_of(node).acts:
        raise ServingError(
            f"{node.loc}: padding would enter the state that {graph.name} keeps of earlier tokens:"
            " of prompts of different lengths the shorter ones would be continued wrongly. Put"
            " zeros behind the tokens (F.pad) where they enter the recurrence, or plan phase train"
        )
    if node is not None:
        raise ServingError(
            f"{node.loc}: `{node.op}` mixes the tokens of a sequence outside attention, as"
            " linear attention and other recurrences do (or has no rule that says it does"
            f" not); the state that {graph.name} would keep of earlier tokens has no cache. Plan"
            " phase train, or serve a model whose layers mix tokens by attention alone"
        )


def _without_unread(graph: Graph, clamp: Node) -> Graph:
    """Without the clamp, if only attention reads the positions."""
    read = {value.name for node in graph.nodes for value in node.operands if node is not clamp}
    read |= {value.name for loop in graph.loops for value in loop.invariants}
    if clamp.output.name in read:
        return graph
    return replace(graph, body=tuple(item for item in graph.body if item is not clamp))


@dataclass(slots=True)
class _Pass:
    """Puts caches under attention nodes, and names them in order."""

    positions: Value
    context: int
    padded: Mapping[str, int]
    outside: int = 0
    _states: dict[str, str] = field(default_factory=dict[str, str])  # by the value of a state
    _zeros: dict[str, Zeros] = field(default_factory=dict[str, Zeros])

    def nodes(self, node: Node, positions: Value, cache: str = "") -> list[Node]:
        """As `node`, with what keeps padding out of a recurrence before it."""
        if node.name not in self.padded:
            return [self.node(node, positions, cache)]
        zeros = self._zeros.setdefault(positions.name, Zeros(positions))
        return zeros.before(node, self.padded[node.name])

    def node(self, node: Node, positions: Value, cache: str = "") -> Node:
        """An attention with a cache, or what goes on with a state; any other node as it is."""
        if not self.keeps(node):
            return node
        continued = operator_of(node).continued_by
        if continued and operator_of(node).keeps_out_padding:
            return replace(node, op=continued, args=(*node.args, ("positions", positions)))
        if operator_of(node).acts:
            cache = self._states[node.operands[0].name]
        elif not cache:
            cache = f"{_leaf(node)}_{self.outside}"
            self.outside += 1
        if continued:
            self._states[node.output.name] = cache
            args = (*node.args, ("positions", positions), ("state", cache))
            return replace(node, op=continued, args=args)
        reason = _why_not(node)
        if reason is not None:
            raise ServingError(f"{node.loc}: this attention {reason}; it cannot have a KV cache")
        tensors: list[tuple[str, Arg]] = [(name, node.arg(name)) for name in ("q", "k", "v")]
        chunk, window = dict(node.args).get("chunk", 0), node.arg("window")
        assert isinstance(chunk, int) and isinstance(window, int)
        window = min(window or chunk, chunk) if chunk else window  # no chunk reaches further
        args = (
            *tensors, ("positions", positions), ("scale", node.arg("scale")), ("window", window),
            ("softcap", node.arg("softcap")), ("context", self.context), ("cache", cache),
            ("value_dim", 0), ("sinks", dict(node.args).get("sinks")), ("chunk", chunk),
        )  # fmt: skip
        return replace(node, op="shardwright.cached_attention", args=args)

    def keeps(self, node: Node) -> bool:
        """Will it have a cache or a state?"""
        return operator_of(node).attends or has_state(node, self.positions.type.shape)

    def loop(self, loop: Loop, known: Value) -> Loop:
        """The loop with the positions as one more invariant, and those that the model reads."""
        renamed = tuple(
            known if value.name == self.positions.name else value for value in loop.invariants
        )
        blocks = tuple(self.block(block, kind, loop.path) for kind, block in enumerate(loop.blocks))
        return replace(loop, invariants=(*renamed, self.positions), blocks=blocks)

    def block(self, block: Block, kind: int, path: str) -> Block:
        """The block of the loop over `path` with an input for positions."""
        inner = replace(self.positions, name=f"{block.nodes[0].name}.positions{kind}")
        counted = _Counted(replace(inner, name=f"{inner.name}_known"))
        caches: set[str] = set()
        nodes: list[Node] = []
        for node in block.nodes:
            operator = operator_of(node)
            new = self.keeps(node) and not (operator.acts or operator.keeps_out_padding)
            cache = _cache_name(node, block, path, caches) if new else ""
            caches.add(cache)
            for told in counted.told(node):
                nodes += self.nodes(told, inner, cache)
        counted.check(*block.outputs)
        if counted.used:
            nodes.insert(0, _known(inner, counted.known))
        return replace(block, inputs=(*block.inputs, inner), nodes=tuple(nodes))


def _cache_name(node: Node, block: Block, path: str, taken: set[str]) -> str:
    """`self_attn.kv`, `conv.state`: a cache lies in the module of `block` that calls its operator.

    In the block itself where that module has a name that cannot stand in Python.
    """
    attends = operator_of(node).attends
    module = node.loc.module if attends else home_of(node)
    found = re.match(rf"{re.escape(path)}\.\d+\.(.+)", module)
    leaf = _leaf(node)
    name = f"{found[1]}.{leaf}" if found and is_path(found[1]) else leaf
    held = [(param.name, param.name.rpartition(".")[0]) for param in block.params]
    known = {path for paths in held for path in paths} | taken
    names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
    return next(name for name in names if name not in known)


def _leaf(node: Node) -> str:
    """What the last part of a cache's name begins with."""
    return "kv" if operator_of(node).attends else "state"


def _known(positions: Value, known: Value) -> Node:
    """The node that makes 0 of the position of padding."""
    args: tuple[tuple[str, Arg], ...] = (("self", positions), ("min", 0))
    return Node(
        known.name, "aten.clamp_min.default", args, (known,), Loc(targets=("position_ids",))
    )


class _Counted:
    """Puts `known` positions (b, t) in place of tokens that a model counts, `arange(t)`.

    What is computed of these elementwise, (t,) or (1, t, 1, ...), is then computed for each
    sequence, (b, t) or (b, t, 1, ...), until it meets something that has a batch and tokens.
    """

    def __init__(self, known: Value) -> None:
        self.known = known
        self._by: dict[str, Value] = {}  # what is counted, for each sequence

    @property
    def used(self) -> bool:
        """Was anything counted?"""
        return bool(self._by)

    def told(self, node: Node) -> list[Node]:
        """The node for known positions, and what it then takes; nothing for one that counts."""
        lead = self.known.type.shape
        if (start := _counts_from(node, lead[1])) is not None:
            return self._counting(node, start)
        counted = [value for value in node.operands if value.name in self._by]
        if not counted:
            return [node]
        new, (old,) = with_operands(node, self._by), node.outputs
        if any(len(value.type.shape) == len(old.type.shape) for value in counted):
            if old.type.shape[:2] == lead and len(lead) <= len(old.type.shape):
                return [new]
            if old.type.shape == counted[0].type.shape and _is_pointwise(node):
                return [self._like(new, self._by[counted[0].name].type.shape)]
        elif node.op in ("aten.reshape.default", "aten.unsqueeze.default"):
            shape = old.type.shape
            if shape[:2] == (1, lead[1]) and set(shape[2:]) <= {1}:
                return [self._like(_reshape(new, (*lead, *shape[2:])), (*lead, *shape[2:]))]
        raise _counts_itself(node.loc)

    def _counting(self, node: Node, start: int) -> list[Node]:
        """Nodes that make what a count from `start` on is of the known positions."""
        old, lead = node.output, self.known.type.shape
        nodes: list[Node] = []
        value = self.known
        args: tuple[tuple[str, Arg], ...]
        if old.type.dtype != value.type.dtype:
            value = Value(f"{old.name}_known", TensorType(lead, old.type.dtype))
            args = (("self", self.known), ("dtype", old.type.dtype))
            args = (*args, ("non_blocking", False), ("copy", False))
            nodes.append(Node(value.name, "aten.to.dtype", args, (value,), node.loc))
        if start:
            args = (("self", value), ("other", start), ("alpha", 1))
            return [*nodes, self._like(replace(node, op="aten.add.Tensor", args=args), lead)]
        self._by[old.name] = value
        return nodes

    def _like(self, node: Node, shape: tuple[int, ...]) -> Node:
        """The node with a result of `shape`, which is counted too."""
        old = node.output
        made = replace(old, type=replace(old.type, shape=shape))
        self._by[old.name] = made
        return replace(node, outputs=(made,))

    def check(self, *readers: Loop | Value) -> None:
        """Raise ServingError if a count is read by what was not told the positions."""
        for reader in readers:
            values = reads(reader) if isinstance(reader, Loop) else (reader,)
            if any(value.name in self._by for value in values):
                raise _counts_itself(Loc())


def _counts_from(node: Node, tokens: int) -> int | None:
    """From which number on it numbers the tokens one by one; None if it does not."""
    if not node.op.startswith("aten.arange.") or node.output.type.shape != (tokens,):
        return None
    args = dict(node.args)
    start, step = args.get("start", 0), args.get("step", 1)
    return int(start) if isinstance(start, int | float) and step == 1 == start % 1 + 1 else None


def _is_pointwise(node: Node) -> bool:
    """Is each element of the result made of one element of the only operand?"""
    if find_op(node.op) is None or len(node.operands) != 1:
        return False
    rule = rule_of(node)
    return rule.operands[0] == rule.results[0] and not rule.whole


def _reshape(node: Node, shape: tuple[int, ...]) -> Node:
    args: tuple[tuple[str, Arg], ...] = (("self", node.operands[0]), ("shape", shape))
    return replace(node, op="aten.reshape.default", args=args)


def _counts_itself(loc: Loc) -> ServingError:
    return ServingError(
        f"{loc}: the model counts its tokens itself (torch.arange), so that each step would begin"
        " at 0 again; use the input `position_ids` instead"
    )


def _why_not(node: Node) -> str | None:
    """Why an attention cannot have a cache; None if it can."""
    if node.op != "shardwright.attention":
        return "is none that is known here"
    query, key = (value.type.shape[2] for value in node.operands[:2])
    if query != key:
        return "reads keys of other tokens (an encoder's)"
    if not node.arg("causal") and query > 1:
        return "is not causal"
    if node.arg("mask") is not None:
        return "has a mask that is a tensor (leave `attention_mask` out: padding has position -1)"
    if node.arg("dropout_p"):
        return "has dropout"
    return None


# ---- logits ------------------------------------------------------------------------------------


def _logits(graph: Graph) -> Output:
    named = [out for out in graph.outputs if out.path and out.path[-1] == "logits"]
    found = named or [out for out in graph.outputs if len(out.value.type.shape) == 3][:1]
    if not found:
        raise ServingError(
            f"{graph.name} has no output `logits` (batch, tokens, vocabulary); return one, by"
            " that name or as the only output"
        )
    return found[0]


def _last_logits(graph: Graph, positions: Value) -> Graph:
    """Only the logits of the last new token of each sequence, picked as early as possible."""
    logits = _logits(graph)
    chain = _tokenwise_chain(graph, logits.value)
    start = chain[0].operands[0] if chain else logits.value
    picked = _with_tokens(start, f"{start.name}_last")
    pick = Node(
        picked.name,
        "shardwright.last_token",
        (("x", start), ("positions", positions)),
        (picked,),
        replace(chain[0].loc if chain else Loc(), targets=("last_token",)),
    )
    by = {start.name: picked}
    rewritten: dict[str, Node] = {}
    for node in chain:
        out = _with_tokens(node.output, node.output.name)
        rewritten[node.name] = replace(with_operands(node, by), outputs=(out,))
        by[node.output.name] = out
    body: list[Node | Loop] = []
    for item in graph.body:
        if isinstance(item, Node) and chain and item.name == chain[0].name:
            body.append(pick)
        body.append(rewritten.get(item.name, item) if isinstance(item, Node) else item)
    if not chain:
        body.append(pick)
    output = Output(logits.path, by[logits.value.name])
    return _live(replace(graph, body=tuple(body), outputs=(output,)))


def _with_tokens(value: Value, name: str) -> Value:
    batch, _, *rest = value.type.shape
    kind = replace(value.type, shape=(batch, 1, *rest))
    return replace(value, name=name, type=kind)


def _tokenwise_chain(graph: Graph, logits: Value) -> list[Node]:
    """The nodes behind `logits` that treat tokens one by one and take one value (b, t, ...)."""
    made = {
        value.name: item for item in graph.body if isinstance(item, Node) for value in item.outputs
    }
    users: dict[str, int] = {}
    for node in graph.nodes:
        for value in node.operands:
            users[value.name] = users.get(value.name, 0) + 1
    chain: list[Node] = []
    at = logits
    while at.name in made and users.get(at.name, 0) == (1 if chain else 0):
        node = made[at.name]
        if not _is_tokenwise(node):
            break
        chain.insert(0, node)
        at = node.operands[0]
        if operator_of(node).heavy:  # the head
            break
    return chain


def _is_tokenwise(node: Node) -> bool:
    """Does it make of its first operand (b, t, ...) one result (b, t, ...), token by token?"""
    if len(node.outputs) != 1 or not node.operands:
        return False
    rule = rule_of(node)
    (first, *others), result = rule.operands, rule.results[0]
    tokens = {factor for dim in first[:2] for factor in dim}
    if len(first) < 3 or result[:2] != first[:2] or tokens & rule.whole:
        return False
    read = {factor for dims in others for dim in dims for factor in dim}
    named = any(isinstance(arg, tuple) for _, arg in node.args)  # sizes, t among them
    return not named and tokens.isdisjoint(read)


def _live(graph: Graph) -> Graph:
    """The graph without nodes outside loops that nothing reads."""
    outputs = {out.value.name for out in graph.outputs}
    body = live_items(graph.body, outputs)
    read = outputs | {value.name for item in body for value in reads(item)}
    used = tuple(i for i in graph.inputs if i.value.name in read)
    return replace(graph, body=body, inputs=used)


__all__ = [
    "FEWEST", "POSITIONS", "ServingError", "fewest_tokens", "is_decoder", "serving_graph",
    "with_own_positions",
]  # fmt: skip
