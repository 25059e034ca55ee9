"""What a user pins: parameters and results of modules, by names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from ...facts.mesh import Mesh
from ...facts.spec import Spec, format_spec, is_shard, parse_spec
from ...ir.graph import Graph, Param
from ..errors import PlanError
from .params import all_params
from .regions import Region, Strategy, scopes
from .setting import Restriction


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
        modules = {module_of(node.loc.module) for scope in scopes(graph) for node in scope.nodes}
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


def module_of(path: str) -> str:
    """A module's path with layer numbers as `*`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


__all__ = ["Pin", "Pins", "module_of", "pinned"]
