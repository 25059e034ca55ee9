"""Expressions nest with just the parentheses they need; reshapes read as users write them."""

from __future__ import annotations

import ast
import random

import pytest

from shardwright.codegen.expressions import nested
from shardwright.ir.ops.views import Dim, reshaped

B, S = (2, (0,)), (9, ())  # a batch that axis 0 cuts, a whole sequence


@pytest.mark.parametrize(
    "text, inner, whole",
    [
        ("a * b", {"a": "x + 1", "b": "f(y)"}, "(x + 1) * f(y)"),
        ("a + b", {"a": "x * 2", "b": "y - 1"}, "x * 2 + (y - 1)"),
        ("a - b", {"a": "x - 1"}, "x - 1 - b"),
        ("f(a, dim=b)", {"a": "x + 1", "b": "-y"}, "f(x + 1, dim=-y)"),
        ("a.flatten(1)", {"a": "F.silu(x)"}, "F.silu(x).flatten(1)"),
        ("a.flatten(1)", {"a": "x + y"}, "(x + y).flatten(1)"),
        ("torch.cat((a, b), dim=-1)", {"a": "-x", "b": "y"}, "torch.cat((-x, y), dim=-1)"),
        ("a[..., 1:]", {"a": "x * 2"}, "(x * 2)[..., 1:]"),
        ("f(a, a)", {"a": "x"}, None),  # it would run twice
        ("2**a", {"a": "-x"}, "2**-x"),
        ("a**2", {"a": "-x"}, None),
    ],
)
def test_nested(text: str, inner: dict[str, str], whole: str | None) -> None:
    assert nested(text, inner) == whole


@pytest.mark.parametrize("seed", range(50))
def test_nested_is_what_was_meant(seed: int) -> None:
    """The tree of the text is the tree of the outer expression with the inner ones in it."""
    rng = random.Random(seed)

    def expression(depth: int) -> str:
        if depth == 0:
            return rng.choice(["p", "q", "r.s", "f(p)", "2"])
        left, right = expression(depth - 1), expression(depth - 1)
        operator = rng.choice(["+", "-", "*", "/", "@"])
        return rng.choice([f"({left}) {operator} ({right})", f"f({left}, {right})", f"-({left})"])

    inner = {"a": ast.unparse(ast.parse(expression(2))), "b": ast.unparse(ast.parse(expression(1)))}
    outer = rng.choice(["a + b", "a - b", "a * b", "g(b).h(a)", "b / a", "a[b]", "(-a) @ b"])
    text = nested(outer, inner)
    assert text is not None
    meant = (
        outer.replace("a", "\0").replace("b", f"({inner['b']})").replace("\0", f"({inner['a']})")
    )
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(meant))


@pytest.mark.parametrize(
    "before, after, numbers, method",
    [
        ([B, S, (64, (1,))], [B, S, (4, (1,)), (16, ())], [None, None, 2, 16],
         ".unflatten(-1, (-1, 16))"),
        ([B, S, (4, ()), (16, ())], [B, S, (64, ())], [None, None, 64], ".flatten(2)"),
        ([B, S, (4, ())], [(18, (0,)), (4, ())], [None, 4], ".flatten(0, 1)"),
        ([B, S], [B, (1, ()), S], [None, 1, None], ".unsqueeze(1)"),
        ([B, (1, ()), S], [B, S], [None, None], ".squeeze(1)"),
        ([(18, (0,)), (4, ())], [B, S, (4, ())], [None, None, 4], None),  # a size that is free
        ([(4, ()), (6, ())], [(6, ()), (4, ())], [6, 4], None),
    ],
)  # fmt: skip
def test_reshaped(
    before: list[Dim], after: list[Dim], numbers: list[int | None], method: str | None
) -> None:
    assert reshaped(before, after, numbers) == method
