"""`plan explain`, `what-if` and `compare`: their figures are those of plans made otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shardwright.api import Plan, plan_file
from shardwright.explaining import explain
from shardwright.facts.phases import find_phase
from shardwright.facts.units import format_seconds
from shardwright.planner.errors import PlanError
from shardwright.planner.report.differences import Side
from shardwright.planner.search.ways import Ways, ways_of_plan
from shardwright.planner.strategies.regions import Region
from shardwright.questions import Change, compare, parse_factor, what_if, why_not

from .conftest import Run

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py")
SLOWER = """base = "cpu"
device = "slower"
[intra_node]
bytes_per_s = {}
switch_reduce_bytes_per_s = 0.0
"""


@cache
def planned(**options: Any) -> Plan:
    """The GPT example on two processes, or as `options` say."""
    asked: dict[str, Any] = {
        "gpus": 2, "cluster": "cpu", "phase": "train", "batch": 4, "seq": 64, "dtype": None,
        "memory_bytes": None, "mesh": None, "pins": (), "optimizer": None, "solver": "highs",
        "time_limit_s": 60.0, **options,
    }  # fmt: skip
    asked["optimizer"] = asked["optimizer"] or find_phase(asked["phase"]).optimizer
    return plan_file(GPT, **asked)


def served() -> Plan:
    """The same, to serve."""
    return planned(phase="serve", output_tokens=8)


def piped() -> Plan:
    """The same in two stages, of four micro-batches."""
    return planned(gpus=None, layout="pp=2", micro_batches=4)


def programs(plan: Plan, change: Change | None = None) -> list[Ways]:
    """What of a plan can be asked about, as things are or would be."""
    return ways_of_plan((change or Change()).again(plan))


def up(ways: Ways) -> Region:
    """The product of a block's MLP that makes it wider."""
    return next(r for r in ways.regions() if r.nodes[0].loc.module == "blocks.0.mlp.up")


@pytest.mark.some(1)
@pytest.mark.parametrize("make", [planned, served, piped])
def test_the_same_machine_gives_the_same_plan(make: Callable[[], Plan]) -> None:
    plan = make()
    same = Change().again(plan).same()
    assert [p.seconds for p in same.phases] == pytest.approx([p.seconds for p in plan.phases])
    assert same.memory.total == pytest.approx(plan.memory.total)
    assert same.decisions.choices == plan.decisions.choices
    assert same.optimizer_s == pytest.approx(plan.optimizer_s)
    for program in programs(plan):  # nothing is asked for otherwise: the plan's own way is found
        region = up(program)
        found = program.run_so(region, lambda way: True)
        assert found is not None
        assert found.seconds == pytest.approx(program.seconds)
        assert program.seconds in (plan.seconds, plan.decode and plan.answer_s)


def test_a_layout_on_slower_links_is_that_layout_planned_there(tmp_path: Path) -> None:
    """The layout leaves nothing to decide, so both are the same plan."""
    plan, file = planned(gpus=None, layout="fsdp=2"), tmp_path / "slower.toml"
    machine = Change(links=0.25).again(plan).cluster
    first = Change().again(plan).cluster.intra_node
    assert machine.intra_node.bytes_per_s == first.bytes_per_s / 4
    same = Change(links=0.25).again(plan).same()
    file.write_text(SLOWER.format(first.bytes_per_s / 4).replace("switch", "#switch"))
    text = file.read_text() + f"ramp_s_per_sqrt_byte = {machine.intra_node.ramp_s_per_sqrt_byte}\n"
    file.write_text(text)
    there = planned(gpus=None, layout="fsdp=2", cluster=str(file))
    assert same.seconds == pytest.approx(there.seconds)
    assert same.seconds > plan.seconds


def test_what_if_says_what_would_be_better_then() -> None:
    text = what_if(planned(), Change(gpu=1000.0, links=0.01))
    assert text.startswith("With links 0.01 times as fast, with GPUs 1000 times as fast this plan")
    little = int(planned().memory.total * 0.97)
    text = what_if(planned(), Change(memory_bytes=little))
    assert "this plan does not fit: it needs" in text
    again = planned(memory_bytes=little, micro_batches=1)  # of the same graph
    best = re.search(r"best that does takes ([\d.]+ \w+) per step", text)
    assert best is not None
    assert best[1] in str(again).splitlines()[0]


def test_why_not_is_that_layout() -> None:
    plan, other = planned(), planned(gpus=None, layout="ddp=2")
    assert f"{other.seconds / plan.seconds:.2f}x slower than this plan" in why_not(plan, "ddp=2")
    assert "is not possible here" in why_not(plan, "ep=2")
    with pytest.raises(PlanError, match="it is for 4 GPUs, the plan for 2"):
        why_not(plan, "tp=4")


def test_the_parts_of_a_plan_add_up() -> None:
    for plan in (planned(), planned(gpus=None, layout="tp=2")):
        parts = Side("", plan).seconds()
        assert sum(parts.values()) == pytest.approx(plan.seconds)
        assert abs(parts["other"]) < 1e-3 * plan.seconds
    text = compare(planned(), planned(gpus=None, layout="ddp=2"), ("a", "b"))
    assert text.startswith("a is ")
    assert "layout none and ddp=2" in text
    with pytest.raises(PlanError, match="not of the same"):
        compare(planned(), planned(phase="serve", output_tokens=8), ("a", "b"))


@pytest.mark.long
def test_pipelines_are_compared() -> None:
    plan, other = planned(), piped()
    ratio = max(plan.seconds, other.seconds) / min(plan.seconds, other.seconds)
    text = compare(plan, other, ("a", "b"))
    assert f" is {ratio:.2f}x faster" in text
    assert "memory at the peak" in text
    parts = Side("", other).seconds()
    assert sum(parts.values()) == pytest.approx(other.seconds)
    assert parts["waiting for other ranks"] > 0
    assert "per step, " in why_not(plan, "pp=2")
    without = planned(gpus=None, layout="ddp=2")
    halves = planned(gpus=None, layout="pp=2", micro_batches=2)
    assert f"{format_seconds(without.seconds)} per step" in why_not(halves, "ddp=2")


def test_what_if_of_a_pipeline_is_that_layout_planned_there() -> None:
    text = what_if(piped(), Change(batch=2))
    more = planned(gpus=None, layout="pp=2", micro_batches=8, batch=8)
    assert f"this plan takes {format_seconds(more.seconds)} per step" in text
    assert "no plan fits" in what_if(piped(), Change(memory_bytes=10**6))


def test_more_sequences_are_that_plan_planned_for_them() -> None:
    text = what_if(planned(gpus=None, layout="ddp=2"), Change(batch=2))
    more = planned(gpus=None, layout="ddp=2", batch=8)
    assert text.startswith(
        f"With 2 times as many sequences this plan takes {format_seconds(more.seconds)} per step"
    )
    with pytest.raises(PlanError, match="planned for their number"):
        what_if(served(), Change(batch=2))
    with pytest.raises(PlanError, match="and 6.4 is no number of them"):
        what_if(planned(), Change(batch=1.6))


def test_programs_of_servers_and_pipelines_are_explained() -> None:
    text = explain(served(), "blocks.*.mlp.up")
    assert "in prefill runs" in text and "in decode runs" in text
    assert f" {format_seconds(served().answer_s)}" in text
    text = explain(piped(), "blocks.*.mlp.up")
    assert "in stage 0 runs" in text and "in stage 1 runs" in text
    with pytest.raises(PlanError, match=r"no operator is called `\*\.upp`; there are .*mlp.up"):
        explain(piped(), "*.upp")


@pytest.mark.slow
def test_a_way_in_one_stage_leaves_the_others_as_they_are() -> None:
    """On two ranks for each stage: what a way costs is what the schedule takes with it."""
    plan = planned(gpus=None, layout="pp=2,ddp=2", micro_batches=2)
    first, _ = programs(plan)
    for way in first.others(up(first)):
        found = first.run_so(up(first), lambda other, way=way: other == way)
        if found is not None:
            assert found.seconds >= plan.seconds * (1 - 1e-9)
            assert first.taken(up(first), found) == way


def test_other_ways_cost_what_they_cost_when_pinned() -> None:
    """All else is decided anew around a way, as it is around a pin."""
    plan = planned(mesh="tp=2")
    (program,) = programs(plan)
    region = up(program)
    costs: dict[str, float] = {}
    for way in program.others(region):
        found = program.run_so(region, lambda other, way=way: other == way)
        assert found is not None
        assert program.taken(region, found) == way
        costs[way.choices[0][0]] = found.seconds
    for what, factor in (("batch", "b"), ("columns", "o")):
        if factor in costs:
            pinned = planned(mesh="tp=2", pins=(f"blocks.*.mlp.up=tp:{what}",))
            assert pinned.seconds == pytest.approx(costs[factor], rel=1e-3)
    text = explain(plan, "blocks.*.mlp.up")
    assert "the next best" in text or "would take the same" in text


@pytest.mark.slow
def test_from_which_speed_on_another_way_wins() -> None:
    """The way that is said to win does so 2 % behind the value, and not 2 % before it."""
    plan = planned(mesh="tp=2")
    text = explain(plan, "blocks.*.mlp.up", flip="link")
    for factor in re.findall(r"wins at ([\d.]+) times", text):
        ways: list[str] = []
        for speed in (float(factor) / 1.03, float(factor) * 1.03):
            (program,) = programs(plan, Change(links=speed))
            region = up(program)
            found = program.run_so(region, lambda way: True)
            ways.append(str(program.taken(region, found).choices[0]))
        assert ways[0] != ways[1]
    assert "Links: " in text or "No speed of links" in text


@pytest.mark.parametrize("text", ["0.5", "0x", "-1x", "fast", "1e3x", ""])
def test_factors_that_are_none(text: str) -> None:
    with pytest.raises(PlanError, match="such as 0.5x"):
        parse_factor("--link", text)


def test_the_commands(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "planned")
    assert run("x", "--help").code == 0
    planned().save(tmp_path / "plan.json")
    folder = tmp_path / "planned"
    folder.mkdir()
    planned().save(folder / "plan.json")
    plan = planned()
    assert plan.why_not("fsdp=2") == why_not(plan, "fsdp=2")
    assert plan.compare(plan, ("a", "b")) == compare(plan, plan, ("a", "b"))
    assert "no plan fits" in plan.what_if(memory_bytes=1000)
    same = run("compare", out, out).out
    assert " ".join(same.split()).startswith(f"{out} and {out} take the same")
    assert run("what-if", out, "--memory", "1MB").out.startswith("With 1 MB per GPU no plan fits")
    assert "fsdp=2 takes" in run("explain", out, "--why-not", "fsdp=2").out
    for words, says in (
        (("explain", out), "explain what?"),
        (("explain", out, "--why-not", "tp=2", "--flip", "gpu"), "--flip is asked of an operator"),
        (("explain", out, "blocks.*.mlp.upc"), "no operator is called `blocks.*.mlp.upc`"),
        (("what-if", out), "what would be other?"),
        (("what-if", out, "--link", "0"), "expected a factor above 0"),
        (("what-if", out, "--cluster", "h1000"), "h100"),
        (("compare", out, str(tmp_path / "none")), "none"),
    ):
        ran = run(*words)
        assert ran.code == 2
        assert says in ran.err.replace("\n", " ")
