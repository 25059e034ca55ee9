"""The operator `shardwright::attention`: attention kept whole by capture.

Shapes: q (b, hq, sq, d), k (b, hkv, sk, d), v (b, hkv, sk, dv), result (b, hq, sq, dv); hq is a
multiple of hkv, and query head h reads key head h // (hq / hkv).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...facts.spec import S, State, V
from ...facts.traffic import Traffic
from ...facts.work import Kernels
from ..graph import Arg, Node, Value
from .algorithms.algorithm import AttentionAlgorithm
from .algorithms.part import Part
from .algorithms.quantities import buffers_of, kernels_of, traffic_of
from .algorithms.registry import ALGORITHMS
from .forms import call, factors, optional
from .local import Local
from .operator import Family, Operator, Render, named_values
from .rule import Algorithm, Choice, Rule
from .sizes import Resizing, Size, Sizes


def attention_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
    sinks: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """softmax(cap(scale * q k^T) + mask) v, written out; differentiable by autograd.

    `causal`: query i sees keys j <= i.  `window` w > 0: query i sees keys j > i - w.  `mask`: bool
    (True = attend) or additive, broadcastable to (b, hq, sq, sk).  `softcap` c > 0: scores become
    c * tanh(scores / c).  `sinks` (hq,): the score of one more key of each head, whose value is
    zero.  `chunk` c > 0: query i sees keys of its own chunk, j // c = i // c.  A query that sees no
    key gives zeros.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-2, -1)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
    seen = _seen(q.shape[2], k.shape[2], mask, causal, window, chunk, q.device)
    if seen is None:
        weights = _weights(scores, sinks)
    else:
        scores = scores.masked_fill(~seen, float("-inf"))
        # a row without any visible key would be 0 / 0: give it zeros, and zero gradients
        empty = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
        weights = _weights(scores, sinks).masked_fill(empty, 0.0)
    weights = weights.to(q.dtype)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ v


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys and, if there are any, the sinks, whose weights are left out."""
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, -1, dtype=_accumulation(scores.dtype))
    return weights if sinks is None else weights[..., :-1]


def _seen(
    sq: int,
    sk: int,
    mask: Tensor | None,
    causal: bool,
    window: int,
    chunk: int,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query may attend to, broadcastable to (b, hq, sq, sk); None means all."""
    seen = mask if mask is None or mask.dtype == torch.bool else mask > -torch.inf
    if not causal and window <= 0 and not chunk:
        return seen
    rows = torch.arange(sq, device=device)[:, None]
    columns = torch.arange(sk, device=device)[None, :]
    band = columns <= rows if causal else torch.ones(sq, sk, dtype=torch.bool, device=device)
    if window > 0:
        band = band & (columns > rows - window)
    if chunk:
        band = band & (columns // chunk == rows // chunk)
    return band if seen is None else seen & band


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    """Softmax runs in at least 32 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("shardwright::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
    sinks: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """`attention_math` as one operator, so that tracing keeps it whole.

    Raises ValueError with `dropout_p` > 0: its backward computes the weights again, and could not
    draw the same zeros.
    """
    if dropout_p > 0:
        raise ValueError(
            f"shardwright::attention cannot be run with dropout_p={dropout_p}: it is an operator "
            "for tracing; call `attention_math`, or set the attention dropout to 0"
        )
    return attention_math(q, k, v, mask, scale, causal, window, softcap, 0.0, sinks, chunk).clone()


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
    sinks: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """Shape and dtype of the result."""
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *first, sinks, chunk = inputs
    ctx.save_for_backward(*first[:4], sinks)
    ctx.options, ctx.chunk = first[4:], chunk


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, a floating-point mask and sinks, by running the formula again."""
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    # torch leaves out last arguments that have their default
    wanted: tuple[bool, ...] = (*ctx.needs_input_grad[:4], any(ctx.needs_input_grad[9:10]))
    leaves: list[Any] = [
        None if value is None else value.detach().requires_grad_(need)
        for value, need in zip(saved, wanted, strict=True)
    ]
    with torch.enable_grad():
        output = attention_math(*leaves[:4], *ctx.options, sinks=leaves[4], chunk=ctx.chunk)
    needed = [leaf for leaf, need in zip(leaves, wanted, strict=True) if leaf is not None and need]
    found = iter(torch.autograd.grad(output, needed, grad))
    *grads, of_sinks = [next(found) if need else None for need in wanted]
    return (*grads, None, None, None, None, None, of_sinks, None)


attention.register_fake(_attention_fake)
attention.register_autograd(_attention_backward, setup_context=_save_inputs)


@torch.library.custom_op("shardwright::mask_stand_in", mutates_args=())
def mask_stand_in(place: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """Stands for an attention mask whose meaning is known otherwise; its values mean nothing.

    bool (batch, 1, queries, keys) on the device of `place`.
    """
    return torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=place.device)


def _stand_in_fake(place: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """Shape and dtype of the stand-in."""
    return place.new_empty((batch, 1, queries, keys), dtype=torch.bool)


mask_stand_in.register_fake(_stand_in_fake)


# --- the declaration -----------------------------------------------------------------------------

FAMILY = Family()

# Query heads of one key head on several ranks, each with a copy of it: tensor parallelism over
# more ranks than there are key heads.
INNER_HEADS = frozenset({"g"})


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
    term += ", (n g)" if sinks_of(node) is not None else ""
    held = "b n [k] [d], b n [k] [e]"
    if decompressing(node) is not None:
        held, term = "b n [k] [w]", f"{term}, (n g) [u] [r]"
    text = f"b (n g) q [d], {held}{term} -> b (n g) q [e]"
    rule = factors(text, sizes=sizes)(node)
    return replace(rule, inner=INNER_HEADS, algorithms=_attention_algorithms(node, rule))


def sinks_of(node: Node) -> Value | None:
    """The scores of attention sinks, if there are any."""
    sinks = dict(node.args).get("sinks")
    return sinks if isinstance(sinks, Value) else None


def _attention_algorithms(node: Node, rule: Rule) -> dict[str, Algorithm]:
    """Ways to run self-attention over an axis that cuts queries, keys and values alike.

    Dropout would need the weights of all ranks, and a mask its rows and columns: neither is known
    to these.
    """
    query, key = node.operands[:2]
    masked = isinstance(node.arg("mask"), Value)
    if masked or node.arg("dropout_p") or query.type.shape[2] != key.type.shape[2]:
        return {}
    sinks = () if sinks_of(node) is None else (V,)
    held = (S(2), *sinks, V) if decompressing(node) is not None else (S(2), S(2), *sinks)
    whole = part_of(Local(node, rule, (), (), {}, training=False))
    return {
        name: choice_of(declared, ("q", "k"), (S(2), *held), (S(2),))
        for name, declared in ALGORITHMS.items()
        if declared.over_shards and declared.suits(whole)
    }


def choice_of(
    declared: AttentionAlgorithm,
    cuts: tuple[str, ...],
    operands: tuple[State, ...],
    results: tuple[State, ...],
    label: str = "",
) -> Algorithm:
    """An algorithm as a choice of a rule."""
    return Algorithm(
        cuts, operands, results, declared.fits, label, words=declared.words,
        orders=declared.orders, balanced=declared.balanced, by_heads=declared.by_heads,
    )  # fmt: skip


def part_of(local: Local, keys: str = "k") -> Part:
    """One rank's part of an attention in numbers; with `keys` "c", of one over a cache."""
    node, rule, cached = local.node, local.rule, keys == "c"
    chosen = enumerate(local.choices)
    axis = next((i for i, choice in chosen if choice in rule.algorithms), -1)
    up, latent = decompressing(node), None
    if up is not None:
        rank = up.type.shape[2]
        latent = (rank, cached_per_head(node) - rank)
    return Part(
        local.size("b"), local.size("n", "g"), local.size("n"), local.size("q"), local.size(keys),
        local.size("d"), local.size("e"), node.output.type.dtype.itemsize,
        cached or bool(node.arg("causal")), node.int_arg("window"),
        local.choices[axis] if axis >= 0 else "", axis, local.sizes[axis] if axis >= 0 else 1,
        local.order == "zigzag", 1 if axis >= 0 else local.ways.get("q", 1), cached,
        values_in_keys(node) and latent is None, latent,
    )  # fmt: skip


def _emit_attention(node: Node, render: Render) -> str:
    if dict(node.args).get("chunk"):
        raise ValueError(f"{node.loc}: attention in chunks is only known over a cache")
    tensors = [render.arg(name) for name in ("q", "k", "v")]
    kwargs = {
        "scale": scale_text(node, render),
        "causal": "True" if node.arg("causal") else "",
        "window": render.arg("window") if node.arg("window") else "",
        "softcap": render.arg("softcap") if node.arg("softcap") else "",
        "sinks": "" if sinks_of(node) is None else render.arg("sinks"),
        "up": "" if decompressing(node) is None else render.arg("up"),
    }
    name, axis = render.algorithm()
    if name:
        zigzag = "True" if render.order() == "zigzag" else ""
        chosen = {"algorithm": f'"{name}"', "axis": axis, "zigzag": zigzag}
        return call("ops.attention", *tensors, **chosen, **kwargs)
    axis = render.axis("q") if node.arg("causal") or node.arg("window") else ""
    kwargs["query_start"] = f"{axis}.rank * {tensors[0]}.size(2)" if axis else ""
    if node.arg("dropout_p"):
        axes = ", ".join(f'"{name}"' for name in render.sharded_axes())
        kwargs["dropout_p"] = f"{render.arg('dropout_p')} if self.training else 0.0"
        kwargs["generator"] = f"self.generator({axes})"
    mask = optional(render, "mask")
    return call("ops.attention", *tensors, *([mask] if mask else []), **kwargs)


def scale_text(node: Node, render: Render) -> str:
    """Source text of the factor of scores; empty where it is 1 / sqrt(d), the default."""
    scale, width = node.arg("scale"), node.operands[0].type.shape[3]
    usual = isinstance(scale, float) and isclose(scale, width**-0.5, rel_tol=1e-12)
    return "" if usual else render.arg("scale")


def values_in_keys(node: Node) -> bool:
    """Does an attention read its values from the keys, or make them of these, and of no others?"""
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


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    up: Tensor | None = None,
    value_dim: int = 0,
    **options: Any,
) -> Tensor:
    """`attention_math`; with `up` (hq, d + dv, r) over keys and values made from latents k.

    `value_dim` r, their numbers without the rotated part, follows from `up`.
    """
    if up is not None:
        k, v = decompressed(k, up, q.shape[3])
    assert v is not None, "values are an operand, or made from latents"
    return attention_math(q, k, v, **options)


def decompressed(latents: Tensor, up: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads from latents (b, 1, s, r + rope), rotated part last."""
    heads, rank = up.shape[0], up.shape[2]
    rope = latents[..., rank:].expand(-1, heads, -1, -1)
    made = torch.einsum("bsr,hur->bhsu", latents[:, 0, :, :rank], up)
    nope = key_dim - rope.shape[3]
    return torch.cat([made[..., :nope], rope], -1), made[..., nope:]


# what cutting a factor is called in reports
WORDS: Mapping[str, str] = MappingProxyType(
    {"n": "heads", "g": "query heads of each", "q": "queries, K/V gathered"}
)


def tie_latents(sizes: Sizes, node: Node) -> bool:
    """Keys and values that are made from latents: their parts fit the queries and the result."""
    up = decompressing(node)
    if up is None:
        return True
    query, latent = (sizes.dim(value, 3) for value in node.operands[:2])
    made, rank, value = sizes.dim(up, 1), sizes.dim(up, 2), sizes.dim(node.output, 3)
    nope, rope = Size(made.size - value.size), Size(latent.size - rank.size)
    sizes.add_up(made, [nope, value])
    sizes.add_up(latent, [rank, rope])
    sizes.add_up(query, [nope, rope])
    return True


def resized_reach(node: Node, new: Resizing, cached: int, kept: int) -> dict[str, Arg]:
    """A window that hides something still does, the same in all graphs.

    `cached` and `kept`: tokens that are cached before, in the old graph and in the new one.
    """
    window, key = node.int_arg("window"), node.operands[1]
    before, after = cached + key.type.shape[2], kept + new.shape(key)[2]
    changes: dict[str, Arg] = {}
    if window > 0:
        reach = after if window >= before else max(1, min(window, after // 2))
        reach = new.windows.setdefault(window, reach if before != after else window)
        changes["window"] = reach
        if dict(node.args).get("chunk"):  # its window is as long
            changes["chunk"] = reach
    if values_in_keys(node):
        up = decompressing(node)
        changes["value_dim"] = new.shape(node.output)[3] if up is None else new.shape(up)[2]
    return changes


class Attention(Operator):
    """Queries over keys; a cut of both runs one of several algorithms."""

    attends = True
    stays = True
    words = WORDS
    in_eval: Mapping[str, Arg] = MappingProxyType({"dropout_p": 0.0})
    noun = "attended"
    spent_on = "attention"

    def rule(self, node: Node) -> Rule:
        """Sequences, key heads, queries of each, and the tokens of queries and keys."""
        return _attention_rule(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """Operands and result; the weights are computed again."""
        return named_values(node, [n for n in _SAVED if n == "result" or n in dict(node.args)])

    def causal(self, node: Node) -> tuple[tuple[Value, int], ...]:
        """Tokens of queries, keys and values, where they stand at the same positions."""
        query, key = node.operands[:2]
        if not node.arg("causal") or query.type.shape[2] != key.type.shape[2]:
            return ()
        return tuple((value, 2) for value in node.operands[: 2 if values_in_keys(node) else 3])

    def contiguous(self, node: Node) -> tuple[Choice, ...]:
        """Queries that are cut alone, where a mask asks for their positions."""
        return ("q",) if node.arg("causal") or node.arg("window") else ()

    def flops(self, local: Local) -> float:
        """FLOPs of the products with keys and values, as if no score was masked."""
        return 2.0 * local.size("b", "n", "g", "q", "k") * (local.size("d") + local.size("e"))

    def work(self, local: Local) -> Kernels:
        """By the algorithm."""
        return kernels_of(part_of(local), local.dtype, backward=local.backward)

    def traffic(self, local: Local) -> tuple[Traffic, ...]:
        """By the algorithm."""
        return traffic_of(part_of(local), backward=local.backward)

    def buffers(self, local: Local) -> float:
        """By the algorithm, and heads that are made of latents."""
        return buffers_of(part_of(local))

    def ties(self, sizes: Sizes, node: Node) -> bool:
        """See `tie_latents`."""
        return tie_latents(sizes, node)

    def resized(self, node: Node, new: Resizing) -> dict[str, Arg]:
        """See `resized_reach`."""
        return resized_reach(node, new, 0, 0)

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """`attention_math`, over keys and values made of latents where there is `up`."""
        return _attention(**args)

    def emit(self, node: Node, render: Render) -> str:
        """`ops.attention`, with the name of the algorithm and its axis if there are any."""
        return _emit_attention(node, render)


_SAVED = ("q", "k", "v", "mask", "sinks", "up", "result")
FAMILY.add("shardwright.attention", Attention())

__all__ = [
    "FAMILY", "INNER_HEADS", "WORDS", "Attention", "attention", "attention_math", "cached_per_head",
    "choice_of", "decompressed", "decompressing", "mask_stand_in", "part_of", "resized_reach",
    "sinks_of", "tie_latents", "values_in_keys",
]  # fmt: skip
