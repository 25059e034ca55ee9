"""Statements find back to the calls that they ran in, in an order that is valid."""

from __future__ import annotations

import random

import pytest

from shardwright.codegen.outline import Item, Outline, outline

Text = tuple[str, str, str]  # what an item reads, makes, and the calls that it ran in


def items(*rows: Text) -> list[Item[str, str]]:
    """Items from words; `~` for the calls of one that floats."""
    return [
        Item(
            tuple(reads.split()),
            tuple(makes.split()),
            () if calls == "~" else tuple(calls.split()),
            calls == "~",
        )
        for reads, makes, calls in rows
    ]


def written(tree: Outline[str, str], rows: list[Item[str, str]]) -> str:
    """`x h = f(b: y) z`: what each item makes, calls with their inputs and outputs."""
    parts = [
        " ".join(rows[part].makes)
        if isinstance(part, int)
        else f"{','.join(part.outputs)}={part.call}({','.join(part.inputs)}: {written(part, rows)})"
        for part in tree.body
    ]
    return " ".join(parts)


LAYER = items(
    ("x", "n", "layer norm"),
    ("n", "n'", "~"),  # gathered: the attention's only argument, so its caller converts it
    ("n'", "q", "layer attention"),
    ("n'", "k", "layer attention"),
    ("q k", "o", "layer attention"),
    ("o", "o'", "~"),
    ("x o'", "y", "layer"),
    ("y", "g", "layer mlp"),
    ("y", "y'", "~"),  # the MLP reads y as it is, too, so it converts it itself
    ("g y'", "d", "layer mlp"),
    ("y d", "z", "layer"),
)


def test_a_layer_has_its_modules_again() -> None:
    tree = outline(LAYER, ["z"], form_of=lambda name: name.rstrip("'"))
    text = "z=layer(x: n n' o=attention(n': q k o) o' y d=mlp(y: g y' d) z)"
    assert written(tree, LAYER) == text


@pytest.mark.parametrize(
    "rows, text",
    [
        # a statement of another call between two of `a` goes out of the way
        ([("x", "p", "a"), ("x", "r", "b"), ("p", "q", "a"), ("r q", "s", "b")],
         "q=a(x: p q) s=b(x,q: r s)"),
        # b needs what a makes first, and a needs what b makes: without a, b is still a call
        ([("x", "p", "a"), ("p", "r", "b"), ("r", "t", "b"), ("t", "q", "a"), ("q", "u", "a")],
         "p t=b(p: r t) q u"),
        # what stands alone in a call stands in its caller
        ([("x", "p", "a"), ("p", "q", "")], "p q"),
        # inner calls stay where their caller is given up
        ([("x", "p", "a c"), ("p", "q", "a c"), ("q", "r", ""), ("r", "s", "a")],
         "q=c(x: p q) r s"),
        # of two results the one that only the call itself reads is not given
        ([("x", "p", "a"), ("p", "q r", "a"), ("p r", "s", "")], "p,r=a(x: p q r) s"),
    ],
)  # fmt: skip
def test_calls(rows: list[Text], text: str) -> None:
    made = items(*rows)
    everything = {value for item in made for value in item.makes}
    read = {value for item in made for value in item.reads}
    results = [v for v in made[-1].makes if v in everything - read]
    tree = outline(made, results)
    assert written(tree, made) == text


def test_what_is_everywhere_is_no_input() -> None:
    rows = items(("w", "w'", "~"), ("x w'", "p", "a"), ("p v", "q", "a"))
    tree = outline(rows, ["q"], everywhere={"w", "v"})
    assert written(tree, rows) == "q=a(x: w' p q)"


def random_items(rng: random.Random) -> list[Item[str, str]]:
    """A body in a valid order, whose items ran in calls at random."""
    known, made = ["x", "w"], list[Item[str, str]]()
    for number in range(rng.randrange(1, 30)):
        reads = tuple(rng.sample(known, rng.randrange(1, min(3, len(known)) + 1)))
        depth = rng.randrange(4)
        calls = tuple(f"{level}{rng.randrange(3)}" for level in range(depth))
        floats = rng.random() < 0.3
        if floats:
            reads, calls = reads[:1], ()
        makes = tuple(f"v{number}.{i}" for i in range(rng.choice([1, 1, 1, 2])))
        made.append(Item(reads, makes, calls, floats))
        known += makes
    return made


@pytest.mark.parametrize("seed", range(300))
def test_any_outline_is_the_same_program(seed: int) -> None:
    """All items once, each after what it reads, and calls get and give all that is needed."""
    rng = random.Random(seed)
    rows = random_items(rng)
    values = [value for item in rows for value in item.makes]
    results = rng.sample(values, rng.randrange(1, min(4, len(values)) + 1))
    tree = outline(rows, results, everywhere={"w"}, form_of=lambda name: name.partition(".")[0])
    assert sorted(tree.flat()) == list(range(len(rows)))
    known = {"x", "w"}
    run(tree, rows, known)
    assert set(results) <= known


def run(tree: Outline[str, str], rows: list[Item[str, str]], known: set[str]) -> None:
    """Go through a function whose values are `known`; it may read nothing else."""
    for part in tree.body:
        if isinstance(part, int):
            assert set(rows[part].reads) <= known
            known |= set(rows[part].makes)
        else:
            assert set(part.inputs) <= known and len(part.flat()) > 1
            inside = {*part.inputs, "w"}
            run(part, rows, inside)
            assert set(part.outputs) <= inside
            known |= set(part.outputs)
