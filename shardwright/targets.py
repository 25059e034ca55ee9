"""What a plan must reach: `tokens/s >= 1e6`, or `TTFT <= 500 ms, TPOT <= 30 ms`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from types import MappingProxyType

from .facts.phases import Phase
from .facts.units import format_bytes, format_seconds
from .figures import Figures

_CONDITION = re.compile(
    r"\s*([A-Za-z/ ]+?)\s*(<=|>=)\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([A-Za-z%]*)\s*"
)
_SECONDS: Mapping[str, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
_COUNTS: Mapping[str, float] = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_BYTES: Mapping[str, float] = {"GB": 1e9, "MB": 1e6, "TB": 1e12, "GiB": 2.0**30}
_SHARES: Mapping[str, float] = {"%": 0.01, "": 1.0}


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a condition may be about: its value in a row, None where the phase has none; `less`: is
    less of it better?"""

    of: Callable[[Figures], float | None]
    units: Mapping[str, float]
    less: bool
    shown: Callable[[float], str]


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


QUANTITIES: Mapping[str, Quantity] = MappingProxyType(
    {
        "step": Quantity(lambda row: row.step_s, _SECONDS, True, format_seconds),
        "TTFT": Quantity(lambda row: row.ttft_s, _SECONDS, True, format_seconds),
        "TPOT": Quantity(lambda row: row.tpot_s, _SECONDS, True, format_seconds),
        "memory": Quantity(lambda row: row.memory_bytes, _BYTES, True, format_bytes),
        "cost": Quantity(lambda row: row.cost_per_million, _COUNTS, True, _number),
        "tokens/s": Quantity(lambda row: row.tokens_per_s, _COUNTS, False, _number),
        "tokens/s/GPU": Quantity(lambda row: row.tokens_per_s_per_gpu, _COUNTS, False, _number),
        "MFU": Quantity(lambda row: row.mfu, _SHARES, False, lambda value: f"{value:.1%}"),
    }
)


_ONLY: Mapping[str, tuple[Callable[[Phase], bool], str]] = {  # which phases have what
    "step": (lambda phase: phase.backward, "train has"),
    "TTFT": (lambda phase: phase.serves and not phase.context, "prefill and serve have"),
    "TPOT": (lambda phase: bool(phase.answer) or phase.tokens == 1, "decode and serve have"),
}


@dataclass(frozen=True, slots=True)
class Condition:
    """A bound on one quantity, in seconds, bytes, tokens a second or a share of 1."""

    name: str
    bound: float

    @property
    def quantity(self) -> Quantity:
        """What it is about."""
        return QUANTITIES[self.name]

    def short_by(self, row: Figures) -> float:
        """How many times better the row would have to be; 1 or less where it holds."""
        value = self.quantity.of(row)
        if value is None:
            return inf
        return value / self.bound if self.quantity.less else self.bound / value if value else inf

    def __str__(self) -> str:
        sign = "<=" if self.quantity.less else ">="
        return f"{self.name} {sign} {self.quantity.shown(self.bound)}"


@dataclass(frozen=True, slots=True)
class Target:
    """Conditions that a plan must meet, all of them."""

    conditions: tuple[Condition, ...]

    def short_by(self, row: Figures) -> float:
        """How far the row is from it: see `Condition.short_by`, the worst of them."""
        return max(condition.short_by(row) for condition in self.conditions)

    def check(self, phase: Phase, *, priced: bool) -> None:
        """Raises ValueError where rows of that phase have no such figure."""
        for name in (condition.name for condition in self.conditions):
            if name == "cost" and not priced:
                raise ValueError(
                    "--target cost: give --price CLUSTER=COST, that of a GPU hour, for each cluster"
                )
            has, of = _ONLY.get(name, (lambda phase: True, ""))
            if not has(phase):
                raise ValueError(
                    f"--target {name}: phase {phase.name} has none; it is that of {of}"
                )

    def holds(self, row: Figures) -> bool:
        """Does the row meet it?"""
        return self.short_by(row) <= 1

    def missed(self, rows: Sequence[Figures]) -> str:
        """How close the rows come that do not meet it, and what binds."""
        nearest = min(rows, key=self.short_by)
        worst = max(self.conditions, key=lambda condition: condition.short_by(nearest))
        value = worst.quantity.of(nearest)
        reached = "" if value is None else worst.quantity.shown(value)
        best = min(rows, key=worst.short_by)
        text = f"No point meets {self}. {worst.name} binds: the nearest, "
        text += f"{nearest.point}, has {reached}"
        if best is not nearest:
            value = worst.quantity.of(best)
            text += f"; the best of all {'' if value is None else worst.quantity.shown(value)}"
        return f"{text}."

    def __str__(self) -> str:
        return ", ".join(map(str, self.conditions))


def parse_target(text: str) -> Target:
    """The target that a text such as `TTFT <= 500 ms, TPOT <= 30 ms` states.

    Raises ValueError saying what is known.
    """
    conditions: list[Condition] = []
    for part in text.split(","):
        found = _CONDITION.fullmatch(part)
        names = {name.lower(): name for name in QUANTITIES}
        name = names.get(found[1].lower()) if found else None
        if found is None or name is None:
            raise ValueError(
                f"--target `{part.strip()}`: expected one of {', '.join(QUANTITIES)}, <= or >=, "
                "and a number, as in 'TTFT <= 500 ms, TPOT <= 30 ms'"
            )
        quantity = QUANTITIES[name]
        if (found[2] == "<=") != quantity.less:
            sign = "<=" if quantity.less else ">="
            raise ValueError(f"--target `{part.strip()}`: {name} is bounded by {sign}")
        if found[4] not in quantity.units:
            raise ValueError(
                f"--target `{part.strip()}`: {name} is given in "
                f"{' or '.join(unit or 'plain numbers' for unit in quantity.units)}"
            )
        bound = float(found[3]) * quantity.units[found[4]]
        if not (bound > 0 and isfinite(bound)):
            raise ValueError(f"--target `{part.strip()}`: the bound must be above 0")
        conditions.append(Condition(name, bound))
    return Target(tuple(conditions))


__all__ = ["QUANTITIES", "Condition", "Quantity", "Target", "parse_target"]
