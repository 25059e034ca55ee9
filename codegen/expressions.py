"""Expressions inside expressions, with the parentheses that they need and no others."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

_PRECEDENCE: Mapping[type[ast.operator], int] = {
    ast.Add: 1, ast.Sub: 1, ast.Mult: 2, ast.Div: 2, ast.FloorDiv: 2, ast.Mod: 2, ast.MatMult: 2,
    ast.Pow: 3,
}  # fmt: skip
_ATOMS = (ast.Name, ast.Call, ast.Attribute, ast.Subscript, ast.Tuple, ast.List)


def nested(text: str, inner: Mapping[str, str]) -> str | None:
    """`text` with the names in `inner` replaced by expressions.

    None where one of them is not there just once, or where it would read badly.

    >>> nested("a * b", {"a": "x + 1", "b": "f(y)"})
    '(x + 1) * f(y)'
    >>> nested("a.flatten(1)", {"a": "F.silu(x)"})
    'F.silu(x).flatten(1)'
    >>> nested("2**a", {"a": "-x"}), nested("2**a", {"a": "x + 1"}), nested("f(a, a)", {"a": "x"})
    ('2**-x', None, None)
    """
    slots = [slot for slot in _slots(ast.parse(text, mode="eval")) if slot[0].id in inner]
    if sorted(name.id for name, _ in slots) != sorted(inner):
        return None
    written = text.encode()
    for name, parent in sorted(slots, key=lambda slot: -slot[0].col_offset):
        own = ast.parse(inner[name.id], mode="eval").body
        closed = _closed(own, name, parent)
        if closed is None:
            return None
        value = inner[name.id] if closed else f"({inner[name.id]})"
        end = name.col_offset + len(name.id.encode())
        written = written[: name.col_offset] + value.encode() + written[end:]
    return written.decode()


def _slots(tree: ast.AST) -> Iterator[tuple[ast.Name, ast.AST]]:
    """Every name with what it stands in."""
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, ast.Name):
                yield child, parent


def _closed(own: ast.expr, name: ast.Name, parent: ast.AST) -> bool | None:
    """Can `own` stand for `name` without parentheses?  None: it should not stand there at all."""
    if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Pow):
        negative = isinstance(own, ast.UnaryOp) and isinstance(own.operand, ast.Name)
        return True if negative and parent.right is name else None
    if isinstance(parent, ast.Slice):
        return None
    if isinstance(own, _ATOMS) or isinstance(parent, (ast.Expression, ast.keyword, ast.Tuple)):
        return True
    if isinstance(parent, ast.Call):
        return parent.func is not name
    if isinstance(parent, ast.BinOp) and isinstance(own, ast.BinOp):
        outer, inner = _PRECEDENCE.get(type(parent.op), 9), _PRECEDENCE.get(type(own.op), 0)
        return inner > outer or (inner == outer and parent.left is name)
    return False


__all__ = ["nested"]
