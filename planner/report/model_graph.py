"""The model as a networkx graph that says what the plan does with each part of it.

Layers are written out one by one, so that the graph has no cycles.  A conversion that several nodes
share stands on the edge to the first of them, where it is paid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import networkx as nx

from ...costmodel.collective import wire_bytes
from ...facts.mesh import Mesh
from ...facts.moves import primitive
from ...facts.spec import Spec, format_spec
from ...ir.graph import Graph, Value
from ...ir.ops.local import local_bytes
from ..plan.plan import PlanData
from ..plan.program import Compute, Convert, LoopCall, PricedStep, Sharded, Weight
from ..strategies.pricing import IN_PART, NEVER, WHOLE, Again
from ..strategies.selected import again_in


@dataclass(frozen=True)
class PlannedGraph(Graph):
    """The graph of a model that has a plan."""

    plan: PlanData = field(repr=False, compare=False, kw_only=True)

    @staticmethod
    def of(plan: PlanData) -> PlannedGraph:
        """The plan's graph."""
        values: dict[str, Any] = {f.name: getattr(plan.graph, f.name) for f in fields(Graph)}
        return PlannedGraph(**values, plan=plan)

    def to_networkx(self) -> nx.DiGraph[str]:
        """The model as a `networkx.DiGraph`, layers one by one; attributes are plain JSON data.

        Nodes are `input:NAME`, `parameter:NAME`, `output:PATH`, and ops by their name, in layers
        `model.layers.3.NAME`.  All have `kind`, `shape` and `dtype` (of the whole first result),
        `spec`, `bytes` (what a rank holds of all results), `seconds` (of a step, or of a forward
        pass) and `communication_s`, how many of those an op waits for collectives of its own; ops
        also `op`, `module`, `loc` and `strategy`, a choice for each mesh axis.

        An edge is a use: `values`, the specs that they are made in (`made`) and needed in
        (`needed`), `steps` (what runs between, and over which axes), `bytes` that a rank
        receives for them and `seconds`, forward and backward.

        Seconds of all nodes, of all edges, `graph["optimizer_s"]` and `graph["casts_s"]` add up to
        those of the plan.
        """
        return _Writer(self.plan).graph


@dataclass(slots=True)
class _Move:
    """One step of a conversion as it runs: the first user pays."""

    priced: PricedStep
    primitive: str
    paid: bool = False


@dataclass(frozen=True, slots=True)
class _Made:
    """A value in a spec: the node that made it, in which spec, and the moves since."""

    node: str
    spec: Spec
    moves: tuple[_Move, ...] = ()


class _Writer:
    """Runs the plan's program by name, from one place to the next."""

    def __init__(self, plan: PlanData) -> None:
        self.plan = plan
        self.mesh = plan.mesh
        self.graph = nx.DiGraph(
            name=plan.graph.name,
            mesh=str(plan.mesh),
            seconds=plan.seconds,
            optimizer_s=plan.optimizer_s,
            casts_s=plan.casts_s,
        )
        self.moves: list[tuple[Value, _Made]] = []  # the ways that were gone
        program, at = plan.program, dict[Sharded, _Made]()
        for item, asked in zip(program.inputs, plan.graph.inputs, strict=True):
            at[item] = self._source(f"input:{asked.name}", "input", item)
        self._weights("", program.weights, at)
        self._run(program.statements, at)
        for item, out in zip(program.outputs, plan.graph.outputs, strict=True):
            name = f"output:{'.'.join(map(str, out.path))}"
            self._node(name, "output", [item])
            self._use(name, [item], at)
        self._pay_for_unused()

    def _run(self, statements: Iterable[Any], at: dict[Sharded, _Made]) -> None:
        for item in statements:
            if isinstance(item, LoopCall):
                self._loop(item, at)
            elif isinstance(item, Convert):
                self._convert(item, at)
            else:
                self._compute("", item, at, again=NEVER)

    def _loop(self, call: LoopCall, outer: dict[Sharded, _Made]) -> None:
        carried = [outer[item] for item in call.carried]
        n, path = len(carried), call.loop.path
        modes = self.plan.program.layers.of(call.loop)
        for index, kind in enumerate(call.loop.order):
            body = call.bodies[kind]
            inputs = body.block.inputs
            at = {
                Sharded(value, item.spec): made
                for value, item, made in zip(inputs[:n], call.carried, carried, strict=True)
            }
            inner = dict(zip((v.name for v in call.loop.invariants), inputs[n:], strict=True))
            at |= {Sharded(inner[a.value.name], a.spec): outer[a] for a in call.arguments}
            self._weights(f"{path}.{index}.", body.weights, at)
            mode = modes.mode(index)
            names, once = again_in(body.block.nodes, mode), IN_PART if mode == "part" else WHOLE
            for item in body.statements:
                if isinstance(item, Convert):
                    self._convert(item, at)
                else:
                    again = once if item.node.name in names else NEVER
                    self._compute(f"{path}.{index}.", item, at, again=again)
            carried = [at[item] for item in body.outputs]
        outer |= dict(zip(call.outputs, carried, strict=True))

    def _weights(self, prefix: str, weights: Iterable[Weight], at: dict[Sharded, _Made]) -> None:
        for weight in weights:
            param, stored = weight.param, Sharded(weight.param.value, weight.stored)
            name = f"parameter:{prefix}{param.name}"
            if name not in self.graph:
                self._node(name, param.kind, [stored])
            moves = tuple(_Move(step, primitive(step.step.a, step.step.b)) for step in weight.way)
            at[weight.item] = _Made(name, weight.stored, moves)

    def _source(self, name: str, kind: str, item: Sharded) -> _Made:
        self._node(name, kind, [item])
        return _Made(name, item.spec)

    def _convert(self, item: Convert, at: dict[Sharded, _Made]) -> None:
        made = at[item.source]
        move = _Move(item.priced, item.primitive)
        at[item.target] = _Made(made.node, made.spec, (*made.moves, move))
        self.moves.append((item.target.value, at[item.target]))

    def _compute(
        self, prefix: str, item: Compute, at: dict[Sharded, _Made], *, again: Again
    ) -> None:
        node, name, work = item.node, prefix + item.node.name, self.plan.work[item.node.name]
        self._node(
            name,
            "op",
            item.outputs,
            op=node.op,
            module=node.loc.module,
            loc=str(node.loc),
            strategy=list(item.choices),
            seconds=work.seconds + work.again_s(again),
            communication_s=work.moving_s + work.again_moving_s(again),
        )
        self._use(name, item.operands, at)
        for output in item.outputs:
            at[output] = _Made(name, output.spec)

    def _node(self, name: str, kind: str, results: Sequence[Sharded], **more: Any) -> None:
        first = results[0]
        self.graph.add_node(
            name,
            kind=kind,
            shape=list(first.value.type.shape),
            dtype=str(first.value.type.dtype).removeprefix("torch."),
            spec=format_spec(first.spec),
            bytes=sum(local_bytes(item.value, item.spec, self.mesh.sizes) for item in results),
            **{"seconds": 0.0, "communication_s": 0.0, **more},
        )

    def _use(self, user: str, items: Iterable[Sharded], at: Mapping[Sharded, _Made]) -> None:
        for item in dict.fromkeys(items):
            self._edge(user, item, at[item])

    def _edge(self, user: str, item: Sharded, made: _Made) -> None:
        if not self.graph.has_edge(made.node, user):
            self.graph.add_edge(
                made.node, user, values=[], made=[], needed=[], steps=[], bytes=0.0, seconds=0.0
            )
        edge = self.graph.edges[made.node, user]
        edge["values"].append(item.value.name)
        edge["made"].append(format_spec(made.spec))
        edge["needed"].append(format_spec(item.spec))
        for move in made.moves:
            edge["steps"].append(_text(move, self.mesh))
            if not move.paid:
                edge["bytes"] += _received(move.priced, self.mesh)
                edge["seconds"] += move.priced.seconds
                move.paid = True

    def _pay_for_unused(self) -> None:
        """What the last layer converts for a next one that there is not."""
        for value, made in self.moves:
            if not all(move.paid for move in made.moves):
                self._node("unused", "output", [Sharded(value, made.spec)])
                self._edge("unused", Sharded(value, made.spec), made)


def _text(move: _Move, mesh: Mesh) -> str:
    """`dp all_gather, backward reduce_scatter`."""
    axes = "+".join(mesh.names[axis] for axis in move.priced.step.axes)
    forward = [move.primitive] if move.primitive != "nothing" else []
    backward = [f"backward {t.kind}" for t in move.priced.traffic if t.backward]
    return f"{axes} {', '.join([*forward, *backward]) or 'nothing'}"


def _received(priced: PricedStep, mesh: Mesh) -> float:
    """Bytes that a rank receives in a step, forward and backward."""
    sizes = [mesh.sizes[axis] for axis in priced.step.axes]
    return sum(float(wire_bytes(t.kind, float(t.bytes), *sizes)) for t in priced.traffic)


__all__ = ["PlannedGraph"]
