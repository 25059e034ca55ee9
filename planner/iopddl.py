"""Read and write IOPDDL JSON, and solve such a file for the command line.

The format (google/iopddl, the ASPLOS 2025 contest): parallel lists of nodes (one half-open live
interval, strategies with integer cost and usage) and edges (cost matrix, row-major over the first
node's strategies), and a usage limit.  Costs of `INFINITE_COST` or more forbid.

Two side fields, ignored by other readers, keep what the format has no place for:
`problem.cost_scale` (integer cost = seconds x scale; 1 if absent) and `problem.nodes.names`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from math import ceil, floor, inf, log10
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np

from ..facts.files import MB, read_json
from .ilp.problem import Edge, FloatArray, ProblemNode, ShardingProblem, Usage
from .ilp.solve import Solution, solve

INFINITE_COST = 10**18
# The contest's evaluator adds costs in 64-bit integers; sums must stay well below INFINITE_COST.
_LARGEST_SUM = 1e17
_FINEST_SCALE = 1e15
_LATEST = 2**62  # times are 64-bit integers, and so are their differences


class IopddlError(ValueError):
    """A file that is not a valid IOPDDL problem; the message names the file and the field."""


def read_problem(path: str | Path) -> ShardingProblem:
    """Read `path`, a .json or .json.gz file of at most 1 GB.

    Raises `DataError` for what is no such file, `IopddlError` if it is not a valid problem.
    """
    content = read_json(path, limit=1000 * MB)
    try:
        return problem_from_json(content)
    except ValueError as e:
        raise IopddlError(f"{path}: {e}") from e


def write_problem(problem: ShardingProblem, path: str | Path) -> None:
    """Write `problem` to `path`, compressed if the name ends in .gz; see `problem_to_json`."""
    path = Path(path)
    data = json.dumps(problem_to_json(problem), separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if _zipped(path) else data)


def _zipped(path: Path) -> bool:
    return path.suffix == ".gz"


# --- reading ---------------------------------------------------------------------------------


def problem_from_json(content: object) -> ShardingProblem:
    """The problem in parsed JSON.  Raises `ValueError` naming the field that is wrong."""
    problem = _mapping(_field(content, "problem", ""), "problem")
    nodes = _mapping(_field(problem, "nodes", "problem."), "problem.nodes")
    edges = _mapping(_field(problem, "edges", "problem."), "problem.edges")
    scale = problem.get("cost_scale", 1)
    if not _is_number(scale) or scale <= 0:
        raise ValueError(f"problem.cost_scale must be a positive number, got {scale!r}")
    limit = problem.get("usage_limit")
    if limit is not None and not _is_number(limit):
        raise ValueError(f"problem.usage_limit must be a number, got {limit!r}")
    read = _read_nodes(nodes, scale)
    return ShardingProblem(
        str(problem.get("name", "")),
        read,
        _read_edges(edges, read, scale),
        None if limit is None else float(limit),
    )


def _read_nodes(nodes: dict[str, Any], scale: float) -> tuple[ProblemNode, ...]:
    where = "problem.nodes"
    costs = _sequence(_field(nodes, "costs", f"{where}."), f"{where}.costs")
    usages = _sequence(_field(nodes, "usages", f"{where}."), f"{where}.usages", len(costs))
    intervals = _sequence(_field(nodes, "intervals", f"{where}."), f"{where}.intervals", len(costs))
    names = nodes.get("names")
    names = range(len(costs)) if names is None else _sequence(names, f"{where}.names", len(costs))
    read: list[ProblemNode] = []
    for k, (cost, usage, interval, name) in enumerate(
        zip(costs, usages, intervals, names, strict=True)
    ):
        start, end = _pair(interval, f"{where}.intervals[{k}]")
        size = _numbers(usage, f"{where}.usages[{k}]")
        try:
            # an interval that ends before it starts holds nothing, as an empty one does
            live = Usage(start, max(start, end), size)
            read.append(ProblemNode(str(name), _costs(cost, f"{where}.costs[{k}]", scale), (live,)))
        except ValueError as e:
            raise ValueError(f"{where}, node {k}: {e}") from e
    return tuple(read)


def _read_edges(
    edges: dict[str, Any], nodes: Sequence[ProblemNode], scale: float
) -> tuple[Edge, ...]:
    where = "problem.edges"
    ends = _sequence(_field(edges, "nodes", f"{where}."), f"{where}.nodes")
    costs = _sequence(_field(edges, "costs", f"{where}."), f"{where}.costs", len(ends))
    read: list[Edge] = []
    for k, (pair, cost) in enumerate(zip(ends, costs, strict=True)):
        a, b = _pair(pair, f"{where}.nodes[{k}]")
        if not (0 <= a < len(nodes) and 0 <= b < len(nodes)):
            raise ValueError(f"{where}.nodes[{k}] is {[a, b]}, nodes are 0..{len(nodes) - 1}")
        shape = (nodes[a].costs.size, nodes[b].costs.size)
        flat = _costs(cost, f"{where}.costs[{k}]", scale)
        if flat.size != shape[0] * shape[1]:
            raise ValueError(
                f"{where}.costs[{k}] has {flat.size} entries, nodes {a} and {b} have "
                f"{shape[0]} x {shape[1]} pairs of strategies"
            )
        read.append(Edge(a, b, flat.reshape(shape)))
    return tuple(read)


def _field(content: object, key: str, prefix: str) -> Any:
    held = _mapping(content, prefix.rstrip(".") or "the file")
    if key not in held:
        raise ValueError(f"{prefix}{key} is missing")
    return held[key]


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _sequence(value: object, where: str, size: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, got {type(value).__name__}")
    held = cast("list[Any]", value)
    if size is not None and len(held) != size:
        raise ValueError(f"{where} must have {size} entries, got {len(held)}")
    return held


def _pair(value: object, where: str) -> tuple[int, int]:
    held = _sequence(value, where, 2)
    if not all(type(item) is int and abs(item) <= _LATEST for item in held):
        raise ValueError(f"{where} must be two integers of 63 bits, got {held}")
    return held[0], held[1]


def _numbers(value: object, where: str) -> FloatArray:
    held = _sequence(value, where)
    try:
        return np.array(held, dtype=np.float64).reshape(len(held))
    except (TypeError, ValueError, OverflowError) as e:
        raise ValueError(f"{where} must be a list of numbers: {e}") from e


def _costs(value: object, where: str, scale: float) -> FloatArray:
    costs = _numbers(value, where)
    return np.where(costs >= INFINITE_COST, inf, costs / scale)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- writing ---------------------------------------------------------------------------------


def problem_to_json(problem: ShardingProblem) -> dict[str, Any]:
    """`problem` as IOPDDL's JSON.

    A node with several usages is followed, after all nodes of the problem, by a twin for each
    further usage, tied to it by an edge that allows only equal strategies: the first
    `len(problem.nodes)` entries of an assignment are the problem's own.  Costs that are not whole
    are scaled by the power of ten that keeps the sum of all under 1e17 (at most 1e15); bytes are
    rounded up and the limit down.
    """
    scale = _cost_scale(problem)
    nodes: list[tuple[str, FloatArray, Usage]] = []
    twins: list[tuple[int, str, Usage]] = []
    for k, node in enumerate(problem.nodes):
        nothing = Usage(0, 0, np.zeros(node.costs.size))
        usages = node.usages or (nothing,)
        nodes.append((node.name, node.costs, usages[0]))
        twins += [(k, f"{node.name}:{n}", usage) for n, usage in enumerate(usages[1:], start=1)]
    ends = [[edge.a, edge.b] for edge in problem.edges]
    costs = [_to_integers(edge.costs, scale) for edge in problem.edges]
    for k, name, usage in twins:
        size = usage.bytes.size
        ends.append([k, len(nodes)])
        costs.append(_to_integers(np.where(np.eye(size, dtype=bool), 0.0, inf), scale))
        nodes.append((name, np.zeros(size), usage))
    body: dict[str, Any] = {
        "name": problem.name,
        "nodes": {
            "intervals": [[usage.start, usage.end] for _, _, usage in nodes],
            "costs": [_to_integers(cost, scale) for _, cost, _ in nodes],
            "usages": [[ceil(x) for x in usage.bytes.tolist()] for _, _, usage in nodes],
            "names": [name for name, _, _ in nodes],
        },
        "edges": {"nodes": ends, "costs": costs},
    }
    if problem.usage_limit is not None:
        body["usage_limit"] = floor(problem.usage_limit)
    if scale != 1:
        body["cost_scale"] = scale
    return {"problem": body}


def _to_integers(costs: FloatArray, scale: float) -> list[int]:
    flat = np.rint(costs.reshape(-1) * scale).tolist()
    return [INFINITE_COST if cost == inf else int(cost) for cost in flat]


def _cost_scale(problem: ShardingProblem) -> float:
    """1 for whole costs, else the largest power of ten that keeps sums in range."""
    total, whole = 0.0, True
    for item in (*problem.nodes, *problem.edges):
        finite = item.costs[np.isfinite(item.costs)]
        total += float(np.abs(finite).max(initial=0.0))
        whole = whole and bool((finite == np.rint(finite)).all())
    if total > _LARGEST_SUM:
        raise ValueError(
            f"`{problem.name}`: costs sum to {total:.3g}; IOPDDL holds integers and reads "
            f"{INFINITE_COST:.0e} as infinite, so divide the costs first"
        )
    if whole:
        return 1
    return min(_FINEST_SCALE, 10.0 ** floor(log10(_LARGEST_SUM / total)))


# --- the command line's `plan solve` ---------------------------------------------------------


def solve_file(path: str | Path, time_limit_s: float = 60.0, solver: str = "highs") -> str:
    """Solve the IOPDDL problem in `path` and say the result in a few printable lines.

    Raises `IopddlError` for a bad file and `ValueError` for an unknown solver.
    """
    started = perf_counter()
    problem = read_problem(path)
    read = perf_counter() - started
    solution = solve(problem, solver=solver, time_limit_s=time_limit_s)
    return format_solution(problem, solution, solver, read)


def format_solution(
    problem: ShardingProblem, solution: Solution, solver: str, read_s: float
) -> str:
    """The lines that `plan solve` prints."""
    limit = "none" if problem.usage_limit is None else _number(problem.usage_limit)
    strategies = sum(node.costs.size for node in problem.nodes)
    lines = [
        f"problem     {problem.name}: {len(problem.nodes)} nodes, {strategies} strategies, "
        f"{len(problem.edges)} edges, usage limit {limit}",
        f"status      {solution.status}" + (f": {solution.reason}" if solution.reason else ""),
        f"cost        {_number(solution.cost) if solution.assignment is not None else 'none'}",
        f"bound       {_number(solution.bound)}",
        f"seconds     {read_s + solution.seconds:.2f} (read {read_s:.2f}, "
        f"{solver} {solution.seconds:.2f})",
    ]
    if solution.assignment is not None:
        lines.append(f"assignment  {list(solution.assignment)}")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Whole numbers in full, others with 9 digits."""
    return f"{value:.0f}" if abs(value) < 1e17 and value == floor(value) else f"{value:.9g}"


__all__ = [
    "INFINITE_COST", "IopddlError", "format_solution", "problem_from_json", "problem_to_json",
    "read_problem", "solve_file", "write_problem",
]  # fmt: skip
