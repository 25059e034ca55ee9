"""Plans of published models with experts: what is chosen, and what the usual deployments cost.

All prices are of one cost model, each the optimum within a restriction; `pytest -s` prints them.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf, prod
from pathlib import Path
from typing import Any

import pytest

from shardwright.api import plan_file
from shardwright.capturing import phase_graph
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.ir.graph import Graph
from shardwright.ir.ops.moe import usual_imbalance
from shardwright.ir.ops.registry import operator_of, rule_of
from shardwright.ir.passes.latent import absorbed, expanded
from shardwright.ir.passes.unfuse import unfuse
from shardwright.loading import load_target
from shardwright.planner.ilp.problem import evaluate
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.split import spent_in_ops
from shardwright.planner.strategies.build import Builder, Decisions
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.regions import Region, Strategy, scopes
from shardwright.planner.strategies.roles import Roles
from shardwright.planner.strategies.setting import Restriction, Setting
from tests.sharded import mesh_of

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SEQ = 4096


@cache
def graph_of(name: str | Path, batch: int, phase: str = "train") -> Graph:
    """The folded graph of a model of full size; no weight is allocated.

    `name` of a config in `examples`, or the path of another.  SEQ tokens of each sequence; in
    decoding one new token after as many.
    """
    target, decode = str(CONFIGS / name), phase == "decode"
    seq = 1 if decode else SEQ
    loaded = load_target(target, batch=batch, seq=seq, phase=phase, formats="bfloat16")
    return phase_graph(loaded, phase, SEQ if decode else 0)


def changed(name: str, folder: Path, **fields: Any) -> Path:
    """A copy of the config `name` in `folder`, with other `fields`."""
    config = json.loads((CONFIGS / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


class Sent(Restriction):
    """Expert parallelism without cutting experts: tokens go to their experts on some axis."""

    def allows(self, region: Region, strategy: Strategy) -> bool:
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            if operator_of(node).experts:
                ways = rule_of(node).algorithms
                if not any(c in ways for c in choices) or any(c in ("f", "o") for c in choices):
                    return False
        return True


@dataclass(frozen=True)
class Priced:
    """The optimum of one restriction; infinite seconds where nothing fits the memory."""

    seconds: float
    graph: Graph
    decisions: Decisions | None
    spent: tuple[tuple[str, float], ...] = ()

    def experts(self) -> set[tuple[str, ...]]:
        """How the layers of experts run."""
        assert self.decisions is not None
        nodes = [node for scope in scopes(self.graph) for node in scope.nodes]
        return {self.decisions.choices[n.name] for n in nodes if operator_of(n).experts}


def best(
    graph: Graph,
    mesh: Mesh,
    cluster: str,
    within: Callable[[Graph], Restriction],
    *,
    training: bool = True,
    imbalance: float = 0.0,
) -> Priced:
    """The cheapest plan within a restriction, gate and up whole or in parts, layers recomputed
    or not."""
    network = Network(mesh, load_cluster(cluster, gpus=prod(mesh.sizes)))
    found = Priced(inf, graph, None)
    for variant in (graph, unfuse(graph)) if training else (graph,):
        for recompute in (False, True) if training else (False,):
            setting = Setting(
                training, "adamw" if training else "none", network.cluster.memory_bytes,
                recompute, expert_imbalance=imbalance,
            )  # fmt: skip
            builder = Builder(variant, network, setting)
            built = builder.build(within(variant))
            problem = built.problem()
            assignment = solve(problem, solver="highs", time_limit_s=60.0).assignment
            if assignment is not None:
                seconds = evaluate(problem, assignment).cost
                if seconds < found.seconds:
                    found = _priced(builder, built.read(assignment), seconds)
    return found


def _priced(builder: Builder, decisions: Decisions, seconds: float) -> Priced:
    nodes = [node for scope in scopes(builder.graph) for node in scope.nodes]
    work = {node.name: builder.work(node, decisions.choices[node.name]) for node in nodes}
    spent = spent_in_ops(builder.graph, work, decisions).rows(seconds, 0.0, 0.0)
    return Priced(seconds, builder.graph, decisions, spent)


def freely(graph: Graph) -> Restriction:
    return Restriction()


def sent(graph: Graph) -> Restriction:
    return Sent()


def megatron(mesh: Mesh) -> Callable[[Graph], Restriction]:
    """Tensor parallelism on the innermost axis, parameters of data-parallel ranks sharded."""
    roles = ("fsdp", "tp+sp")[-len(mesh.axes) :]
    return lambda graph: Roles(roles, graph, mesh)


# ---- training on H100s -------------------------------------------------------------------------


@pytest.mark.slow
def test_small_experts_are_chosen_to_stay_whole(tmp_path: Path) -> None:
    """Four layers of Qwen3-30B-A3B on one node: 16 experts on each GPU, which tokens go to."""
    folder = changed("qwen3-30b-a3b", tmp_path, num_hidden_layers=4)
    plan = plan_file(
        str(folder), gpus=8, cluster="h100", phase="train", batch=8, seq=SEQ, dtype="bfloat16",
        memory_bytes=40_000_000_000, mesh="8", pins=(), optimizer="adamw", solver="highs",
        time_limit_s=60.0,
    )  # fmt: skip
    assert "expert, EP with all-to-all" in str(plan)
    others = {row.name: row.seconds for row in plan.baselines}
    assert others["FSDP"] is not None and plan.seconds < 0.7 * others["FSDP"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8,), (8, 8)], ids=str)
def test_qwen_on_h100s(sizes: tuple[int, ...]) -> None:
    """128 experts: sending tokens to them is far ahead of TP4, and what is chosen.  TP8 would cut
    the four heads of keys."""
    mesh, graph = mesh_of(*sizes), graph_of("qwen3-30b-a3b", prod(sizes))
    chosen, ep = best(graph, mesh, "h100", freely), best(graph, mesh, "h100", sent)
    narrow = mesh_of(prod(sizes) // 4, 4)
    tp = best(graph, narrow, "h100", megatron(narrow))
    print(f"\nQwen3-30B-A3B on {sizes}: {chosen.seconds=} {ep.seconds=} {tp.seconds=}")
    print(chosen.experts())
    assert chosen.seconds == pytest.approx(ep.seconds, rel=1e-6)
    assert ep.seconds < (0.6 if sizes == (8,) else 0.85) * tp.seconds


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8,), (8, 8)], ids=str)
def test_mixtral_on_h100s(sizes: tuple[int, ...]) -> None:
    """Eight experts: sending tokens beats TP8 by far on eight nodes, and on one node too unless
    the router is as uneven as a power law, when the hidden units of experts are cut."""
    mesh, graph = mesh_of(*sizes), graph_of("mixtral-8x7b", prod(sizes))
    tp = best(graph, mesh, "h100", megatron(mesh))
    for imbalance in (1.0, 1.25, 0.0):
        chosen = best(graph, mesh, "h100", freely, imbalance=imbalance)
        ep = best(graph, mesh, "h100", sent, imbalance=imbalance)
        print(f"\nMixtral-8x7B on {sizes}, {imbalance=}:")
        print(f"{chosen.seconds=} {ep.seconds=} {tp.seconds=}")
        print(chosen.experts())
        if sizes == (8,) and not imbalance:
            assert chosen.experts() == {("f",)}
            assert chosen.seconds <= tp.seconds < ep.seconds
        elif not imbalance:  # experts over fewer ranks, whose weights come behind computing
            assert chosen.seconds < ep.seconds < 0.9 * tp.seconds
        else:
            assert chosen.seconds == pytest.approx(ep.seconds, rel=1e-6)
            assert ep.seconds < (0.96 if sizes == (8,) else 0.85) * tp.seconds


def whole_with_experts(mesh: Mesh) -> Callable[[Graph], Restriction]:
    """Data parallelism with sharded parameters and no TP; experts over the innermost axis."""
    roles = ("fsdp",) * (len(mesh.axes) - 1) + ("fsdp+ep",)
    return lambda graph: Roles(roles, graph, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("imbalance", [1.0, 1.25, 0.0])
def test_deepseek_on_2048_h800s(imbalance: float) -> None:
    """EP64 without TP, as it was trained (there with a pipeline besides), is ahead of TP8, however
    uneven the router; what is chosen sends tokens to experts and cuts none."""
    graph = graph_of("deepseek-v3", 2048)
    wide, nodes = mesh_of(32, 64), mesh_of(256, 8)
    chosen = best(graph, wide, "h800", freely, imbalance=imbalance)
    ep = best(graph, wide, "h800", whole_with_experts(wide), imbalance=imbalance)
    tp = best(graph, nodes, "h800", megatron(nodes), imbalance=imbalance)
    print(f"\nDeepSeek-V3 on 2048 H800, {imbalance=}: chosen {chosen.seconds:.2f} s, EP64")
    print(f"without TP {ep.seconds:.2f} s, FSDP x TP8 {tp.seconds:.2f} s; {chosen.experts()}")
    assert chosen.seconds <= ep.seconds < 0.95 * tp.seconds
    assert all(any(c.startswith("dispatch") for c in way) for way in chosen.experts())
    assert all(c not in ("f", "o") for way in chosen.experts() for c in way)


# ---- DeepSeek-V3 in inference on H800s ---------------------------------------------------------


@dataclass(frozen=True)
class Published(Restriction):
    """As deployed: attention cut over batch and heads (SP is left open), experts over all ranks.

    `heads` is the factor of attention that has them: key heads, or the query heads of latents.
    """

    heads: str

    def allows(self, region: Region, strategy: Strategy) -> bool:
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            operator = operator_of(node)
            if operator.attends and choices != ("b", self.heads):
                return False
            if operator.experts and choices != ("dispatch_i0", "dispatch_i0"):
                return False
        return True


@pytest.mark.slow
@pytest.mark.parametrize("imbalance", [1.0, 0.0])
def test_prefill_of_deepseek_on_32_h800s(imbalance: float) -> None:
    """No dearer than the deployment (arXiv:2412.19437, 3.4.1): attention TP4 with SP and DP8, EP32.

    Experts are cut over 16 ranks, and their weights gathered over two, where the deployment has
    them over all 32: since gathers pass behind computing that is cheaper with balanced experts, too
    (the deployment keeps copies of popular ones).
    """
    plan = plan_file(
        str(CONFIGS / "deepseek-v3"), gpus=32, cluster="h800", phase="prefill", batch=32, seq=SEQ,
        dtype="bfloat16", memory_bytes=None, mesh=None, pins=(), optimizer="none",
        solver="highs", time_limit_s=20.0, expert_imbalance=imbalance or None,
    )  # fmt: skip
    graph = expanded(graph_of("deepseek-v3", 32, "prefill"))
    ours = best(graph, plan.mesh, "h800", freely, training=False, imbalance=imbalance)
    theirs = best(
        graph, mesh_of(8, 4), "h800", lambda graph: Published("g"), training=False,
        imbalance=imbalance,
    )  # fmt: skip
    print(f"\nDeepSeek-V3 {imbalance=}: {plan.mesh} {ours.experts()} {theirs.experts()}")
    for name, priced in (("ours", ours), ("as deployed", theirs)):
        parts = ", ".join(f"{what} {s * 1e3:.0f}" for what, s in priced.spent)
        print(f"{name}: {priced.seconds * 1e3:.0f} ms: {parts}")
    # balanced, all meshes are within 1 % of each other, and not all are solved to their end
    assert plan.search.status == "optimal" or imbalance == 1.0
    assert any(
        note.startswith("Attention reads keys and values made from latents") for note in plan.notes
    )
    # the search keeps the fastest of the plans that the problem finds; `best` takes the cheapest
    assert 0.995 * ours.seconds <= plan.seconds <= ours.seconds * (1 + 1e-6)
    assert ours.seconds <= theirs.seconds
    assert not any(c.startswith("dispatch") for way in ours.experts() for c in way)
    assert all(any(c.startswith("dispatch") for c in way) for way in theirs.experts())


@pytest.mark.slow
def test_decode_of_deepseek_on_256_h800s() -> None:
    """Attention TP4 with DP64 and one expert on each of 256 ranks is chosen freely.

    The deployment has 320 ranks: 64 hold copies of popular experts, which are not planned here.
    """
    mesh, graph = mesh_of(64, 4), graph_of("deepseek-v3", 512, "decode")
    ours = best(graph, mesh, "h800", freely, training=False)
    print(f"\nDeepSeek-V3, decode: {ours.seconds=} {ours.experts()}")
    assert ours.experts() == {("dispatch_i0", "dispatch_i0")}
    assert ours.decisions is not None
    nodes = [node for scope in scopes(graph) for node in scope.nodes]
    attention = {ours.decisions.choices[n.name] for n in nodes if operator_of(n).attends}
    assert attention == {("b", "n")}


def load_with_copies(experts: int, copies: int) -> float:
    """Load of the busiest of `experts + copies` ranks, each with one expert, over the mean.

    Popularity is that of `usual_imbalance`; copies go one by one to the expert whose copies have
    the most to do, and share its tokens equally, which is the best that copies can do.
    """
    total = sum((i + 1) ** -0.5 for i in range(experts))
    heap = [(-((i + 1) ** -0.5) / total, 1, (i + 1) ** -0.5 / total) for i in range(experts)]
    heapq.heapify(heap)
    for _ in range(copies):
        _, count, share = heapq.heappop(heap)
        heapq.heappush(heap, (-share / (count + 1), count + 1, share))
    return -heap[0][0] * (experts + copies)


def test_copies_lower_the_load() -> None:
    """One copy halves the load of the most popular expert at best."""
    assert load_with_copies(2, 0) == pytest.approx(2 / (1 + 2**-0.5))
    assert load_with_copies(2, 1) == pytest.approx(3 * 2**-0.5 / (1 + 2**-0.5))
    assert 1.0 < load_with_copies(256, 64) < usual_imbalance(256, 64)


BATCH_320 = 32 * 320  # 256 rows for each expert of 320, as the technical report has it at most


@pytest.mark.slow
def test_decode_of_deepseek_on_320_h800s(tmp_path: Path) -> None:
    """No dearer than the deployment, under the same prices.

    The deployment (arXiv:2412.19437, 3.4.2) has attention TP4 with SP and DP80, and one expert on
    each of 320 ranks, 64 of them copies.  There are no copies here, and 320 ranks do not divide 256
    experts, so that experts go over 64 ranks, with five sets of them.  The deployment is priced
    as a model of 320 experts: balanced, and with the load that copies leave of a power law.
    """
    plan = plan_file(
        str(CONFIGS / "deepseek-v3"), gpus=320, cluster="h800", phase="decode", batch=BATCH_320,
        seq=1, context=SEQ, dtype="bfloat16", memory_bytes=None, mesh=None, pins=(),
        optimizer="none", solver="highs", time_limit_s=60.0,
    )  # fmt: skip
    print(f"\n{str(plan).split('outside the')[0]}")
    assert plan.search.status == "optimal"
    assert any("Attention reads latents" in note for note in plan.notes)
    experts = {plan.decisions.choices[n.name] for n in plan.graph.nodes if operator_of(n).experts}
    assert experts == {("i0", "dispatch_i0", "dispatch_i0")}
    assert plan.mesh.sizes[0] == 5

    ours = absorbed(graph_of("deepseek-v3", BATCH_320, "decode"))
    folder = changed("deepseek-v3", tmp_path, n_routed_experts=320)
    theirs = absorbed(graph_of(folder, BATCH_320, "decode"))
    copied = load_with_copies(256, 64)
    for our_load, their_load in ((1.0, 1.0), (0.0, copied)):
        print(
            f"\nload of the busiest rank: ours {our_load or 'power law'}, theirs {their_load:.2f}"
        )
        own = best(ours, plan.mesh, "h800", freely, training=False, imbalance=our_load)
        deployed = best(
            theirs, mesh_of(80, 4), "h800", lambda graph: Published("g"), training=False,
            imbalance=their_load,
        )  # fmt: skip
        for name, priced in (("ours", own), ("as deployed", deployed)):
            parts = ", ".join(f"{what} {s * 1e3:.2f}" for what, s in priced.spent)
            print(f"{name}: {priced.seconds * 1e3:.2f} ms: {parts}")
        assert own.seconds <= deployed.seconds
        parts, others = dict(own.spent), dict(deployed.spent)
        # each GPU reads the cache of its own sequences, not of those that four GPUs share
        assert parts["attention"] < 0.5 * others["attention"]
        # but four experts' weights instead of one's
        assert parts["experts"] > others["experts"]
