"""Values between the nodes of a problem that make them and those that need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...facts.spec import Spec
from ...ir.graph import Value
from .params import ParamRef
from .regions import Place, Region
from .storage import Storage


@dataclass(frozen=True, slots=True)
class Flow:
    """The node of the problem that decides a value's spec, which is one for each strategy."""

    node: int
    specs: tuple[Spec, ...]


@dataclass(slots=True)
class User:
    """One node of the problem that needs a value: per strategy the specs that it needs."""

    node: int
    needs: list[tuple[Spec, ...]]
    weight: int
    place: Place  # users in one place share conversions
    region: Region | None = None  # that the node stands for, if any

    def wants(self, spec: Spec) -> bool:
        """May it need the value in `spec`?"""
        return any(spec in needs for needs in self.needs)


@dataclass(slots=True)
class ValueFlow:
    """A value between the node that makes it and the nodes that need it; of a parameter also the
    ways to keep it, one for each of the specs that it is stored in."""

    value: Value
    node: int
    specs: list[Spec]
    users: list[User] = field(default_factory=list[User])
    param: ParamRef | None = None
    storages: Sequence[Storage] = ()


__all__ = ["Flow", "User", "ValueFlow"]
