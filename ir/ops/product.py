"""Matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...facts import work as facts
from ...facts.work import Kernels
from ..graph import Node
from .forms import call, factors, optional
from .local import Local
from .operator import Family, Leaf, Light, Render, opaque, shapes_of
from .rule import Choice, Dims, Rule

FAMILY = Family()


class Product(Light):
    """A product of two operands, and what is added to it; declared as `Light` is."""

    heavy = True
    stays = True
    words: Mapping[str, str] = MappingProxyType({"o": "columns", "k": "rows"})
    also: Mapping[str, str] = MappingProxyType({"out": "o", "in": "k"})
    spent_on = "matrix products"
    names_module = True

    def work(self, local: Local) -> Kernels:
        """One product, and in backward one for the gradient of each side that has one."""
        batch, m, n, k = product_dims(local.rule, local.ways)
        dtype = local.dtype
        if local.node.output.type.dtype.is_complex:  # four real products: [re, -im; im, re] by rows
            m, k, dtype = 2 * m, 2 * k, str(local.node.output.type.dtype.to_real())
        forward = facts.Product(m, n, k, batch, dtype)
        if not local.backward:
            return Kernels(((forward,),))
        sides = [v for i, v in enumerate(local.node.operands) if i not in local.rule.addends]
        turned = ((m, k, n), (k, n, m))
        back = tuple(
            facts.Product(*sizes, batch, dtype)
            for side, sizes in zip(sides[:2], turned, strict=False)
            if side.differentiable
        )
        return Kernels(((forward,),), (back,))


def product_dims(rule: Rule, ways: Mapping[str, int]) -> tuple[int, int, int, int]:
    """(batch, m, n, k) of a matrix product whose factors are cut `ways` times.

    A product of more than two operands counts as if it was computed in one step.
    """
    named = [
        {factor for dim in dims for factor in dim}
        for i, dims in enumerate(rule.operands)
        if i not in rule.addends
    ]
    left, right = named[0], set[str]().union(*named[1:])
    result = {factor for dim in rule.results[0] for factor in dim}

    def size(factors: set[str]) -> int:
        return prod(-(-rule.sizes[f] // ways.get(f, 1)) for f in factors)

    return (
        size(left & right & result),
        size((left - right) & result),
        size((right - left) & result),
        size((left & right) - result),
    )


def _linear_rule(node: Node) -> Rule:
    if len(node.operands) == 3:
        return factors("... k, o k, o -> ... o", uneven="o", addends=[2])(node)
    return factors("... k, o k -> ... o", uneven="o")(node)


def _emit_linear(node: Node, render: Render) -> str:
    bias = optional(render, "bias")
    return call("F.linear", render.arg("input"), render.arg("weight"), *([bias] if bias else []))


class Linear(Product):
    """input @ weight.T + bias."""

    def leaf(self, node: Node, choices: Sequence[Choice]) -> Leaf | None:
        """A linear layer of the columns and rows that are here."""
        return Leaf("Linear")


FAMILY.add(
    "aten.linear.default",
    Linear(
        _linear_rule,
        _emit_linear,
        saves=("input if weight", "weight if input"),
    ),
)


class Affine(Product):
    """input @ weight + bias with a weight [in, out], as in GPT-2's Conv1D."""

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """On whole tensors."""
        input, weight, bias = (args[key] for key in ("input", "weight", "bias"))
        return input @ weight + bias


FAMILY.add(
    "shardwright.affine",
    Affine(
        factors("... k, k o, o -> ... o", uneven="o", addends=[2]),
        "F.linear({input}, {weight}.T, {bias})",
        saves=("input if weight", "weight if input"),
    ),
)


def _addmm_rule(node: Node) -> Rule:
    bias, left, right = shapes_of(node.operands)
    skipped = 2 - len(bias)  # it may have fewer dims, and dims of size 1
    wholes = zip(("m", "o")[skipped:], (left[0], right[1])[skipped:], bias, strict=True)
    names = [name if size == whole else "1" for name, whole, size in wholes]
    uneven = "o" if "o" in names else ""  # a bias that broadcasts would fill the padding
    return factors(f"{' '.join(names)}, m k, k o -> m o", uneven=uneven, addends=[0])(node)


def _emit_added(function: str, *operands: str) -> Callable[[Node, Render], str]:
    """A product that is added to `self`, both times a factor."""

    def emit(node: Node, render: Render) -> str:
        factors = ("beta", "alpha")
        scale = {name: "" if node.arg(name) == 1 else render.arg(name) for name in factors}
        return call(function, *(render.arg(name) for name in ("self", *operands)), **scale)

    return emit


FAMILY.add(
    "aten.addmm.default",
    Product(
        _addmm_rule,
        _emit_added("torch.addmm", "mat1", "mat2"),
        saves=("mat1 if mat2", "mat2 if mat1"),
    ),
)
FAMILY.add(
    "aten.mm.default",
    Product(
        factors("m k, k n -> m n"),
        "{self} @ {mat2}",
        saves=("self if mat2", "mat2 if self"),
    ),
)
FAMILY.add(
    "aten.bmm.default",
    Product(
        factors("b m k, b k n -> b m n"),
        "{self} @ {mat2}",
        saves=("self if mat2", "mat2 if self"),
    ),
)


def _baddbmm_rule(node: Node) -> Rule:
    added, left, right = shapes_of(node.operands)
    whole = zip("bmn", (left[0], left[1], right[2]), strict=True)
    sizes = dict(whole)
    kept = [(name, n) for name, n in zip("bmn"[3 - len(added) :], added, strict=True)]
    names = " ".join(name if n == sizes[name] else "1" for name, n in kept)
    return factors(f"{names}, b m k, b k n -> b m n", addends=[0])(node)


FAMILY.add(
    "aten.baddbmm.default",
    Product(
        _baddbmm_rule,
        _emit_added("torch.baddbmm", "batch1", "batch2"),
        saves=("batch1 if batch2", "batch2 if batch1"),
    ),
)


def _matmul_rule(node: Node) -> Rule:
    left, right = shapes_of(node.operands)
    if len(right) == 1:
        return factors("... k, k -> ...")(node)
    if len(left) == 1:
        return factors("k, ... k n -> ... n")(node)
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


FAMILY.add(
    "aten.matmul.default",
    Product(_matmul_rule, "{self} @ {other}", saves=("self if other", "other if self")),
)


def _einsum_rule(node: Node) -> Rule:
    left, arrow, right = str(node.arg("equation")).replace(" ", "").partition("->")
    if not arrow:  # dims that occur once, in the order of the alphabet
        letters = left.replace(",", "").replace(".", "")
        once = sorted(name for name in letters if letters.count(name) == 1)
        right = "".join(["..." if "." in left else "", *once])
    terms = [*left.split(","), right]
    if any(len(set(names)) < len(names) for names in (t.replace(".", "") for t in terms)):
        return opaque(node)  # `ii` is a diagonal, which a cut would change
    shapes = [*shapes_of(node.operands), *shapes_of(node.outputs)]
    spelled = [_einsum_term(term, shape) for term, shape in zip(terms, shapes, strict=True)]
    return factors(f"{', '.join(spelled[:-1])} -> {spelled[-1]}")(node)


def _einsum_term(term: str, shape: Sequence[int]) -> str:
    """`...ij` as the names of its dims, `e1 e0 i j`; dims of size 1 may broadcast."""
    before, _, after = term.partition("...")
    count = len(shape) - len(before) - len(after)
    names = [*before, *(f"e{i}" for i in reversed(range(count))), *after]
    return " ".join("1" if n == 1 else name for name, n in zip(names, shape, strict=True))


def _emit_einsum(node: Node, render: Render) -> str:
    return call("torch.einsum", render.arg("equation"), *render.items("tensors"))


FAMILY.add(
    "aten.einsum.default",
    Product(_einsum_rule, _emit_einsum, saves=("tensors",)),
)

FAMILY.called("product", "matmul bmm baddbmm mm einsum linear addmm affine")

__all__ = ["FAMILY", "Product", "product_dims"]
