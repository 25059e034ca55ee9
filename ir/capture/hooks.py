"""What an export would not see: hooks on gradients, which are refused with their place, `x.data`,
which cuts gradients, and what is written to a tensor that is there (`out=`, `x.data =`)."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
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
    replaced: dict[tuple[Any, str], Callable[..., Any]]
    replaced = {(kind, name): _refusal(name) for kind, name in kinds}
    replaced[saved_tensors_hooks, "__enter__"] = _kept_otherwise
    replaced[torch.inference_mode, "__enter__"] = _without_gradients
    replaced[torch.inference_mode, "__exit__"] = _as_before
    before = [(kind, name, getattr(kind, name)) for kind, name in replaced]
    for (kind, name), method in replaced.items():
        setattr(kind, name, method)
    try:
        yield
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)


def _kept_otherwise(hooks: saved_tensors_hooks) -> None:
    """Refuses what may give backward other tensors than were saved; torch's own give the same."""
    if not type(hooks).__module__.startswith("torch.") or type(hooks) is saved_tensors_hooks:
        raise OwnBackward(f"{_here()}: `saved_tensors_hooks` keeps tensors in a way that {_LOST}")
    _ENTER(hooks)


def _without_gradients(region: Any) -> None:
    """An export does not see `inference_mode`, but `no_grad`, which has the same gradients."""
    region.instead = torch.no_grad() if region.mode else torch.enable_grad()
    region.instead.__enter__()


def _as_before(region: Any, *error: Any) -> None:
    region.instead.__exit__(*error)


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


class PlainCalls(TorchFunctionMode):
    """Inside, `x.data` is `x.detach()`, as an export takes what it gives for a constant.  What a
    function writes to `out`, or `x.data` is set to, is copied there, as an export would take it for
    a new tensor.  Where gradients are captured, no parameter is frozen or thawed."""

    def __init__(self, *, training: bool) -> None:
        super().__init__()
        self._training = training

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func == _DATA:
            return args[0].detach()
        if func == _SET_DATA:
            return _write(args[0].detach(), args[1])
        kwargs = kwargs or {}
        if args and func in _FREEZING and isinstance(args[0], nn.Parameter):
            wanted = (*args, kwargs.get("requires_grad", True))[1]
            if self._training and wanted != args[0].requires_grad:
                raise OwnBackward(
                    f"{_here()}: `requires_grad` of a parameter is changed in the forward pass,"
                    " which an export does not see; use `parameter.detach()`, or set it before"
                )
        out = kwargs.get("out")
        if out is None:
            return func(*args, **kwargs)
        results = func(*args, **{name: x for name, x in kwargs.items() if name != "out"})
        several = isinstance(out, (tuple, list))
        for old, new in zip(out, results, strict=True) if several else ((out, results),):
            _write(old, new)
        return type(results)(out) if several else out


def _write(out: Tensor, result: Tensor) -> None:
    """Raises CaptureError where `out` would get another shape, which old readers would see."""
    if out.shape != result.shape:
        raise CaptureError(
            f"{_here()}: what is written to has shape {tuple(out.shape)}, and the result"
            f" {tuple(result.shape)}; give it that shape"
        )
    out.copy_(result)


_DATA: Any = getattr(Tensor.data, "__get__")  # noqa: B009
_SET_DATA: Any = getattr(Tensor.data, "__set__")  # noqa: B009
_FREEZING: tuple[Any, ...] = (
    Tensor.requires_grad_,
    getattr(Tensor.requires_grad, "__set__"),  # noqa: B009
)
_ENTER = saved_tensors_hooks.__enter__
_LOST = (
    "a plan would lose, with what it does to gradients; remove it, or write what it does as the "
    "backward of a `torch.autograd.Function`"
)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise OwnBackward(f"{_here()}: `{name}` sets a hook on gradients, which {_LOST}")

    return refuse


def _here() -> str:
    """The user's line that runs now."""
    return place(*innermost_frame("".join(traceback.format_stack())))


__all__ = ["PlainCalls", "check_hooks", "refusing_hooks"]
