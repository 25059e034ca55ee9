"""From a model to the graphs of a request: those of its phase, captured once for each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from .facts.held import taken
from .facts.phases import find_phase
from .facts.updated import updated_buffer
from .formats import MIXED
from .ir.capture.capture import captured
from .ir.capture.huggingface import is_pretrained
from .ir.graph import Graph
from .ir.passes.extents import Again, extents_as_in, served_extents, with_extents
from .ir.passes.masters import with_masters
from .ir.passes.returned import returning
from .ir.passes.serving import (
    FEWEST,
    ServingError,
    fewest_tokens,
    is_decoder,
    serving_graph,
    with_own_positions,
)
from .ir.reference.resizing import with_batch
from .ir.reference.tables import check_tables
from .kept import Captured, Kept
from .loading import (
    Loaded,
    load_target,
    of_sizes,
    quiet_torch,
    takes_tensors_alone,
    tokens_of,
    with_positions,
    with_rows,
    with_tokens,
    with_tokens_alone,
)
from .planner.errors import PlanError
from .planner.search.search import Job


def capture_graph(loaded: Loaded, *, training: bool) -> Graph:
    """The folded graph of a loaded model, its inputs' dims labelled, with their extents."""
    return with_extents(*_captured(loaded, training=training, serving=False))


def _captured(loaded: Loaded, *, training: bool, serving: bool) -> tuple[Graph, Again]:
    """The folded graph of a loaded model, its inputs' dims labelled, and how to get it for inputs
    of other sizes."""
    _check_names(loaded.model)
    with quiet_torch():
        found = captured(
            loaded.model,
            loaded.inputs,
            training=training,
            serving=serving,
            rebuild=loaded.rebuild,
        )
    try:
        check_tables(found.graph)
    except ValueError as error:
        raise PlanError(str(error)) from error

    def again(sizes: Mapping[str, int]) -> Graph:
        with quiet_torch():
            other = found.again(of_sizes(loaded, sizes))
        check_tables(other)
        return other

    inputs = tuple(replace(i, labels=loaded.labels.get(i.name, ())) for i in found.graph.inputs)
    return replace(found.graph, inputs=inputs), again


def _check_names(model: nn.Module) -> None:
    """Raises PlanError for a part whose name a generated module has for itself."""
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if word := taken(name):
            raise PlanError(
                f"{type(model).__name__} has a part `{name}`; generated modules have `{word}` for "
                "themselves: rename that part"
            )


def phase_graph(loaded: Loaded, name: str, context: int) -> Graph:
    """The graph of a phase: training, or serving with a KV cache.

    The forward pass of a model that is no decoder, or takes no positions, is planned as it is,
    unless the phase needs a cache; then PlanError is raised.
    """
    phase = find_phase(name)
    if not phase.serves:
        return capture_graph(loaded, training=phase.backward)
    # One token alone attends itself, in an encoder as in a decoder, and shows no recurrence.
    few = tokens_of(loaded) < FEWEST and takes_tensors_alone(loaded)
    telling = _telling_positions(_with_few(loaded, FEWEST) if few else loaded)
    if telling is not None:
        if phase.needs_cache or is_decoder(telling[0]):
            served = _served(*telling, 0 if few else context)
            return _of_few_tokens(loaded, served, context) if few else served
    elif phase.needs_cache:
        instead = (
            "plan it for training, or --phase prefill"
            if is_pretrained(loaded.model)
            else "add it and use it in place of torch.arange"
        )
        raise PlanError(
            f"{type(loaded.model).__name__}.forward has no keyword `position_ids` (batch, tokens), "
            f"so phase {name} cannot tell where new tokens stand; {instead}"
        )
    return capture_graph(loaded, training=False)


def _telling_positions(loaded: Loaded) -> tuple[Graph, Again] | None:
    """The graph of a forward pass whose inputs tell where tokens stand, and how to get it for other
    sizes; None if that is not told.

    A model that takes no positions may do without, if its layers keep states: those of the graph
    then say what is padding.
    """
    served = with_positions(loaded)
    if served is not None:
        return _captured(served, training=False, serving=True)
    tokens = with_tokens_alone(loaded)
    if tokens is None:
        return None
    graph, again = _captured(tokens, training=False, serving=True)
    telling = with_own_positions(graph)

    def again_telling(sizes: Mapping[str, int]) -> Graph:
        other = with_own_positions(again(sizes))
        if other is None:
            raise ServingError("no layer shows a state of its own then")
        return other

    return telling and (telling, again_telling)


def _of_few_tokens(loaded: Loaded, served: Graph, context: int) -> Graph:
    """As `served`, of as many tokens as `loaded` has, or as its recurrences show in."""
    tokens = max(tokens_of(loaded), fewest_tokens(served))
    telling = _telling_positions(_with_few(loaded, tokens))
    if telling is None:
        raise PlanError(
            f"{type(loaded.model).__name__} shows no state of its layers when it is given {tokens}"
            " tokens alone, so that they cannot go on from one; write the same lines for any number"
        )
    return extents_as_in(served, _serving(telling[0], context))


def _with_few(loaded: Loaded, tokens: int) -> Loaded:
    """The same model with so many tokens of each sequence; where a recurrence needs several, one
    more than there are sequences of, so that the two are told apart in merged dims."""
    batch = next(iter(loaded.tensors.values())).shape[0]
    return with_tokens(loaded, tokens + (tokens == batch > 1))


def _served(graph: Graph, again: Again, context: int) -> Graph:
    """The graph of serving, which must be that of any number of tokens."""
    made = _serving(graph, context)
    try:
        return served_extents(made, lambda sizes: serving_graph(again(sizes), context))
    except ServingError as error:
        raise PlanError(str(error)) from error


def _serving(graph: Graph, context: int) -> Graph:
    for output in graph.outputs:
        if name := updated_buffer(output.path):
            raise PlanError(
                f"{graph.name} changes its buffer `{name}` while it answers, and a served model "
                "keeps nothing but caches; change it in training mode alone (`if self.training`)"
            )
    try:
        return serving_graph(graph, context)
    except ServingError as error:
        raise PlanError(str(error)) from error


@dataclass(frozen=True)
class Captures:
    """A model, and what was captured of it: the graphs of a request, once for each number of rows.

    For requests that differ in nothing else that a graph depends on: in GPUs, cluster, mesh, layout
    and memory, and in micro-batches.  `load` gives the model, which is in `formats`, when it is
    needed: not where `kept` has from earlier runs what is asked for.
    """

    load: Callable[[], Loaded]
    formats: str
    outputs: Sequence[str]
    kept: Kept | None = None
    _known: dict[int, Captured] = field(default_factory=dict[int, Captured])

    @staticmethod
    def of_target(job: Job, outputs: Sequence[str], *, kept: bool = True) -> Captures:
        """Those of the model that a request names; `kept`: earlier runs may have captured it."""
        request = job.request

        def load() -> Loaded:
            job.progress("build the model")
            with job.clock.step("model"):
                return load_target(
                    request.target, batch=request.batch, seq=request.seq, phase=request.phase,
                    formats=request.formats,
                )  # fmt: skip

        known = Kept.of(request.target) if kept else None
        return Captures(load, request.formats, outputs, known)

    @cached_property
    def _loaded(self) -> Loaded:
        return self.load()

    def graphs(self, job: Job) -> tuple[Graph, ...]:
        """The graph of a request, and in phase `serve` that of one output token besides."""
        first, *others = self._captured(job).graphs
        return (with_masters(first) if job.request.precision == MIXED else first, *others)

    def in_own_formats(self, job: Job) -> Job:
        """The job, but for mixed precision of a model that has nothing to mix: in its own formats.

        Raises PlanError where another format of its gradients was asked for.
        """
        request = job.request
        if request.precision != MIXED or self._captured(job).narrow:
            return job
        if request.reduce_dtype != "float32":
            raise PlanError(
                f"--reduce-dtype {request.reduce_dtype} is for mixed precision, and no parameter of"
                f" {self._captured(job).graphs[0].name} is in float32 or fewer bits alone; leave it"
                " out"
            )
        return replace(job, request=replace(request, precision="own", reduce_dtype="own"))

    def _captured(self, job: Job) -> Captured:
        rows = job.request.rows
        if rows not in self._known:
            found = self._resized(rows) or self._from_before(job) or self._anew(job)
            self._known[rows] = found
        return self._known[rows]

    def _resized(self, rows: int) -> Captured | None:
        """What is known of more sequences, for fewer; None where that is not told without a
        capture."""
        for known in self._known.values():
            graphs = [graph for each in known.graphs if (graph := with_batch(each, rows))]
            if len(graphs) == len(known.graphs):
                return replace(known, graphs=tuple(graphs))
        return None

    def _key(self, job: Job) -> tuple[object, ...]:
        """What a capture depends on besides the model."""
        request = job.request
        return (
            self.formats, request.rows, request.seq, request.phase, request.context,
            request.decode_steps, *self.outputs,
        )  # fmt: skip

    def _from_before(self, job: Job) -> Captured | None:
        if self.kept is None:
            return None
        with job.clock.step("capture"):
            return self.kept.read(self._key(job))

    def _anew(self, job: Job) -> Captured:
        loaded = with_rows(self._loaded, job.request.rows)
        job.progress("capture the graph")
        with job.clock.step("capture"):
            found = Captured(_graphs_of(loaded, job, self.outputs), _narrow(loaded.model))
            if self.kept is not None and self.kept == Kept.of(job.request.target):
                self.kept.write(self._key(job), found)  # the file is as it was when it was read
        return found


def _narrow(model: nn.Module) -> bool:
    """Has the model parameters in fewer bits than float32?"""
    return any(p.dtype.is_floating_point and p.dtype.itemsize < 4 for p in model.parameters())


def _graphs_of(loaded: Loaded, job: Job, outputs: Sequence[str]) -> tuple[Graph, ...]:
    request = job.request
    graph = phase_graph(loaded, request.phase, request.context)
    graph = _returning(graph, outputs) if outputs else graph
    if not find_phase(request.phase).answer:
        return (graph,)
    longest = request.seq + request.decode_steps - 1
    return graph, _of_few_tokens(with_tokens(loaded, 1), graph, longest)


def _returning(graph: Graph, outputs: Sequence[str]) -> Graph:
    try:
        return returning(graph, outputs)
    except ValueError as error:
        raise PlanError(f"--outputs: {error}") from error


__all__ = ["Captures", "capture_graph", "phase_graph"]
