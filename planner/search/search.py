"""From a graph to the best plan: try meshes, solve each, price the ordinary plans beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf, isfinite
from typing import Generic, Protocol, TypeVar

from ...costmodel.machines.cluster import Cluster
from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...ir.graph import Graph
from ...ir.graph.remember import once_for_each
from ...ir.graph.schema import DTYPES
from ...ir.ops.order import token_dims
from ...ir.ops.registry import operator_of
from ...ir.passes.unfuse import unfuse
from ..errors import LayoutError, PlanError
from ..ilp.problem import ShardingProblem
from ..ilp.solve import Solution, solve
from ..plan.decide import Solved, decide, plan_of, spent
from ..plan.plan import SHORT_OF_MEMORY, Baseline, PlanData, Request, Search
from ..strategies.build import Builder, Built
from ..strategies.layout import Layout
from ..strategies.network import Network
from ..strategies.prices import network_for
from ..strategies.regions import Recomputed, scopes
from ..strategies.roles import Roles, cuts_weights, name_of, ordinary_roles
from ..strategies.setting import OfNodes, Restriction, Setting
from .partly import in_layers

Progress = Callable[[str], None]
Limit = Callable[[Graph, Mesh], Restriction]


@dataclass(slots=True)
class Clock:
    """Seconds spent in each planning step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        """Add the time of the `with` block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(slots=True)
class Builders:
    """The builders of a search: each is made once, for the search and for the ordinary plans."""

    networks: dict[tuple[Mesh, Cluster], Network] = field(
        default_factory=dict[tuple[Mesh, Cluster], Network]
    )
    made: dict[tuple[int, Mesh, OfNodes], Builder] = field(
        default_factory=dict[tuple[int, Mesh, OfNodes], Builder]
    )

    def for_others(self) -> Builders:
        """For other graphs on the same machine, which keep none of these."""
        return Builders(self.networks)


@dataclass(frozen=True, slots=True)
class Job:
    """A request, and how its plan is searched for.

    `mesh` is None where all candidates are tried; `limit` says what may be chosen in a graph, also
    by the `layout` that was asked for, if one was.  `baselines`: ordinary plans are priced, too.
    `known_s`: seconds of a plan that is known; what is not faster, and what recomputes layers, is
    not looked for.
    """

    cluster: Cluster
    request: Request
    mesh: Mesh | None
    limit: Limit
    solver: str
    time_limit_s: float
    clock: Clock
    progress: Progress
    layout: Layout | None = None
    baselines: bool = True
    known_s: float = inf
    builders: Builders = field(default_factory=Builders)

    @property
    def setting(self) -> Setting:
        """What the problem builder needs to know of the request."""
        return setting_of(self.request)

    def settings(self, graph: Graph) -> tuple[Setting, ...]:
        """Those to try, the later only where memory is short: layers kept, layers recomputed."""
        asked = None if self.layout is None else self.layout.recomputed(graph)
        if asked is None:
            return self.setting, replace(self.setting, recompute=True)
        how = {"recompute": asked.any, "kept_layers": asked.kept, "part_layers": asked.part}
        return (replace(self.setting, **how),)

    def check(self, graph: Graph) -> None:
        """Raises LayoutError where a layout cannot be that of the graph, whatever the sizes."""
        if self.layout is not None and cuts_weights(self.layout.roles) and is_fused(graph):
            raise LayoutError(f"--layout {self.layout.text}: {_FUSED}")

    @property
    def meshes(self) -> list[Mesh]:
        """The meshes to try."""
        if self.mesh is not None:
            return [self.mesh]
        return candidate_meshes(self.request.gpus, self.cluster)

    def builder(self, graph: Graph, mesh: Mesh, setting: Setting) -> Builder:
        """What builds the problems of a graph on a mesh."""
        made, networks = self.builders.made, self.builders.networks
        key = (id(graph), mesh, setting.of_nodes)  # the builder holds the graph: it stays the same
        if key not in made:
            network = network_for(graph, mesh, self.cluster)
            network = networks.setdefault((mesh, network.cluster), network)
            made[key] = Builder(graph, network, setting)
        return made[key].under(setting)

    def saying(self, way: str) -> Job:
        """The same, with `way` said after each step."""
        progress = self.progress
        return replace(self, progress=lambda step: progress(step + way))

    def solution(self, problem: ShardingProblem, mesh: Mesh, ceiling: float = inf) -> Solution:
        """The optimum of one problem, unless it is known to take `ceiling` seconds or more.

        Raises PlanError where the time was too short to find out.
        """
        with self.clock.step("solve"):
            solution = solve(
                problem, solver=self.solver, time_limit_s=self.time_limit_s, ceiling=ceiling
            )
        if solution.status == "unknown":
            raise PlanError(
                f"the solver found no plan on {mesh} within {self.time_limit_s:.0f} s; give it "
                "more with --time-limit, or a smaller mesh with --mesh"
            )
        return solution


_FUSED = "fused projections are whole here, and an axis does not cut them by heads"


def is_fused(graph: Graph) -> bool:
    """Has the graph projections that could be in parts?"""
    return unfuse(graph) is not graph


class Timed(Protocol):
    """A plan, or what one is made of."""

    @property
    def cost(self) -> float:
        """What it takes, as problems count it."""
        ...

    @property
    def seconds(self) -> float:
        """What it takes."""
        ...


Found = TypeVar("Found", bound=Timed)


def search_meshes(graph: Graph, job: Job, rival: Solved | None = None) -> Searched[Solved]:
    """The cheapest plan over all the job's meshes, if any is cheaper than the rival.

    A rival that recomputes some layers is compared with the same: all recomputed, a plan may be
    slower, and still the better one to start from.
    """
    job.check(graph)
    searched = Searched[Solved].against(rival)
    searched.ceiling = min(searched.ceiling, job.known_s)
    searched.fastest = min(searched.fastest, job.known_s)
    partly = rival is not None and _is_mixed(rival.builder.setting)
    again = Searched[Solved]() if partly else searched
    for n, setting in enumerate(job.settings(graph)):
        if n and (isfinite(job.known_s) or not _short_of_memory(searched.best or rival, setting)):
            break
        mine = again if setting.recompute else searched
        for mesh in job.meshes:
            for order in token_orders(graph, mesh):
                one = replace(setting, order=order)
                built = _built(graph, mesh, one, job, job.limit, mine.ceiling)
                mine.add(*_solve(built, job, mine.ceiling))
    _keep_some(graph, job, job.limit, again)
    if partly:
        searched.join(again)
    return searched


def _is_mixed(setting: Setting) -> bool:
    """Are not all layers recomputed whole, nor all kept?"""
    return setting.kept_layers > 0 or setting.part_layers > 0


def _keep_some(graph: Graph, job: Job, limit: Limit, searched: Searched[Solved]) -> None:
    """Where memory has room for what some layers keep, recompute only the others: on the mesh of
    the best plan so far.

    Where it has room for the part that selective layers keep, all are so but for as many last ones
    as fit; else as many last ones are.  Where a part does not pay, the last ones keep all.
    What these problems prove is of their mesh, order of tokens and number of layers alone.
    """
    best, layers = searched.best, max((len(loop.order) for loop in graph.loops), default=0)
    if best is None or not layers or len(job.settings(graph)) == 1 or isfinite(job.known_s):
        return
    mesh, setting = best.builder.network.mesh, best.builder.setting
    if not _short_of_memory(best, setting):
        return

    @cache
    def built(kept: int, part: int) -> Built:
        how = {"recompute": True, "kept_layers": kept, "part_layers": part}
        return _built(graph, mesh, replace(setting, **how), job, limit)

    def faster(between: Built) -> bool:
        found, solution = _solve(between, job, searched.ceiling)
        searched.proven &= solution.status != "feasible"
        if found is None or found.seconds >= searched.fastest:
            return False
        searched.take(found)
        searched.least = min(searched.least, solution.bound)
        return True

    pays = in_layers(best).part_pays
    try:
        if pays and faster(built(0, layers)):
            _find_most(searched, layers, lambda n: built(n, layers - n), faster)
        elif setting.recompute:
            _find_most(searched, layers, lambda n: built(0, n) if pays else built(n, 0), faster)
    except PlanError:  # the time is up; there is a plan
        searched.proven = False


def _find_most(
    searched: Searched[Solved],
    layers: int,
    built: Callable[[int], Built],
    faster: Callable[[Built], bool],
) -> None:
    """Take the plan in which the most last layers keep more than in the best one, but not all do.

    The number is the largest for which memory may do, else one for which the plan's own memory
    does if each layer takes what the last does, else found by halving.
    """
    best = searched.best
    assert best is not None

    def least(count: int) -> float:
        return built(count).least_memory()

    room = best.builder.setting.memory_bytes or 0.0
    fits, over = 0, 1 + most_kept(least, layers, room)
    layer = max(least(layers) - least(layers - 1), 1.0) if over > 1 else 1.0
    guess = int((room - best.peak_bytes) / layer)
    probes = [over - 1, guess, guess + 1]
    while over - fits > 1:
        count = probes.pop(0) if probes else (fits + over) // 2
        if fits < count < over:
            fits, over = (count, over) if faster(built(count)) else (fits, count)


_ROUNDING = 1e-6  # of a number of layers


def most_kept(least: Callable[[int], float], layers: int, room: float) -> int:
    """The most of some layers, but not all, with which `least` bytes do not exceed `room`; it
    grows with their number, the steeper the more there are.

    So the line through two numbers that are too many meets `room` at no fewer than those wanted.
    """
    above, kept = layers, layers - 1
    while kept > 0 and least(kept) > room:
        steps = (least(kept) - room) * (above - kept) / max(least(above) - least(kept), 1.0)
        above, kept = kept, max(0, min(kept - 1, int(kept - steps + _ROUNDING)))
    return max(0, kept)


@dataclass(slots=True)
class Searched(Generic[Found]):
    """What a search has found so far: each mesh needs a plan only if it beats those before it.

    Problems are solved for what they count, and of their optima the fastest is kept.
    """

    ceiling: float = inf  # cost of a problem's plan that is worth looking at
    fastest: float = inf  # seconds that a plan has to beat
    best: Found | None = None
    least: float = inf  # no plan costs less; inf where nothing fits the memory
    proven: bool = True  # every problem was solved to its end
    clash: str | None = None  # where choices do not go together; "": memory is what lacks somewhere

    @staticmethod
    def against(rival: Found | None) -> Searched[Found]:
        """A search for what beats `rival`."""
        if rival is None:
            return Searched()
        return Searched(max(rival.cost, rival.seconds), rival.seconds)

    def add(self, found: Found | None, solution: Solution) -> None:
        """The plan of one mesh, None where it has none, and the solver's answer."""
        self.least = min(self.least, solution.bound)
        self.proven &= solution.status != "feasible"
        if solution.status == "infeasible":
            self.clash = solution.clash if self.clash is None else self.clash and solution.clash
        if found is None:
            return
        # what a problem counts is a bound from below of the seconds of its plans
        self.ceiling = min(self.ceiling, max(found.cost, found.seconds))
        # equal ones differ by rounding: the first is kept
        if float(f"{found.seconds:.9e}") < float(f"{self.fastest:.9e}"):
            self.take(found)

    def join(self, other: Searched[Found]) -> None:
        """With what another search has found."""
        self.least = min(self.least, other.least)
        self.proven &= other.proven
        if other.best is not None and other.fastest < self.fastest:
            self.take(other.best)

    def take(self, found: Found) -> None:
        """The best so far."""
        self.best, self.fastest = found, found.seconds
        self.ceiling = min(self.ceiling, max(found.cost, found.seconds))


def _built(
    graph: Graph, mesh: Mesh, setting: Setting, job: Job, limit: Limit, ceiling: float = inf
) -> Built:
    layers = max((len(loop.order) for loop in graph.loops), default=0)
    again = f", layers {setting.recomputed.words(layers)}" if setting.recompute else ""
    order = ", tokens in zigzag order" if setting.order == "zigzag" else ""
    job.progress(f"solving {mesh}{again}{order}")
    with job.clock.step("problem"):
        return job.builder(graph, mesh, setting).build(limit(graph, mesh), ceiling)


def _short_of_memory(best: Solved | None, setting: Setting) -> bool:
    """May recomputing layers help?  It costs time and gives nothing but memory."""
    if not setting.training or setting.memory_bytes is None:
        return False
    if best is None or best.builder.setting.recompute:  # also a rival that fits no other way
        return True
    return best.peak_bytes > SHORT_OF_MEMORY * setting.memory_bytes


def token_orders(graph: Graph, mesh: Mesh) -> list[str]:
    """The orders of tokens worth trying on `mesh`.

    Zigzag balances causal attention and costs nothing, where the sequence divides; only a sliding
    window can be cheaper over contiguous tokens.
    """
    causal = [n for scope in scopes(graph) for n in scope.nodes if operator_of(n).causal(n)]
    uneven = any(node.operands[0].type.shape[2] % (2 * mesh.ranks) for node in causal)
    if uneven or not token_dims(graph):
        return ["contiguous"]
    windows = any(node.arg("window") for node in causal)
    return ["contiguous", "zigzag"] if windows else ["zigzag"]


def setting_of(request: Request) -> Setting:
    """What the problem builder needs to know of a request."""
    phase = find_phase(request.phase)
    return Setting(
        phase.backward,
        request.optimizer,
        request.memory_bytes,
        expert_imbalance=request.expert_imbalance,
        longest_run=request.seq if phase.answer else 0,
        whole_outputs=request.output_layout == "replicated",
        micro_batches=request.micro_batches,
        reduced=DTYPES.get(request.reduce_dtype),
    )


def candidate_meshes(gpus: int, cluster: Cluster) -> list[Mesh]:
    """Meshes worth trying: one to three axes, the inner ones within a node.

    The innermost axis is the one that talks most.  Across nodes there is one mesh of three axes: a
    node's GPUs inside, and up to eight nodes between them and the outermost axis.
    """
    node = min(cluster.gpus_per_node, gpus)
    shapes: list[tuple[int, ...]] = [(gpus,)]
    inner = [n for n in _divisors(node) if 1 < n < gpus and gpus % n == 0]
    shapes += [(gpus // n, n) for n in inner]
    if gpus <= node:
        shapes += [
            (gpus // (a * b), a, b)
            for b in inner
            for a in _divisors(gpus // b)
            if a > 1 and gpus // (a * b) > 1
        ]
    else:
        middle = [a for a in (8, 4, 2) if gpus % (a * node) == 0 and gpus > a * node]
        shapes += [(gpus // (a * node), a, node) for a in middle[:1]]
    names = {1: ("x",), 2: ("x", "y"), 3: ("x", "y", "z")}
    return [Mesh(tuple(zip(names[len(s)], s, strict=True))) for s in shapes]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _solve(built: Built, job: Job, ceiling: float = inf) -> tuple[Solved | None, Solution]:
    """The optimum of one problem, None if nothing fits its memory or is below the ceiling, and
    the solver's answer."""
    problem = built.problem()
    solution = job.solution(problem, built.builder.network.mesh, ceiling)
    if solution.assignment is None:
        return None, solution
    return decide(built, problem, solution.assignment, solution), solution


def fits_on(graph: Graph, mesh: Mesh, job: Job) -> bool:
    """Is there a plan on a mesh that fits the memory, its layers run again if they may be?"""
    setting = job.settings(graph)[-1]
    order = token_orders(graph, mesh)[0]
    built = _built(graph, mesh, replace(setting, order=order), job, job.limit)
    return job.solution(built.problem(), mesh).assignment is not None


def ordinary_plans(graph: Graph, best: Solved, job: Job) -> Ordinary[Solved]:
    """The ordinary plans of a graph, on meshes that were searched, the winner's among them."""
    aside = replace(job, clock=Clock(), progress=lambda _: None)

    def price(mesh: Mesh, limit: Limit) -> Price[Solved]:
        """As the plan itself is searched: layers are recomputed where memory is short."""
        searched, least = Searched[Solved](), inf
        for n, setting in enumerate(job.settings(graph)):
            if n and not _short_of_memory(searched.best, setting):
                break
            for order in token_orders(graph, mesh):
                built = _built(graph, mesh, replace(setting, order=order), aside, limit)
                searched.add(*_solve(built, aside))
                least = min(least, built.least_memory())
        _keep_some(graph, aside, limit, searched)
        if (solved := searched.best) is not None:
            how = solved.builder.setting.recomputed
            return Price(solved.peak_bytes, solved, spent(solved), how)
        if searched.clash:
            raise LayoutError(clash_at(searched.clash, [graph]))
        return Price(least)

    return price_ordinary(graph, job, best.builder.network.mesh, price)


def clash_at(name: str, graphs: Sequence[Graph]) -> str:
    """What is said where choices do not go together at a node of the problem of these graphs."""
    made = name.removeprefix("output ").partition(" -> ")[0]
    nodes = (node for graph in graphs for scope in scopes(graph) for node in scope.nodes)
    node = next((n for n in nodes if made in (n.name, *(out.name for out in n.outputs))), None)
    where = f"`{made}`" if node is None else f"{node.loc}, `{made}`"
    return f"{where} cannot be cut so that it goes with what is before and behind it"


@dataclass(frozen=True, slots=True)
class Price(Generic[Found]):
    """The cheapest plan within a limit, its peak bytes, what its seconds go into, and which layers
    it recomputes; where none fits, None and the least bytes that one would need."""

    peak_bytes: float
    found: Found | None = None
    spent: tuple[tuple[str, float], ...] = ()
    recomputed: Recomputed = Recomputed()


@dataclass(slots=True)
class Ordinary(Generic[Found]):
    """The rows of ordinary plans, and the fastest of these."""

    rows: list[Baseline] = field(default_factory=list[Baseline])
    fastest: Found | None = None

    def add(self, row: Baseline, found: Found | None) -> None:
        """A row, and its plan where it has one."""
        self.rows.append(row)
        if found is not None and (self.fastest is None or found.seconds < self.fastest.seconds):
            self.fastest = found


def price_ordinary(
    graph: Graph, job: Job, best: Mesh, price: Callable[[Mesh, Limit], Price[Found]]
) -> Ordinary[Found]:
    """The rows of the ordinary plans, on meshes that were searched, the winner's among them.

    There are none beside a layout that was asked for.
    """
    ordinary = Ordinary[Found]()
    if job.layout is not None or not job.baselines:
        return ordinary
    job.progress("pricing the ordinary plans")
    meshes = job.meshes
    with job.clock.step("baselines"):
        fused = is_fused(graph)
        for mesh in _baseline_meshes(meshes, best, job.cluster):
            searched = len(meshes) > 1 and len(mesh.axes) > 1  # pure plans: priced on one axis
            for roles in ordinary_roles(mesh, graph):
                if not (searched and len(set(roles)) == 1):
                    ordinary.add(*_baseline(graph, mesh, roles, price, fused))
    return ordinary


def _baseline(
    graph: Graph,
    mesh: Mesh,
    roles: Sequence[str],
    price: Callable[[Mesh, Limit], Price[Found]],
    fused: bool,
) -> tuple[Baseline, Found | None]:
    """The row of one ordinary plan, and the plan; where sizes do not allow it, the row says why."""
    name, size = name_of(roles, mesh), "x".join(map(str, mesh.sizes))
    try:
        if fused and cuts_weights(roles):
            raise LayoutError(_FUSED)

        @once_for_each
        def ordinary(graph: Graph) -> Roles:
            return Roles(roles, graph, mesh)

        whole = ordinary(graph).left_whole(graph)
        found = price(mesh, lambda graph, _: ordinary(graph))
    except LayoutError as error:
        return Baseline(name, size, None, 0.0, refused=str(error)), None
    seconds = None if found.found is None else found.found.seconds
    row = Baseline(
        name,
        size,
        seconds,
        found.peak_bytes,
        found.spent,
        found.recomputed.any,
        tuple(whole),
        kept_layers=found.recomputed.kept,
        part_layers=found.recomputed.part,
    )
    return row, found.found


def _baseline_meshes(meshes: Sequence[Mesh], best: Mesh, cluster: Cluster) -> list[Mesh]:
    """One axis, a node's GPUs as the inner axis (all or half of them), and the winner's own."""
    node = min(cluster.gpus_per_node, meshes[0].ranks)
    inner = (node, node // 2)
    return [
        mesh
        for mesh in meshes
        if len(mesh.axes) == 1 or (len(mesh.axes) == 2 and mesh.sizes[1] in inner) or mesh == best
    ]


def assemble(
    best: Solved, baselines: tuple[Baseline, ...], proven: bool, bound: float, job: Job
) -> PlanData:
    """The plan; it is optimal only if the problem of every mesh was solved to its end.

    The least that a problem counts is a bound: the gap is that of the plan's seconds to it.
    """
    gap = best.solution.gap if isfinite(best.solution.gap) else 0.0
    search = Search(
        job.solver,
        "optimal" if proven else "feasible",
        max(gap, 1 - bound / best.seconds) if best.seconds else gap,
        len(job.meshes),
        tuple(job.clock.seconds.items()),
    )
    return plan_of(best, job.request, search, baselines)


__all__ = [
    "Builders", "Clock", "Found", "Job", "Limit", "Ordinary", "Price", "Progress", "Searched",
    "assemble", "candidate_meshes", "clash_at", "fits_on", "most_kept", "ordinary_plans",
    "price_ordinary", "search_meshes", "setting_of",
]  # fmt: skip
