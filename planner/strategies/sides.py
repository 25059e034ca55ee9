"""Which dims tensor parallelism cuts: found by what products and attention do with them.

Dims of values that one factor of a rule ties together are one dim: the columns of the q projection,
the heads of attention and the rows of the o projection; the columns of gate and up and the rows of
down; the vocabulary of a head and of its loss.  Such a dim is *inner* if it is one of a weight, if
some operator sums over it (or it leaves the model), and if nothing needs it whole, as a norm
does, also one that is written out; the dims that inputs have and those that layers hand on,
those of the batch and the sequence, and experts are not.
What a weight has beside an inner dim is the dim between the blocks: the *outer* one.

The rank of an adapter (LoRA), between two matrices that stand beside one that is cut, is no inner
dim either: the one of them that shares the cut dim is cut with it, the other is whole.

So columns and rows are told apart by the side that the inner dim stands on, never by a name, and a
product between two dims that are not inner (a router, the latents of DeepSeek) stays whole, as
in Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from networkx.utils import UnionFind

from ...ir.graph import Graph, Loop, Node, Value
from ...ir.graph.remember import once_for_each
from ...ir.ops.labels import DimLabels, label_dims
from ...ir.ops.registry import operator_of, rule_of
from ...ir.ops.rule import Choice, Dim, Rule
from .params import all_params
from .regions import scopes

_Place: TypeAlias = tuple[str, int]  # a value and one of its dims
_DATA = ("b", "s")


class Sides:
    """The inner and the outer dims of a graph's values."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = [node for scope in scopes(graph) for node in scope.nodes]
        self._same: UnionFind[_Place] = UnionFind()
        for node in self._nodes:
            for _, places in _factors(node):
                self._same.union(*places)
        for loop in graph.loops:
            for one, other in _pairs(loop):
                for dim in range(len(one.type.shape)):
                    self._same.union((one.name, dim), (other.name, dim))
        weights = [ref.param.value for ref in all_params(graph)]
        weights = [value for value in weights if len(value.type.shape) > 1]
        ends = (self._used_up() | self._leaving(graph)) - self._refused(graph)
        inner = ends & {self._of(value, dim) for value in weights for dim in _dims(value)}
        self._inner = inner - self._narrow(inner, weights)
        self._outer = {
            self._of(value, dim)
            for value in weights
            if any(self.is_inner(value, other) for other in _dims(value))
            for dim in _dims(value)
        } - self._inner

    def is_inner(self, value: Value, dim: int) -> bool:
        """Is it a dim that tensor parallelism cuts?"""
        return self._of(value, dim) in self._inner

    def inner_dim(self, value: Value) -> int | None:
        """The first inner dim of a value, if it has one."""
        return next((dim for dim in _dims(value) if self.is_inner(value, dim)), None)

    def cuts_inner(self, node: Node, choice: Choice) -> bool:
        """Does a choice cut an inner dim, or a factor further inside of one?"""
        return choice in rule_of(node).sizes and any(
            self.is_inner(value, i)
            for value, dims in _terms(node)
            for i, dim in enumerate(dims)
            if choice in dim
        )

    def inner_choices(self, node: Node) -> tuple[Choice, ...]:
        """The choices of a node that cut an inner dim, whatever the sizes."""
        return tuple(c for c in rule_of(node).choices() if self.cuts_inner(node, c))

    def is_between(self, node: Node) -> bool:
        """Does a node stand between the blocks: has it an outer dim, and no inner one?"""
        places = [self._of(value, i) for value, dims in _terms(node) for i, _ in enumerate(dims)]
        return not self._inner.intersection(places) and bool(self._outer.intersection(places))

    def _of(self, value: Value, dim: int) -> _Place:
        return self._same[value.name, dim]

    def _used_up(self) -> set[_Place]:
        """Dims that some operator sums over, or looks up in, and can do cut."""
        return {
            self._same[places[0]]
            for node in self._nodes
            for factor, places in _factors(node)
            if factor in rule_of(node).choices()
            and not any(factor in dim for dims in rule_of(node).results for dim in dims)
        }

    def _normalised(self) -> set[_Place]:
        """Dims that products sum over, and of which light operators make a sum or mean that comes
        back to all of the dim: a norm that is written out."""
        summed: set[_Place] = set()
        back: set[_Place] = set()
        sums: dict[str, set[_Place]] = {}  # what a value is a sum of, or made of such ones
        for node in self._nodes:
            own, rule = set[_Place](), rule_of(node)
            for factor, places in _factors(node):
                if not any(factor in dim for dims in rule.results for dim in dims):
                    own.add(self._same[places[0]])
            if operator_of(node).heavy:
                summed |= own if operator_of(node).spent_on == "matrix products" else set()
                continue
            own = own.union(*(sums.get(value.name, ()) for value in node.operands))
            for value in node.outputs:
                sums[value.name] = own
                back |= own.intersection(self._of(value, dim) for dim in _dims(value))
        return summed & back

    def _narrow(self, inner: set[_Place], weights: list[Value]) -> set[_Place]:
        """Inner dims that weights join to other inner dims, and that are smaller than all that they
        are joined to: the rank of a product of two matrices, as adapters have it.

        What they are joined to is cut; cutting them, too, would cost more than it saves.
        """
        sizes: dict[_Place, int] = {}
        joined: dict[_Place, set[_Place]] = {}
        for value in weights:
            places = {self._of(value, dim): size for dim, size in enumerate(value.type.shape)}
            sizes.update(places)
            for place in inner.intersection(places):
                joined.setdefault(place, set()).update(set(places) - {place})
        return {
            place
            for place, others in joined.items()
            if inner & others and all(sizes[place] < sizes[other] for other in others)
        }

    def _leaving(self, graph: Graph) -> set[_Place]:
        return {self._of(out.value, dim) for out in graph.outputs for dim in _dims(out.value)}

    def _refused(self, graph: Graph) -> set[_Place]:
        """Dims that must stay whole, that count data or experts, or that inputs or layers hand
        on."""
        refused = {
            self._same[places[0]]
            for node in self._nodes
            for factor, places in _factors(node)
            if factor in rule_of(node).whole or factor == operator_of(node).experts
        }
        refused |= self._normalised()
        refused |= {self._of(item.value, dim) for item in graph.inputs for dim in _dims(item.value)}
        for loop in graph.loops:
            refused |= {self._of(value, dim) for value in loop.outputs for dim in _dims(value)}
        labels = label_dims(graph)
        values = {value.name: value for node in self._nodes for value, _ in _terms(node)}
        return refused | {
            self._of(value, dim)
            for name, value in values.items()
            for dim in _dims(value)
            if _is_data(labels.get(name, ()), dim)
        }


sides_of = once_for_each(Sides)
"""The dims of a graph, found once."""


def _is_data(labels: DimLabels, dim: int) -> bool:
    return dim < len(labels) and bool(labels[dim]) and labels[dim][0] in _DATA


def _dims(value: Value) -> range:
    return range(len(value.type.shape))


def _terms(node: Node) -> Iterator[tuple[Value, tuple[Dim, ...]]]:
    """Every operand and result of a node with the factors of its dims."""
    rule = rule_of(node)
    yield from zip((*node.operands, *node.outputs), (*rule.operands, *rule.results), strict=True)


def _factors(node: Node) -> Iterator[tuple[str, list[_Place]]]:
    """Each factor with the dims whose outermost it is: those that a cut of it cuts."""
    rule = rule_of(node)
    for factor in rule.sizes:
        places = [
            (value.name, i)
            for value, dims in _terms(node)
            for i, dim in enumerate(dims)
            if _outermost(dim, rule) == factor
        ]
        if places:
            yield factor, places


def _outermost(dim: Dim, rule: Rule) -> str | None:
    return next((factor for factor in dim if rule.sizes[factor] != 1), None)


def _pairs(loop: Loop) -> Iterator[tuple[Value, Value]]:
    """Values inside the blocks of a loop with those that they are outside of it."""
    outside = (*loop.carried, *loop.invariants)
    for block in loop.blocks:
        yield from zip(block.inputs, outside, strict=True)
        yield from zip(block.outputs, loop.outputs, strict=True)
    yield from zip(loop.carried, loop.outputs, strict=True)


__all__ = ["Sides", "sides_of"]
