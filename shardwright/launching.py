"""Scripts that start a plan on many machines: by `torchrun` on each, or by Slurm.

Ranks of one machine follow one another, and the innermost axis of a mesh has neighbouring ranks, so
that what was priced inside a node runs inside one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

By: TypeAlias = Literal["torchrun", "slurm"]
PORT = 29500
_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")


@dataclass(frozen=True, slots=True)
class Launch:
    """What a script starts: `program` (a Python file and its arguments) on `nodes` machines with
    `per_node` ranks each, for the model `title` on the `mesh` (axis sizes, outermost first).

    `time_limit` is `HH:MM:SS` or `D-HH:MM:SS`; after a failure all ranks start again, up to
    `max_restarts` times.
    """

    title: str
    mesh: Mapping[str, int]
    nodes: int
    per_node: int
    program: Sequence[str]
    time_limit: str
    max_restarts: int

    @staticmethod
    def of(
        title: str,
        mesh: Mapping[str, int],
        gpus_per_node: int,
        nodes: int | None,
        program: Sequence[str],
        time_limit: str,
        max_restarts: int,
    ) -> Launch:
        """For a plan that was priced on nodes of `gpus_per_node` GPUs.

        Raises ValueError for other nodes than that, and a time limit that is none.
        """
        ranks = prod(mesh.values())
        per_node = min(ranks, gpus_per_node)
        needed = -(-ranks // per_node)
        if ranks % per_node:
            raise ValueError(
                f"the plan has {ranks} GPUs, which are not whole nodes of {per_node}: plan for a"
                " multiple, or for a cluster with other nodes (`gpus_per_node` of its file)"
            )
        if nodes not in (None, needed):
            raise ValueError(
                f"--nodes {nodes}: the plan is for {needed} nodes of {per_node} GPUs, and prices"
                " what goes between them; plan again for a cluster with other nodes"
                " (`gpus_per_node` of its file)"
            )
        if not _TIME.fullmatch(time_limit):
            raise ValueError(f"--time-limit {time_limit}: expected HH:MM:SS or D-HH:MM:SS")
        return Launch(title, mesh, needed, per_node, program, time_limit, max_restarts)

    def script(self, by: By) -> str:
        """The text of a bash script."""
        lines = self._slurm() if by == "slurm" else self._torchrun()
        return "\n".join(["#!/bin/bash", *lines, ""])

    def _slurm(self) -> list[str]:
        return [
            f"#SBATCH --nodes={self.nodes}",
            "#SBATCH --ntasks-per-node=1",
            f"#SBATCH --gpus-per-node={self.per_node}",
            f"#SBATCH --time={self.time_limit}",
            "#SBATCH --requeue --open-mode=append",
            *self._about("sbatch"),
            "set -eu",
            'HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "exec srun --kill-on-bad-exit " + self._command('"$SLURM_JOB_ID"'),
        ]

    def _torchrun(self) -> list[str]:
        seconds = _seconds(self.time_limit)
        return [
            *self._about("bash, on every machine, with HOST the address of one of them"),
            "set -eu",
            ': "${HOST:?set HOST to the address of one of the machines, the same on all}"',
            f"exec timeout --kill-after=60 {seconds} " + self._command('"${RUN:-shardwright}"'),
        ]

    def _about(self, how: str) -> list[str]:
        mesh = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        many = f"{self.nodes} machines with {self.per_node} ranks each"
        return [
            f"# {self.title}, mesh {mesh}, on {many}; run it by {how}.",
            f"# Ranks are numbered machine by machine, so that {self._inside()}.",
            "# After a failure all ranks start again: the program goes on from its last checkpoint",
            "# if it is one that does (examples/train.py with --resume).",
        ]

    def _inside(self) -> str:
        """Which axes lie inside a machine."""
        names = list(self.mesh)
        ranks = {name: prod(list(self.mesh.values())[i:]) for i, name in enumerate(names)}
        inside = [name for name in names if ranks[name] <= self.per_node]
        if not inside:
            return f"{names[-1]} goes over neighbouring ones"
        return f"{' and '.join(inside)} {'lie' if len(inside) > 1 else 'lies'} inside one"

    def _command(self, run: str) -> str:
        program = " ".join(map(shlex.quote, self.program))
        return (
            f"torchrun --nnodes {self.nodes} --nproc-per-node {self.per_node} --rdzv-id {run} "
            f'--rdzv-backend c10d --rdzv-endpoint "$HOST:${{PORT:-{PORT}}}" '
            f"--max-restarts {self.max_restarts} {program}"
        )


def _seconds(limit: str) -> int:
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


__all__ = ["By", "Launch"]
