"""Solvers side by side: cost, proven bound and time on IOPDDL instances.

    python -m benchmarks.solvers [--time-limit S] [--solver NAME ...] FILE.json[.gz] ...

Without files it takes the contest's instances G and A from `shared/data/iopddl` next to the
repository.  "contest" is the best cost of the contest's winners, from `reference_costs.csv` in
the file's folder where there is one.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from time import perf_counter

from shardwright.planner.ilp.problem import ShardingProblem
from shardwright.planner.ilp.solve import SOLVERS, solve
from shardwright.planner.iopddl import read_problem

INSTANCES = Path(__file__).parents[2] / "shared" / "data" / "iopddl"
COLUMNS = "{:10} {:8} {:11} {:>15} {:>15} {:>9} {:>15} {:>8}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Solvers side by side on IOPDDL instances")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S")
    parser.add_argument("--solver", action="append", choices=list(SOLVERS))
    args = parser.parse_args()
    files = args.files or [INSTANCES / f"asplos-2025-iopddl-{name}.json.gz" for name in "GA"]
    print(
        COLUMNS.format("instance", "solver", "status", "cost", "bound", "gap", "contest", "seconds")
    )
    for path in files:
        started = perf_counter()
        problem = read_problem(path)
        name = path.name.split(".")[0].removeprefix("asplos-2025-iopddl-")
        print(
            f"{name:10} {'(read)':{8 + 1 + 11 + 1 + 15 + 1 + 15 + 1 + 9 + 1 + 15}} "
            f"{perf_counter() - started:8.2f}",
            flush=True,
        )
        for solver in args.solver or SOLVERS:
            _row(name, problem, solver, args.time_limit, _contest(path, name))


def _row(
    name: str, problem: ShardingProblem, solver: str, time_limit_s: float, contest: str
) -> None:
    found = solve(problem, solver=solver, time_limit_s=time_limit_s)
    print(
        COLUMNS.format(
            name,
            solver,
            found.status,
            f"{found.cost:.10g}",
            f"{found.bound:.10g}",
            f"{found.gap:.2%}" if found.assignment is not None else "-",
            contest,
            f"{found.seconds:.2f}",
        ),
        flush=True,
    )


def _contest(path: Path, name: str) -> str:
    """The contest's best cost of the instance `name`, "-" if it is not known."""
    reference = path.parent / "reference_costs.csv"
    if not reference.is_file():
        return "-"
    with reference.open(newline="") as lines:
        best = {row["instance"]: row["best_of_contest"] for row in csv.DictReader(lines)}
    return best.get(name, "-")


if __name__ == "__main__":
    main()
