"""Factor rules: one line per op, from which every sharding of the op follows.

A rule names the factors of an op's dims as in einsum.  `linear` is

    b s k, o k -> b s o

- a factor in an operand is a dim that can be cut there; `(n d)` is a dim that is a product of
  factors, major to minor, of which only the outermost can be cut without moving data (and one of
  `inner` by an axis after those that cut all factors before it into single ones);
- a factor that is missing from the result is contracted: cutting it gives a partial sum;
- `[h]` must stay whole; `1` (or a broadcast dim) has no factor;
- `...` stands for any leading dims, the same in every operand that has them.

A *choice* says what an op does on one mesh axis: the name of a factor that is cut over it, `R`
(the op does not use the axis: everything replicated), `V` (everything whole, gradients
partial) or `P0`, `P1`, ... (the op is linear in that group of operands: it runs on partial sums).
From rule and choice follow the required state of each operand and the state of each result:

| choice | operand with the factor | operand without it | result with it | result without it |
|--------|-------------------------|--------------------|----------------|-------------------|
| factor | `S`                     | `V` (*)            | `S`            | `P`               |
| `R`    |                         | `R`                |                | `R`               |
| `V`    |                         | `V`                |                | `V`               |
| `Pi`   | in group i: `P`         | others: `V`        |                | `P`               |

(*) an addend, such as a bias, is `P` where the result is `P`: it must be added once, not per rank.

Some ops can also be cut in ways that no single factor describes, because they communicate while
they run: attention over a sharded sequence, experts on different ranks.  Such a choice is an
`Algorithm`: it has a name, the factors that it cuts, and the states that it takes and gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

from ...facts.spec import P, R, S, State, V

Dim: TypeAlias = tuple[str, ...]  # factors of one dim, major to minor; () for a size-1 dim
Dims: TypeAlias = tuple[Dim, ...]
Choice: TypeAlias = str


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A way to run an op over an axis that communicates inside the op.

    `cuts` are the factors of which each rank computes its part, the one that gives the choice its
    meaning (and label) first.  A node uses at most one algorithm, on one axis or, if `joint`, on
    several taken as one; no other axis cuts the factors that are `alone` (default: all it cuts).
    """

    cuts: tuple[str, ...]
    operands: tuple[State, ...]
    results: tuple[State, ...]
    # may it run over so many ranks, given the sizes that other axes leave of each factor?
    fits: Callable[[Mapping[str, int], int], bool] = field(
        default=lambda sizes, ranks: True, compare=False
    )
    label: str = ""  # what it cuts (`s`, `b`), where no operand has its first factor
    joint: bool = False
    alone: tuple[str, ...] | None = None
    words: str = ""  # what reports call the choice
    # of the tokens of a sequence that ranks share: orders in which it can run, and whether zigzag
    # order gives ranks equal shares of a causal mask
    orders: tuple[str, ...] = ("contiguous", "zigzag")
    balanced: bool = False
    by_heads: bool = False  # of attention: does each rank attend whole sequences, of some heads?


@dataclass(frozen=True, slots=True)
class Rule:
    """The factors of one node.

    Invariants: one entry in `operands` per tensor operand, one in `results` per output; every
    factor has a size; a dim's size is the product of its factors' sizes.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()  # factors that no axis may cut
    linear: tuple[frozenset[int], ...] = ()  # groups of operands in which the op is jointly linear
    uneven: frozenset[str] = frozenset()  # factors whose shards may carry padding at the end
    inside: frozenset[str] = (
        frozenset()
    )  # contracted factors that the op itself reduces: result `R`
    addends: frozenset[int] = frozenset()  # operands added to the result (a bias): `P` when it is
    passes: bool = False  # worth running on `V`: views and elementwise ops
    inner: frozenset[str] = frozenset()  # may be cut where the factors before them are wholly cut
    algorithms: Mapping[str, Algorithm] = field(default_factory=dict[str, Algorithm])
    _choices: dict[str, tuple[tuple[State, ...], tuple[State, ...]]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def choices(self) -> dict[Choice, tuple[tuple[State, ...], tuple[State, ...]]]:
        """Every legal choice on one axis -> (states of the operands, states of the results)."""
        if not self._choices:
            n_in, n_out = len(self.operands), len(self.results)
            self._choices["R"] = ((R,) * n_in, (R,) * n_out)
            # factors that appear in operands: leaving one out of a result sums over it
            summed = {f for dims in self.operands for dim in dims for f in dim}
            for factor in self.sizes:
                if states := self._cut(factor, summed):
                    self._choices[factor] = states
            if self.passes:
                self._choices["V"] = ((V,) * n_in, (V,) * n_out)
            for i, group in enumerate(self.linear):
                operands = tuple(P if k in group else V for k in range(n_in))
                self._choices[f"P{i}"] = (operands, (P,) * n_out)
            for name, way in self.algorithms.items():
                self._choices[name] = (way.operands, way.results)
        return self._choices

    def _cut(
        self, factor: str, summed: set[str]
    ) -> tuple[tuple[State, ...], tuple[State, ...]] | None:
        """States when `factor` is cut, or None where that would need data to move."""
        if factor in self.whole or self.sizes[factor] == 1:
            return None
        known = {**self.sizes, **dict.fromkeys(self._before(factor), 1)}
        places = [_place(dims, factor, known) for dims in (*self.operands, *self.results)]
        if any(place == _INNER for place in places) or all(place is None for place in places):
            return None
        n = len(self.operands)
        absent = R if factor in self.inside else P
        results = tuple(absent if place is None else S(place) for place in places[n:])
        if P in results and factor not in summed:
            return None
        missing = [P if i in self.addends and P in results else V for i in range(n)]
        operands = tuple(
            missing[i] if place is None else S(place) for i, place in enumerate(places[:n])
        )
        return operands, results

    def cuts(self, choice: Choice) -> tuple[str, ...]:
        """The factors that a choice cuts; none for `R`, `V` and partial sums."""
        if choice in self.algorithms:
            return self.algorithms[choice].cuts
        return (choice,) if choice in self.sizes else ()

    def ways(self, choices: Sequence[Choice], axis_sizes: Sequence[int]) -> dict[str, int] | None:
        """How many ways each factor is cut, or None where a size does not divide.

        A factor in `uneven` may be cut unevenly, but by one axis only: two axes would disagree
        about where the padded blocks begin.
        """
        ways: dict[str, int] = {}
        for choice, n in zip(choices, axis_sizes, strict=True):
            for factor in self.cuts(choice):
                ways[factor] = ways.get(factor, 1) * n
        if not self._algorithm_fits(choices, axis_sizes, ways):
            return None
        if self.inner and not self._inner_fit(choices, axis_sizes):
            return None
        for factor, n in ways.items():
            size = self.sizes[factor]
            if size % n == 0:
                continue
            if factor not in self.uneven or choices.count(factor) > 1 or size < n:
                return None
        return ways

    def _before(self, factor: str) -> set[str]:
        """The factors that stand before one of `inner` in a dim."""
        if factor not in self.inner:
            return set()
        dims = [dim for term in (*self.operands, *self.results) for dim in term if factor in dim]
        return {name for dim in dims for name in dim[: dim.index(factor)]}

    def _inner_fit(self, choices: Sequence[Choice], axis_sizes: Sequence[int]) -> bool:
        """Is each inner factor cut after axes that have wholly cut the factors before it?"""
        pairs = list(zip(choices, axis_sizes, strict=True))
        return all(
            prod(n for c, n in pairs[:axis] if c == before) == self.sizes[before]
            for axis, choice in enumerate(choices)
            for before in self._before(choice)
        )

    def _algorithm_fits(
        self, choices: Sequence[Choice], axis_sizes: Sequence[int], ways: Mapping[str, int]
    ) -> bool:
        """At most one algorithm, alone on its factors, and one that these sizes allow."""
        used = [(c, n) for c, n in zip(choices, axis_sizes, strict=True) if c in self.algorithms]
        if not used:
            return True
        names, ranks = {choice for choice, _ in used}, prod(n for _, n in used)
        way = self.algorithms[used[0][0]]
        alone = way.cuts if way.alone is None else way.alone
        if len(names) > 1 or (len(used) > 1 and not way.joint):
            return False
        if any(factor in alone for c in choices if c not in names for factor in self.cuts(c)):
            return False
        left = {f: size // ways.get(f, 1) for f, size in self.sizes.items()}
        return way.fits(left, ranks)


_INNER = -1


def _place(dims: Dims, factor: str, sizes: Mapping[str, int]) -> int | None:
    """The dim whose outermost factor is `factor`; _INNER if it is not outermost; None if absent."""
    for i, dim in enumerate(dims):
        if factor in dim:
            outer = dim[: dim.index(factor)]
            return i if all(sizes[f] == 1 for f in outer) else _INNER
    return None


_TOKEN = re.compile(r"\(([^)]*)\)|\[(\w+)\]|(\.\.\.)|(\w+)")


def parse_rule(
    text: str,
    operand_shapes: Sequence[Sequence[int]],
    result_shapes: Sequence[Sequence[int]],
    *,
    sizes: Mapping[str, int] | None = None,
    linear: Sequence[Sequence[int]] = (),
    uneven: str = "",
    inside: str = "",
    addends: Sequence[int] = (),
    passes: bool = False,
) -> Rule:
    """A `Rule` from its text and the shapes of one node.

    `sizes` gives factor sizes that the shapes alone do not tell (a product whose factors stand
    nowhere alone).  Raises ValueError if text and shapes do not fit.

    >>> rule = parse_rule("... k, o k -> ... o", [(2, 8, 4), (6, 4)], [(2, 8, 6)])
    >>> sorted(rule.choices())
    ['R', 'i0', 'i1', 'k', 'o']
    """
    left, right = text.split("->")
    terms = [*left.split(","), *right.split(",")]
    shapes = [*operand_shapes, *result_shapes]
    if len(terms) != len(shapes):
        raise ValueError(f"rule `{text}` has {len(terms)} terms for {len(shapes)} tensors")
    whole: set[str] = set()
    known: dict[str, int] = dict(sizes or {})
    parsed = [
        _parse_term(term, len(shape), whole) for term, shape in zip(terms, shapes, strict=True)
    ]
    pairs = [p for d, shape in zip(parsed, shapes, strict=True) for p in zip(d, shape, strict=True)]
    _learn_sizes(text, pairs, known)
    used = {f for dims in parsed for dim in dims for f in dim}
    n = len(operand_shapes)
    return Rule(
        operands=tuple(parsed[:n]),
        results=tuple(parsed[n:]),
        sizes={f: known[f] for f in sorted(used)},
        whole=frozenset(whole),
        linear=tuple(frozenset(group) for group in linear),
        uneven=frozenset(uneven.split()),
        inside=frozenset(inside.split()),
        addends=frozenset(addends),
        passes=passes,
    )


def _parse_term(term: str, rank: int, whole: set[str]) -> Dims:
    dims: list[Dim | None] = []
    for product, bracket, dots, name in _TOKEN.findall(term):
        if dots:
            dims.append(None)
        elif product:
            dims.append(tuple(product.split()))
        elif bracket:
            whole.add(bracket)
            dims.append((bracket,))
        else:
            dims.append(() if name == "1" else (name,))
    if None in dims:
        at = dims.index(None)
        extra = rank - (len(dims) - 1)
        lead: list[Dim | None] = [(f"i{k}",) for k in range(extra)]
        dims[at : at + 1] = lead
    if len(dims) != rank:
        raise ValueError(f"rule term `{term.strip()}` has {len(dims)} dims for a tensor of {rank}")
    return tuple(dim for dim in dims if dim is not None)


def _learn_sizes(text: str, pairs: Sequence[tuple[Dim, int]], known: dict[str, int]) -> None:
    """Put the size of every factor into `known`, from all (dim, its size)."""
    for _ in pairs:  # each round can tell the last unknown factor of further dims
        for dim, size in pairs:
            unknown = [f for f in dim if f not in known]
            if len(unknown) == 1:
                known[unknown[0]] = size // prod(known[f] for f in dim if f in known)
        if all(f in known for dim, _ in pairs for f in dim):
            break
    for dim, size in pairs:
        unknown = [f for f in dim if f not in known]
        if unknown:
            raise ValueError(f"rule `{text}`: sizes of {unknown} are not known")
        made = prod(known[f] for f in dim)
        if dim and made != size:
            raise ValueError(f"rule `{text}`: factors {dim} make {made}, the dim has size {size}")


def broadcast_rule(
    operand_shapes: Sequence[Sequence[int]],
    result_shape: Sequence[int],
    *,
    linear: Sequence[Sequence[int]] = (),
    passes: bool = True,
    uneven: bool = True,
) -> Rule:
    """The rule of an elementwise op with broadcasting: dims are aligned from the right."""
    rank = len(result_shape)
    sizes = {f"d{i}": size for i, size in enumerate(result_shape) if size != 1}

    def dims(shape: Sequence[int]) -> Dims:
        lead = rank - len(shape)
        return tuple((f"d{lead + i}",) if size != 1 else () for i, size in enumerate(shape))

    return Rule(
        operands=tuple(dims(shape) for shape in operand_shapes),
        results=(dims(result_shape),),
        sizes=sizes,
        uneven=frozenset(sizes) if uneven else frozenset(),
        linear=tuple(frozenset(group) for group in linear),
        passes=passes,
    )


def reshape_rule(old: Sequence[int], new: Sequence[int]) -> Rule:
    """The rule of a reshape: the common refinement of both shapes, group by group.

    >>> rule = reshape_rule((2, 8, 12), (2, 8, 3, 4))
    >>> rule.operands[0], rule.results[0]
    ((('r0',), ('r1',), ('r2', 'r3')), (('r0',), ('r1',), ('r2',), ('r3',)))
    """
    sizes: dict[str, int] = {}
    whole: set[str] = set()
    old_dims: list[Dim] = [()] * len(old)
    new_dims: list[Dim] = [()] * len(new)
    for group_old, group_new in _reshape_groups(old, new):
        cuts_old = _cuts([old[i] for i in group_old])
        cuts_new = _cuts([new[i] for i in group_new])
        cuts = sorted({1, *cuts_old, *cuts_new})
        nested = all(b % a == 0 for a, b in zip(cuts, cuts[1:], strict=False))
        if nested:
            names: dict[tuple[int, int], str] = {}
            for a, b in reversed(list(zip(cuts, cuts[1:], strict=False))):
                names[a, b] = f"r{len(sizes)}"
                sizes[names[a, b]] = b // a
            spans = list(names.items())
            _assign(old_dims, group_old, cuts_old, spans)
            _assign(new_dims, group_new, cuts_new, spans)
        else:  # (6, 4) -> (4, 6): no factor survives; each dim stays whole
            for dims, group, shape in ((old_dims, group_old, old), (new_dims, group_new, new)):
                for i in group:
                    name = f"r{len(sizes)}"
                    sizes[name] = shape[i]
                    whole.add(name)
                    dims[i] = (name,)
    return Rule(
        operands=(tuple(old_dims),),
        results=(tuple(new_dims),),
        sizes=sizes,
        whole=frozenset(whole),
        linear=(frozenset({0}),),
        uneven=frozenset(f for f in sizes if (f,) in old_dims and (f,) in new_dims),
        passes=True,
    )


def _reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims of both shapes with equal products, size-1 dims left out."""
    olds = [i for i, size in enumerate(old) if size != 1]
    news = [i for i, size in enumerate(new) if size != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(olds) or j < len(news):
        group_old, group_new = [olds[i]], [news[j]]
        a, b = old[olds[i]], new[news[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= old[olds[i]]
                group_old.append(olds[i])
                i += 1
            else:
                b *= new[news[j]]
                group_new.append(news[j])
                j += 1
        groups.append((group_old, group_new))
    return groups


def _cuts(sizes: Sequence[int]) -> list[int]:
    """Cumulative products from the minor end: where the dims of a group begin."""
    return [prod(sizes[k:]) for k in range(len(sizes))]


def _assign(
    dims: list[Dim],
    group: list[int],
    cuts: list[int],
    spans: list[tuple[tuple[int, int], str]],
) -> None:
    for k, i in enumerate(group):
        high, low = cuts[k], cuts[k + 1] if k + 1 < len(cuts) else 1
        inner = [name for (a, b), name in spans if low <= a and b <= high]
        dims[i] = tuple(inner)


def opaque_rule(
    operand_shapes: Sequence[Sequence[int]], result_shapes: Sequence[Sequence[int]]
) -> Rule:
    """The rule of an op that we know nothing about: every dim stays whole."""
    sizes: dict[str, int] = {}

    def dims(shape: Sequence[int]) -> Dims:
        out: list[Dim] = []
        for size in shape:
            name = f"w{len(sizes)}"
            sizes[name] = size
            out.append((name,))
        return tuple(out)

    operands = tuple(dims(shape) for shape in operand_shapes)
    results = tuple(dims(shape) for shape in result_shapes)
    return Rule(operands=operands, results=results, sizes=sizes, whole=frozenset(sizes))
