"""What a program's collectives move in one step: bytes by operation, axis and phase.

This is the count that `runtime.count_collectives` makes on a rank, known before running: every
conversion of the program, the collectives inside ops (a loss over a sharded vocabulary, counting
tokens), and the weights of each block, which move together and come a second time for backward.
In backward only what a gradient reaches is counted: with a scalar loss among the outputs, the
gradient starts there alone.
Layers that are recomputed run forward twice, the second time until everything is back that
autograd had kept: what comes after in the layer is not run again.  In those that keep a part, what
is kept does not run again either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import NamedTuple, TypeAlias

from ...costmodel.collective import messages, wire_bytes
from ...facts.mesh import Mesh
from ...facts.moves import KEPT_MOVES
from ...facts.together import rounds
from ...facts.traffic import Traffic
from ...ir.ops.counted import Counted, counted_labels
from ...ir.ops.registry import is_view, local_of, operator_of, saved_values
from .program import BlockBody, Compute, Convert, Leg, LoopCall, Program, Sharded, Statement, Weight


class Moved(NamedTuple):
    """A row of the count; `axis` joins the names of several axes taken as one: `dp_tp`."""

    op: str
    axis: str
    phase: str  # forward | backward


def predicted_bytes(program: Program, mesh: Mesh) -> dict[Moved, float]:
    """Bytes that each rank receives in one forward pass and, in training, one backward pass."""
    return {key: n_bytes for key, (n_bytes, _) in _walked(program, mesh).items()}


def predicted_messages(program: Program, mesh: Mesh) -> dict[Moved, int]:
    """In how many messages that is, one after the other from rank to rank."""
    return {key: messages for key, (_, messages) in _walked(program, mesh).items()}


@dataclass(frozen=True, slots=True)
class Together:
    """A collective of weights: the step of each that it takes, and the bytes of that; how many
    `times` it runs."""

    traffic: Traffic
    shares: tuple[tuple[Sharded, int, float], ...]
    times: int = 1


def brought_together(program: Program, mesh: Mesh) -> list[Together]:
    """Every collective of weights in one step."""
    return _walk(program, mesh).together


def _walked(program: Program, mesh: Mesh) -> dict[Moved, tuple[float, int]]:
    return _walk(program, mesh).moved


def _walk(program: Program, mesh: Mesh) -> _Count:
    """One step: of its micro-batches those between the first and the last are alike."""
    last = program.micro_batches - 1
    count = _Count()
    for batch in sorted({0, min(1, last), last}):
        times = last - 1 if 0 < batch < last else 1
        count.add(_micro_batch(program, mesh, first=batch == 0, last=batch == last), times)
    axes = _data_axes(program)
    if last and axes and isinstance(counted_labels(program.graph), Counted):
        sizes, names = [mesh.sizes[i] for i in axes], [mesh.names[i] for i in axes]
        counts = 8.0 * program.micro_batches  # of the labels that count in each
        key = Moved("all_reduce", "_".join(names), "forward")
        moved = float(wire_bytes("all_reduce", counts, *sizes))
        count.move(key, moved, messages("all_reduce", *sizes))
    return count


def _data_axes(program: Program) -> list[int]:
    """The axes that cut the rows of every batch, as runtime/mesh/rows.py has them."""
    cut = [
        [axis for axis, state in enumerate(item.spec) if state == 0]
        for item, source in zip(program.inputs, program.graph.inputs, strict=True)
        if source.extents[:1] not in ((), (None,))
    ]
    return list(commonprefix(cut))


def _micro_batch(program: Program, mesh: Mesh, *, first: bool, last: bool) -> _Count:
    walk = _Walk(mesh, program, first=first, last=last)
    trained = [out for out in program.outputs if out.value.differentiable and program.training]
    scalars = [out for out in trained if out.value.type.shape == ()]
    walk.model(program, set(scalars[:1] or trained))
    return walk.count


@dataclass(slots=True)
class _Brought:
    """The weights of a unit that come again in backward, as in runtime/gathering/again.py: by
    weight how many nodes will ask for it, and which of them are there."""

    weights: dict[Sharded, Weight]
    left: dict[Sharded, int] = field(default_factory=dict[Sharded, int])
    there: set[Sharded] = field(default_factory=set[Sharded])


# What a rank has, and which weight it is or is a view of
_Known: TypeAlias = Mapping[Sharded, tuple[_Brought, Sharded]]


@dataclass(slots=True)
class _Count:
    """Bytes and messages, and the collectives of weights."""

    moved: dict[Moved, tuple[float, int]] = field(default_factory=dict[Moved, tuple[float, int]])
    together: list[Together] = field(default_factory=list[Together])

    def move(self, key: Moved, n_bytes: float, n_messages: int) -> None:
        """Add to a row."""
        before, count = self.moved.get(key, (0.0, 0))
        self.moved[key] = before + n_bytes, count + n_messages

    def add(self, other: _Count, times: int) -> None:
        """Add another, `times` times."""
        for key, (n_bytes, n_messages) in other.moved.items():
            self.move(key, times * n_bytes, times * n_messages)
        self.together += [replace(each, times=times * each.times) for each in other.together]


class _Walk:
    """Goes through statements from the last to the first, with what a gradient reaches, in the
    first or the last micro-batch of a step, or in one between."""

    def __init__(self, mesh: Mesh, program: Program, *, first: bool, last: bool) -> None:
        self.mesh = mesh
        self.program = program
        self.order = program.order
        self.first = first
        self.last = last
        self.count = _Count()
        self._told: set[Traffic] = set()  # once per step

    def model(self, program: Program, live: set[Sharded]) -> None:
        """Count the whole model; a gradient reaches its outputs `live`."""
        stages = program.stages()
        units: dict[int, list[Weight]] = {}
        for weight in program.weights:
            units.setdefault(stages.get(weight.item, (0, 0))[0], []).append(weight)
        known = {k: v for weights in units.values() for k, v in _known(weights).items()}
        self._expect(program.statements, _with_views(program.statements, known))
        self.run(program.statements, live, known)
        for weights in units.values():
            self._bring(weights, live, 1)

    def run(
        self,
        statements: Sequence[Statement],
        live: set[Sharded],
        known: _Known,
        *,
        again: Collection[int] = (),
        in_part: bool = False,
    ) -> set[Sharded]:
        """Count `statements`; `live` grows by what a gradient reaches, and is returned.

        `known` are weights that will come again; the statements numbered `again` run forward twice,
        `in_part` without what they spare.
        """
        known = _with_views(statements, known)
        for at, item in reversed(list(enumerate(statements))):
            times = 2 if at in again else 1
            if isinstance(item, LoopCall):
                live |= self._loop(item, live, known)
            elif isinstance(item, Convert):
                self._convert(item, item.target in live, times)
                if item.target in live and item.source.value.differentiable:
                    live.add(item.source)
            else:
                live_here = bool(live.intersection(item.outputs))
                self._inside(item, times, live_here, in_part=in_part)
                if live_here:
                    live.update(o for o in item.operands if o.value.differentiable)
                    for brought, weight in _kept(item, known):
                        self._ask(brought, weight)
        return live

    def _loop(self, call: LoopCall, live: set[Sharded], known: _Known) -> set[Sharded]:
        """Count the layers from the last to the first; what of the outside a gradient reaches."""
        n = len(call.carried)
        reached: set[Sharded] = set()
        carried = tuple(out in live for out in call.outputs)
        layers: dict[tuple[object, ...], tuple[_Count, frozenset[str]]] = {}
        runs: dict[tuple[object, ...], int] = {}
        modes = self.program.layers.of(call.loop)
        for layer, kind in reversed(list(enumerate(call.loop.order))):
            body, mode = call.bodies[kind], modes.mode(layer)
            entering = _entering(call, body, known) if mode == "kept" else {}
            # layers that begin alike count alike, unless they share weights that come once
            key = (kind, carried, len(self._told), layer if entering else None, mode)
            if key not in layers:
                layers[key] = self._counted(body, carried, entering, mode)
            runs[key] = runs.get(key, 0) + 1
            names = layers[key][1]
            carried = tuple(value.name in names for value in body.block.inputs[:n])
            inner = _inner(call, body)
            reached |= {a for a in call.arguments if inner[a].value.name in names}
        for key, (count, _) in layers.items():
            self.count.add(count, runs[key])
        return reached | {v for v, alive in zip(call.carried, carried, strict=True) if alive}

    def _counted(
        self, body: BlockBody, carried: Sequence[bool], entering: _Known, mode: str
    ) -> tuple[_Count, frozenset[str]]:
        """The count of one layer, and the names of what a gradient reaches in it, which comes from
        what is `carried` on.  It is recomputed as `mode` says (see `Modes`)."""
        outside, self.count = self.count, _Count()
        ends = {out for out, alive in zip(body.outputs, carried, strict=True) if alive}
        again = again_at(body.statements, mode if ends else "kept")
        # what comes for the second run of a layer serves its backward
        ours = {} if again else _known(body.weights)
        self._expect(body.statements, _with_views(body.statements, ours))
        reaches = self.run(
            body.statements, ends, {**entering, **ours}, again=again, in_part=mode == "part"
        )
        self._bring(body.weights, reaches, 2 if again else 1)
        counted, self.count = self.count, outside
        return counted, frozenset(item.value.name for item in reaches)

    def _convert(self, item: Convert, live: bool, times: int) -> None:
        for traffic in [item.priced.forward] * times + [item.priced.backward] * live:
            if traffic is not None:
                self._add(traffic.kind, traffic.axes, traffic.backward, traffic.bytes)

    def _bring(self, weights: Sequence[Weight], live: set[Sharded], times: int) -> None:
        """The weights of a unit come `times` times, and gradients of those in `live` leave."""
        for again in range(times):
            fresh = self.first and not again
            self._together(weights, _all_ahead if fresh else _ahead, backward=False)
        trained = [weight for weight in weights if weight.item in live]
        self._together(trained, self._back, backward=True)

    def _back(self, weight: Weight) -> tuple[Leg, ...]:
        return weight.backward(home=weight.kept.late and not self.last)

    def _together(
        self,
        weights: Iterable[Weight],
        way: Callable[[Weight], tuple[Leg, ...]],
        *,
        backward: bool,
    ) -> None:
        """Collectives that take many weights at once."""
        items = [(weight, way(weight)) for weight in weights]
        ways = [
            [
                ((t.kind, t.axes, weight.param.value.type.dtype), t.bytes)
                for t in (leg.traffic for leg in legs)
            ]
            for weight, legs in items
        ]
        left = [iter(legs) for _, legs in items]
        for each in rounds(ways):
            kind, axes, _ = each.key
            self._add(kind, axes, backward, each.nbytes)
            taken = [(items[i][0].item, next(left[i])) for i in each.members]
            shares = tuple((item, leg.step, float(leg.traffic.bytes)) for item, leg in taken)
            self.count.together.append(Together(Traffic(kind, axes, each.nbytes, backward), shares))

    def _expect(self, statements: Sequence[Statement], known: _Known) -> None:
        """Count the nodes, those in loops too, that keep what is `known`."""
        for item in statements if known else ():
            if isinstance(item, LoopCall):
                for kind in item.loop.order[self.program.recomputed(item.loop) :]:
                    body = item.bodies[kind]
                    entering = _entering(item, body, known)
                    self._expect(body.statements, _with_views(body.statements, entering))
            elif isinstance(item, Compute):
                for brought, weight in _kept(item, known):
                    brought.left[weight] = brought.left.get(weight, 0) + 1

    def _ask(self, brought: _Brought, weight: Sharded) -> None:
        """A node's backward asks for a weight: it comes with all of its unit that will be asked
        for, and is kept for others that will ask."""
        if weight not in brought.there:
            coming = [
                item
                for item in brought.weights
                if (brought.left.get(item, 0) or item == weight) and item not in brought.there
            ]
            weights = [brought.weights[item] for item in coming]
            self._together(weights, lambda weight: weight.forward, backward=True)
            brought.there.update(coming)
        brought.left[weight] = max(brought.left[weight] - 1, 0)
        if not brought.left[weight]:
            brought.there.discard(weight)

    def _inside(self, item: Compute, times: int, live: bool, *, in_part: bool) -> None:
        """What an op moves itself; of experts what is expected of balanced routing."""
        local = local_of(
            item.node,
            item.choices,
            self.mesh.sizes,
            training=live,
            order=self.order,
            imbalance=1.0,
        )
        operator = operator_of(item.node)
        spared = operator.spares(local)[1] if in_part else ()
        for traffic in operator.traffic(local):
            if traffic.told:
                if traffic in self._told:
                    continue
                self._told.add(traffic)
            once = traffic.backward or traffic.told or traffic in spared
            for _ in range(traffic.times * (1 if once else times)):
                self._add(traffic.kind, traffic.axes, traffic.backward, traffic.bytes)

    def _add(self, kind: str, axes: tuple[int, ...], backward: bool, n_bytes: float) -> None:
        sizes = [self.mesh.sizes[axis] for axis in axes]
        name = "_".join(self.mesh.names[axis] for axis in axes)
        key = Moved(kind, name, "backward" if backward else "forward")
        moved = float(wire_bytes(kind, float(n_bytes), *sizes))
        if moved:
            self.count.move(key, moved, messages(kind, *sizes))


def _ahead(weight: Weight) -> tuple[Leg, ...]:
    return weight.forward


def _all_ahead(weight: Weight) -> tuple[Leg, ...]:
    """With those of the copy that is made at home."""
    return (*weight.refresh, *weight.forward)


def again_at(statements: Sequence[Statement], mode: str) -> Collection[int]:
    """The numbers of the statements of a layer that run again in backward in a mode (`Modes`)."""
    until = 0 if mode == "kept" else kept_until(statements)
    return set(range(until)) - (_kept_results(statements) if mode == "part" else set())


def kept_until(statements: Sequence[Statement]) -> int:
    """How many statements run until the last one of which autograd keeps something."""
    kept = [i for i, s in enumerate(statements) if isinstance(s, Compute) and saved_values(s.node)]
    return kept[-1] + 1 if kept else 0


def _kept_results(statements: Sequence[Statement]) -> set[int]:
    """The statements whose results are kept by a layer that keeps a part: products and attention,
    and what sums these up over ranks or exchanges them."""
    found, kept = set[int](), set[Sharded]()
    for at, item in enumerate(statements):
        if isinstance(item, Compute) and operator_of(item.node).stays:
            found.add(at)
            kept.update(item.outputs)
        elif isinstance(item, Compute) and is_view(item.node) and item.operands[0] in kept:
            kept.update(item.outputs)
        elif isinstance(item, Convert) and item.source in kept:
            if item.primitive in KEPT_MOVES:
                found.add(at)
            if item.primitive in KEPT_MOVES or item.primitive == "nothing":
                kept.add(item.target)
    return found


def _inner(call: LoopCall, body: BlockBody) -> dict[Sharded, Sharded]:
    """The loop's arguments by the names that a block knows them by."""
    inputs = body.block.inputs[len(call.carried) :]
    of = {outer.name: i for outer, i in zip(call.loop.invariants, inputs, strict=True)}
    return {a: Sharded(of[a.value.name], a.spec) for a in call.arguments}


def _known(weights: Sequence[Weight]) -> dict[Sharded, tuple[_Brought, Sharded]]:
    """The weights of one unit that will come again."""
    brought = _Brought({weight.item: weight for weight in weights if weight.forward})
    return {item: (brought, item) for item in brought.weights}


def _entering(call: LoopCall, body: BlockBody, known: _Known) -> _Known:
    """The weights among a loop's arguments, as a block knows them."""
    inner = _inner(call, body)
    return {inner[a]: known[a] for a in call.arguments if a in known}


def _with_views(statements: Sequence[Statement], known: _Known) -> _Known:
    """And what looks into them."""
    found = dict(known)
    for item in statements:
        if isinstance(item, Compute) and is_view(item.node) and item.operands[0] in found:
            found |= dict.fromkeys(item.outputs, found[item.operands[0]])
    return found


def _kept(item: Compute, known: _Known) -> list[tuple[_Brought, Sharded]]:
    """The weights that autograd keeps from a node."""
    held = operator_of(item.node).holds(item.node, item.choices)
    kept = {value.name for value in saved_values(item.node)} & {value.name for value in held}
    operands = [o for o in dict.fromkeys(item.operands) if o.value.name in kept and o in known]
    found = {known[o][1]: known[o] for o in operands}
    return list(found.values())


__all__ = [
    "Moved", "Together", "again_at", "brought_together", "predicted_bytes", "predicted_messages",
]  # fmt: skip
