"""Mixtures of experts as generated modules: experts cut, tokens sent, on 2 and 4 ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import shardwright
from shardwright.facts.spec import Spec, is_shard
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph, Node, Param
from shardwright.ir.ops import moe as declared
from shardwright.ir.ops.experts import moe_math
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.unfuse import unfuse
from shardwright.ir.reference.widen import widened
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.traffic import predicted_bytes
from shardwright.planner.strategies.build import Builder, Decisions
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool
from tests import sharded
from tests.ir.models import batch
from tests.ir.test_moe import FAMILIES, model_of, operators
from tests.sharded import (
    assert_close,
    builder_of,
    mesh_of,
    program_of,
    random_decisions,
    reference,
    run_module,
    source_of,
)

from .families import example_module

Pool = Callable[[int], RankPool]
EVERY = ("example", *FAMILIES)


@dataclass(frozen=True)
class Case:
    """A model in float64, a batch, and what one process computes from it."""

    graph: Graph
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: tuple[dict[str, Tensor], dict[str, Tensor | None]]
    routed: list[Tensor]  # the experts of each token (b, s, k), layer by layer

    @staticmethod
    def of(graph: Graph, params: dict[str, Tensor], inputs: dict[str, Tensor]) -> Case:
        routed: list[Tensor] = []

        def noted(**args: Any) -> Tensor:
            routed.append(args["indices"])
            return moe_math(**args)

        with mock.patch.object(declared, "moe_math", noted):
            expected = reference(graph, params, inputs)
        return Case(graph, params, inputs, expected, routed)


@cache
def case_of(family: str) -> Case:
    """A tiny model of the family."""
    if family == "example":
        torch.manual_seed(0)
        example = example_module("moe")
        sizes = {"layers": 2, "width": 32, "heads": 4, "experts": 8, "expert_width": 12}
        model: nn.Module = example.MoETransformer(example.MoEConfig(vocab_size=64, **sizes))
        inputs = batch(8, 8, "tokens", "labels")
    else:
        model = model_of(family)
        inputs = batch(8, 8, "input_ids", "labels")
    graph = widened(fold(capture(model, inputs, training=True)))
    params = {name: t.double() for name, t in model.state_dict().items()}
    return Case.of(graph, params, inputs)


def decisions_with(builder: Builder, wanted: tuple[str, ...], start: int) -> Decisions:
    """Random decisions in which some experts run as one of `wanted`."""
    names = {node.name for node in operators(builder.graph)}
    for seed in range(start, start + 400):
        decisions = random_decisions(builder, seed)
        if any(choice in wanted for name in names for choice in decisions.choices[name]):
            return decisions
    raise AssertionError(f"400 random decisions without {wanted}")


def check(pool: RankPool, case: Case, builder: Builder, decisions: Decisions) -> None:
    """Results and all gradients are those of one process; every byte that a rank receives is
    predicted, from the experts that its tokens and those of others chose."""
    source = source_of(builder, decisions)
    assert "ops.moe(" in source
    fixed = _without_experts(builder, decisions)
    busiest: Counter[tuple[str, ...]] = Counter()  # the first and last rank lack a neighbour
    results = pool.run(run_module, source, case.params, case.inputs)
    for rank, (outputs, gradients, counts) in enumerate(results):
        counted = {key: n_bytes for key, (n_bytes, _) in counts.items()}
        for path, want in case.expected[0].items():
            assert_close(outputs[path], want, 1e-9, f"rank {rank} output {path}\n{source}")
        for name, want in case.expected[1].items():
            if want is not None and name in gradients:
                got = gradients[name]
                assert got is not None
                assert_close(got, want, 1e-9, f"rank {rank} gradient of {name}\n{source}")
        moved = fixed + _of_experts(builder, decisions, case.routed, rank)
        if any("window" in choices for choices in decisions.choices.values()):
            busiest |= Counter({key: counted.pop(key, 0.0) for key in _hops(moved)})
            moved -= _hops(moved)
        assert counted == pytest.approx(dict(moved), rel=1e-12), f"rank {rank}\n{source}"
    assert not busiest or busiest == pytest.approx(_hops(fixed), rel=1e-12)


def _hops(moved: Counter[tuple[str, ...]]) -> Counter[tuple[str, ...]]:
    return Counter({key: n for key, n in moved.items() if key[0] == "send_recv"})


def _without_experts(builder: Builder, decisions: Decisions) -> Counter[tuple[str, ...]]:
    """Bytes that are moved otherwise than to experts and back, by (operation, axis, phase)."""
    with mock.patch.object(declared, "exchanges", lambda layer, *, backward: ()):
        moved = predicted_bytes(program_of(builder, decisions), builder.network.mesh)
    return Counter({tuple(key): n for key, n in moved.items()})


def _of_experts(
    builder: Builder, decisions: Decisions, routed: Sequence[Tensor], rank: int
) -> Counter[tuple[str, ...]]:
    """Bytes that `rank` receives in all-to-alls of experts."""
    mesh = builder.network.mesh
    moved: Counter[tuple[str, ...]] = Counter()
    for node, indices in zip(layers_of(builder.graph), routed, strict=True):
        choices = decisions.choices[node.name]
        axes = [i for i, choice in enumerate(choices) if choice.startswith("dispatch_")]
        if not axes:
            continue
        name = "_".join(mesh.names[i] for i in axes)
        forward, backward = _exchanged(node, choices, mesh.sizes, indices, rank)
        moved["all_to_all", name, "forward"] += forward
        moved["all_to_all", name, "backward"] += backward
    return moved


def layers_of(graph: Graph) -> list[Node]:
    """The experts of each layer, in the order in which layers run."""
    found: list[Node] = []
    for item in graph.body:
        blocks = (
            [[item]] if isinstance(item, Node) else [item.blocks[kind].nodes for kind in item.order]
        )
        found += [node for nodes in blocks for node in nodes if node.op == "shardwright.moe"]
    return found


def _exchanged(
    node: Node, choices: Sequence[str], sizes: Sequence[int], routed: Tensor, rank: int
) -> tuple[int, int]:
    """(forward, backward) bytes that `rank` receives in one layer: a token goes once to each other
    rank that has one of its experts, and its result comes back."""
    place = _place(rank, sizes)
    group = [  # ranks that exchange tokens with this one, in the order of their experts
        other
        for other in range(prod(sizes))
        if all(
            a == b or choice.startswith("dispatch_")
            for a, b, choice in zip(_place(other, sizes), place, choices, strict=True)
        )
    ]
    count = node.operands[3].type.shape[0] // len(group)
    served = back = 0
    for source in group:
        owners = routed[_tokens(_place(source, sizes), choices, sizes, routed.shape)] // count
        goes = torch.stack([(owners == owner).any(-1) for owner in range(len(group))])
        goes[group.index(source)] = False
        if source == rank:
            back = int(goes.sum())
        else:
            served += int(goes[group.index(rank)].sum())
    x, k = 8 * node.operands[0].type.shape[-1], routed.shape[-1]
    ways = prod(n for n, choice in zip(sizes, choices, strict=True) if choice == "o")
    out = 8 * node.output.type.shape[-1] // ways
    forward = 8 * (len(group) - 1) + served * (x + k * (8 + 4)) + back * out
    return forward, served * out + back * (x + k * 8)


def _place(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The rank's index on each axis."""
    place: list[int] = []
    for size in reversed(sizes):
        place.insert(0, rank % size)
        rank //= size
    return tuple(place)


def _tokens(
    place: Sequence[int], choices: Sequence[str], sizes: Sequence[int], shape: Sequence[int]
) -> tuple[slice, ...]:
    """Which tokens (b, s) the rank at `place` has."""
    slices: list[slice] = []
    for dim, size in enumerate(shape[:-1]):
        start, rows = 0, size
        for index, choice, ways in zip(place, choices, sizes, strict=True):
            if choice.endswith(f"i{dim}"):
                rows //= ways
                start += index * rows
        slices.append(slice(start, start + rows))
    return tuple(slices)


WAYS = {"dispatch": ("dispatch_i0", "dispatch_i1"), "own experts": ("e",)}


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4"])
@pytest.mark.some(1)
def test_hidden_units_on_two_ranks(pool: Pool, family: str) -> None:
    """Gate and up are parts of one parameter, whose gradient is that of the whole."""
    builder = builder_of(unfuse(case_of(family).graph), mesh_of(2))
    check(pool(2), case_of(family), builder, decisions_with(builder, ("f",), 0))


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.some(4)
def test_two_ranks(pool: Pool, family: str, way: str) -> None:
    builder = builder_of(case_of(family).graph, mesh_of(2))
    check(pool(2), case_of(family), builder, decisions_with(builder, WAYS[way], 0))


@pytest.mark.parametrize("family", ["example", "gpt_oss"])
@pytest.mark.some(1)
def test_four_ranks_on_two_axes(pool: Pool, family: str) -> None:
    builder = builder_of(case_of(family).graph, mesh_of(2, 2))
    for start in (0, 1000):
        check(pool(4), case_of(family), builder, decisions_with(builder, WAYS["dispatch"], start))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_four_ranks(pool: Pool, family: str, way: str) -> None:
    for mesh in (mesh_of(4), mesh_of(2, 2)):
        builder = builder_of(case_of(family).graph, mesh)
        for start in (0, 1000, 2000):
            check(pool(4), case_of(family), builder, decisions_with(builder, WAYS[way], start))


# ---- planned: one way for all layers of experts, the rest as the solver likes ------------------


@dataclass(frozen=True)
class Way(Restriction):
    """All experts run so, one choice per mesh axis; parameters are kept in slices if `sharded`."""

    choices: tuple[str, ...]
    sizes: tuple[int, ...]
    sharded: bool = False
    parts: bool = False  # gate and up as two parameters where they lie one after the other
    attention: tuple[str, ...] = ()  # its choices; default: any

    def allows(self, region: Region, strategy: Strategy) -> bool:
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            if node.op == "shardwright.moe" and choices != self.choices:
                return False
            if node.op == "shardwright.attention" and self.attention not in ((), choices):
                return False
        return True

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        fits = param.value.type.numel % prod(self.sizes) == 0
        return not (self.sharded and fits) or all(is_shard(state) for state in spec)

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        raise AssertionError(f"{self.choices} is no strategy of {region.name}")


RING, GATHER = ("b", "ring"), ("b", "gather")
TWO = {
    "EP": Way(("dispatch_i0",), (2,)),
    "EP, summands": Way(("e",), (2,)),
    "EP, sharded": Way(("dispatch_i0",), (2,), sharded=True),
    "TP": Way(("f",), (2,), parts=True),
    "DP, sharded": Way(("i0",), (2,), sharded=True),
    "EP = CP": Way(("dispatch_i1",), (2,), attention=("ring",)),
}
FOUR = {
    "EP on 4": Way(("dispatch_i0",), (4,)),
    "EP x TP": Way(("dispatch_i0", "f"), (2, 2), parts=True),
    "EP x DP": Way(("i0", "dispatch_i0"), (2, 2)),
    "EP x CP": Way(("dispatch_i0", "i1"), (2, 2), attention=RING),
    "EP = CP, x DP": Way(("i0", "dispatch_i1"), (2, 2), attention=GATHER),
    "EP over two axes": Way(("dispatch_i0", "dispatch_i0"), (2, 2)),
    "EP over two axes, sharded": Way(("dispatch_i0", "dispatch_i0"), (2, 2), sharded=True),
    "EP of sequence parts, sharded": Way(("dispatch_i1", "i0"), (2, 2), sharded=True),
    "EP, summands, on 4": Way(("e",), (4,)),
    "EP, summands, x DP": Way(("i0", "e"), (2, 2), sharded=True),
    "EP, summands, x TP": Way(("e", "f"), (2, 2), parts=True),
    "EP, summands, x CP": Way(("e", "i1"), (2, 2), attention=("R", "ring")),
    "TP x EP": Way(("f", "dispatch_i0"), (2, 2), parts=True),
    "EP, width": Way(("dispatch_i0", "o"), (2, 2)),
}
EIGHT = {
    "EP on 8": Way(("dispatch_i0",), (8,)),
    "EP on 8, summands, sharded": Way(("e",), (8,), sharded=True),
    "EP 4 x TP 2": Way(("dispatch_i0", "f"), (4, 2), parts=True),
    "DP 2 x EP 4": Way(("i0", "dispatch_i0"), (2, 4)),
    "EP 4 x CP 2": Way(("dispatch_i0", "i1"), (4, 2), attention=RING),
    "EP over 2 x 4, sharded": Way(("dispatch_i0", "dispatch_i0"), (2, 4), sharded=True),
    "DP 2 x EP 2 x TP 2": Way(("i0", "dispatch_i0", "f"), (2, 2, 2), parts=True),
    "DP 2 x EP 2 x CP 2, sharded": Way(
        ("i0", "dispatch_i0", "i1"), (2, 2, 2), sharded=True, attention=("b", "b", "gather")
    ),
}
WAYS_TO_RUN = TWO | FOUR | EIGHT
# Each way on 2 or 4 ranks for one model; the rest is slow.
QUICK = {
    *zip(TWO, ("deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe", "llama4", "example"), strict=True),
    ("EP on 4", "llama4"), ("EP x TP", "deepseek_v3"), ("EP x DP", "qwen3_moe"),
    ("EP x CP", "gpt_oss"), ("EP = CP, x DP", "deepseek_v3"),
    ("EP over two axes, sharded", "mixtral"),
}  # fmt: skip


def planned(case: Case, way: Way) -> tuple[Builder, Decisions]:
    """The optimum in which experts run in this way."""
    builder = builder_of(unfuse(case.graph) if way.parts else case.graph, mesh_of(*way.sizes))
    built = builder.build(way)
    solution = solve(built.problem(), solver="highs", time_limit_s=60.0)
    assert solution.assignment is not None
    decisions = built.read(solution.assignment)
    assert {decisions.choices[node.name] for node in operators(builder.graph)} == {way.choices}
    return builder, decisions


def check_way(pool: Pool, case: Case, way: Way) -> None:
    check(pool(prod(way.sizes)), case, *planned(case, way))


@pytest.mark.parametrize(
    ("way", "family"),
    [
        pytest.param(way, family, marks=() if (way, family) in QUICK else pytest.mark.slow)
        for way in WAYS_TO_RUN
        for family in EVERY
    ],
)
@pytest.mark.some(4)
def test_planned(pool: Pool, way: str, family: str) -> None:
    check_way(pool, case_of(family), WAYS_TO_RUN[way])


# ---- routers that send most tokens to few ranks ------------------------------------------------


def skewed(family: str) -> Case:
    """The case with other routers: all tokens to experts 0 and 1 (GPT-OSS), to the first group's
    (DeepSeek's groups are chosen first), or each to the first two or the last two (Mixtral)."""
    case = case_of(family)
    params = {name: t.clone() for name, t in case.params.items()}
    routers = 0
    for name, t in params.items():
        if name.endswith(("router.bias", "e_score_correction_bias")):
            t[: 2 if family == "gpt_oss" else 4] = 100.0
            routers += 1
        elif family == "mixtral" and name.endswith("gate.weight"):
            t[:2], t[2:6], t[6:] = 5.0 * t[0], 0.01 * t[2:6], -5.0 * t[0]
            routers += 1
    assert routers >= 3
    return Case.of(case.graph, params, case.inputs)


@pytest.mark.parametrize(
    ("family", "way"),
    [("gpt_oss", "EP"), ("mixtral", "EP x DP"), ("deepseek_v3", "EP over two axes")],
)
@pytest.mark.some(1)
def test_skewed_routers(pool: Pool, family: str, way: str) -> None:
    """Ranks may have no token for their experts, or all of them."""
    check_way(pool, skewed(family), WAYS_TO_RUN[way])


# ---- choices that are given: what the planner expects of a balanced router is then exact -------


class Given(nn.Module):
    """A layer of 4 experts, 2 of them for each token: its second input says which."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.router = nn.Linear(6, 8), nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 12, 8))
        self.down = nn.Parameter(torch.randn(4, 8, 6))
        self.double()

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        x = self.into(x)
        weights = torch.softmax(self.router(x), -1).gather(-1, indices)
        return shardwright.moe(x, indices, weights, self.up, self.down)


PAIRS = tuple(combinations(range(4), 2))
ROUTERS = {
    "balanced": PAIRS,  # in each sequence, so on each rank, every pair of experts once
    "one expert": ((3, 3),) * 6,
    "experts of one rank": ((0, 1),) * 6,
}


@pytest.mark.parametrize("way", ["EP", "EP on 4", "EP x DP", "EP over two axes, sharded"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.some(4)
def test_given_choices(pool: Pool, router: str, way: str) -> None:
    """Ranks without tokens, and with all of them; the bytes that are planned with if balanced."""
    model = Given()
    indices = torch.tensor(ROUTERS[router]).expand(4, 6, 2).contiguous()
    inputs = {"x": torch.randn(4, 6, 6, dtype=torch.float64), "indices": indices}
    case = Case.of(capture(model, inputs, training=True), dict(model.state_dict()), inputs)
    builder, decisions = planned(case, WAYS_TO_RUN[way])
    ranks = pool(builder.network.mesh.ranks)
    check(ranks, case, builder, decisions)
    if router == "balanced":
        sharded.check(ranks, builder, decisions, case.params, inputs, case.expected, tolerance=1e-9)
