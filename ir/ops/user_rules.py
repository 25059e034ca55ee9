"""`shardwright.rule`: how an operator or function of the user's own may be cut, as they say."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch.autograd import Function

from ...compat.torch import operator_name
from .rule import Rule, parse_rule

_DIM = re.compile(r"[a-z]\w*|\[[a-z]\w*\]|1|\.\.\.", re.ASCII)
_OF_DOTS = re.compile(r"i\d+")  # what the dims behind `...` are called
_declared: dict[object, str] = {}


def rule(op: object, text: str) -> None:
    """Declare how an operator or function of yours may be cut.

        shardwright.rule(FakeQuant, "... -> ...")               # each element by itself
        shardwright.rule(row_norm, "b s [h], [h] -> b s [h]")   # each row by itself, with weights
        shardwright.rule(torch.ops.mylib.matmul, "b s k, o k -> b s o")

    `op` is what `torch.library.custom_op` returns, an operator `torch.ops.space.name`, or a
    `torch.autograd.Function`.  `text` has a term for each tensor that it takes, in order, and after
    the arrow one for each that it returns; a term names the dims of one.  Each name is a *factor*,
    which ranks may share among them: `op`, called with their parts, must give the same parts of the
    results, and its backward the same parts of the gradients.  So

    - `[h]` is never cut: where an element depends on others along h, or the backward does;
    - a factor that no result has is summed over, as in an einsum; write `[k]` if the results are
      more than the sum of the parts' results (a bias is added, a maximum is taken);
    - gradients of what has no such dim (weights) are summed over the ranks that share it;
    - `1` is a dim of size 1, `...` any number of leading dims, the same in all that have them.

    What is given beside the tensors is the same on every rank, so it must not hold sizes of dims
    that may be cut.  Whether the rule is true is your claim, which `plan verify` tests.  Without a
    rule `op` runs replicated.  Raises TypeError for another `op`, ValueError for another text.
    """
    check_text(text)
    _declared[_key(op)] = text


def declared(op: object) -> str:
    """The rule of an operator `space.name`, or of a class of functions; empty without one."""
    return _declared.get(op, "")


def check_text(text: str) -> None:
    """Raises ValueError for what is no rule, whatever the tensors."""
    left, arrow, right = text.partition("->")
    _check("->" not in right and bool(arrow), text, "has no single arrow `->`")
    operands, results = ([term.split() for term in side.split(",")] for side in (left, right))
    for term in (*operands, *results):
        for dim in term:
            _check(bool(_DIM.fullmatch(dim)), text, f"has `{dim}`, which is no {_FORMS}")
            _check(not _OF_DOTS.fullmatch(dim.strip("[]")), text, f"has `{dim}`: number otherwise")
            twice = dim != "1" and [other.strip("[]") for other in term].count(dim.strip("[]")) > 1
            _check(not twice, text, f"has `{dim}` twice in one term")
    read = {dim.strip("[]") for term in operands for dim in term}
    whole = {dim.strip("[]") for term in (*operands, *results) for dim in term if "[" in dim}
    for dim in (dim.strip("[]") for term in results for dim in term):
        known = dim in read or dim in whole or dim == "1"
        _check(known, text, f"has `{dim}` in a result alone: write `[{dim}]`, which is not cut")


def rule_for(
    text: str, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> Rule:
    """The rule for tensors of these shapes.  Raises ValueError where they do not fit."""
    check_text(text)
    made = parse_rule(text, operands, results)
    for dims, shape in zip((*made.operands, *made.results), (*operands, *results), strict=True):
        for dim, size in zip(dims, shape, strict=True):
            if not dim and size != 1:
                raise ValueError(f"rule `{text}` has `1` for a dim of size {size}")
    return made


_FORMS = "name in small letters, `[name]`, `1` or `...`"


def _check(good: bool, text: str, what: str) -> None:
    if not good:
        raise ValueError(f"rule `{text}` {what}; write it as `b s [h], [h] -> b s [h]`")


def _key(op: object) -> object:
    """What `declared` is asked for.  Raises TypeError where no user has defined `op`."""
    if getattr(op, "__name__", "") == "apply":  # `FakeQuant.apply`, as models call it
        op = getattr(op, "__self__", op)
    if isinstance(op, type) and issubclass(op, Function):
        return op
    name = operator_name(op)
    if not name or name.startswith(("aten.", "prims.", "shardwright.")):
        raise TypeError(
            "shardwright.rule is for operators of `torch.library.custom_op` and classes of "
            f"`torch.autograd.Function`, not for {op!r}"
        )
    return name


__all__ = ["check_text", "declared", "rule", "rule_for"]
