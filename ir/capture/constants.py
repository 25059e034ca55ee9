"""Values of what no state dict carries: non-persistent buffers of a model without memory.

A model built on the meta device has shapes but no values.  Parameters and persistent buffers come
from checkpoints; a non-persistent buffer (a rotary table, a mask) is computed by the code that
builds the model, so that code runs again, for as small a part of the model as possible.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...compat.torch import makes_tensors

# When a whole model is built again, tensors above this many elements stay without memory.
_SMALL = 2**20


class UnknownConstant(ValueError):
    """The value of a non-persistent buffer could not be computed; the message says what to do."""


class _SmallTensorsAreReal(TorchFunctionMode):
    """Factory functions give CPU tensors up to `_SMALL` elements, and meta tensors above."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not makes_tensors(func) or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        shape: Tensor = func(*args, **kwargs | {"device": "meta"})
        return shape if shape.numel() > _SMALL else func(*args, **kwargs | {"device": "cpu"})


def recover(
    model: nn.Module, names: list[str], rebuild: Callable[[], nn.Module] | None
) -> dict[str, Tensor]:
    """CPU values of the buffers `names` of `model`, in the model's dtypes.

    For each: the value that the buffer has; else the buffer of a new module made from the owner's
    `config`; else the buffer of the model that `rebuild` makes.  Raises UnknownConstant.
    """
    found: dict[str, Tensor] = {}
    modules: dict[str, nn.Module | None] = {}
    rebuilt: nn.Module | None = None
    for name in names:
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        expected = model.get_buffer(name)
        value: Tensor | None = expected if expected.device.type != "meta" else None
        if value is None:
            if owner_name not in modules:
                modules[owner_name] = _remake(owner)
            value = _matching(modules[owner_name], attribute, expected)
        if value is None and rebuild is not None:
            if rebuilt is None:
                with _SmallTensorsAreReal():
                    rebuilt = rebuild()
            value = _matching(rebuilt.get_submodule(owner_name), attribute, expected)
        if value is None:
            raise UnknownConstant(_advice(name, owner, rebuild is not None))
        found[name] = value.detach().to("cpu", expected.dtype)
    return found


def _remake(module: nn.Module) -> nn.Module | None:
    """A new module of the same class on CPU, if its class is built from `module.config`.

    Further constructor arguments are taken from attributes of the same name; without one they
    must have a default.
    """
    config = getattr(module, "config", None)
    if config is None:
        return None
    parameters = list(inspect.signature(type(module)).parameters.values())
    if not parameters or parameters[0].name != "config":
        return None
    arguments: dict[str, Any] = {}
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name == "device":
            arguments["device"] = "cpu"
        elif hasattr(module, parameter.name):
            arguments[parameter.name] = getattr(module, parameter.name)
        elif parameter.default is parameter.empty:
            return None
    if any(p.numel() > _SMALL for p in module.parameters()):
        return None  # a whole model, not a table
    with torch.device("cpu"):
        return type(module)(config, **arguments)


def _matching(module: nn.Module | None, attribute: str, expected: Tensor) -> Tensor | None:
    """The buffer of that name if it has memory and the expected shape."""
    value = None if module is None else dict(module.named_buffers(recurse=False)).get(attribute)
    if value is None or value.device.type == "meta" or value.shape != expected.shape:
        return None
    return value


def _advice(name: str, owner: nn.Module, rebuilt: bool) -> str:
    """What is missing and what would help."""
    tried = "building the model again did not give it a value" if rebuilt else "it has no value"
    return (
        f"buffer `{name}` of {type(owner).__name__} is not persistent, so no checkpoint holds it, "
        f"and on the meta device {tried}. Register it with persistent=True, compute it in "
        "`forward`, or give a model that is not on the meta device"
    )


__all__ = ["UnknownConstant", "recover"]
