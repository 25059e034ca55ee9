"""The plan: what was decided, what it costs, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.schedules import PipelineSchedule, schedule
from ...facts.spec import Spec, format_spec
from ...ir.graph import Graph, Value
from ...ir.graph.schema import DTYPES
from ..errors import PlanError
from ..strategies.build import Decisions
from ..strategies.pricing import Work
from .program import PricedStep, Program, lower
from .split import Spent, spent_in_ops

OUTPUT_LAYOUTS = ("sharded", "replicated")
MIXED = "mixed"  # trained parameters in float32, products in bfloat16


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; enough to build the model again for `plan verify`."""

    target: str  # `model.py:build_model`, a config folder, or "" for a model given by the API
    gpus: int
    cluster: str
    phase: str
    batch: int
    seq: int
    dtype: str  # in which parameters are stored: `bfloat16`, or `own`, as the model has them
    optimizer: str
    memory_bytes: float
    pins: tuple[str, ...] = ()
    context: int = 0  # tokens of each sequence that are cached before
    output_tokens: int = 0  # of each answer, in phase `serve`
    expert_imbalance: float = 0.0  # load of the busiest rank's experts over the mean; 0: usual
    output_layout: str = "sharded"  # of what training returns; or `replicated`
    layout: str = ""  # the ordinary plan that was asked for, such as `ddp=4,fsdp=8`
    precision: str = "own"  # of products: `mixed` has parameters in float32, products in bfloat16
    reduce_dtype: str = "own"  # of gradients between ranks; `own`: as products give them
    micro_batches: int = 1  # of a step, one after another; `batch` is that of all together
    schedule: str = ""  # of the pipeline that was asked for, if one was

    @property
    def rows(self) -> int:
        """Sequences of one micro-batch, on all ranks together."""
        return self.batch // self.micro_batches

    @property
    def formats(self) -> str:
        """The formats in which the model is run: a dtype, `own`, or `mixed`."""
        return self.dtype if self.precision == "own" else self.precision

    @property
    def decode_steps(self) -> int:
        """Decodes of an answer: prefill gives its first token.  At least one is planned."""
        return max(self.output_tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per GPU at the peak, by kind: gradients are those that are there by then."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    cache: float = 0.0  # keys and values of cached tokens, room for the new ones included

    @property
    def total(self) -> float:
        """The peak."""
        state = self.parameters + self.gradients + self.optimizer + self.cache
        return state + self.activations + self.transient


@dataclass(frozen=True, slots=True)
class Baseline:
    """An ordinary plan priced by the same model.

    If it does not fit, `seconds` is None and `peak_bytes` what it needs at least.  `spent` says
    what the seconds go into, as `planner.split` has it; `recompute`, whether layers run forward
    again in backward, and `kept_layers`, how many last ones of each loop do not, and `part_layers`,
    how many of the others keep a part; `whole`, which weights stay whole where FSDP's axes do not
    divide them.
    `refused`: there is no such plan, and why; then `peak_bytes` is 0.
    """

    name: str
    mesh: str
    seconds: float | None
    peak_bytes: float
    spent: tuple[tuple[str, float], ...] = ()
    recompute: bool = False
    whole: tuple[str, ...] = ()
    refused: str = ""
    kept_layers: int = 0
    part_layers: int = 0


SHORT_OF_MEMORY = 0.8  # a plan that fills more than this share may be held back by memory


@dataclass(frozen=True, slots=True)
class Search:
    """How the plan was found: solver status, relative gap, seconds of each planning step."""

    solver: str
    status: str
    gap: float
    meshes: int
    seconds: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Recache:
    """KV caches that are converted once per answer, from prefill's layout to that of decode.

    `name` is that of the cache, layers as `*`; `count` such caches, of the attention that prefill's
    graph calls `node`, take `steps` each; `seconds` is the time of all.
    """

    name: str
    node: str
    count: int
    source: Spec
    target: Spec
    steps: tuple[PricedStep, ...]
    seconds: float

    @property
    def path(self) -> tuple[Spec, ...]:
        """The specs from the first layout to the last."""
        specs = [self.source]
        for priced in self.steps:
            step = priced.step
            specs.append(tuple(step.b if i in step.axes else s for i, s in enumerate(specs[-1])))
        return tuple(specs)


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage of a pipeline: which of the kinds of stages it is, and its part of the model.

    `first` has by the path of a loop the first of the model's layers that it runs; `taken` are the
    inputs that the stage before sends, `given` the outputs that go to the next.  Seconds are those
    of a micro-batch, forward, backward, and to send what it gives and the gradients of what it
    took (in inference the last stage sends logits back to all others); `once_s` are those of a step
    besides.
    """

    kind: int
    layers: int
    first: tuple[tuple[str, int], ...]
    taken: tuple[str, ...]
    given: tuple[str, ...]
    forward_s: float
    backward_s: float
    once_s: float
    send_s: float
    send_back_s: float


@dataclass(frozen=True)
class Pipeline:
    """Stages over `ranks` groups of ranks, and the schedule by which micro-batches pass them.

    `kinds` are plans of stages, each on the mesh of one group; `bubble` is the share of a step in
    which ranks wait for others.
    """

    schedule: str
    ranks: int
    bubble: float
    stages: tuple[PlannedStage, ...]
    kinds: tuple[PlanData, ...]

    @property
    def per_rank(self) -> int:
        """Stages of a rank."""
        return len(self.stages) // self.ranks

    def table(self, micro_batches: int) -> PipelineSchedule:
        """Who runs what when in a step of so many micro-batches."""
        return schedule(self.schedule, self.ranks, self.per_rank, micro_batches)


@dataclass(frozen=True)
class PlanData:
    """How to cut a model over a mesh: what `plan.json` holds.

    It is data alone.  `report` prints it, `store` writes and reads it, `codegen` makes a module of
    it; `shardwright.Plan` is this with all of that as methods.
    `seconds` is one step (training) or one forward pass (other phases), as the cost model prices
    it; `graph` and `work` are those of one micro-batch.
    `paths` holds every conversion that the program runs: (value, from, to) -> priced steps.
    In phase `serve` this is the plan of prefill, and `decode` that of one output token, with the
    same mesh and parameters; `recached` are the caches that decode wants laid out otherwise.
    With a `pipeline`, which the plan of decode then has too, decisions are those of its stages, and
    here are none; `mesh` has the axis of the pipeline before those of a stage, and `memory` is that
    of the rank that holds most.
    """

    request: Request
    graph: Graph
    mesh: Mesh
    decisions: Decisions
    paths: dict[tuple[str, Spec, Spec], tuple[PricedStep, ...]]
    work: dict[str, Work]
    seconds: float
    optimizer_s: float
    casts_s: float
    memory: Memory
    baselines: tuple[Baseline, ...]
    search: Search
    notes: tuple[str, ...] = field(default=())
    decode: PlanData | None = None
    recached: tuple[Recache, ...] = ()
    pipeline: Pipeline | None = None

    @property
    def answer_s(self) -> float:
        """Seconds of a whole answer in phase `serve`: prefill, the conversion of caches, and all
        output tokens."""
        if self.decode is None:
            raise ValueError(f"a plan for phase {self.request.phase} has no answers")
        tokens = self.request.decode_steps * self.decode.seconds
        return self.seconds + self.conversion_s + tokens

    @property
    def whole_s(self) -> float:
        """Seconds of a whole answer in phase `serve`, else of a step."""
        return self.seconds if self.decode is None else self.answer_s

    @property
    def conversion_s(self) -> float:
        """Seconds in which caches are converted once an answer: in a pipeline those of the stage
        that takes longest, of all micro-batches."""
        if self.pipeline is None:
            return sum(recache.seconds for recache in self.recached)
        return self.request.micro_batches * max(kind.conversion_s for kind in self.pipeline.kinds)

    @property
    def phases(self) -> tuple[PlanData, ...]:
        """This plan, and in phase `serve` that of decode."""
        return (self,) if self.decode is None else (self, self.decode)

    @property
    def training(self) -> bool:
        """Is this a plan for training steps?"""
        return find_phase(self.request.phase).backward

    @property
    def serves_in_stages(self) -> bool:
        """Is this a pipeline for inference?"""
        return self.pipeline is not None and not self.training

    @property
    def may_recompute(self) -> bool:
        """Is memory so short that recomputing layers may have helped?"""
        limit = self.request.memory_bytes
        return self.training and self.memory.total > SHORT_OF_MEMORY * limit

    @property
    def spent(self) -> Spent:
        """What the seconds of a step go into, but for conversions and the optimizer."""
        times = self.request.micro_batches
        return spent_in_ops(self.graph, self.work, self.decisions, times=times)

    @cached_property
    def program(self) -> Program:
        """The statements that one rank runs.  Raises PlanError for a conversion without steps."""
        if self.pipeline is not None:
            raise PlanError("a pipeline has a program for each of its stages, and none of its own")

        def paths(value: Value, a: Spec, b: Spec) -> tuple[PricedStep, ...]:
            if (value.name, a, b) not in self.paths:
                way = f"{format_spec(a)} to {format_spec(b)}"
                raise PlanError(f"the plan has no conversion of `{value.name}` from {way}")
            return self.paths[value.name, a, b]

        return lower(
            self.graph,
            self.decisions,
            paths,
            training=self.training,
            micro_batches=self.request.micro_batches,
            reduced=DTYPES.get(self.request.reduce_dtype),
        )
