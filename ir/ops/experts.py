"""The operator `shardwright::moe`: the experts of a mixture, kept whole by capture.

The router stays ordinary ops: it gives, for each token, the numbers of its experts and their
weights.  Shapes: x (..., h), indices and weights (..., k), up (e, f, h) or, where gate and up are
one matrix, (e, 2f, h), gate (e, f, h), down (e, o, f), biases (e, rows); result (..., o).

Models come here in three ways, none of which knows a model's name: transformers' registry of
experts' implementations (`ir/capture/huggingface.py`), experts written out for all tokens
(`ir/capture/dense_experts.py`), and the user's own words, `moe` and `experts` below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}
GATINGS = ("none", "separate", "halves", "pairs")


@dataclass(frozen=True, slots=True)
class Form:
    """How an expert computes: `down (act(g) * (u + offset))`, or `down act(u)` without a gate.

    `gating`: `halves`, rows of g first, then those of u, in one matrix; `pairs`, they alternate;
    `separate`, two matrices; `none`.  `alpha`: silu is g * sigmoid(alpha g).  `limit` > 0: g is cut
    off above it, u on both sides.  `transposed`: matrices are (e, in, out).  `weigh_input`: the
    weight multiplies the token on its way in, not the result.

    Raises ValueError for a gating or activation that does not exist.
    """

    gating: str = "halves"
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0
    transposed: bool = False
    weigh_input: bool = False

    def __post_init__(self) -> None:
        if self.gating not in GATINGS:
            raise ValueError(f"gating is one of {', '.join(GATINGS)}; got {self.gating!r}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"experts know the activations {known}; got {self.activation!r}")
        if self.alpha != 1.0 and self.activation != "silu":
            raise ValueError(f"`alpha` is for silu, not for {self.activation!r}")

    def arguments(self) -> tuple[tuple[str, str | float | bool], ...]:
        """(name, value) pairs in the order of the operator's schema."""
        return tuple((field.name, getattr(self, field.name)) for field in fields(self))

    def hidden(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """Hidden units (m, f) from what the first product gave."""
        if self.gating == "halves":
            gate, up = up.chunk(2, dim=-1)
        elif self.gating == "pairs":
            gate, up = up.unflatten(-1, (-1, 2)).unbind(-1)
        if gate is None:
            return self._activated(up)
        if self.limit > 0:
            gate, up = torch.clamp(gate, max=self.limit), torch.clamp(up, -self.limit, self.limit)
        return self._activated(gate) * (up + self.offset)

    def _activated(self, x: Tensor) -> Tensor:
        if self.alpha != 1.0:
            return x * torch.sigmoid(self.alpha * x)
        return ACTIVATIONS[self.activation](x)


def moe_math(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    gating: str,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    transposed: bool,
    weigh_input: bool,
) -> Tensor:
    """The weighted sum of a token's experts, expert by expert; differentiable by autograd.

    Sums are made in the wider of the dtypes of x and weights, at least float32, and rounded once.
    """
    form = Form(gating, activation, alpha, limit, offset, transposed, weigh_input)
    tokens = x.reshape(-1, x.shape[-1])
    chosen = indices.reshape(-1, indices.shape[-1])
    shares = weights.reshape(chosen.shape)
    width = down.shape[2] if transposed else down.shape[1]
    wide = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    total = x.new_zeros((len(tokens), width), dtype=wide)

    def product(rows: Tensor, matrices: Tensor, biases: Tensor | None, expert: int) -> Tensor:
        matrix = matrices[expert].T if transposed else matrices[expert]
        return F.linear(rows, matrix, None if biases is None else biases[expert])

    for expert in range(up.shape[0]):
        token, choice = torch.where(chosen == expert)
        share = shares[token, choice].unsqueeze(-1)
        rows = tokens[token]
        rows = (rows * share).to(x.dtype) if weigh_input else rows
        first = product(rows, up, up_bias, expert)
        second = None if gate is None else product(rows, gate, gate_bias, expert)
        out = product(form.hidden(first, second), down, down_bias, expert)
        out = out if weigh_input else out * share
        total = total.index_add(0, token, out.to(wide))
    return total.to(x.dtype).reshape(*x.shape[:-1], width)


@torch.library.custom_op("shardwright::moe", mutates_args=())
def moe_operator(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    gating: str,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    transposed: bool,
    weigh_input: bool,
) -> Tensor:
    """`moe_math` as one operator, so that tracing keeps it whole."""
    return moe_math(
        x, indices, weights, up, gate, down, up_bias, gate_bias, down_bias,
        gating, activation, alpha, limit, offset, transposed, weigh_input,
    ).clone()  # fmt: skip


_TENSORS = 9  # the tensors come first among the operator's arguments


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    """Shape and dtype of the result."""
    down, transposed = arguments[4], arguments[-2]
    return x.new_empty((*x.shape[:-1], down.shape[2] if transposed else down.shape[1]))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors but `indices`, by running the formula again."""
    wanted: tuple[bool, ...] = ctx.needs_input_grad[:_TENSORS]
    leaves: list[Any] = [
        None if value is None else value.detach().requires_grad_(need)
        for value, need in zip(ctx.saved_tensors, wanted, strict=True)
    ]
    with torch.enable_grad():
        output = moe_math(*leaves, *ctx.options)
    needed = [leaf for leaf, need in zip(leaves, wanted, strict=True) if leaf is not None and need]
    found = iter(torch.autograd.grad(output, needed, grad, materialize_grads=True))
    grads = [next(found) if need else None for need in wanted]
    return (*grads, *[None] * len(ctx.options))


moe_operator.register_fake(_fake)
moe_operator.register_autograd(_backward, setup_context=_save_inputs)


# ---- what a user writes ------------------------------------------------------------------------


def moe(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    **form: Any,
) -> Tensor:
    """The weighted sum of each token's experts, which capture keeps as one operator.

    x (..., h), indices (..., k) whole numbers in [0, e), weights (..., k); up (e, 2f, h) with the
    gate's rows first, down (e, o, f); result (..., o) in the dtype of x.  `form`: the fields of
    `Form`, for experts of other kinds.  With one process it runs expert by expert.

    Raises ValueError for a form that does not exist or does not fit the tensors.
    """
    made = Form(**form)
    if (gate is not None) != (made.gating == "separate"):
        raise ValueError("`gate` is a tensor with gating='separate', and only then")
    return moe_operator(
        x, indices, weights, up, gate, down, up_bias, gate_bias, down_bias,
        *(value for _, value in made.arguments()),
    )  # fmt: skip


_Module = TypeVar("_Module", bound=type[nn.Module])


def experts(
    *,
    up: str,
    down: str,
    gate: str | None = None,
    up_bias: str | None = None,
    gate_bias: str | None = None,
    down_bias: str | None = None,
    **form: Any,
) -> Callable[[_Module], _Module]:
    """A class decorator that tells capture what `forward(x, indices, weights)` computes.

        @shardwright.experts(up="gate_up", down="down")
        class Experts(nn.Module): ...

    The names are those of the module's stacked parameters; shapes and `form` as in `moe`.  While a
    model is captured, and on meta tensors, `forward` calls the operator; at any other time it runs
    as it is written.  Whether both say the same is the user's claim.  Raises ValueError as `moe`
    does.
    """
    Form(**form)
    names = {
        "up": up, "down": down, "gate": gate,
        "up_bias": up_bias, "gate_bias": gate_bias, "down_bias": down_bias,
    }  # fmt: skip

    def declare(cls: _Module) -> _Module:
        written = cls.forward

        @wraps(written)
        def forward(
            self: nn.Module, x: Tensor, indices: Tensor, weights: Tensor, *more: Any, **named: Any
        ) -> Any:
            if not (torch.compiler.is_exporting() or x.is_meta):
                return written(self, x, indices, weights, *more, **named)
            tensors = {key: getattr(self, name) for key, name in names.items() if name is not None}
            return moe(x, indices, weights, **tensors, **form)

        cls.forward = forward
        return cls

    return declare


__all__ = ["ACTIVATIONS", "Form", "experts", "moe", "moe_math", "moe_operator"]
