"""The operator `shardwright.moe`: how a layer of experts is cut, and what its parts take and move.

How many tokens a rank's experts get is decided by the router.  With n tokens on each of p ranks,
k choices per token and E experts, balanced routing gives a rank n k pairs (token, expert); of them
`imbalance` times as many are expected on the busiest one, which all wait for.  In the form with
all-to-all a token goes once to each rank that has one of its experts, to a given one with the
probability q = 1 - C(E - E/p, k) / C(E, k); so n (p - 1) q rows come in from others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import comb, log, sqrt
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...compat.torch import is_fake
from ...facts.spec import S
from ...facts.traffic import Traffic
from ...facts.work import Kernel, Kernels, Product, Stream
from ..graph import Node, Value
from .experts import moe_math, moe_operator
from .forms import call, optional
from .local import Local
from .operator import Family, Operator, Render, named_values, shapes_of
from .rule import Algorithm, Rule, parse_rule
from .sizes import Size, Sizes

FAMILY = Family()
_INDEX_BYTES = 4
_COUNT_BYTES = 8
# Popularity of the i-th most popular expert is i ** -_POWER: between uniform (0) and Zipf (1).
# Trained routers with a balancing loss lie below, routers on one narrow domain above.
_POWER = 0.5


def usual_imbalance(experts: int, ranks: int) -> float:
    """Load of the busiest of `ranks` equal blocks of experts over the mean, for a power-law router.

    Mean of the largest of `ranks` sums of `experts / ranks` popularities, each sum taken as normal:
    1 + v sqrt(2 ln ranks / (experts / ranks)) with v the popularities' coefficient of variation.

    >>> usual_imbalance(8, 1), round(usual_imbalance(256, 32), 2)
    (1.0, 1.61)
    """
    if ranks == 1:
        return 1.0
    shares = [(i + 1) ** -_POWER for i in range(experts)]
    mean = sum(shares) / experts
    spread = sqrt(sum((share - mean) ** 2 for share in shares) / experts) / mean
    busiest = 1.0 + spread * sqrt(2.0 * log(ranks) * ranks / experts)
    return min(busiest, float(ranks))


@dataclass(frozen=True, slots=True)
class Layer:
    """One rank's part of a layer of experts."""

    tokens: int
    choices: int
    experts: int  # on this rank
    all_experts: int
    width: int
    hidden: int
    out: int
    matrices: int  # of the first product: 2 with a gate
    itemsize: int
    axes: tuple[int, ...]  # that cut the experts
    ranks: int
    sends: bool  # tokens go to their experts; else every rank has all and gives a summand
    imbalance: float
    dtype: str

    @property
    def pairs(self) -> float:
        """Rows (token, expert) that the busiest rank's experts compute."""
        mean = self.tokens * self.choices / (1 if self.sends else self.ranks)
        return mean * self.imbalance

    @property
    def rows_sent(self) -> float:
        """Rows that a rank sends, those to itself included, with balanced routing."""
        block = self.all_experts // self.ranks
        missed = comb(self.all_experts - block, self.choices) / comb(self.all_experts, self.choices)
        return self.tokens * self.ranks * (1.0 - missed)

    @property
    def sorted_bytes(self) -> float:
        """Bytes of the sorted rows that the products take and give."""
        widths = self.width + (self.matrices + 1) * self.hidden + self.out
        return self.pairs * widths * self.itemsize

    @property
    def saved_bytes(self) -> float:
        """Bytes of the sorted rows that the products take and give, which autograd keeps, and with
        a gate of what it lets through."""
        gated = self.hidden if self.matrices == 2 else 0
        return self.sorted_bytes + self.pairs * gated * self.itemsize

    @property
    def part_bytes(self) -> float:
        """Bytes of what a layer keeps that keeps a part: what products and exchanges give."""
        given = self.pairs * (self.matrices * self.hidden + self.out)
        if not self.sends or self.ranks == 1:
            return given * self.itemsize
        rows = self.rows_sent * self.imbalance
        come = rows * (self.width + self.out + self.choices) * self.itemsize
        return given * self.itemsize + come + rows * self.choices * _INDEX_BYTES


def layer_of(local: Local) -> Layer:
    """The part under the choices of `local`; its `imbalance` of 0 is `usual_imbalance`."""
    rule, node = local.rule, local.node
    axes = tuple(i for i, choice in enumerate(local.choices) if "e" in rule.cuts(choice))
    ranks, total = local.ways.get("e", 1), rule.sizes["e"]
    load = 1.0
    if ranks > 1:
        load = min(local.imbalance, float(ranks)) or usual_imbalance(total, ranks)
    return Layer(
        tokens=local.size(*(factor for dim in rule.operands[0][:-1] for factor in dim)),
        choices=local.size("k"),
        experts=local.size("e"),
        all_experts=total,
        width=local.size("h"),
        hidden=local.size("f"),
        out=local.size("o"),
        matrices=1 if node.arg("gating") == "none" else 2,
        itemsize=node.output.type.dtype.itemsize,
        axes=axes,
        ranks=ranks,
        sends=any(choice in rule.algorithms for choice in local.choices),
        imbalance=load,
        dtype=local.dtype,
    )


def kernels(layer: Layer, *, backward: bool) -> Kernels:
    """What the busiest rank computes, between the exchanges."""
    pairs = max(layer.pairs, 1.0)
    # Of few rows each goes to another expert: their weights are what is read.
    active = max(layer.experts * (1.0 - (1.0 - 1.0 / layer.experts) ** pairs), 1.0)
    rows = pairs / active
    products = (  # (rows, columns of the result, inner size) of each expert's two products
        (rows, layer.matrices * layer.hidden, layer.width),
        (rows, layer.out, layer.hidden),
    )

    def product(m: float, n: float, k: float) -> Kernel:
        return Product(m, n, k, active, layer.dtype)

    moved = Stream(2.0 * (layer.sorted_bytes + layer.tokens * layer.out * layer.itemsize))
    forward = (*(product(*sizes) for sizes in products), moved)
    if not backward:
        return Kernels((forward,))
    back = [product(*sizes) for m, n, k in products for sizes in ((m, k, n), (k, n, m))]
    return Kernels((forward,), ((*back, moved),))


def exchanges(layer: Layer, *, backward: bool) -> tuple[Traffic, ...]:
    """The all-to-alls, which nothing hides."""
    if not layer.sends or layer.ranks == 1:
        return ()
    rows = layer.rows_sent * layer.imbalance
    there = [rows * layer.width * layer.itemsize, rows * layer.choices * layer.itemsize]
    back = [rows * layer.out * layer.itemsize]
    counts, numbers = float(_COUNT_BYTES * layer.ranks), rows * layer.choices * _INDEX_BYTES
    passes = [(False, [counts, numbers, *there, *back])]
    passes += [(True, [*back, *there])] if backward else []
    return tuple(
        Traffic("all_to_all", layer.axes, n, backward=again) for again, sent in passes for n in sent
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
        shapes_of(node.operands),
        shapes_of(node.outputs),
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
    named = {name: optional(render, name) for name in ("gate", "up_bias", "gate_bias", "down_bias")}
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


class Experts(Operator):
    """The experts of a mixture: tokens, experts, hidden units or the result's width may be cut."""

    experts = "e"
    words: Mapping[str, str] = MappingProxyType(
        {
            "e": "expert, EP with summed results",
            "f": "intermediate size",
            "o": "columns",
            "dispatch_i0": "expert, EP with all-to-all",
            "dispatch_i1": "expert, EP with all-to-all",
        }
    )
    noun = "expert_output"
    spent_on = "experts"

    def rule(self, node: Node) -> Rule:
        """Tokens, experts, hidden units of each, width of the result; forms with all-to-all."""
        return _moe_rule(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """What the products are made of; the sorted rows are `extra_bytes`."""
        return named_values(node, ("x", "indices", "weights", "up", "gate", "down"))

    def load(self, local: Local) -> float:
        """That of the busiest rank's experts over the mean."""
        layer = layer_of(local)
        return layer.imbalance if layer.sends else 1.0

    def extra_bytes(self, local: Local) -> float:
        """The rows, sorted by expert, of the busiest rank."""
        return layer_of(local).saved_bytes

    def work(self, local: Local) -> Kernels:
        """Grouped products of the busiest rank, and the sorting of its rows."""
        return kernels(layer_of(local), backward=local.backward)

    def traffic(self, local: Local) -> tuple[Traffic, ...]:
        """What is expected of balanced routing, times the load of the busiest rank."""
        return exchanges(layer_of(local), backward=local.backward)

    def part_bytes(self, local: Local) -> float:
        """What products and exchanges give."""
        return layer_of(local).part_bytes

    def spares(self, local: Local) -> tuple[tuple[Kernel, ...], tuple[Traffic, ...]]:
        """Products and exchanges; rows are sorted and gated again."""
        layer = layer_of(local)
        steps = kernels(layer, backward=False).forward
        products = tuple(each for step in steps for each in step if isinstance(each, Product))
        return products, exchanges(layer, backward=False)

    def ties(self, sizes: Sizes, node: Node) -> bool:
        """Experts and choices stay, since indices name experts; gate and up are as large."""
        up = node.arg("up")
        assert isinstance(up, Value)
        sizes.fix(sizes.dim(up, 0), sizes.dim(node.operands[1], -1))
        rows, two = sizes.dim(up, 2 if node.arg("transposed") else 1), Size(2, fixed=True)
        unit = Size(rows.size // 2)
        if node.arg("gating") == "halves":
            sizes.equate([rows], [two, unit])
        elif node.arg("gating") == "pairs":
            sizes.equate([rows], [unit, two])
        return True

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """Which rows an expert gets depends on values, which fake and meta tensors do not have."""
        without_values = is_fake(args["x"]) or args["x"].is_meta
        return moe_operator(**args) if without_values else moe_math(**args)

    def emit(self, node: Node, render: Render) -> str:
        """`ops.moe`, told which axis cuts the experts and whether tokens go there."""
        return _emit_moe(node, render)


FAMILY.add("shardwright.moe", Experts())

__all__ = ["FAMILY", "Experts", "Layer", "exchanges", "kernels", "layer_of", "usual_imbalance"]
