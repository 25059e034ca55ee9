"""A function of the user's is run on tensors without values, to know what it returns and keeps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...compat.torch import (
    OpOverload,
    TorchDispatchMode,
    changes,
    fake_tensors,
    outside_modes,
    storage_key,
    tree_leaves,
)
from ..graph import TensorType


class Refused(ValueError):
    """The function cannot be kept whole; the message says why, after its name, and what to do."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the tensor of this number stands among the arguments."""

    number: int


Given: TypeAlias = (
    "Slot | int | float | complex | bool | str | torch.dtype | tuple[Given, ...] | None"
)


@dataclass(frozen=True, slots=True)
class Called:
    """One call: what is given, and what a trial has shown of it.

    `flows`: the results through which gradients pass.  `needs`: the operands that have gradients.
    `saves`, `kept_bytes`: as in `ir.ops.users.FUNCTION`.
    """

    function: type[Any]
    arguments: tuple[Given, ...]
    outputs: tuple[TensorType, ...]
    in_tuple: bool
    flows: tuple[bool, ...]
    needs: tuple[bool, ...]
    saves: tuple[int, ...]
    kept_bytes: int


def tried(function: type[Any], args: Sequence[Any]) -> Called:
    """Run `function` on fakes like `args`, forward and backward.  Raises Refused."""
    _check_importable(function)
    arguments = _arguments(args)
    with outside_modes(), fake_tensors(), torch.enable_grad(), _Watch() as watch:
        given = [_fake(arg) if isinstance(arg, Tensor) else arg for arg in args]
        tensors = [arg for arg in given if isinstance(arg, Tensor)]
        watch.know(*tensors)
        before = [changes(x) for x in tensors]
        result = _run("forward", lambda: function.apply(*given))
        if before != [changes(x) for x in tensors]:
            raise Refused(
                "which changes a tensor that it is given in place (`mark_dirty`); return a new one"
            )
        results = list(result) if isinstance(result, tuple) else [result]
        if not results or not all(isinstance(each, Tensor) for each in results):
            raise Refused("whose forward returns more than tensors; return tensors alone")
        ends = [each for each in results if each.requires_grad]
        saves, kept_bytes = _kept(ends[0].grad_fn, [*tensors, *results]) if ends else ((), 0)
        starts = [x for x in tensors if x.requires_grad]
        if ends:
            along = [torch.empty_like(each) for each in ends]
            _run("backward", lambda: torch.autograd.grad(ends, starts, along, allow_unused=True))
    return Called(
        function,
        arguments,
        tuple(TensorType(tuple(each.shape), each.dtype) for each in results),
        isinstance(result, tuple),
        tuple(each.requires_grad for each in results),
        tuple(x.requires_grad for x in tensors),
        saves,
        kept_bytes,
    )


def _check_importable(function: type[Any]) -> None:
    """A generated module finds it by its name."""
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not function:
        raise Refused(
            f"a torch.autograd.Function that `{function.__module__}` does not have under that name,"
            " so that no generated module can import it; define it at the top of a file"
        )


def _arguments(args: Sequence[Any]) -> tuple[Given, ...]:
    """The arguments with a slot for each tensor."""
    number, found = 0, list[Given]()
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(Slot(number))
            number += 1
        else:
            found.append(_constant(arg))
    if not number:
        raise Refused("which is given no tensor; call what it does as a plain function")
    return tuple(found)


def _constant(arg: Any) -> Given:
    """What may stand in a generated module as it is."""
    if isinstance(arg, str):
        if arg.isprintable() and not set(arg) & {'"', "\\"}:
            return arg
    elif arg is None or type(arg) in (bool, int, float, complex) or isinstance(arg, torch.dtype):
        return arg
    elif isinstance(arg, (tuple, list)) and not any(isinstance(item, Tensor) for item in arg):
        return tuple(_constant(item) for item in arg)
    raise Refused(
        f"with {_said(arg)} among its arguments, which cannot be written down; it may have tensors,"
        " numbers, plain texts, dtypes, None, and tuples of those but tensors"
    )


def _said(arg: Any) -> str:
    if isinstance(arg, (tuple, list)):
        return f"a {type(arg).__name__} of tensors"
    return f"the text {arg!r}" if isinstance(arg, str) else f"a {type(arg).__qualname__}"


def _fake(x: Tensor) -> Tensor:
    """A tensor like `x`, which is no leaf: those may not be changed in place."""
    leaf = torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad)
    return leaf.clone()


def _run(part: str, call: Any) -> Any:
    try:
        return call()
    except Refused:
        raise
    except Exception as error:  # the user's code may raise anything
        first = (str(error).splitlines() or [""])[0]
        raise Refused(
            f"whose {part} cannot be run on tensors without values ({type(error).__name__}: "
            f"{first}); what it does must follow from shapes and dtypes alone"
        ) from error


def _kept(context: Any, known: Sequence[Tensor]) -> tuple[tuple[int, ...], int]:
    """Which of the known tensors a function keeps for backward, and the bytes of what it keeps
    besides: what it saves, and what it has put on `ctx`."""
    kept = {_key(x): x for x in tree_leaves([*context.saved_tensors, vars(context)])
            if isinstance(x, Tensor)}  # fmt: skip
    keys: dict[int, int] = {}
    for number, x in enumerate(known):
        keys.setdefault(_key(x), number)
    besides = (x.untyped_storage().nbytes() for key, x in kept.items() if key not in keys)
    return tuple(sorted(keys[key] for key in kept if key in keys)), sum(besides)


def _key(x: Tensor) -> int:
    return storage_key(x.untyped_storage())


class _Watch(TorchDispatchMode):
    """Refuses what a function does with more than it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Tensor] = {}  # held, so that no key is used twice

    def know(self, *tensors: Tensor) -> None:
        self._known.update({_key(x): x for x in tensors})

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refused(
                f"which draws random numbers (`{func}`): copies of a tensor would get different "
                "ones; draw them in the model and give them to it"
            )
        read = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        fresh = func.namespace == "aten" and "lift_fresh" in str(func)  # `torch.tensor(2.0)`
        if not fresh and any(_key(x) not in self._known for x in read):
            raise Refused(
                f"which reads a tensor that it is not given (in `{func}`): one of its module, or of"
                " what is around; give it as an argument"
            )
        result = func(*args, **(kwargs or {}))
        self.know(*(x for x in tree_leaves(result) if isinstance(x, Tensor)))
        return result


__all__ = ["Called", "Given", "Refused", "Slot", "tried"]
