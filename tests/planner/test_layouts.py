"""Layouts and ordinary plans are what their names say: what each weight and each product does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from shardwright.asked import Asked, silent
from shardwright.capturing import phase_graph
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.spec import format_spec, is_shard
from shardwright.ir.graph import Graph
from shardwright.ir.ops.registry import operator_of
from shardwright.loading import load_target
from shardwright.planner.errors import LayoutError, PlanError
from shardwright.planner.report.report import hidden_seconds, split_seconds
from shardwright.planner.report.throughput import mfu, throughput
from shardwright.planner.search.variants import make_plan
from shardwright.planner.strategies.layout import Layout
from shardwright.planner.strategies.params import all_params
from shardwright.planner.strategies.regions import scopes
from shardwright.planner.strategies.sides import Sides

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SMALL = {
    "llama3-8b": {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 1024, "head_dim": 16,
    },
    "gpt2": {"n_embd": 256, "n_head": 8, "n_layer": 2, "vocab_size": 1024},
    "qwen3-30b-a3b": {
        "hidden_size": 256, "moe_intermediate_size": 64, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 1024, "head_dim": 16,
        "num_experts": 16, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@cache
def graph(model: str) -> Graph:
    """A small model, eight sequences a step."""
    config = json.loads((CONFIGS / model / "config.json").read_text()) | SMALL[model]
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        loaded = load_target(folder, batch=8, seq=64, phase="train", formats="bfloat16")
        return phase_graph(loaded, "train", 0)


OPTIONS: dict[str, Any] = {
    "gpus": None, "cluster": "h100", "phase": "train", "context": None, "output_tokens": None,
    "expert_imbalance": None, "mesh": None, "pins": (), "memory_bytes": None, "optimizer": None,
    "solver": "highs", "time_limit_s": 60.0, "progress": silent, "outputs": (), "dtype": "bfloat16",
}  # fmt: skip


def made(model: str, batch: int = 8, **given: Any) -> sw.Plan:
    """A plan of a small model."""
    job = Asked(**{**OPTIONS, **given}).job("", batch, 64)
    return sw.Plan.of(make_plan(graph(model), job))


@cache
def planned(model: str, layout: str) -> sw.Plan:
    """The layout of a small model."""
    return made(model, layout=layout)


def weights(plan: sw.Plan) -> dict[str, str]:
    """The spec of every weight matrix, by the last parts of its name without `weight`."""
    return {
        ref.name.removesuffix(".weight").rsplit(".", 1)[-1]: format_spec(
            plan.decisions.specs[ref.param.value.name]
        )
        for ref in all_params(plan.graph)
        if ref.trainable and len(ref.param.value.type.shape) > 1
    }


def products(plan: sw.Plan) -> dict[str, str]:
    """What is cut in every heavy operator, by the name of its module."""
    return {op.name: op.strategy for op in plan.ops}


def choices(plan: sw.Plan, *modules: str) -> set[tuple[str, ...]]:
    """The choices of light operators in modules of these names."""
    return {
        plan.decisions.choices[node.name]
        for scope in scopes(plan.graph)
        for node in scope.nodes
        if node.loc.module.rsplit(".", 1)[-1] in modules and not operator_of(node).heavy
    }


# -- tensor parallelism ---------------------------------------------------------------------------

COLUMNS, ROWS, VOCABULARY = "tp: columns", "tp: rows", "tp: vocabulary"
TP = {
    "llama3-8b": {
        "embed_tokens": VOCABULARY, "q_proj": COLUMNS, "k_proj": COLUMNS, "v_proj": COLUMNS,
        "attention": "tp: heads", "o_proj": ROWS, "gate_proj": COLUMNS, "up_proj": COLUMNS,
        "down_proj": ROWS, "lm_head": COLUMNS, "cross_entropy": VOCABULARY,
    },
    "gpt2": {
        "wte": VOCABULARY, "wpe": VOCABULARY, "attention": "tp: heads", "c_fc": COLUMNS,
        "c_proj": ROWS, "lm_head": COLUMNS, "cross_entropy": VOCABULARY,
        **{f"c_attn.weight_{part}_states": COLUMNS for part in ("query", "key", "value")},
    },
    "qwen3-30b-a3b": {
        "embed_tokens": VOCABULARY, "q_proj": COLUMNS, "k_proj": COLUMNS, "v_proj": COLUMNS,
        "attention": "tp: heads", "o_proj": ROWS, "experts": "tp: intermediate size",
        "lm_head": COLUMNS, "cross_entropy": VOCABULARY,
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", ["tp=4", "tp=4,sp"])
@pytest.mark.parametrize("model", SMALL)
@pytest.mark.some(2)
def test_tensor_parallelism(model: str, layout: str) -> None:
    """Columns, then rows; weights lie as they are used; between them all is whole, or sequence."""
    plan = planned(model, layout)
    found = products(plan)
    assert {name: found[name] for name in TP[model]} == TP[model]
    rest = {cut for name, cut in found.items() if name not in TP[model]}
    assert rest <= {"replicated", "tp: sequence"}  # a router
    stored = weights(plan)
    turned = {ROWS: "S0", COLUMNS: "S1"} if model == "gpt2" else {ROWS: "S1", COLUMNS: "S0"}
    for name, cut in TP[model].items():
        if (weight := name.rsplit(".", 1)[-1]) in stored:
            assert stored[weight] == turned.get(cut, "S0"), name
    assert all(w.stored == w.used for w, _ in plan.program.brought() if is_shard(w.stored[0]))
    norms = choices(plan, "input_layernorm", "post_attention_layernorm", "ln_1", "ln_2", "ln_f")
    assert norms == ({("i1",)} if layout.endswith("sp") else norms & {("V",), ("R",)})


def test_more_ranks_than_key_heads_take_two_axes() -> None:
    """Eight key heads on sixteen GPUs: two GPUs share each, with half of its query heads."""
    found = products(planned("llama3-8b", "tp=8,tp=2"))
    assert found["attention"] == "tp1: heads, tp2: query heads of each"
    assert found["q_proj"] == "tp1: columns, tp2: columns"


# -- data parallelism -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize(
    ("layout", "axes", "sharded"),
    [
        ("ddp=8", "dp: batch", [False]),
        ("fsdp=8", "dp: batch", [True]),
        ("dp=2,fsdp=4", "dp1: batch, dp2: batch", [False, True]),
    ],
)
@pytest.mark.some(3)
def test_data_parallelism(model: str, layout: str, axes: str, sharded: list[bool]) -> None:
    """Every operator cuts the batch alone; weights are whole, or sharded and gathered for use."""
    plan = planned(model, layout)
    assert set(products(plan).values()) <= {axes, "replicated"}  # positions have no batch
    assert products(plan)["attention"] == axes
    for ref in all_params(plan.graph):
        if ref.trainable:
            spec = plan.decisions.specs[ref.param.value.name]
            assert [is_shard(state) for state in spec] == sharded, ref.name
    used = {w.used for w, _ in plan.program.brought() if any(map(is_shard, w.stored))}
    assert not any(is_shard(state) for spec in used for state in spec)
    assert bool(used) == any(sharded)


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize(("layout", "late"), [("zero1=8", True), ("zero2=8", False)])
def test_zero(model: str, layout: str, late: bool) -> None:
    """Weights are gathered once a step, gradients reduced once a step or in each micro-batch; the
    optimizer has a part of everything that eight GPUs divide.  A table of positions, whose use
    knows no batch, is left to FSDP."""
    plan = made(model, layout=layout, micro_batches=2, batch=16)
    assert plan.request.rows == 8
    for weight, _ in plan.program.brought():
        if weight.param.kind == "parameter" and weight.param.value.differentiable:
            homely = any(size % 8 == 0 for size in weight.param.value.type.shape)
            homely &= not weight.name.endswith("wpe.weight")
            assert weight.kept.kept == homely, weight.name
            assert not homely or (weight.kept.late == late and not weight.forward)


class LearnedPositions(nn.Module):
    """Positions that know no batch: each rank makes the whole gradient of their table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 16)
        self.places = nn.Embedding(32, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits = self.head(self.tokens(tokens) + self.places(places))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("layout", ["zero1=4", "zero2=4"])
def test_zero_leaves_weights_that_know_no_batch(layout: str) -> None:
    """They come for each use, as FSDP's do, and have no home where no use leaves summands."""
    with torch.device("meta"):
        model = LearnedPositions()
        rows = torch.empty(16, 32, dtype=torch.int64)
    plan = sw.plan(
        model, {"tokens": rows, "labels": rows}, cluster="cpu", layout=layout, micro_batches=4
    )
    homes = {w.name: w.kept.kept for w, _ in plan.program.brought()}
    assert homes.pop("places.weight") is False and any(homes.values())
    stored = {name: format_spec(spec) for name, spec in plan.decisions.specs.items()}
    assert any("places" in name and spec.startswith("S") for name, spec in stored.items())


@pytest.mark.parametrize(
    ("layout", "attention", "others", "sharded"),
    [
        ("cp=4", ("ring", "gather"), "i1", False),
        ("fsdp=2,cp=4", ("ring", "gather"), "i1", True),
        ("ulysses=4", ("ulysses",), "i1", False),
    ],
)
def test_sequence_parallelism(
    layout: str, attention: tuple[str, ...], others: str, sharded: bool
) -> None:
    """Tokens are cut in every product, and attention is a ring, or exchanges them for heads."""
    plan = planned("llama3-8b", layout)
    taken: dict[bool, set[str]] = {True: set(), False: set()}
    for scope in scopes(plan.graph):
        for node in scope.nodes:
            if operator_of(node).spent_on in ("matrix products", "attention"):
                taken[operator_of(node).attends].add(plan.decisions.choices[node.name][-1])
    assert taken[True] <= set(attention) and taken[False] == {others}
    assert all(("S" in spec) == sharded for spec in weights(plan).values())


def test_experts_are_spread() -> None:
    plan = planned("qwen3-30b-a3b", "fsdp=2,ep=4")
    assert "expert, EP with all-to-all" in products(plan)["experts"]
    stored = weights(plan)
    assert stored["gate_up_proj"].endswith(",S0") and stored["q_proj"] in ("S0,S0", "S1,S1")


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp=8", "tp=4,sp,recompute=full", "ddp=2,cp=4", "ulysses=8",
        "tp=4,sp,recompute=selective", "fsdp=8,recompute=1",
    ],
)  # fmt: skip
def test_the_price_is_that_of_what_runs(layout: str) -> None:
    plan = planned("llama3-8b", layout)
    compute, moving = split_seconds(plan)
    layers = len(plan.graph.loops[0].order)
    assert plan.decisions.recompute == ("recompute" in layout)
    assert plan.decisions.part_layers == layers * ("selective" in layout)
    assert plan.decisions.kept_layers == (layers - 1) * layout.endswith("=1")
    hidden = compute + sum(moving.values()) + plan.optimizer_s - plan.seconds
    weights = sum(step.seconds * n for each, n in plan.program.brought() for step in each.way)
    assert hidden == pytest.approx(hidden_seconds(plan), abs=1e-6 * plan.seconds)
    free = 1 - load_cluster("h100").contention
    assert -1e-6 * plan.seconds <= hidden <= free * weights + 1e-6 * plan.seconds
    assert f"as --layout {layout} has it" in str(plan) and plan.baselines == ()
    assert sw.Plan.of(plan) == plan and plan.to_json()["request"]["layout"] == layout


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("fsdp=16", "16 GPUs do not divide the batch of 8"),
        ("cp=48", "48 GPUs do not divide the sequence of 64"),
        ("tp=16", r"16 GPUs do not divide `model.layers.\*.self_attn` \(attention\).*8 heads"),
        ("ep=4", "there are no experts to spread"),
        ("zero2=16", "16 GPUs do not divide the batch of 8"),
        ("vpp=2", "`vpp` is how many stages each rank of a pipeline has: pp=4,vpp=2"),
        ("pp=x,ddp=4", "`pp` is followed by a number of GPUs"),
        (
            "ddp=8,recompute=some",
            "recompute is one of none, selective, full or a number of layers, not `some`",
        ),
        ("ddp=8,recompute=99", "there are loops of 2 layers, of which 99 cannot be recomputed"),
        ("pp=2,ddp=4,recompute=2", "stages of a pipeline recompute none of their layers or all"),
        ("fdsp=8", r"unknown word `fdsp`, did you mean `fsdp`\?"),
        ("sp=8", "`sp` shares the GPUs of tp and has no size"),
        ("ddp=8,sp", "`sp` is what the ranks of tp do between the blocks"),
        ("tp", "`tp` is followed by a number of GPUs, such as tp=8"),
        ("tp=0", "`tp` is followed by a number of GPUs"),
        ("recompute=full", "expected words with numbers of GPUs"),
        ("ddp=2,fsdp=2,cp=2,tp=2", "at most 3 axes, these are 4"),
    ],
)
def test_impossible_layouts_say_why(layout: str, said: str) -> None:
    with pytest.raises(PlanError, match=f"^--layout {layout}: .*{said}"):
        planned("llama3-8b", layout)


class Unlike(nn.Module):
    """Two blocks that are no loop, with a norm that is written out in front of each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.gate, self.back = nn.Linear(16, 32), nn.Linear(32, 16)
        self.start, self.head = nn.Linear(8, 16), nn.Linear(16, 24)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        x = x + self.down(self.up(written_norm(x) * self.scale).relu())
        x = x + self.back(self.gate(written_norm(x)).tanh())
        return self.head(written_norm(x))


def written_norm(x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(-1) + 1.0)


def unlike(layout: str) -> sw.Plan:
    with torch.device("meta"):
        return sw.plan(Unlike(), {"x": torch.zeros(4, 8, 8)}, cluster="cpu", layout=layout)


def test_a_dim_that_a_written_norm_takes_whole_is_not_cut() -> None:
    specs = weights(unlike("tp=2"))
    cut = {"up": "S0", "down": "S1", "gate": "S0", "back": "S1", "head": "S0"}
    assert {name: specs[name] for name in cut} == cut


def test_choices_that_do_not_go_together_are_no_want_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were the dim that the norm takes whole a dim to cut, no choice of the norm would do."""
    monkeypatch.setattr(Sides, "_normalised", lambda _: set())
    with pytest.raises(LayoutError, match=r"--layout tp=2: .*`.*` cannot be cut so that it goes "):
        unlike("tp=2")


def test_words() -> None:
    """Outermost first; axes of one rank are none; FSDP's group spans the axes of the sequence."""
    layout = Layout.parse("dp=2, fsdp=4,cp=1,tp=8,sp,recompute=none")
    assert layout.roles == ("ddp", "fsdp", "tp+sp") and layout.mesh.sizes == (2, 4, 8)
    assert layout.recompute == "none" and layout.name == "HSDP x TP+SP"
    assert Layout.parse("fsdp=2,cp=4,ep=2").roles == ("fsdp", "fsdp+cp", "fsdp+ep")
    assert Layout.parse("ep=8").roles == ("ddp+ep",) and Layout.parse("ddp=1").mesh.ranks == 1


# -- pins by factor -------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["tp", "z"])
@pytest.mark.some(1)
def test_a_pin_says_what_an_axis_cuts(axis: str) -> None:
    """Weights that are pinned in slices may be gathered; operators that are cut are not."""
    mesh = "dp=2,tp=4" if axis == "tp" else "2x4"
    name = "tp" if axis == "tp" else "y"
    pins = (f"*.q_proj={name}:out", f"*.o_proj={name}:in,{'dp' if axis == 'tp' else 'x'}:batch")
    plan = made("llama3-8b", gpus=8, mesh=mesh, pins=pins)
    taken = {
        node.loc.module.rsplit(".", 1)[-1]: plan.decisions.choices[node.name]
        for scope in scopes(plan.graph)
        for node in scope.nodes
        if operator_of(node).spent_on == "matrix products"
    }
    assert taken["q_proj"][1] == "o" and taken["o_proj"] == ("i0", "k")
    ways = plan.strategies_of("*.q_proj").splitlines()
    assert sum(line.startswith("  * ") for line in ways) == 1 and len(ways) > 10
    plan.dump("problem")  # the pins are understood again


@pytest.mark.parametrize(
    ("pin", "said"),
    [
        ("*.q_proj=up:out", "the mesh has the axes dp, tp"),
        ("*.q_proj=tp:heads", "what can be cut there: batch, columns, .*out.*rows"),
        ("*.x_proj=tp:out", r"no module matches; the nearest are .*self_attn.q_proj"),
        ("*.q_prj.weight=R,S0", r"the nearest are model.layers.\*.self_attn.q_proj.weight"),
        ("lm_haed.weight=R,S0", r"the nearest are lm_head.weight"),
        ("*.q_proj=tp:", "expected AXIS:WHAT, such as"),
    ],
)
def test_pins_that_cannot_be(pin: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        made("llama3-8b", gpus=8, mesh="dp=2,tp=4", pins=(pin,))


def test_mfu_counts_products_and_attention_three_times() -> None:
    """By hand: 2 FLOPs for each weight and token, 4 for each score and number of a head."""
    plan, tokens, layers, width = planned("llama3-8b", "fsdp=8"), 8 * 64, 2, 256
    matrices = layers * width * (256 + 2 * 128 + 256 + 3 * 512) + width * 1024
    forward = 2 * tokens * matrices + layers * 4 * tokens * 64 * width
    assert mfu(plan, lambda _: 1e12) == pytest.approx(3 * forward / (plan.seconds * 8 * 1e12))
    line = throughput(plan, lambda _: 1e12, price=3.0)
    cost = plan.seconds / 3600 * 8 * 3.0
    assert f"A step costs {cost:.3g}, a million tokens {cost / tokens * 1e6:.3g}." in line
    assert "costs" not in throughput(plan, lambda _: 1e12, price=0.0)
