"""The solver library stands alone: its folder, copied elsewhere, solves without this package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "planner" / "ilp"
USE = """
import sys
import numpy as np
from choices.problem import Edge, ProblemNode, ShardingProblem, Usage, brute_force
from choices.solve import solve

nodes = tuple(
    ProblemNode(str(i), np.array([1.0, 2.0, 4.0]), (Usage(0, 1, np.array([4.0, 2.0, 1.0])),))
    for i in range(4)
)
edges = tuple(Edge(i, i + 1, np.array([[0, 5, 9], [5, 0, 5], [9, 5, 0.0]])) for i in range(3))
problem = ShardingProblem("four in a row", nodes, edges, usage_limit=9.0)
solution = solve(problem)
assert brute_force(problem) == (solution.assignment, solution.cost), solution
assert not {name.partition(".")[0] for name in sys.modules} & {"shardwright", "torch"}
print(solution.assignment, solution.status)
"""


def test_the_folder_alone_solves(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "choices", ignore=shutil.ignore_patterns("__pycache__"))
    ran = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    # 4 x 2.0 seconds in 8 of 9 bytes: all alike is cheapest, and all in the first do not fit
    assert ran.stdout == "(1, 1, 1, 1) optimal\n", ran.stderr
