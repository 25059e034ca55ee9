"""Which of its strategies does each node take?  A solver for pairwise choices under a memory limit.

It knows numpy and solvers, and no model: the folder can be taken out and used by itself.

    problem = ShardingProblem("two", nodes, edges, usage_limit=16e9)    # problem.py
    solution = solve(problem, solver="highs", time_limit_s=60)           # solve.py
    solution.assignment, solution.cost, solution.bound, solution.status  # solution.py

| file | what it has |
|---|---|
| `problem.py` | nodes, edges and live memory; `evaluate` and `brute_force`, which need no solver |
| `iopddl.py` | the same as JSON files, in the form of Google's IOPDDL benchmark |
| `solve.py` | one door to all back ends: presolve, parts, the answer priced again |
| `solution.py` | what a back end gives, and when that counts as proven |
| `presolve.py` | exact reductions, and how an answer is carried back |
| `formulation.py` | the tight linear program as sparse arrays |
| `highs.py`, `cpsat.py`, `pyomo_highs.py` | the back ends |
| `narrow.py` | the linear relaxation first, strategies that it proves too dear left out |
| `heuristic.py` | local search, and margins of strategies |
"""
