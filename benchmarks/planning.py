"""Cold planning: from starting the process to the written module, wall time and peak memory.

    python -m benchmarks.planning [--case 8b-8x8 ...] [--repeat 1] [--limit-s 300]

Each case is a fresh process of the command `plan`, on at most two cores; of several repetitions the
fastest is shown, since other work on the machine only ever adds time.  Peak memory is that of the
process (its largest resident set).  The columns at the end say where the time went; "start" is all
that is not in a planning step: Python, imports, reading and writing files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_STEPS = ("model", "capture", "problem", "solve", "baselines")
_CORES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """A request, what it may take, and AutoParallel's figures where they were published."""

    config: str
    gpus: int
    mesh: str | None  # None: searched
    batch: int
    target: tuple[float, float | None]  # seconds, GB
    autoparallel: tuple[float, float] | None = None  # seconds, GB; published, not run here
    cluster: str = "h100"
    options: tuple[str, ...] = ("--seq", "8192")


CASES: Mapping[str, Case] = {
    "8b-8x8": Case("llama3-8b", 64, "8x8", 32, (10.0, 2.0)),
    "8b-32x8": Case("llama3-8b", 256, "32x8", 256, (10.0, 2.0), (91.0, 5.5)),
    "70b-32x8": Case("llama3-70b", 256, "32x8", 256, (15.0, None), (188.0, 14.8)),
    "405b-1024": Case("llama3-405b", 1024, None, 512, (30.0, None)),
    "ds-prefill": Case(
        "deepseek-v3", 32, None, 32, (60.0, None), None, "h800",
        ("--phase", "prefill", "--seq", "4096"),
    ),
    "ds-decode": Case(
        "deepseek-v3", 320, None, 10_240, (60.0, None), None, "h800",
        ("--phase", "decode", "--context", "4096"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One cold process: seconds of wall time and of the processor, bytes, seconds by step."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    steps: Mapping[str, float]

    @property
    def start(self) -> float:
        """Seconds outside all steps."""
        return self.seconds - sum(self.steps.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=300.0, help="for one process")
    args = parser.parse_args()
    columns = "{:10} {:>7} {:>7} {:>8} | {:>14} | {:>16} |" + " {:>9}" * (1 + len(_STEPS))
    head = ("case", "wall", "cpu", "peak", "target", "AutoParallel *", "start", *_STEPS)
    print(columns.format(*head))
    for name in args.case:
        case = CASES[name]
        runs = [plan_cold(case, args.limit_s) for _ in range(args.repeat)]
        run = min(runs, key=lambda r: r.seconds)
        print(
            columns.format(
                name,
                f"{run.seconds:.1f} s",
                f"{run.cpu_seconds:.1f} s",
                f"{run.peak_bytes / 1e9:.2f} GB",
                _limits(*case.target),
                "-" if case.autoparallel is None else _limits(*case.autoparallel),
                f"{run.start:.2f} s",
                *(f"{run.steps.get(step, 0.0):.2f} s" for step in _STEPS),
            ),
            flush=True,
        )
    print("* published, same two cores, not run here")


def _limits(seconds: float, gigabytes: float | None) -> str:
    return f"{seconds:g} s" + ("" if gigabytes is None else f", {gigabytes:g} GB")


def plan_cold(case: Case, limit_s: float) -> Run:
    """Run `plan` once in a new process.  Raises RuntimeError with its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "plan_out", Path(folder) / "log"
        config = _ROOT / "examples" / "configs" / case.config
        command = [
            sys.executable, "-m", "shardwright.cli", str(config), "--gpus", str(case.gpus),
            "--cluster", case.cluster, *case.options, "--batch", str(case.batch), "--out",
            str(out),
        ]  # fmt: skip
        if case.mesh is not None:
            command += ["--mesh", case.mesh]
        with log.open("w") as output:
            start = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=_ROOT, preexec_fn=_take_cores
            )
            code, cpu_seconds, peak_bytes = _wait(process, limit_s)
            seconds = time.perf_counter() - start
        if code != 0 or not (out / "sharded_model.py").exists():
            raise RuntimeError(f"`{' '.join(command)}` gave {code}:\n{log.read_text()[-3000:]}")
        plan = json.loads((out / "plan.json").read_text())
        return Run(seconds, cpu_seconds, peak_bytes, _step_seconds(plan))


def _take_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> tuple[int, float, int]:
    """Exit code, processor seconds and peak bytes of the process; killed after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            # Popen must not wait for a process that is gone.
            process.returncode = os.waitstatus_to_exitcode(status)
            cpu = usage.ru_utime + usage.ru_stime
            return process.returncode, cpu, usage.ru_maxrss * 1024
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.02)


def _step_seconds(plan: Mapping[str, Any]) -> dict[str, float]:
    """The planning steps of a plan file."""
    return {step: float(seconds) for step, seconds in plan["search"]["seconds"]}


if __name__ == "__main__":
    main()
