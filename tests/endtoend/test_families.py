"""Every model family on gloo ranks equals one process: outputs, all gradients, bytes moved."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from shardwright.ir.ops.registry import operator_of, rule_of
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.program import Convert, LoopCall
from shardwright.planner.plan.traffic import predicted_bytes
from shardwright.planner.strategies.build import Builder, Decisions
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.roles import Roles
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool
from tests.endtoend.families import FAMILIES, Case, case, case32, fused_case
from tests.sharded import builder_of, check, mesh_of, program_of, random_decisions

Pool = Callable[[int], RankPool]
MESHES = ((2,), (4,), (2, 2), (2, 2, 2))

# Each family on one mesh; the slow tests run the rest, and the three whose problems take longest.
ROTATED = [  # on three axes T5, whose biases are learned, takes half a minute
    (name, (2, 2) if name == "t5" else MESHES[i % len(MESHES)])
    for i, name in enumerate(FAMILIES)
    if name not in ("gemma3", "mistral", "olmo2")
]
OTHERS = [(name, sizes) for name in FAMILIES for sizes in MESHES if (name, sizes) not in ROTATED]
ROLES = (
    (("ddp",), (2,)), (("fsdp",), (2,)), (("tp",), (2,)), (("cp",), (4,)),
    (("ddp", "tp"), (2, 2)), (("fsdp", "tp"), (2, 2)), (("fsdp", "cp"), (2, 2)),
    (("fsdp", "cp", "tp"), (2, 2, 2)),
)  # fmt: skip


@cache
def builder(name: str, sizes: tuple[int, ...], kind: str = "train") -> Builder:
    """The problem builder of a family on a mesh.

    `kind` is train, recompute, zigzag, eval or float32.
    """
    graph = case32(name).graph if kind == "float32" else case(name, kind != "eval").graph
    order = "zigzag" if kind == "zigzag" else "contiguous"
    recompute = kind == "recompute"
    return builder_of(
        graph, mesh_of(*sizes), training=kind != "eval", recompute=recompute, order=order
    )


class Parallel(Restriction):
    """Every matrix product and attention is cut on every axis: tiny models else run replicated."""

    def allows(self, region: Region, strategy: Strategy) -> bool:
        spent = {operator_of(node).spent_on for node in region.nodes}
        heavy = spent & {"matrix products", "attention"}
        return not heavy or not {"R", "V"} & {c for cs in strategy.choices for c in cs}


def planned(made: Builder, restriction: Restriction | None = None) -> Decisions:
    """The optimum under a restriction."""
    built = made.build(restriction or Restriction())
    solution = solve(built.problem(), solver="highs", time_limit_s=240.0)
    assert solution.status == "optimal" and solution.assignment is not None
    return built.read(solution.assignment)


def run(pool: Pool, made: Builder, decisions: Decisions, of: Case, tolerance: float = 1e-9) -> None:
    ranks = pool(made.network.mesh.ranks)
    check(ranks, made, decisions, of.params, of.inputs, of.expected, tolerance=tolerance)


def ids(value: object) -> str:
    """`2x2` for a mesh, `fsdp-tp` for roles."""
    if not isinstance(value, tuple):
        return str(value)
    return ("x" if isinstance(value[0], int) else "-").join(map(str, value))


@pytest.mark.parametrize(("name", "sizes"), ROTATED, ids=ids)
@pytest.mark.some(2)
def test_the_optimal_parallel_plan(pool: Pool, name: str, sizes: tuple[int, ...]) -> None:
    made = builder(name, sizes)
    run(pool, made, planned(made, Parallel()), case(name))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), OTHERS, ids=ids)
def test_the_optimal_parallel_plan_on_all_meshes(
    pool: Pool, name: str, sizes: tuple[int, ...]
) -> None:
    made = builder(name, sizes)
    run(pool, made, planned(made, Parallel()), case(name))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.some(6)
def test_random_decisions(pool: Pool, name: str, seed: int) -> None:
    made = builder(name, (2, 2))
    run(pool, made, random_decisions(made, seed), case(name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("sizes", MESHES, ids=ids)
@pytest.mark.parametrize("name", FAMILIES)
def test_random_decisions_on_all_meshes(
    pool: Pool, name: str, sizes: tuple[int, ...], seed: int
) -> None:
    made = builder(name, sizes)
    run(pool, made, random_decisions(made, seed), case(name))


class SplitGroups(Restriction):
    """Key heads over the outer axis, the query heads of each over the inner one."""

    def allows(self, region: Region, strategy: Strategy) -> bool:
        pairs = zip(region.nodes, strategy.choices, strict=True)
        return all(cs == ("n", "g") for node, cs in pairs if operator_of(node).attends)


def test_more_ranks_than_key_heads(pool: Pool) -> None:
    made = builder("llama", (2, 2))
    decisions = planned(made, SplitGroups())
    nodes = [node for node in made.graph.nodes if operator_of(node).attends]
    assert nodes and {decisions.choices[node.name] for node in nodes} == {("n", "g")}
    run(pool, made, decisions, case("llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder_decoder"])
@pytest.mark.parametrize(("roles", "sizes"), ROLES, ids=ids)
@pytest.mark.some(8)
def test_each_parallelism(
    pool: Pool, name: str, roles: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    made = builder(name, sizes)
    decisions = planned(made, Roles(roles, made.graph, made.network.mesh))
    assert_attention_is_cut(made, decisions, roles)
    run(pool, made, decisions, case(name))


def assert_attention_is_cut(made: Builder, decisions: Decisions, roles: tuple[str, ...]) -> None:
    """Attention takes part in every axis in the way of its role."""
    ways = {
        "ddp": ("b",),
        "fsdp": ("b",),
        "cp": ("q", "ring", "gather", "window"),
        "tp": ("n",),
    }
    nodes = [n for region in made.regions for n in region.nodes if operator_of(n).attends]
    assert nodes
    for node in nodes:
        for role, choice in zip(roles, decisions.choices[node.name], strict=True):
            assert choice in ways[role], node


class Algorithms(Restriction):
    """Every self-attention runs one algorithm over the last axis, and is cut over the others."""

    def __init__(self, name: str) -> None:
        self.name = name

    def allows(self, region: Region, strategy: Strategy) -> bool:
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            if operator_of(node).attends and self.name in rule_of(node).algorithms:
                if choices[-1] != self.name or {"R", "V"} & set(choices[:-1]):
                    return False
        return True


ALGORITHMS = [
    ("ring", "train"), ("ring", "zigzag"), ("gather", "train"), ("gather", "zigzag"),
    ("ulysses", "train"), ("ulysses", "zigzag"), ("window", "train"), ("ring", "recompute"),
    ("gather", "eval"),
]  # fmt: skip


@pytest.mark.parametrize("sizes", [(2,), (2, 2)], ids=ids)
@pytest.mark.parametrize(("algorithm", "kind"), ALGORITHMS)
@pytest.mark.some(6)
def test_attention_over_a_sharded_sequence(
    pool: Pool, algorithm: str, kind: str, sizes: tuple[int, ...]
) -> None:
    """Mistral has windows and grouped heads."""
    made = builder("mistral", sizes, kind)
    decisions = planned(made, Algorithms(algorithm))
    used = {choices[-1] for choices in decisions.choices.values()}
    assert algorithm in used and decisions.order == made.setting.order
    run(pool, made, decisions, case("mistral", training=kind != "eval"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt_neox", "encoder_decoder"])
@pytest.mark.some(1)
def test_random_decisions_in_zigzag_order(pool: Pool, name: str) -> None:
    made = builder(name, (2, 2), "zigzag")
    for seed in (0, 1):
        run(pool, made, random_decisions(made, seed), case(name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.some(4)
def test_float32_equals_the_original_model(pool: Pool, name: str) -> None:
    """Against the model itself, not its graph."""
    made = builder(name, (2, 2), "float32")
    run(pool, made, random_decisions(made, 3), case32(name), tolerance=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert", "encoder_decoder"])
@pytest.mark.some(2)
def test_prefill(pool: Pool, name: str) -> None:
    made = builder(name, (2, 2), "eval")
    for decisions in (planned(made, Parallel()), random_decisions(made, 5)):
        run(pool, made, decisions, case(name, training=False))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "encoder_decoder"])
@pytest.mark.some(1)
def test_recomputed_layers(pool: Pool, name: str) -> None:
    made = builder(name, (2, 2), "recompute")
    for decisions in (planned(made, Parallel()), random_decisions(made, 7)):
        run(pool, made, decisions, case(name))


@pytest.mark.parametrize(("name", "sizes"), [("gpt", (2,)), ("gpt2", (4,)), ("phi3", (2, 2))])
@pytest.mark.some(1)
def test_fused_projections_whole(pool: Pool, name: str, sizes: tuple[int, ...]) -> None:
    """What the tests above run in parts, as the original has it."""
    of = fused_case(name)
    made = builder_of(of.graph, mesh_of(*sizes))
    for decisions in (planned(made, Parallel()), random_decisions(made, 0)):
        run(pool, made, decisions, of)


class Column(Roles):
    """Tensor parallelism in which every matrix product and attention takes part."""

    def allows(self, region: Region, strategy: Strategy) -> bool:
        return Parallel().allows(region, strategy) and super().allows(region, strategy)


@pytest.mark.parametrize(("name", "ranks"), [("gpt", 2), ("gpt2", 4), ("phi3", 2)])
def test_fused_projections_are_cut_by_heads(pool: Pool, name: str, ranks: int) -> None:
    """q, k and v by columns, attention by heads; nothing moves between them."""
    made = builder(name, (ranks,))
    decisions = planned(made, Column(["tp"], made.graph, made.network.mesh))
    block = made.graph.loops[0].blocks[0]
    parts = {param.value.name for param in block.params if param.part is not None}
    products = [n for n in block.nodes if any(v.name in parts for v in n.operands)]
    assert len(products) == (5 if name == "phi3" else 3)
    assert {decisions.choices[node.name] for node in products} == {("o",)}
    (attention,) = (node for node in block.nodes if operator_of(node).attends)
    assert decisions.choices[attention.name] == ("n",)
    program = program_of(made, decisions)
    moved = predicted_bytes(program, made.network.mesh)
    assert {kind for kind, _, _ in moved} <= {"all_reduce", "reduce_scatter", "all_gather"}
    (call,) = (item for item in program.statements if isinstance(item, LoopCall))
    inside = [item for item in call.bodies[0].statements if isinstance(item, Convert)]
    between = {v.name for node in (*products, attention) for v in node.outputs}
    assert not [item for item in inside if item.source.value.name in between]
    weights = [weight for weight in call.bodies[0].weights if weight.param.value.name in parts]
    assert weights and all(weight.steps == () for weight in weights)
    run(pool, made, decisions, case(name))


def test_parallel_roles_differ_in_what_they_move(pool: Pool) -> None:
    """A guard on the tests above: roles are not just other names for the same plan."""
    seen: set[frozenset[object]] = set()
    for role in ("ddp", "fsdp", "tp", "cp"):
        made = builder("llama", (2,))
        decisions = planned(made, Roles((role,), made.graph, made.network.mesh))
        moved = predicted_bytes(program_of(made, decisions), made.network.mesh)
        seen.add(frozenset(moved.items()))
    assert len(seen) == 4
