"""Whether an optimizer treats every number by itself, found out by letting it step two ways."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_BLOCKS = [
    (rows, columns) for rows in (slice(0, 4), slice(4, 8)) for columns in (slice(0, 3), slice(3, 6))
]
_STEPS = 2


def not_elementwise(optimizer: Optimizer) -> str:
    """Why the optimizer must see whole parameters; empty if it need not, or can't be tried.

    One like it steps a matrix, and another the four blocks of that matrix, as ranks hold them: an
    elementwise one gives the same.
    """
    parameters = inspect.signature(type(optimizer).step).parameters
    closure = parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return "its step takes a closure and looks at all parameters together"
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 6, generator=generator)
    shape = (_STEPS, 8, 6)
    gradients = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator)
    try:
        (whole,) = _stepped(optimizer, [start], [[g] for g in gradients])
        parts = _stepped(
            optimizer,
            [start[block] for block in _BLOCKS],
            [[g[block] for block in _BLOCKS] for g in gradients],
        )
    except Exception:  # of a class that is made otherwise, or wants more: its states are looked at
        return ""
    together = start.clone()
    for block, part in zip(_BLOCKS, parts, strict=True):
        together[block] = part
    most = (whole - start).abs().max()
    if (whole - together).abs().max() <= 1e-3 * most:
        return ""
    return "it steps a part of a matrix otherwise than it steps that part within the whole"


def _stepped(
    optimizer: Optimizer, start: list[Tensor], gradients: list[list[Tensor]]
) -> list[Tensor]:
    """What steps by an optimizer like this one make of tensors, on the device of its own."""
    group = optimizer.param_groups[0]
    device = group["params"][0].device
    known = inspect.signature(type(optimizer)).parameters
    options: dict[str, Any] = {
        name: value for name, value in group.items() if name in known and name != "params"
    }
    if "lr" in options:  # at the start of a schedule it may be 0
        rate = options["lr"]
        options["lr"] = torch.ones_like(rate) if isinstance(rate, Tensor) else 1.0
    tensors = [torch.nn.Parameter(x.clone().to(device)) for x in start]
    like = type(optimizer)(tensors, **options)
    for own in gradients:
        for x, gradient in zip(tensors, own, strict=True):
            x.grad = gradient.clone().to(device)
        like.step()
    return [x.detach().cpu() for x in tensors]


__all__ = ["not_elementwise"]
