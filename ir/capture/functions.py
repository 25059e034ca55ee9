"""Functions with a backward of their own, which a capture keeps whole.

`torch.export` records what the forward of a `torch.autograd.Function` calls; its backward would be
lost, and the gradients of what was recorded are other ones.  So while a model is captured, a call
of such a function is one of the operator below, whose results are known from a trial (`trial.py`).
What a reentrant checkpoint runs is captured as its plain self: the plan decides what is computed
again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...compat.torch import BINDS_EARLY, CheckpointFunction, FunctionBase
from ...compat.transformers import WRAPPERS
from .location import innermost_frame, place
from .trial import Called, Refused, Slot, tried

# Their classes are torch's own operators, whose gradients are those of what they compute
_TRUSTED = ("torch.", f"{WRAPPERS}.")
# ... but for those that it makes of the user's, under `torch.vmap`
_MADE = "torch._functorch."

_numbers: dict[tuple[type[Any], str], int] = {}
_calls: list[Called] = []  # distinct ones: the schema of an operator has no room for them


class OwnBackward(ValueError):
    """A function with its own backward cannot be kept; the message says where, and what to do."""


@torch.library.custom_op("shardwright::function", mutates_args=())
def recorded(tensors: Sequence[Tensor], call: int) -> list[Tensor]:
    """Stands for a call of a function in what is exported; `called` knows number `call`."""
    raise NotImplementedError("this operator is recorded, and never run")


@recorded.register_fake
def _(tensors: Sequence[Tensor], call: int) -> list[Tensor]:
    device = tensors[0].device
    types = _calls[call].outputs
    return [torch.empty(each.shape, dtype=each.dtype, device=device) for each in types]


def _numbered(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.number = inputs[1]


def _no_gradient(ctx: Any, *gradients: object) -> NoReturn:
    name = _calls[ctx.number].function.__qualname__
    raise OwnBackward(
        f"{_here()}: the model takes a gradient through `{name}`, a torch.autograd.Function, while "
        "it runs; a plan has the gradients of its loss alone"
    )


recorded.register_autograd(_no_gradient, setup_context=_numbered)


def called(number: int) -> Called:
    """The call that `recorded` was given the number of."""
    return _calls[number]


@contextmanager
def keeping_functions() -> Generator[None]:
    """Inside, calls of functions that the model brings are recorded whole, or raise OwnBackward.

    Reentrant checkpoints run as what they wrap.
    """
    checkpoints: Any = CheckpointFunction
    before = vars(FunctionBase).get("apply")
    keeping = _Keeping()
    checkpoints.apply = staticmethod(_plain)
    FunctionBase.apply = classmethod(keeping.applied)
    bound_before = keeping.watched() if BINDS_EARLY else []
    try:
        yield
    finally:
        for cls, own in bound_before:
            if own is None:
                del cls.forward
            else:
                cls.forward = own
        del checkpoints.apply, FunctionBase.apply  # those of their base classes show again
        if before is not None:
            FunctionBase.apply = before


def _plain(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """`CheckpointFunction.apply`, without the checkpoint."""
    return function(*args)


class _Keeping:
    """Calls of functions, recorded whole; of those that another one calls each is a part of it."""

    def __init__(self) -> None:
        self.trying = False

    def applied(self, cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        """`FunctionBase.apply`."""
        if self.trying or kwargs or _is_of_torch(cls):
            return super(FunctionBase, cls).apply(*args, **kwargs)
        return self._recorded(cls, args)

    def watched(self) -> list[tuple[type[Any], Any]]:
        """Have the `forward` of all functions there are record a call, too; what each had of its
        own."""
        found = [cls for cls in _all_below(torch.autograd.Function) if not _is_of_torch(cls)]
        known = [(cls, vars(cls).get("forward")) for cls in found]
        watching = [self._watching(cls, cls.forward) for cls in found]
        for cls, forward in zip(found, watching, strict=True):
            cls.forward = staticmethod(forward)
        return known

    def _watching(self, cls: type[Any], forward: Callable[..., Any]) -> Callable[..., Any]:
        # without `setup_context` of its own, a forward is given the context first
        with_context = cls.setup_context is torch.autograd.Function.setup_context

        def watching(*args: Any) -> Any:
            if self.trying:
                return forward(*args)
            return self._recorded(cls, args[1:] if with_context else args)

        return watching

    def _recorded(self, cls: type[Any], args: tuple[Any, ...]) -> Any:
        self.trying = True
        try:
            call = tried(cls, args)
        except Refused as error:
            said = f"{_here()}: the model calls `{cls.__qualname__}`, {error}"
            raise OwnBackward(said) from error
        finally:
            self.trying = False
        return _record(call, [arg for arg in args if isinstance(arg, Tensor)])


def _all_below(cls: type[Any]) -> list[type[Any]]:
    return [each for below in cls.__subclasses__() for each in (below, *_all_below(below))]


def _here() -> str:
    """The line of the model that runs."""
    return place(*innermost_frame("".join(traceback.format_stack())))


def _is_of_torch(cls: type[Any]) -> bool:
    module = f"{cls.__module__}."
    return module.startswith(_TRUSTED) and not module.startswith(_MADE)


def _record(call: Called, tensors: list[Tensor]) -> Any:
    """What the call returns; equal calls have one number."""
    number = _numbers.setdefault((call.function, repr(call)), len(_calls))
    if number == len(_calls):
        _calls.append(call)
    results = recorded(tensors, number)
    flowing = zip(results, call.flows, strict=True)
    given = tuple(result if flows else result.detach() for result, flows in flowing)
    return given if call.in_tuple else given[0]


__all__ = ["Called", "OwnBackward", "Slot", "called", "keeping_functions"]
