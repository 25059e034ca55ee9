"""What a user pins: how parameters and results of modules lie, and what axes cut in operators."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from ...facts.mesh import Mesh
from ...facts.spec import Spec, format_spec, is_shard, parse_spec
from ...ir.graph import Graph, Node, Param
from ...ir.ops.labels import LABELS, DimLabels, factor_labels, label_dims
from ...ir.ops.registry import operator_of, rule_of, words_of
from ...ir.ops.rule import Choice
from ..errors import PlanError
from .params import all_params
from .regions import Region, Strategy, scopes
from .setting import Restriction
from .storage import Storage


@dataclass(frozen=True, slots=True)
class Pin:
    """A user's own decision: parameters or modules that match `pattern` take `spec`.

    With `cuts`, pairs (axis, what is cut), it is one on the operators of modules instead.
    """

    pattern: str
    spec: Spec
    cuts: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(text: str, mesh_axes: int | None = None) -> Pin:
        """`*.q_proj.weight=R,S0`: one state per mesh axis, outermost axis first.

        `*.q_proj=tp:out`: what the axis `tp` cuts in the operators there.
        """
        pattern, sign, spec = text.partition("=")
        if not sign or not pattern:
            raise PlanError(f"--pin {text}: expected PATTERN=SPEC, such as '*.q_proj.weight=R,S0'")
        if ":" in spec:
            parts = [part.partition(":") for part in spec.split(",")]
            if not all(axis and what for axis, _, what in parts):
                raise PlanError(f"--pin {text}: expected AXIS:WHAT, such as '*.q_proj=tp:out'")
            return Pin(pattern, (), tuple((axis, what) for axis, _, what in parts))
        try:
            states = parse_spec(spec)
        except ValueError as error:
            raise PlanError(f"--pin {text}: {error}") from error
        if mesh_axes is not None and len(states) != mesh_axes:
            raise PlanError(
                f"--pin {text}: {len(states)} states for a mesh of {mesh_axes} axes; give one "
                "state per axis, and the mesh itself with --mesh"
            )
        return Pin(pattern, states)


class Pins(Restriction):
    """Keeps the user's pins.  A pin that matches nothing, or cannot be kept, is an error.

    `axes` are the names of the mesh's.
    """

    def __init__(self, pins: Sequence[Pin], graph: Graph, axes: Sequence[str] = ()) -> None:
        self.pins = [pin for pin in pins if not pin.cuts]
        self._cut: dict[str, list[_Cuts]] = {}
        for asked in (_Cuts(pin, graph, axes) for pin in pins if pin.cuts):
            for node in asked.nodes:
                self._cut.setdefault(node.name, []).append(asked)
        names = [name for ref in all_params(graph) for name in _known_as(ref.param, ref.name)]
        modules = {module_of(node.loc.module) for scope in scopes(graph) for node in scope.nodes}
        for pin in self.pins:
            if not any(fnmatchcase(name, pin.pattern) for name in (*names, *modules)):
                raise PlanError(
                    f"--pin {pin.pattern}: no parameter or module has such a name; the nearest are"
                    f" {', '.join(_nearest(pin.pattern, [*names, *sorted(modules)]))}"
                )

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """Only the pinned spec for a parameter that is pinned by name."""
        return all(spec == pin.spec for pin in self._of(param, name))

    def _of(self, param: Param, name: str) -> list[Pin]:
        """The pins of a parameter."""
        names = _known_as(param, name)
        return [pin for pin in self.pins if any(fnmatchcase(n, pin.pattern) for n in names)]

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """A pinned module's last node must give its result in the pinned spec, and a pinned
        operator be cut as it says."""
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            if not all(asked.allows(node, choices) for asked in self._cut.get(node.name, ())):
                return False
        for pin in self.pins:
            matching = [
                n for n in region.nodes if fnmatchcase(module_of(n.loc.module), pin.pattern)
            ]
            if not matching:
                continue
            last = matching[-1].output.name
            made = {v.name: s for v, s in zip(region.values, strategy.produces, strict=True)}
            if made[last] != pin.spec:
                return False
        return True

    def allows_home(
        self, param: Param, name: str, storage: Storage, *, several: bool, homeless: Collection[int]
    ) -> bool:
        """What is pinned to be sharded is whole only while it is used."""
        return not (storage.gathered and self._of(param, name))

    def none_allowed(self, param: Param, name: str, sizes: tuple[int, ...]) -> None:
        """A pin that its parameter cannot have is refused."""
        pins = self._of(param, name)
        if not pins:
            return
        if len({pin.spec for pin in pins}) > 1:
            texts = " and ".join(f"{pin.pattern}={format_spec(pin.spec)}" for pin in pins)
            raise PlanError(f"--pin {texts}: `{name}` cannot be both; keep one")
        pin = pins[0]
        shape = list(param.value.type.shape)
        reason = "a parameter is stored whole (R) or sharded (S0, S1, ...)"
        for dim in {state for state in pin.spec if is_shard(state)}:
            ways = prod(n for n, s in zip(sizes, pin.spec, strict=True) if s == dim)
            if dim >= len(shape):
                reason = f"it has no dim {dim}, dims count from 0"
            elif shape[dim] % ways:
                reason = f"{ways} ranks do not divide its dim {dim} of size {shape[dim]}"
        raise PlanError(
            f"--pin {pin.pattern}={format_spec(pin.spec)}: `{name}` of shape {shape} cannot be "
            f"kept so on a mesh of {' x '.join(map(str, sizes))}: {reason}"
        )

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        """A pin that its module's result cannot have is refused."""
        for node in region.nodes:
            if node.name in self._cut:
                raise PlanError(
                    f"{' and '.join(map(str, self._cut[node.name]))}: no way to run "
                    f"`{module_of(node.loc.module)}` on a mesh of {' x '.join(map(str, sizes))} "
                    "cuts that; the sizes must divide"
                )
        for pin in self.pins:
            nodes = [n for n in region.nodes if fnmatchcase(module_of(n.loc.module), pin.pattern)]
            if nodes:
                last = nodes[-1]
                raise PlanError(
                    f"--pin {pin.pattern}={format_spec(pin.spec)}: no way to run "
                    f"`{last.loc.module}` leaves its result of shape "
                    f"{list(last.output.type.shape)} so on a mesh of "
                    f"{' x '.join(map(str, sizes))}; the sizes must divide, and the op must be "
                    "able to give it"
                )


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that are most like a pattern, by their ends, which it may leave the rest of."""
    wanted = pattern.removeprefix("*").lstrip(".")
    depth = wanted.count(".") + 1
    by_end: dict[str, str] = {}
    for name in filter(None, names):
        by_end.setdefault(".".join(name.split(".")[-depth:]), name)
    near = difflib.get_close_matches(wanted, by_end, n=4, cutoff=0.0)
    return [by_end[end] for end in near]


class _Cuts:
    """A pin on operators: which of them it is for, and the choices that it leaves on its axes."""

    def __init__(self, pin: Pin, graph: Graph, axes: Sequence[str]) -> None:
        self._pin = pin
        self._axes = [(_axis(name, axes), what) for name, what in pin.cuts]
        if axes and any(not 0 <= axis < len(axes) for axis, _ in self._axes):
            raise PlanError(f"{self}: the mesh has the axes {', '.join(axes)}")
        labels = label_dims(graph)
        heavy = [
            node
            for scope in scopes(graph)
            for node in scope.nodes
            if operator_of(node).heavy and fnmatchcase(module_of(node.loc.module), pin.pattern)
        ]
        self._names = {node.name: _names(node, labels) for node in heavy}
        wanted = {what for _, what in self._axes}
        self.nodes = [n for n in heavy if wanted <= self._names[n.name].keys()]
        if not self.nodes:
            known = sorted({word for words in self._names.values() for word in words})
            there = f"what can be cut there: {', '.join(known)}"
            if not known:
                nodes = [node for scope in scopes(graph) for node in scope.nodes]
                modules = {module_of(n.loc.module) for n in nodes if operator_of(n).heavy}
                near = ", ".join(_nearest(pin.pattern, sorted(modules)))
                there = f"no module matches; the nearest are {near}"
            raise PlanError(f"{self}: {there}; `plan show DIR --ops PATTERN` lists it")

    def __str__(self) -> str:
        cuts = ",".join(f"{axis}:{what}" for axis, what in self._pin.cuts)
        return f"--pin {self._pin.pattern}={cuts}"

    def allows(self, node: Node, choices: Sequence[Choice]) -> bool:
        """Does a node cut what is asked for, over each axis that is spoken of?"""
        known = self._names[node.name]
        return all(choices[axis] in known[what] for axis, what in self._axes)


def _axis(name: str, axes: Sequence[str]) -> int:
    """The number of an axis, by its name or, where none was given, by x, y, z; -1: none."""
    places = {**{letter: i for i, letter in enumerate("xyz")}, **{n: i for i, n in enumerate(axes)}}
    return places.get(name, -1)


def _names(node: Node, labels: Mapping[str, DimLabels]) -> dict[str, set[Choice]]:
    """What a pin may call the cuts of a node, and the choices that are meant: the factor, its
    words in reports, other names of it, `batch` and `sequence`, and `whole`."""
    found: dict[str, set[Choice]] = {"whole": {"R", "V"}}
    operator, known = operator_of(node), factor_labels(node, labels)
    for choice in rule_of(node).choices():
        if choice in ("R", "V") or choice.startswith("P"):
            continue
        words = {choice, words_of(node, choice), LABELS.get(known.get(choice, ""), "")}
        words |= {name for name, factor in operator.also.items() if factor == choice}
        for word in words - {""}:
            found.setdefault(word, set()).add(choice)
    return found


def pinned(texts: Sequence[str]) -> Callable[[Graph, Mesh], Restriction]:
    """What the pins of a request leave of a graph on a mesh."""

    def limit(graph: Graph, mesh: Mesh) -> Restriction:
        pins = [Pin.parse(text, len(mesh.axes)) for text in texts]
        return Pins(pins, graph, mesh.names) if pins else Restriction()

    return limit


def _known_as(param: Param, name: str) -> tuple[str, ...]:
    """The names that a pin may use: a part of a fused weight is known by the weight's name too."""
    if param.part is None:
        return (name,)
    return (name, name.removesuffix(param.name) + param.part.name)


def module_of(path: str) -> str:
    """A module's path with layer numbers as `*`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


__all__ = ["Pin", "Pins", "module_of", "pinned"]
