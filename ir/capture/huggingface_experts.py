"""Experts of Hugging Face models as `shardwright::moe`, through transformers' own registry.

A module of experts that transformers marks with `use_experts_implementation` keeps its weights
stacked under known names and hands its tokens, expert numbers and weights to a registered
function.  What it does between its two products is Python code: `form_of` finds the `Form` that
gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ...compat import transformers as hf
from ..ops.experts import ACTIVATIONS, GATINGS, Form, moe

NAME = "shardwright"

_QUICK_GELU = 1.702  # x * sigmoid(1.702 x), a constant inside transformers' activation
_LARGEST_NUMBER = 1e4  # numbers of a module that may be a limit: layer sizes would overflow nothing

# what each module of experts computes, while a model is traced; a text says why it is not known
_forms: ContextVar[dict[int, Form | str] | None] = ContextVar("_forms", default=None)


@contextmanager
def shardwright_experts(model: nn.Module) -> Generator[None]:
    """Inside, the experts of `model` call `shardwright::moe`."""
    hf.register_experts(NAME, _experts_forward)
    modules = [module for module in model.modules() if hf.is_experts(module)]
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    token = _forms.set(_forms_of(modules))
    try:
        with hf.experts_by(NAME, configs.values()):
            yield
    finally:
        _forms.reset(token)


def experts_in_loops(model: nn.Module) -> None:
    """From now on the experts of `model` run in transformers' own loops over experts."""
    for module in model.modules():
        if hf.is_experts(module):
            hf.use_own_loops(module)


def _experts_forward(
    module: Any, hidden_states: Tensor, indices: Tensor, weights: Tensor, **kwargs: Any
) -> Tensor:
    """`moe` as transformers' models call their experts: (t, h), (t, k), (t, k) -> (t, h)."""
    forms = _forms.get()
    if forms is None:
        raise ValueError(
            f"experts implementation `{NAME}` works only while a model is captured; "
            'set `experts_implementation="eager"` to run it'
        )
    form = forms[id(module)]
    unknown = [name for name, given in kwargs.items() if given is not None]
    if isinstance(form, str) or unknown:
        reason = form if isinstance(form, str) else f"passes `{unknown[0]}` to its experts"
        raise ValueError(
            f"{type(module).__name__} {reason}, which `shardwright::moe` does not know. Mark a "
            "module of your own with `@shardwright.experts(...)`, or write its experts for all "
            "tokens with `torch.bmm`, which is planned like any other op"
        )
    first = "gate_up_proj" if module.has_gate else "up_proj"
    biased = bool(module.has_bias)
    options: dict[str, Any] = dict(form.arguments())
    return moe(
        hidden_states,
        indices,
        weights,
        getattr(module, first),
        module.down_proj,
        up_bias=getattr(module, f"{first}_bias") if biased else None,
        down_bias=module.down_proj_bias if biased else None,
        **options,
    )


# ---- what a module computes between its two products -------------------------------------------


def _forms_of(modules: list[nn.Module]) -> dict[int, Form | str]:
    """The form of each module; most are like the one before."""
    found: dict[int, Form | str] = {}
    last: Form | None = None
    for module in modules:
        try:
            last = form_of(module, last)
            found[id(module)] = last
        except ValueError as error:
            found[id(module)] = str(error)
    return found


def form_of(module: Any, guess: Form | None = None) -> Form:
    """The form that computes the same as the module does with what its first product gives.

    Forms are tried on float64 numbers on both sides of all limits; the numbers in a form are among
    the module's own attributes.  `guess` is tried first.  Raises ValueError with the second half
    of a sentence, where no form does.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError("norms what its experts give")
    numbers = _numbers(module)
    with torch.no_grad(), torch.device("cpu"):
        inputs = _probe(numbers)
        try:
            wanted = hf.gated(module, inputs)
        except Exception as error:  # any Python code; it may need weights, which are on meta
            raise ValueError(f"has a gate that cannot be tried ({error})") from error
        candidates = _candidates(numbers, bool(module.has_gate), bool(module.is_transposed))
        for form in candidates if guess is None else (guess, *candidates):
            if form.transposed == module.is_transposed and _same(form.hidden, inputs, wanted):
                return form
    raise ValueError("gates its experts in a way of its own")


def _numbers(module: nn.Module) -> list[float]:
    """Numbers among the module's attributes that may be a slope or a limit."""
    found = {
        float(value)
        for value in vars(module).values()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return sorted(value for value in found if 0 < value < _LARGEST_NUMBER)


def _probe(numbers: list[float]) -> Tensor:
    """Rows of 16 numbers: small ones, and larger ones that exceed every limit."""
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 8.0, *(2.0 * value for value in numbers))
    rows = [torch.randn(32, 16, generator=generator, dtype=torch.float64) * s for s in scales]
    return torch.cat(rows)


def _candidates(numbers: list[float], has_gate: bool, transposed: bool) -> Iterator[Form]:
    """Every form with the module's numbers, plain ones first."""
    gatings = [g for g in GATINGS if g in ("halves", "pairs")] if has_gate else ["none"]
    limits = [0.0, *numbers] if has_gate else [0.0]
    offsets = (0.0, 1.0) if has_gate else (0.0,)
    slopes = (1.0, _QUICK_GELU, *numbers)
    for limit, offset, gating, name, alpha in product(
        limits, offsets, gatings, ACTIVATIONS, slopes
    ):
        if alpha == 1.0 or name == "silu":
            yield Form(gating, name, alpha, limit, offset, transposed)


def _same(function: Callable[[Tensor], Tensor], inputs: Tensor, wanted: Tensor) -> bool:
    got = function(inputs)
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


__all__ = ["experts_in_loops", "form_of", "shardwright_experts"]
