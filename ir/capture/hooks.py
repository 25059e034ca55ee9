"""What cuts or changes gradients beside operators: hooks are refused with their place, and `x.data`
is what cuts them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...compat.torch import gradient_hooks, gradient_hooks_of_all
from .errors import CaptureError
from .functions import OwnBackward
from .location import innermost_frame, place

_OF_TENSORS = ("register_hook", "register_post_accumulate_grad_hook")
_OF_MODULES = (
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)


@contextmanager
def refusing_hooks() -> Generator[None]:
    """Inside, registering a hook on gradients raises OwnBackward, which says where."""
    kinds: list[tuple[Any, str]] = [(Tensor, name) for name in _OF_TENSORS]
    kinds += [(nn.Module, name) for name in _OF_MODULES]
    before = [(kind, name, getattr(kind, name)) for kind, name in kinds]
    for kind, name in kinds:
        setattr(kind, name, _refusal(name))
    try:
        yield
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)


def check_hooks(model: nn.Module) -> None:
    """Raises CaptureError, naming it, for a module or parameter that has hooks on gradients."""
    for path, module in model.named_modules():
        if gradient_hooks(module):
            raise CaptureError(
                f"the module `{path}` ({type(module).__name__}) has a backward hook, which {_LOST}"
            )
    for name, parameter in model.named_parameters():
        if gradient_hooks(parameter):
            raise CaptureError(
                f"the parameter `{name}` has a hook on its gradient, which the sharded module would"
                " not have; remove it, and register it on the sharded module's own parameter"
            )
    if gradient_hooks_of_all():
        raise CaptureError(f"there is a backward hook on all modules, which {_LOST}")


class DataDetached(TorchFunctionMode):
    """Inside, `x.data` is `x.detach()`: an export takes what it gives for a constant."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_DATA: Any = getattr(Tensor.data, "__get__")  # noqa: B009
_LOST = (
    "a plan would lose, with what it does to gradients; remove it, or write what it does as the "
    "backward of a `torch.autograd.Function`"
)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        where = place(*innermost_frame("".join(traceback.format_stack())))
        raise OwnBackward(f"{where}: `{name}` sets a hook on gradients, which {_LOST}")

    return refuse


__all__ = ["DataDetached", "check_hooks", "refusing_hooks"]
