"""Factor rules: what they say is written out by hand here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.facts.spec import format_spec
from shardwright.ir.ops.rule import (
    Dims,
    Rule,
    broadcast_rule,
    opaque_rule,
    parse_rule,
    reshape_rule,
)


def dims(text: str) -> tuple[tuple[str, ...], ...]:
    """`b s (n d) 1` -> (("b",), ("s",), ("n", "d"), ())."""
    out: list[tuple[str, ...]] = []
    for part in text.replace("(", " ( ").replace(")", " ) ").split():
        if part == "(":
            group: list[str] = []
            out.append(("(",))
        elif part == ")":
            at = max(i for i, d in enumerate(out) if d == ("(",))
            group = [name for d in out[at + 1 :] for name in d]
            out[at:] = [tuple(group)]
        else:
            out.append(() if part == "1" else (part,))
    return tuple(out)


def table(rule: Rule) -> dict[str, str]:
    """Choice -> `operands -> results`, one state per tensor: `{"o": "V S0 -> S2"}`."""
    return {
        choice: " ".join(format_spec((s,)) for s in needs)
        + " -> "
        + " ".join(format_spec((s,)) for s in gives)
        for choice, (needs, gives) in rule.choices().items()
    }


LINEAR = parse_rule("... k, o k -> ... o", [(2, 8, 4), (6, 4)], [(2, 8, 6)], uneven="o")
BIASED = parse_rule("m k, o k, o -> m o", [(8, 4), (6, 4), (6,)], [(8, 6)], addends=[2])


def test_linear() -> None:
    assert LINEAR.operands == (dims("i0 i1 k"), dims("o k"))
    assert LINEAR.results == (dims("i0 i1 o"),)
    assert LINEAR.sizes == {"i0": 2, "i1": 8, "k": 4, "o": 6}
    assert table(LINEAR) == {
        "R": "R R -> R",
        "i0": "S0 V -> S0",
        "i1": "S1 V -> S1",
        "k": "S2 S1 -> P",
        "o": "V S0 -> S2",
    }


def test_an_addend_is_added_once() -> None:
    assert table(BIASED) == {
        "R": "R R R -> R",
        "m": "S0 V V -> S0",
        "k": "S1 S1 P -> P",
        "o": "V S0 S0 -> S1",
    }


def test_only_the_outer_factor_of_a_product_is_cut() -> None:
    rule = parse_rule("b (n g) q, b n -> b (n g) q", [(2, 12, 5), (2, 4)], [(2, 12, 5)])
    assert rule.operands[0] == dims("b (n g) q")
    assert rule.sizes == {"b": 2, "g": 3, "n": 4, "q": 5}
    assert set(rule.choices()) == {"R", "b", "n", "q"}
    assert table(rule)["n"] == "S1 S1 -> S1"
    alone = parse_rule("(n g), n -> (n g)", [(6,), (1,)], [(6,)])
    assert table(alone)["g"] == "S0 V -> S0"  # the outer factor has size 1


def test_an_inner_factor_is_cut_after_the_outer_ones() -> None:
    plain = parse_rule("b (n g) q, b n -> b (n g) q", [(2, 12, 5), (2, 4)], [(2, 12, 5)])
    rule = replace(plain, inner=frozenset({"g"}))
    assert table(rule)["g"] == "S1 V -> S1"
    assert rule.ways(("n", "g"), (4, 3)) == {"n": 4, "g": 3}
    assert rule.ways(("n", "b", "n", "g"), (2, 2, 2, 3)) == {"n": 4, "b": 2, "g": 3}
    for choices, sizes in ((("g",), (3,)), (("n", "g"), (2, 3)), (("g", "n"), (3, 4))):
        assert rule.ways(choices, sizes) is None


def test_whole_factors_and_size_one_dims_are_not_cut() -> None:
    rule = parse_rule("... [h], [h] -> ... [h]", [(4, 1, 8), (8,)], [(4, 1, 8)])
    assert rule.whole == {"h"}
    assert set(rule.choices()) == {"R", "i0"}
    broadcast = parse_rule("a 1 -> a", [(4, 1)], [(4,)])
    assert broadcast.operands == (dims("a 1"),)


def test_a_factor_reduced_inside_gives_a_whole_result() -> None:
    rule = parse_rule("t v, t -> ", [(4, 8), (4,)], [()], inside="v")
    assert table(rule) == {"R": "R R -> R", "t": "S0 S0 -> P", "v": "S1 V -> R"}


def test_a_factor_of_results_only_must_be_in_all_of_them() -> None:
    made = broadcast_rule([], (4, 6), passes=False)
    assert table(made) == {"R": " -> R", "d0": " -> S0", "d1": " -> S1"}
    two = parse_rule("a -> a b, a", [(4,)], [(4, 6), (4,)])
    assert set(two.choices()) == {"R", "a"}  # cutting b would leave the second result whole


def test_linear_and_passing_ops_run_on_sums() -> None:
    rule = broadcast_rule([(4, 6), (6,)], (4, 6), linear=[[0, 1]])
    assert table(rule) == {
        "R": "R R -> R",
        "d0": "S0 V -> S0",
        "d1": "S1 S0 -> S1",
        "V": "V V -> V",
        "P0": "P P -> P",
    }
    product = broadcast_rule([(4,), (4,)], (4,), linear=[[0], [1]], passes=False)
    assert table(product)["P0"] == "P V -> P"
    assert table(product)["P1"] == "V P -> P"
    assert "V" not in table(product)


@pytest.mark.parametrize(
    ("operands", "result", "want"),
    [
        ([(4, 6), (4, 6)], (4, 6), ["d0 d1", "d0 d1"]),
        ([(4, 1), (6,)], (4, 6), ["d0 1", "d1"]),
        ([(), (2, 3)], (2, 3), ["", "d0 d1"]),
        ([(1, 3), (2, 1)], (2, 3), ["1 d1", "d0 1"]),
    ],
)
def test_broadcasting(
    operands: Sequence[tuple[int, ...]], result: tuple[int, ...], want: list[str]
) -> None:
    rule = broadcast_rule(operands, result)
    assert rule.operands == tuple(map(dims, want))
    assert rule.uneven == set(rule.sizes)
    assert broadcast_rule(operands, result, uneven=False).uneven == set()


@pytest.mark.parametrize(
    ("old", "new", "want_old", "want_new", "cuts"),
    [
        ((2, 8, 12), (2, 8, 3, 4), "r0 r1 (r2 r3)", "r0 r1 r2 r3", "r0 r1 r2"),
        ((2, 8, 3, 4), (2, 8, 12), "r0 r1 r2 r3", "r0 r1 (r2 r3)", "r0 r1 r2"),
        ((4, 6, 8), (24, 8), "r0 r1 r2", "(r0 r1) r2", "r0 r2"),
        ((4, 1, 6), (4, 6, 1), "r0 1 r1", "r0 r1 1", "r0 r1"),
        ((4, 4, 8), (8, 2, 8), "r0 (r1 r2) r3", "(r0 r1) r2 r3", "r0 r3"),
        ((6, 4), (4, 6), "r0 r1", "r2 r3", ""),
        ((5,), (1, 5), "r0", "1 r0", "r0"),
        ((), (1, 1), "", "1 1", ""),
    ],
    ids=str,
)
def test_reshapes(
    old: tuple[int, ...], new: tuple[int, ...], want_old: str, want_new: str, cuts: str
) -> None:
    rule = reshape_rule(old, new)
    assert rule.operands == (dims(want_old),)
    assert rule.results == (dims(want_new),)
    assert set(rule.choices()) == {*cuts.split(), "R", "V", "P0"}


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes with the same number of elements."""
    primes = draw(st.lists(st.sampled_from([1, 2, 3, 5]), max_size=6))

    def grouped(items: list[int]) -> tuple[int, ...]:
        shape = [1] if items else []
        for item in items:
            if draw(st.booleans()):
                shape.append(item)
            else:
                shape[-1] *= item
        return tuple(shape)

    return grouped(primes), grouped(draw(st.permutations(primes)))


def local_dims(dims: Dims, sizes: Mapping[str, int], ways: Mapping[str, int]) -> tuple[int, ...]:
    """Local shape of a tensor with these `dims` when factors are cut `ways` times."""
    return tuple(prod(-(-sizes[f] // ways.get(f, 1)) for f in dim) for dim in dims)


@given(reshapes())
def test_reshape_factors_make_both_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = shapes
    rule = reshape_rule(old, new)
    assert local_dims(rule.operands[0], rule.sizes, {}) == old
    assert local_dims(rule.results[0], rule.sizes, {}) == new
    for factor in rule.sizes.keys() - rule.whole:
        for side in (*rule.operands, *rule.results):
            assert [f for dim in side for f in dim].count(factor) == 1
    order = [f for dim in rule.operands[0] for f in dim if f not in rule.whole]
    assert order == [f for dim in rule.results[0] for f in dim if f not in rule.whole]


@given(reshapes(), st.sampled_from([2, 3, 4]))
def test_cut_reshapes_keep_the_number_of_elements(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], n: int
) -> None:
    rule = reshape_rule(*shapes)
    for choice in rule.choices():
        ways = rule.ways((choice,), (n,))
        if ways is not None:
            old = local_dims(rule.operands[0], rule.sizes, ways)
            new = local_dims(rule.results[0], rule.sizes, ways)
            assert prod(old) == prod(new)


def test_an_unknown_op_keeps_every_dim_whole() -> None:
    rule = opaque_rule([(4, 6), (4,)], [(4, 6)])
    assert rule.whole == {"w0", "w1", "w2", "w3", "w4"}
    assert table(rule) == {"R": "R R -> R"}


@pytest.mark.parametrize(
    ("choices", "sizes", "want"),
    [
        (("i0", "R"), (2, 4), {"i0": 2}),
        (("i1", "i1"), (2, 4), {"i1": 8}),
        (("i0", "o"), (2, 2), {"i0": 2, "o": 2}),
        (("i0",), (4,), None),  # 2 rows over 4
        (("k", "k"), (2, 4), None),  # 4 over 8
        (("o",), (4,), {"o": 4}),  # 6 over 4: may be uneven
        (("o", "R"), (6, 2), {"o": 6}),
        (("o",), (8,), None),  # more ways than rows
        (("o", "o"), (2, 2), None),  # uneven over two axes
        (("R", "R"), (2, 4), {}),
    ],
)
def test_ways(
    choices: tuple[str, ...], sizes: tuple[int, ...], want: dict[str, int] | None
) -> None:
    assert LINEAR.ways(choices, sizes) == want


@pytest.mark.parametrize(
    ("text", "operands", "results", "message"),
    [
        ("a b -> a", [(2, 3), (4,)], [(2,)], "has 2 terms for 3 tensors"),
        ("a b -> a", [(2, 3, 4)], [(2,)], "`a b` has 2 dims for a tensor of 3"),
        ("(a b) -> (a b)", [(6,)], [(6,)], "sizes of ['a', 'b'] are not known"),
        ("a, a -> a", [(2,), (3,)], [(2,)], "make 2, the dim has size 3"),
        ("a, (a b) -> a", [(4,), (6,)], [(4,)], "make 4, the dim has size 6"),
    ],
)
def test_errors(
    text: str,
    operands: list[tuple[int, ...]],
    results: list[tuple[int, ...]],
    message: str,
) -> None:
    with pytest.raises(ValueError) as caught:
        parse_rule(text, operands, results)
    assert message in str(caught.value)
