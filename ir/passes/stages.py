"""A graph cut into the stages of a pipeline, each a graph of its own.

    x = embedding(tokens)                     x = embedding(tokens)
    for layer in layers:               ->     for layer in layers[:2]: x = layer(x)     stage 0
        x = layer(x)                          ------------------------------------- x is sent
    loss = cross_entropy(head(x), labels)     for layer in layers[2:]: x = layer(x)     stage 1
                                              loss = cross_entropy(head(x), labels)

Cuts lie between layers of loops.  A node outside of them runs in the first stage that uses what it
makes, and what the model returns is used by the last.  What is made of inputs alone, without a
gradient (angles of positions, masks), is made again in each stage that uses it; everything else
that a later stage uses is sent from stage to stage, as an output of one and an input of the next of
the same name.  Parameters that several stages use (tied embeddings) are in each of them, those that
none uses in the first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ...facts.updated import updated_buffer
from ..graph import Block, Graph, Input, Loop, Node, Output, Param, Value
from ..ops.labels import label_dims
from .invariants import repeatable


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its graph, and of each loop that it runs a part of the first layer.

    Stages in the middle of a model have equal graphs where they run as many layers of each kind.
    """

    graph: Graph
    first: tuple[tuple[str, int], ...]  # by the loop's path; layers of `graph` count from 0
    taken: tuple[str, ...]  # inputs that the stage before sends
    given: tuple[str, ...]  # outputs that are sent to the next


def layer_count(graph: Graph) -> int:
    """Layers of all loops of a graph: the most stages that it can be cut into."""
    return sum(len(loop.order) for loop in graph.loops)


def shared_params(stages: Sequence[Stage]) -> dict[str, tuple[int, ...]]:
    """The trained parameters that several stages have, with the numbers of these stages."""
    found: dict[str, list[int]] = {}
    for number, stage in enumerate(stages):
        for param in stage.graph.params:
            if param.kind == "parameter" and param.value.differentiable:
                found.setdefault(param.name, []).append(number)
    return {name: tuple(numbers) for name, numbers in found.items() if len(numbers) > 1}


def cut_into_stages(graph: Graph, layers: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a folded `graph`, of so many layers each.

    Raises ValueError, in a sentence, for numbers that are not those of its layers, and for a graph
    that can't be cut.
    """
    count = layer_count(graph)
    if sum(layers) != count or min(layers, default=0) < 1:
        text = " + ".join(map(str, layers))
        raise ValueError(
            f"{graph.name} has {count} repeated layers, which {len(layers)} stages of {text} layers"
            " are not; each stage has one or more"
        )
    if any(updated_buffer(output.path) for output in graph.outputs):
        raise ValueError(
            f"{graph.name} changes buffers in its forward pass, and a pipeline runs that once for"
            " each micro-batch: plan without stages, or take these layers out"
        )
    if graph.signature is not None:
        raise ValueError(
            f"the forward of {graph.name} takes more than tensors by name, which stages of a"
            " pipeline do not: plan without stages"
        )
    return _Cutting(graph, layers).stages()


class _Cutting:
    """Where everything of a graph goes."""

    def __init__(self, graph: Graph, layers: Sequence[int]) -> None:
        self.graph = graph
        self.bounds = [sum(layers[:n]) for n in range(len(layers) + 1)]
        self.count = len(layers)
        self.labels = label_dims(graph)
        self.again = _made_again(graph)
        self.loop_at: dict[str, int] = {}  # how many layers stand before a loop
        before = 0
        for loop in graph.loops:
            self.loop_at[loop.name] = before
            before += len(loop.order)
        read = _read(graph.body, graph.outputs)  # parameters that nothing reads: in the first stage
        self.unread = {param.value.name for param in graph.params} - read
        self.used: dict[str, list[int]] = {}  # by value the stages that use it
        self.stage_of: dict[str, int] = {}  # by value the stage that makes it
        self._place()

    def _stage_at(self, layer: int) -> int:
        return bisect_right(self.bounds, layer) - 1

    def parts(self, loop: Loop) -> list[tuple[int, int, int]]:
        """(stage, first layer, layer behind the last) of the loop's parts."""
        at = self.loop_at[loop.name]
        found: list[tuple[int, int, int]] = []
        for stage, (low, high) in enumerate(pairwise(self.bounds)):
            first, last = max(low - at, 0), min(high - at, len(loop.order))
            if first < last:
                found.append((stage, first, last))
        return found

    def _use(self, values: Iterable[Value], stages: Iterable[int]) -> None:
        stages = tuple(stages)
        for value in values:
            self.used.setdefault(value.name, []).extend(stages)

    def _place(self) -> None:
        """Each node to the first stage that uses it; made-again ones to all that do."""
        self._use((output.value for output in self.graph.outputs), [self.count - 1])
        for item in reversed(self.graph.body):
            if isinstance(item, Loop):
                stages = [stage for stage, _, _ in self.parts(item)]
                self._use(item.carried, stages[:1])
                self._use(item.invariants, stages)
                self.stage_of |= {value.name: stages[-1] for value in item.outputs}
                continue
            users = [n for value in item.outputs for n in self.used.get(value.name, [])]
            if item.name in self.again:
                self._use(item.operands, users)
                continue
            stage = min(users, default=self.count - 1)
            self._use(item.operands, [stage])
            self.stage_of |= {value.name: stage for value in item.outputs}

    def sent(self, boundary: int) -> list[tuple[str, Value, Value]]:
        """What stage `boundary` sends to the next: its name, the value there and here."""
        found: list[tuple[Value, Value]] = []
        for item in self.graph.body:
            if isinstance(item, Loop):
                own = [stage for stage, _, _ in self.parts(item)]
                if own[0] <= boundary < own[-1]:
                    found += [(value, _taken(value)) for value in item.outputs]
                    continue
            for value in item.outputs:
                made = self.stage_of.get(value.name)
                last = max(self.used.get(value.name, []), default=0)
                if made is not None and made <= boundary < last:
                    found.append((value, value))
        names = ["hidden_states", *(f"passed_{n}" for n in range(1, len(found)))]
        return [(name, here, there) for name, (here, there) in zip(names, found, strict=False)]

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stage(number) for number in range(self.count))

    def _stage(self, number: int) -> Stage:
        taken = self.sent(number - 1) if number else []
        given = self.sent(number) if number < self.count - 1 else []
        body: list[Node | Loop] = []
        first: list[tuple[str, int]] = []
        for item in self.graph.body:
            if isinstance(item, Loop):
                for stage, low, high in self.parts(item):
                    if stage == number:
                        body.append(_sliced(item, low, high))
                        first.append((item.path, low))
            elif item.name in self.again:
                if any(number in self.used.get(v.name, []) for v in item.outputs):
                    body.append(item)
            elif self.stage_of[item.outputs[0].name] == number:
                body.append(item)
        renamed = {here.name: there for _, here, there in taken}
        outputs = [
            Output((name,), renamed[value.name] if self._passes(value, number) else value)
            for name, value, _ in given
        ]
        if number == self.count - 1:
            outputs = list(self.graph.outputs)
        read = _read(body, outputs)
        inputs = [self._input(name, there) for name, _, there in taken]
        inputs += [each for each in self.graph.inputs if each.value.name in read]
        if not number:
            read |= self.unread
        params = tuple(p for p in self.graph.params if p.value.name in read)
        graph = replace(
            self.graph, inputs=tuple(inputs), params=params, body=tuple(body),
            outputs=tuple(outputs),
        )  # fmt: skip
        names = (tuple(name for name, _, _ in each) for each in (taken, given))
        return Stage(graph, tuple(first), *names)

    def _passes(self, value: Value, number: int) -> bool:
        """Does a stage give on what it was given?"""
        made = self.stage_of.get(value.name)
        if any(value in loop.outputs for loop in self.graph.loops):
            inside = [loop for loop in self.graph.loops if value in loop.outputs]
            return number not in [stage for stage, _, _ in self.parts(inside[0])]
        return made != number

    def _input(self, name: str, value: Value) -> Input:
        source = value.name.removesuffix(_SUFFIX)
        dims = self.labels.get(source, ())
        shape = value.type.shape
        labels = tuple(dim[0] if len(dim) == 1 else "" for dim in dims)
        return Input(name, value, labels if len(labels) == len(shape) else ("",) * len(shape))


_SUFFIX = "_taken"


def _taken(value: Value) -> Value:
    """What a loop carries, as a stage takes it that runs the loop's later layers."""
    return replace(value, name=value.name + _SUFFIX)


def _made_again(graph: Graph) -> set[str]:
    """Names of the nodes outside of loops that are made of inputs alone, without a gradient."""
    known = {each.value.name for each in graph.inputs if not each.value.differentiable}
    known |= {p.value.name for p in graph.params if not p.value.differentiable}
    found: set[str] = set()
    for item in graph.body:
        if isinstance(item, Loop) or any(value.differentiable for value in item.outputs):
            continue
        if repeatable(item) and all(value.name in known for value in item.operands):
            known |= {value.name for value in item.outputs}
            found.add(item.name)
    return found


def _sliced(loop: Loop, low: int, high: int) -> Loop:
    """The loop's layers from `low` to `high`, with the kinds of block that are among them."""
    order = loop.order[low:high]
    kinds = sorted(set(order))
    blocks: tuple[Block, ...] = tuple(loop.blocks[kind] for kind in kinds)
    carried = tuple(map(_taken, loop.outputs)) if low else loop.carried
    return replace(
        loop, blocks=blocks, order=tuple(kinds.index(kind) for kind in order), carried=carried
    )


def _read(body: Iterable[Node | Loop], outputs: Iterable[Output]) -> set[str]:
    """Names of what a body and outputs take."""
    read = {output.value.name for output in outputs}
    for item in body:
        values = item.operands if isinstance(item, Node) else (*item.carried, *item.invariants)
        read |= {value.name for value in values}
    return read


def stage_params(stage: Stage) -> tuple[Param, ...]:
    """The parameters, buffers and constants of a stage, those of layers by their own names."""
    first = dict(stage.first)
    found = list(stage.graph.params)
    for loop in stage.graph.loops:
        for index, kind in enumerate(loop.order):
            prefix = f"{loop.path}.{first[loop.path] + index}."
            found += [replace(p, name=prefix + p.name) for p in loop.blocks[kind].params]
    return tuple(found)


__all__ = ["Stage", "cut_into_stages", "layer_count", "shared_params", "stage_params"]
