"""Layouts in words: `ddp=4,fsdp=8`, and what they leave of a graph.

Each word with a size is a mesh axis, the innermost last.  It gives that axis a role (`roles.py`),
so that a layout is priced as the ordinary plan of that name is; `recompute` says which layers run
forward again in backward.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from ...facts.mesh import MOST_RANKS, Mesh
from ...ir.graph import Graph, Param, Value
from ..errors import LayoutError, PlanError
from .pins import pinned
from .regions import Recomputed, Region, Strategy
from .roles import Roles, name_of
from .setting import Restriction
from .storage import Storage

_MOST_LAYERS = 2**14
_NAMES = ("x", "y", "z")  # of axes; a plan names them by their use
_ROLES = {
    "ddp": "ddp",
    "dp": "ddp",
    "zero1": "zero1",
    "zero2": "zero2",
    "fsdp": "fsdp",
    "tp": "tp",
    "cp": "cp",
    "ulysses": "ulysses",
    "ep": "ddp+ep",
}
_BETWEEN = "sp"  # without a size: the ranks of tp share the sequence between the blocks
_RECOMPUTE = ("none", "selective", "full")
_PIPELINE = ("pp", "vpp")  # ranks of a pipeline, and stages of each
_WORDS = (*_ROLES, _BETWEEN, "recompute", *_PIPELINE)


@dataclass(frozen=True, slots=True)
class Layout:
    """A role for each mesh axis, as `Role.parse` reads it; `text` is what the user wrote.

    `recompute`: are layers run forward again in backward: none, selective (what is between products
    and attention), full, or so many first ones of each loop?  None: where memory is short.
    `pipeline`: how many ranks a pipeline has, outside of `mesh`, which is that of a stage; each has
    `per_rank` stages.
    """

    text: str
    roles: tuple[str, ...]
    mesh: Mesh
    recompute: str | int | None = None
    pipeline: int = 1
    per_rank: int = 1

    @property
    def ranks(self) -> int:
        """GPUs that it is for."""
        return self.pipeline * self.mesh.ranks

    @staticmethod
    def parse(text: str) -> Layout:
        """`fsdp=32`, `ddp=4,tp=8,sp`, `pp=4,ddp=2,tp=8`, `fsdp=4,ep=8,recompute=full`,
        `fsdp=8,recompute=20`.  Raises PlanError."""
        axes: list[tuple[str, int]] = []
        stages = dict.fromkeys(_PIPELINE, 1)
        between, recompute = False, None
        for part in text.split(","):
            word, sign, value = (piece.strip() for piece in part.partition("="))
            if word == "recompute":
                recompute = _read_recompute(text, value)
            elif word == _BETWEEN:
                if sign:
                    _refuse(text, "`sp` shares the GPUs of tp and has no size: tp=8,sp")
                between = True
            elif word in _PIPELINE:
                stages[word] = _read_size(text, word, value)
            elif word in _ROLES:
                axes.append((word, _read_size(text, word, value)))
            else:
                near = difflib.get_close_matches(word, _WORDS, n=1)
                what = f"unknown word `{word}`" if word else "a word is missing"
                hint = f", did you mean `{near[0]}`?" if near else "."
                _refuse(text, f"{what}{hint} There are {', '.join(_WORDS)}")
        if stages["vpp"] > 1 and stages["pp"] == 1:
            _refuse(text, "`vpp` is how many stages each rank of a pipeline has: pp=4,vpp=2")
        if stages["pp"] > 1 and not axes:
            axes.append(("ddp", 1))
        if stages["pp"] > 1 and isinstance(recompute, int):
            _refuse(text, "stages of a pipeline recompute none of their layers or all: full")
        made = _layout(text, axes, between, recompute)
        return replace(made, pipeline=stages["pp"], per_rank=stages["vpp"])

    @property
    def name(self) -> str:
        """As rows of ordinary plans are named: `DDP x TP+SP`."""
        inner = name_of(self.roles, self.mesh)
        return inner if self.pipeline == 1 else f"PP x {inner}"

    def recomputed(self, graph: Graph) -> Recomputed | None:
        """Which layers of a graph run again; None where nothing is said.  Raises LayoutError for
        more layers than there are, or loops of which each would have another number of them."""
        counts = {len(loop.order) for loop in graph.loops}
        most = max(counts, default=0)
        match self.recompute:
            case None:
                return None
            case "none":
                return Recomputed()
            case int(layers):
                if layers > most or (layers < most and len(counts) > 1):
                    there = " and ".join(map(str, sorted(counts))) or "no"
                    raise LayoutError(
                        f"--layout {self.text}: there are loops of {there} layers, of which"
                        f" {layers} cannot be recomputed"
                    )
                return Recomputed(True, most - layers)
            case words:
                return Recomputed(True, 0, most if words == "selective" else 0)

    def limit(self, graph: Graph, mesh: Mesh) -> Restriction:
        """What it leaves of a graph.  Raises LayoutError where a size does not divide."""
        return Roles(self.roles, graph, mesh, f"--layout {self.text}: ")


def _layout(
    text: str, axes: Sequence[tuple[str, int]], between: bool, recompute: str | int | None
) -> Layout:
    """The layout of these words; axes of one rank are none."""
    words = [word for word, _ in axes]
    if not words:
        _refuse(text, "expected words with numbers of GPUs, such as fsdp=32 or ddp=4,tp=8,sp")
    if between and "tp" not in words:
        _refuse(text, "`sp` is what the ranks of tp do between the blocks: tp=8,sp")
    shards = "fsdp" in words
    roles: list[str] = []
    for word in words:
        role = _ROLES[word]
        if shards and word != "ddp" and word != "dp":  # FSDP's group spans all axes of data
            role = {"cp": "fsdp+cp", "ulysses": "fsdp+ulysses", "ddp+ep": "fsdp+ep"}.get(role, role)
        roles.append("tp+sp" if role == "tp" and between else role)
    real = [(role, size) for role, (_, size) in zip(roles, axes, strict=True) if size > 1]
    real = real or [(roles[0], 1)]
    if len(real) > len(_NAMES):
        _refuse(text, f"a mesh has at most {len(_NAMES)} axes, these are {len(real)}")
    mesh = Mesh(tuple(zip(_NAMES, (size for _, size in real), strict=False)))
    return Layout(text, tuple(role for role, _ in real), mesh, recompute)


_TEXTS = {
    **{role: word for word, role in _ROLES.items() if word != "dp"},
    "tp+sp": "tp", "fsdp+cp": "cp", "fsdp+ulysses": "ulysses", "fsdp+ep": "ep",
}  # fmt: skip


def words_of_roles(axes: Sequence[tuple[str, int]], recompute: str = "") -> str:
    """The words that `Layout.parse` reads as these roles and sizes; neighbours alike are one.

    >>> words_of_roles([("fsdp", 2), ("fsdp", 4), ("tp+sp", 2)])
    'fsdp=8,tp=2,sp'
    """
    merged: list[tuple[str, int]] = []
    for role, size in axes:
        if merged and merged[-1][0] == role:
            role, size = role, size * merged.pop()[1]
        merged.append((role, size))
    words = [f"{_TEXTS[role]}={size}" for role, size in merged]
    roles = [role for role, _ in merged]
    if any(role.startswith("fsdp+") for role in roles) and "fsdp" not in roles:
        words.insert(0, "fsdp=1")  # which makes those words shard the weights
    words += [_BETWEEN] if "tp+sp" in roles else []
    words += [f"recompute={recompute}"] if recompute else []
    return ",".join(words)


def _read_size(text: str, word: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and 0 < int(value) <= MOST_RANKS):
        _refuse(text, f"`{word}` is followed by a number of GPUs, such as {word}=8")
    return int(value)


def _read_recompute(text: str, value: str) -> str | int:
    if value.isascii() and value.isdigit() and 0 < int(value) <= _MOST_LAYERS:
        return int(value)
    if value not in _RECOMPUTE:
        words = ", ".join(_RECOMPUTE)
        _refuse(text, f"recompute is one of {words} or a number of layers, not `{value}`")
    return value


def _refuse(text: str, why: str) -> NoReturn:
    raise PlanError(f"--layout {text}: {why}")


class _Both(Restriction):
    """What a layout and pins both allow."""

    def __init__(self, pins: Restriction, layout: Restriction) -> None:
        self._pins, self._layout = pins, layout

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """May `region` run so?"""
        return all(one.allows(region, strategy) for one in (self._pins, self._layout))

    def allows_storage(self, param: Param, name: str, spec: tuple[int, ...]) -> bool:
        """May the parameter be stored so?"""
        return all(one.allows_storage(param, name, spec) for one in (self._pins, self._layout))

    def allows_home(
        self, param: Param, name: str, storage: Storage, *, several: bool, homeless: Collection[int]
    ) -> bool:
        """May the parameter be kept so between its uses?"""
        both = (self._pins, self._layout)
        return all(
            one.allows_home(param, name, storage, several=several, homeless=homeless)
            for one in both
        )

    def allows_end(self, value: Value, spec: tuple[int, ...]) -> bool:
        """May an input or output come and go so?"""
        return all(one.allows_end(value, spec) for one in (self._pins, self._layout))

    def allows_gather(self, axis: int) -> bool:
        """May a parameter be gathered over it?"""
        return self._layout.allows_gather(axis)

    def none_allowed(self, param: Param, name: str, sizes: tuple[int, ...]) -> None:
        """Each says what is in the way, if it alone is."""
        raise PlanError(
            f"--pin and --layout leave no way to store `{name}`; the layout decides on every "
            "weight, so drop the pin"
        )

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        """Each says what is in the way, if it alone is."""
        for one in (self._layout, self._pins):
            if not any(one.allows(region, strategy) for strategy in region.strategies):
                one.no_strategy(region, sizes)
        raise PlanError(
            f"--pin and --layout leave no way to run `{region.nodes[0].loc.module or region.name}`"
            "; drop one of them"
        )


def limited(pins: Sequence[str], layout: str) -> Callable[[Graph, Mesh], Restriction]:
    """What the pins and the layout ("": none) of a request leave of a graph on a mesh."""
    by_pins = pinned(pins)
    if not layout:
        return by_pins
    by_layout = Layout.parse(layout).limit
    if not pins:
        return by_layout
    return lambda graph, mesh: _Both(by_pins(graph, mesh), by_layout(graph, mesh))


__all__ = ["Layout", "limited", "words_of_roles"]
