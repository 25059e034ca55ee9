"""Ordinary plans as restrictions: DDP, FSDP, Megatron TP+SP, and what a user pins.

A baseline gives every mesh axis a role and lets the solver find the cheapest plan within it, so
that it is priced by the same model as the winner, and can never beat it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from ...facts.mesh import Mesh
from ...facts.spec import S, Spec, format_spec, is_shard, parse_spec
from ...ir.graph import Graph, Node, Param
from ...ir.ops.labels import factor_labels, label_dims
from ...ir.ops.registry import operator_of, rule_of
from ..errors import PlanError
from .params import all_params
from .regions import Region, Strategy, scopes
from .setting import Restriction

ROLES = {"ddp": "DDP", "fsdp": "FSDP", "tp": "TP+SP", "cp": "CP"}
_SPREAD = "+ep"  # on an axis whose ranks have different experts
_DATA = {"ddp": "b", "fsdp": "b", "cp": "s"}  # roles that cut one dim of the data wherever it is


@dataclass(frozen=True, slots=True)
class Pin:
    """A user's own decision: parameters or modules that match `pattern` take `spec`."""

    pattern: str
    spec: Spec

    @staticmethod
    def parse(text: str, mesh_axes: int | None = None) -> Pin:
        """`*.q_proj.weight=R,S0`: one state per mesh axis, outermost axis first."""
        pattern, sign, spec = text.partition("=")
        if not sign or not pattern:
            raise PlanError(f"--pin {text}: expected PATTERN=SPEC, such as '*.q_proj.weight=R,S0'")
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
    """Keeps the user's pins.  A pin that matches nothing, or cannot be kept, is an error."""

    def __init__(self, pins: Sequence[Pin], graph: Graph) -> None:
        self.pins = pins
        names = [name for ref in all_params(graph) for name in _known_as(ref.param, ref.name)]
        modules = {_module(node.loc.module) for scope in scopes(graph) for node in scope.nodes}
        for pin in pins:
            if not any(fnmatchcase(name, pin.pattern) for name in (*names, *modules)):
                some = ", ".join(names[:4])
                raise PlanError(
                    f"--pin {pin.pattern}: no parameter or module has such a name; parameters are "
                    f"named like {some}"
                )

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """Only the pinned spec for a parameter that is pinned by name."""
        return all(spec == pin.spec for pin in self._of(param, name))

    def _of(self, param: Param, name: str) -> list[Pin]:
        """The pins of a parameter."""
        names = _known_as(param, name)
        return [pin for pin in self.pins if any(fnmatchcase(n, pin.pattern) for n in names)]

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """A pinned module's last node must give its result in the pinned spec."""
        for pin in self.pins:
            matching = [n for n in region.nodes if fnmatchcase(_module(n.loc.module), pin.pattern)]
            if not matching:
                continue
            last = matching[-1].output.name
            made = {v.name: s for v, s in zip(region.values, strategy.produces, strict=True)}
            if made[last] != pin.spec:
                return False
        return True

    def none_allowed(self, param: Param, name: str, sizes: tuple[int, ...]) -> None:
        """A pin that its parameter cannot have is refused."""
        pins = self._of(param, name)
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
        for pin in self.pins:
            nodes = [n for n in region.nodes if fnmatchcase(_module(n.loc.module), pin.pattern)]
            if nodes:
                last = nodes[-1]
                raise PlanError(
                    f"--pin {pin.pattern}={format_spec(pin.spec)}: no way to run "
                    f"`{last.loc.module}` leaves its result of shape "
                    f"{list(last.output.type.shape)} so on a mesh of "
                    f"{' x '.join(map(str, sizes))}; the sizes must divide, and the op must be "
                    "able to give it"
                )


def pinned(texts: Sequence[str]) -> Callable[[Graph, Mesh], Restriction]:
    """What the pins of a request leave of a graph on a mesh."""

    def limit(graph: Graph, mesh: Mesh) -> Restriction:
        pins = [Pin.parse(text, len(mesh.axes)) for text in texts]
        return Pins(pins, graph) if pins else Restriction()

    return limit


def _known_as(param: Param, name: str) -> tuple[str, ...]:
    """The names that a pin may use: a part of a fused weight is known by the weight's name too."""
    if param.part is None:
        return (name,)
    return (name, name.removesuffix(param.name) + param.part.name)


def _module(path: str) -> str:
    """A module's path with layer numbers as `*`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


class Roles(Restriction):
    """One role per mesh axis: `ddp`, `fsdp`, `cp` or `tp`.

    A data axis cuts the batch (`cp`: the sequence) wherever an op has one; a tensor axis cuts
    anything else, but never the sequence of attention, and its parameters are never gathered.
    `tp+ep` and the like spread experts over the axis, and send them their tokens, which no other
    role does; all else keeps to the role.
    """

    def __init__(self, roles: Sequence[str], graph: Graph, mesh: Mesh) -> None:
        self.roles = tuple(role.removesuffix(_SPREAD) for role in roles)
        self.spread = tuple(axis for axis, role in enumerate(roles) if role.endswith(_SPREAD))
        self._of_experts = {value.name for node in _experts(graph) for value in node.operands}
        self.mesh = mesh
        labels = label_dims(graph)
        self._labels = {
            node.name: factor_labels(node, labels) for s in scopes(graph) for node in s.nodes
        }
        self._cuttable: dict[tuple[int, int], bool] = {}

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """Does the strategy keep every axis to its role?"""
        routed = any(operator_of(node).experts for node in region.nodes)
        for axis, role in enumerate(self.roles):
            cuts = self._cuts(region, strategy, axis)
            if routed and _sends(region, strategy, axis) != (axis in self.spread):
                return False
            if routed and axis in self.spread:
                continue
            elif role == "tp":
                sequence = any(operator_of(n).attends for n in region.nodes) and "s" in cuts
                if "b" in cuts or sequence:
                    return False
            elif self._can_cut(region, axis, _DATA[role]):
                if _DATA[role] not in cuts:
                    return False
            elif cuts:
                return False
        return True

    def _can_cut(self, region: Region, axis: int, label: str) -> bool:
        key = (id(region), axis)
        if key not in self._cuttable:
            self._cuttable[key] = any(
                label in self._cuts(region, s, axis) for s in region.strategies
            )
        return self._cuttable[key]

    def _cuts(self, region: Region, strategy: Strategy, axis: int) -> set[str]:
        """Labels of the factors that are cut over `axis`; `?` for one without a label."""
        found: set[str] = set()
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            choice = choices[axis]
            if choice not in ("R", "V") and not choice.startswith("P"):
                found.add(self._labels[node.name].get(choice, "?"))
        return found

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """DDP replicates parameters; FSDP shards those that some dim of divides.  Experts lie on
        the axes that they are spread over."""
        routed = param.value.name in self._of_experts
        for axis, (role, state) in enumerate(zip(self.roles, spec, strict=True)):
            if routed and axis in self.spread:
                if state != S(0):
                    return False
                continue
            if role == "ddp" and is_shard(state):
                return False
            if role == "fsdp" and not is_shard(state) and self._divides(param, axis):
                return False
        return True

    def _divides(self, param: Param, axis: int) -> bool:
        return any(size % self.mesh.sizes[axis] == 0 for size in param.value.type.shape)

    def allows_gather(self, axis: int) -> bool:
        """Tensor parallelism never gathers a parameter."""
        return self.roles[axis] != "tp"


def name_of(roles: Sequence[str], mesh: Mesh) -> str:
    """`FSDP x TP+SP, EP64`; axes with the same role count as one."""
    name = " x ".join(dict.fromkeys(ROLES[role.removesuffix(_SPREAD)] for role in roles))
    spread = [axis for axis, role in enumerate(roles) if role.endswith(_SPREAD)]
    ranks = prod(mesh.sizes[axis] for axis in spread)
    return f"{name}, EP{ranks}" if spread else name


def _experts(graph: Graph) -> list[Node]:
    """The layers of experts."""
    nodes = [node for scope in scopes(graph) for node in scope.nodes]
    return [node for node in nodes if operator_of(node).experts]


def _sends(region: Region, strategy: Strategy, axis: int) -> bool:
    """Do the region's experts get their tokens by exchanges over `axis`?"""
    return all(
        choices[axis] in rule_of(node).algorithms
        for node, choices in zip(region.nodes, strategy.choices, strict=True)
        if operator_of(node).experts
    )


def ordinary_roles(mesh: Mesh, graph: Graph) -> list[tuple[str, ...]]:
    """The ordinary plans on a mesh: one role on all axes, and data outside with tensor inside.

    With experts also those that spread them over the innermost axes, as many as divide them.
    """
    n = len(mesh.axes)
    mixed = [(role,) * (n - 1) + ("tp",) for role in ("ddp", "fsdp")] if n > 1 else []
    inner = _axes_for_experts(mesh, graph)
    spread = [
        tuple(role + _SPREAD if axis >= n - inner else role for axis, role in enumerate(roles))
        for roles in (("ddp",) * n, ("fsdp",) * n, *mixed)
        if inner
    ]
    return [*((role,) * n for role in ROLES), *mixed, *spread]


def _axes_for_experts(mesh: Mesh, graph: Graph) -> int:
    """How many of the innermost axes together divide the experts of all layers."""
    numbers = [rule_of(node).sizes[operator_of(node).experts] for node in _experts(graph)]
    fitting = [
        inner
        for inner in range(1, len(mesh.axes) + 1)
        if all(number % prod(mesh.sizes[-inner:]) == 0 for number in numbers)
    ]
    return max(fitting, default=0) if numbers else 0


__all__ = ["Pin", "Pins", "Roles", "name_of", "ordinary_roles", "pinned"]
