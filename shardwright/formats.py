"""In which number formats a model is stored, computed and reduced: what options say together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .facts.phases import Phase
from .planner.errors import PlanError
from .planner.plan.plan import MIXED

# what `--dtype` may say; None: the formats that the model itself has
DTYPES: dict[str, torch.dtype | None] = {
    "own": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_REAL = tuple(kind for kind in DTYPES.values() if kind is not None)
PRECISIONS = (MIXED, "bfloat16", "float32", "own")  # what `--precision` may say
REDUCED = ("float32", "bfloat16")  # what `--reduce-dtype` may say


@dataclass(frozen=True, slots=True)
class Formats:
    """`dtype` is that of parameters, `precision` `own` (that of products, too) or `mixed`, and
    `reduce_dtype` that of gradients between ranks."""

    dtype: str
    precision: str
    reduce_dtype: str


def formats_of(
    dtype: str | None,
    precision: str | None,
    reduce_dtype: str | None,
    phase: Phase,
    *,
    faster: bool,
) -> Formats:
    """What the options say together; None is one that was not given.

    Training is `mixed` by default where products in bfloat16 are `faster`; a dtype that is given
    implies its own precision.  Raises PlanError where options contradict each other.
    """
    _one_of("dtype", dtype, DTYPES)
    _one_of("precision", precision, PRECISIONS)
    _one_of("reduce dtype", reduce_dtype, REDUCED)
    if precision is None:
        usual = phase.backward and faster and dtype is None
        precision = MIXED if usual else "own"
    elif precision == MIXED and not phase.backward:
        raise PlanError(
            f"--precision mixed is for training: phase {phase.name} has no optimizer, so that its"
            " parameters may be stored as they are used; give --dtype bfloat16"
        )
    elif precision == MIXED and dtype not in (None, "own", "float32"):
        raise PlanError(
            f"--precision mixed stores trained parameters in float32, not in {dtype}; leave"
            f" --dtype out, or give --precision own for products in {dtype}, too"
        )
    elif precision not in (MIXED, "own"):
        if dtype not in (None, precision):
            raise PlanError(
                f"--precision {precision} stores parameters in {precision}, too, and --dtype says"
                f" {dtype}; give one of them"
            )
        dtype, precision = precision, "own"
    if reduce_dtype is not None and not phase.backward:
        raise PlanError(f"--reduce-dtype is for training: phase {phase.name} has no gradients")
    reduced = reduce_dtype or ("float32" if precision == MIXED else "own")
    return Formats("own" if precision == MIXED else dtype or "own", precision, reduced)


def computed_in(formats: str) -> torch.dtype | None:
    """The dtype of products; None for the model's own."""
    return torch.bfloat16 if formats == MIXED else DTYPES[formats]


def casts(formats: str, parameters: Iterable[torch.dtype]) -> dict[torch.dtype, torch.dtype]:
    """Which real dtypes become which, in a model that has parameters of these dtypes."""
    target, real = computed_in(formats), [kind for kind in parameters if kind.is_floating_point]
    if target is None:
        return {}
    if formats == MIXED and set(real) != {torch.float32}:  # others are so on purpose
        return {}
    return dict.fromkeys(_REAL, target)


def _one_of(what: str, given: str | None, known: Iterable[str]) -> None:
    if given is not None and given not in known:
        raise PlanError(f"unknown {what} `{given}`; expected one of {', '.join(known)}")


__all__ = [
    "DTYPES", "MIXED", "PRECISIONS", "REDUCED", "Formats", "casts", "computed_in", "formats_of",
]  # fmt: skip
