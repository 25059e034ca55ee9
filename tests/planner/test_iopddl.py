"""IOPDDL files: read, written, read again, solved."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from shardwright.facts.files import DataError
from shardwright.planner.ilp.problem import (
    ProblemNode,
    ShardingProblem,
    Usage,
    brute_force,
    evaluate,
)
from shardwright.planner.iopddl import (
    INFINITE_COST,
    IopddlError,
    problem_from_json,
    problem_to_json,
    read_problem,
    solve_file,
    write_problem,
)
from tests.planner.random_problems import problems

INF = float("inf")
IOPDDL = Path(__file__).parents[3] / "shared" / "data" / "iopddl"
instances = pytest.mark.skipif(not IOPDDL.is_dir(), reason=f"needs the instances in {IOPDDL}")


def content() -> dict[str, Any]:
    """Two nodes, of which the second's last strategy is forbidden."""
    return {
        "problem": {
            "name": "tiny",
            "nodes": {
                "intervals": [[0, 5], [3, 3]],
                "costs": [[1, 2], [3, 4, INFINITE_COST]],
                "usages": [[10, 5], [1, 1, 1]],
            },
            "edges": {"nodes": [[1, 0]], "costs": [[10, 20, 30, 40, 50, 60]]},
            "usage_limit": 7,
        }
    }


def test_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content()).encode()))
    problem = read_problem(path)
    assert (problem.name, problem.usage_limit) == ("tiny", 7.0)
    assert problem.nodes[1].costs.tolist() == [3, 4, INF]
    # row-major over the first node named, which is node 1
    assert problem.edges[0].costs.tolist() == [[10, 20], [30, 40], [50, 60]]
    assert brute_force(problem) == ((1, 0), 2 + 3 + 20)
    lines = solve_file(path).splitlines()
    assert lines[0] == "problem     tiny: 2 nodes, 5 strategies, 1 edges, usage limit 7"
    assert lines[1:4] == ["status      optimal", "cost        25", "bound       25"]
    assert lines[5] == "assignment  [1, 0]"


def test_an_infeasible_file_says_so(tmp_path: Path) -> None:
    tight = content()
    tight["problem"]["usage_limit"] = 4
    path = tmp_path / "tight.json"
    path.write_text(json.dumps(tight))
    lines = solve_file(path).splitlines()
    assert lines[1] == (
        "status      infeasible: at time 0 at least 5 bytes are live, whatever is chosen; "
        "the limit is 4.0"
    )
    assert lines[2] == "cost        none"


@settings(max_examples=100, deadline=None)
@given(problems())
def test_what_is_written_is_read_back_with_the_same_optimum(problem: ShardingProblem) -> None:
    again = problem_from_json(json.loads(json.dumps(problem_to_json(problem))))
    count = len(problem.nodes)
    assert [n.name for n in again.nodes[:count]] == [n.name for n in problem.nodes]
    assert again.usage_limit == problem.usage_limit
    if np.prod([float(n.costs.size) for n in again.nodes]) > 1e6 or len(again.nodes) > 30:
        return
    want, found = brute_force(problem), brute_force(again)
    if want is None or found is None:
        assert want is None and found is None
        return
    assert found[1] == pytest.approx(want[1], rel=1e-9, abs=1e-12)
    own = evaluate(problem, found[0][:count])
    assert own.feasible and own.cost == pytest.approx(found[1], rel=1e-9, abs=1e-12)


def test_several_usages_become_twins(tmp_path: Path) -> None:
    usages = (Usage(0, 2, np.array([1.0, 2.0])), Usage(5, 9, np.array([3.5, 4.0])))
    problem = ShardingProblem("p", (ProblemNode("w", np.array([1e-6, INF]), usages),), (), 10.9)
    write_problem(problem, tmp_path / "p.json")
    held = json.loads((tmp_path / "p.json").read_text())["problem"]
    scale = held["cost_scale"]
    assert held["nodes"]["costs"] == [[round(1e-6 * scale), INFINITE_COST], [0, 0]]
    assert held["nodes"]["intervals"] == [[0, 2], [5, 9]]
    assert held["nodes"]["usages"] == [[1, 2], [4, 4]]  # bytes up, limit down: never too little
    assert held["usage_limit"] == 10
    assert held["edges"] == {
        "nodes": [[0, 1]],
        "costs": [[0, INFINITE_COST, INFINITE_COST, 0]],
    }
    assert read_problem(tmp_path / "p.json").nodes[0].costs.tolist() == [1e-6, INF]


def broken(*path: str | int, value: object) -> dict[str, Any]:
    """`content()` with one place changed (or removed, where value is None)."""
    held: Any = content()
    root, where = held, path[:-1]
    for key in where:
        held = held[key]
    if value is None:
        del held[path[-1]]
    else:
        held[path[-1]] = value
    return root


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "the file must be an object, got list"),
        ({}, "problem is missing"),
        (broken("problem", "nodes", "costs", value=None), "problem.nodes.costs is missing"),
        (
            broken("problem", "nodes", "usages", value=[[1, 2]]),
            "problem.nodes.usages must have 2 entries, got 1",
        ),
        (
            broken("problem", "nodes", "costs", 0, value=[1, "x"]),
            r"problem.nodes.costs\[0\] must be a list of numbers",
        ),
        (
            broken("problem", "nodes", "usages", 0, value=[1]),
            "node 0: node `0` has 2 strategies, but a usage with 1 entries",
        ),
        (
            broken("problem", "edges", "nodes", 0, value=[0, 7]),
            r"problem.edges.nodes\[0\] is \[0, 7\], nodes are 0..1",
        ),
        (
            broken("problem", "edges", "costs", 0, value=[1]),
            r"costs\[0\] has 1 entries, nodes 1 and 0 have 3 x 2 pairs",
        ),
        (broken("problem", "usage_limit", value="8GB"), "usage_limit must be a number, got '8GB'"),
        (broken("problem", "cost_scale", value=0), "cost_scale must be a positive number, got 0"),
    ],
)
def test_malformed_files_name_the_field(tmp_path: Path, bad: object, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(IopddlError, match=message) as error:
        read_problem(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["bad.json", "bad.json.gz"])
def test_what_is_not_json_is_refused(tmp_path: Path, name: str) -> None:
    data = b"{ not json"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DataError, match="is not JSON"):
        read_problem(tmp_path / name)


@instances
def test_the_contests_example_costs_445() -> None:
    """Its optimum by the contest's own documentation."""
    found = brute_force(read_problem(IOPDDL / "example.json"))
    assert found is not None and found[1] == 445


@instances
def test_plan_solve_on_instance_g() -> None:
    lines = solve_file(IOPDDL / "asplos-2025-iopddl-G.json.gz", time_limit_s=250).splitlines()
    assert lines[1:4] == ["status      optimal", "cost        217039", "bound       217039"]
    choices = [int(k) for k in lines[5].removeprefix("assignment  [").rstrip("]").split(",")]
    problem = read_problem(IOPDDL / "asplos-2025-iopddl-G.json.gz")
    priced = evaluate(problem, choices)
    assert priced.feasible and priced.cost == 217039
