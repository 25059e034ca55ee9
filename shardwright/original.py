"""The user's own model with real weights: what `plan verify` compares with.

Built as the user's code builds it and cast only where a dtype was asked for, by torch itself: a
mistake in how planning casts a model (`loading.in_formats`) must not be repeated here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .formats import MIXED, computed_in
from .ir.capture import huggingface
from .loading import function_of, import_model


def build_original(target: str, formats: str) -> nn.Module:
    """The model that `target` names, its weights as its own code draws them, on the CPU.

    `formats` as in `load_target`.
    """
    path, _, builder = target.partition(":")
    if not path.endswith(".py"):
        return huggingface.with_weights(Path(path), computed_in(formats))
    build = function_of(import_model(Path(path)), builder or "build_model", Path(path))
    with torch.device("cpu"):
        model: nn.Module = build()
    asked = computed_in(formats)
    plain = {p.dtype for p in model.parameters()} == {torch.float32}
    if asked is None or (formats == MIXED and not plain):
        return model
    return _to(model, asked)


def _to(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)`, which would halve complex numbers: they are put aside meanwhile."""
    own = [
        (module, name, tensor)
        for module in model.modules()
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in tensors
        if tensor.is_complex()
    ]
    for module, name, _ in own:
        setattr(module, name, None)
    model.to(dtype)
    for module, name, tensor in own:
        setattr(module, name, tensor)
    return model


__all__ = ["build_original"]
