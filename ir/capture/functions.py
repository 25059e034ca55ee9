"""Functions with a backward of their own, which a capture would replace by that of their forward.

`torch.export` records what the forward of a `torch.autograd.Function` calls; its backward is lost,
and the gradients of what was recorded are other ones (none at all, for reentrant checkpoints).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch.autograd import Function

from ...compat.torch import CheckpointFunction
from ...compat.transformers import WRAPPERS
from .location import innermost_frame, place

# Their classes are torch's own operators, whose gradients are those of what they compute
_TRUSTED = ("torch.", f"{WRAPPERS}.")


class OwnBackward(ValueError):
    """The model calls a function with its own backward; the message says where."""


@contextmanager
def refusing_own_backward() -> Generator[None]:
    """Inside, a call of any such function that the model brings raises OwnBackward."""
    before = [(kind, kind.__dict__["forward"]) for kind in _brought()]
    try:
        for kind, _ in before:
            kind.forward = staticmethod(_refusal(kind))
        yield
    finally:
        for kind, forward in before:
            kind.forward = forward


def _brought() -> Iterator[type[Any]]:
    """Every class of functions but those of torch, and that of reentrant checkpoints."""
    waiting: list[type[Any]] = [Function]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        ours = kind is CheckpointFunction or not f"{kind.__module__}.".startswith(_TRUSTED)
        if ours and "forward" in kind.__dict__:
            yield kind


def _refusal(kind: type[Any]) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        where = place(*innermost_frame("".join(traceback.format_stack())))
        if kind is CheckpointFunction:
            raise OwnBackward(
                f"{where}: torch.utils.checkpoint with `use_reentrant=True` would leave the"
                " model without gradients; pass `use_reentrant=False`, or leave it out: the plan"
                " decides what is computed again"
            )
        raise OwnBackward(
            f"{where}: the model calls `{kind.__qualname__}`, a torch.autograd.Function: its"
            " own backward would be lost, and the gradients would be those of its forward. Write"
            " it with torch's functions; a straight-through estimate is"
            " `x + (rounded - x).detach()`, and what is kept for backward the plan decides"
        )

    return refuse


__all__ = ["OwnBackward", "refusing_own_backward"]
