"""Functions of autograd that have a first derivative only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def first_order(what: str) -> Callable[[Backward], Backward]:
    """A decorator of `backward`, that of `what`, whose results can't be differentiated again.

    Raises RuntimeError where they shall be: with `create_graph=True` alone does autograd run with
    gradients enabled.  Compiled graphs refuse it themselves.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def once(ctx: Any, *gradients: Any) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{what} has no second derivative in a sharded module: leave create_graph=True"
                    " out, or take the gradients that are differentiated again (a gradient"
                    " penalty, say) of the original model in one process"
                )
            return backward(ctx, *gradients)

        return once

    return decorate


__all__ = ["first_order"]
