"""Functions with a backward of their own, which a capture would replace by that of their forward.

`torch.export` records what the forward of a `torch.autograd.Function` calls; its backward is lost,
and the gradients of what was recorded are other ones.  What a reentrant checkpoint runs is captured
as its plain self: the plan decides what is computed again.
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
    """Inside, a call of any such function that the model brings raises OwnBackward.

    Reentrant checkpoints run as what they wrap.
    """
    before = [(kind, kind.__dict__["forward"]) for kind in _brought()]
    checkpoints: Any = CheckpointFunction
    try:
        for kind, _ in before:
            kind.forward = staticmethod(_refusal(kind))
        checkpoints.apply = staticmethod(_plain)
        yield
    finally:
        del checkpoints.apply  # that of its base class shows again
        for kind, forward in before:
            kind.forward = forward


def _plain(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """`CheckpointFunction.apply`, without the checkpoint."""
    return function(*args)


def _brought() -> Iterator[type[Any]]:
    """Every class of functions but those of torch."""
    waiting: list[type[Any]] = [Function]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not f"{kind.__module__}.".startswith(_TRUSTED) and "forward" in kind.__dict__:
            yield kind


def _refusal(kind: type[Any]) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        where = place(*innermost_frame("".join(traceback.format_stack())))
        raise OwnBackward(
            f"{where}: the model calls `{kind.__qualname__}`, a torch.autograd.Function: its"
            " own backward would be lost, and the gradients would be those of its forward. Write"
            " it as a `torch.library.custom_op` with `register_fake` and `register_autograd`,"
            " which keeps its backward, or with torch's functions: a straight-through estimate is"
            " `x + (rounded - x).detach()`, and what is kept for backward the plan decides"
        )

    return refuse


__all__ = ["OwnBackward", "refusing_own_backward"]
