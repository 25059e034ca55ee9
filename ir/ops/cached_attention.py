"""The operator `shardwright.cached_attention`: new tokens over those that a cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...facts.spec import R, S, V
from ...facts.traffic import Traffic
from ...facts.work import Kernels
from ..graph import Arg, Node, Value
from .algorithms.part import Part
from .algorithms.quantities import buffers_of, kernels_of, positions_of, traffic_of
from .algorithms.registry import ALGORITHMS
from .attention import (
    INNER_HEADS,
    WORDS,
    attention_math,
    choice_of,
    decompressed,
    decompressing,
    part_of,
    resized_reach,
    scale_text,
    sinks_of,
    tie_latents,
    values_in_keys,
)
from .forms import call, factors
from .local import Local
from .operator import Family, Operator, Render, named_values
from .rule import Rule
from .sizes import Resizing, Sizes

FAMILY = Family()
_MOST_CONTEXT = 32  # tokens that are cached before, in smaller graphs


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a cache was given: keys and values (b, heads, s, d), positions (b, s), -1 is padding."""

    k: Tensor
    v: Tensor
    positions: Tensor


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
    sink, more = ("", ()) if sinks_of(node) is None else (", (n g)", (V,))
    key_dim, up = "d", ""
    if decompressing(node) is not None:
        key_dim, up, more = "w", ", (n g) [u] [r]", (*more, V)
    text = f"b (n g) [q] [d], b n [k] [{key_dim}],{values} b [q]{sink}{up} -> b (n g) [q] [e]"
    rule = factors(text, sizes={"n": heads, "g": groups})(node)
    tensors = 2 if values_in_keys(node) else 3  # that have tokens in dim 2
    cut = (*(S(2),) * tensors, S(1), *more)
    whole = (R,) * len(node.operands)
    return replace(
        rule,
        sizes={**rule.sizes, "c": context + new},
        uneven=frozenset({"c"}),
        inner=INNER_HEADS,
        algorithms={
            name: choice_of(declared, ("c",), whole, (R,), label="s")
            if declared.whole
            else choice_of(declared, ("q", "k", "c"), cut, (S(2),))
            for name, declared in ALGORITHMS.items()
            if declared.over_cache
        },
    )


def _part(local: Local) -> Part:
    return part_of(local, keys="c")


def _emit_cached_attention(node: Node, render: Render) -> str:
    name, axis = render.algorithm()
    return call(
        "ops.cached_attention",
        *(render.arg(tensor) for tensor in ("q", "k", "v")),
        f"self.{node.arg('cache')}",
        render.arg("positions"),
        algorithm=f'"{name}"' if name else "",
        axis=axis,
        scale=scale_text(node, render),
        window=render.arg("window") if node.arg("window") else "",
        softcap=render.arg("softcap") if node.arg("softcap") else "",
        sinks="" if sinks_of(node) is None else render.arg("sinks"),
        chunk=render.arg("chunk") if dict(node.args).get("chunk") else "",
        up="" if decompressing(node) is None else render.arg("up"),
    )


def cached_attention_math(
    cached: Tokens | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    context: int,
    value_dim: int = 0,
    sinks: Tensor | None = None,
    chunk: int = 0,
    up: Tensor | None = None,
) -> tuple[Tensor, Tokens]:
    """Attention of new tokens over all that are known, and all that are known then.

    Without `v` the values are the first `value_dim` numbers of the keys.  `sinks` (hq,) and
    `chunk`: see `attention_math`.  `context`, the number that was planned for, changes nothing.
    With `up` (hq, d + dv, r) the keys are latents, of which keys and values of all heads are made.
    """
    v = k[..., :value_dim] if v is None else v
    keys = positions
    if cached is not None:
        k, v = torch.cat([cached.k, k], 2), torch.cat([cached.v, v], 2)
        keys = torch.cat([cached.positions, positions], 1)
    rows, columns = positions[:, None, :, None], keys[:, None, None, :]
    mask = (columns >= 0) & (columns <= rows)
    if window:
        mask &= columns > rows - window
    if chunk:
        mask &= columns // chunk == rows // chunk
    heads_k, heads_v = (k, v) if up is None else decompressed(k, up, q.shape[3])
    out = attention_math(
        q, heads_k, heads_v, mask, scale, causal=False, window=0, softcap=softcap, dropout_p=0.0,
        sinks=sinks,
    )  # fmt: skip
    return out, Tokens(k, v, keys)


class CachedAttention(Operator):
    """New tokens over all that are cached, themselves included."""

    attends = True
    words = WORDS
    noun = "attended"
    spent_on = "attention"
    remembers = "cache"

    def rule(self, node: Node) -> Rule:
        """Sequences, key heads, queries of each; `c`, all tokens, stands in no operand."""
        return _cached_attention_rule(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """Queries, keys and values."""
        return named_values(node, ("q", "k", "v"))

    def flops(self, local: Local) -> float:
        """FLOPs of the products with keys and values of all tokens, as if no score was masked."""
        return 2.0 * local.size("b", "n", "g", "q", "c") * (local.size("d") + local.size("e"))

    def work(self, local: Local) -> Kernels:
        """By the algorithm."""
        return kernels_of(_part(local), local.dtype, backward=False)

    def traffic(self, local: Local) -> tuple[Traffic, ...]:
        """By the algorithm, and what tells ranks which tokens the others have."""
        part = _part(local)
        return (*positions_of(part), *traffic_of(part, backward=False))

    def buffers(self, local: Local) -> float:
        """By the algorithm, and heads that are made of latents."""
        return buffers_of(_part(local))

    def remembered(self, local: Local, run: int = 0) -> float:
        """Bytes of the KV cache; what a window drops is not in it."""
        return float(_part(local).cache_bytes(run))

    def ties(self, sizes: Sizes, node: Node) -> bool:
        """See `tie_latents`."""
        return tie_latents(sizes, node)

    def resized(self, node: Node, new: Resizing) -> dict[str, Arg]:
        """Fewer cached tokens, and what `resized_reach` says."""
        context = node.int_arg("context")
        kept = min(context, _MOST_CONTEXT) if new.shortens else context
        return {"context": kept, **resized_reach(node, new, context, kept)}

    def continued(self, memory: Any, args: Mapping[str, Any]) -> tuple[Tensor, Tokens]:
        """The result, and all tokens that are cached then; `memory` are those before, or None."""
        return cached_attention_math(memory, **args)

    def emit(self, node: Node, render: Render) -> str:
        """`ops.cached_attention` with the name of its cache."""
        return _emit_cached_attention(node, render)


FAMILY.add("shardwright.cached_attention", CachedAttention())

__all__ = ["FAMILY", "CachedAttention", "Tokens", "cached_attention_math"]
