"""Ranks on this machine: run a function in N gloo processes and bring back what it returns.

    losses = run_ranks(train, 4, config)          # one launch
    with RankPool(4) as pool:                     # many small runs in the same processes
        pool.run(check, case)

The function must be importable (defined at the top of a module), its arguments and
results picklable.  Each rank has torch.distributed initialised and one thread.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_all_start_methods, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

# How long the other ranks may take to finish or fail, too, after the first one failed.
_GRACE_S = 0.5


class RankError(RuntimeError):
    """A rank failed; `rank` says which, the message holds its traceback."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    fn: Callable[..., Any], ranks: int, *args: object, timeout_s: float = 120.0
) -> list[Any]:
    """`[fn(*args) on rank 0, ... on rank 1, ...]`, each rank a process of its own.

    Raises RankError with the traceback of the first rank that failed (by an exception or by
    dying), TimeoutError naming the ranks that had not finished after `timeout_s` seconds.
    No process is left behind in any case.
    """
    with RankPool(ranks) as pool:
        return pool.run(fn, *args, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


@dataclass(frozen=True, slots=True)
class _Answer:
    ok: bool
    value: Any  # the pickled result, or the text of the traceback
    died: bool = False


class RankPool:
    """N rank processes that stay up between runs; a context manager.

    After a run that fails on some ranks only (the others may be waiting inside a collective) or
    times out, the processes are killed and the next run starts fresh ones.
    """

    def __init__(self, ranks: int) -> None:
        if ranks < 1:
            raise ValueError(f"at least one rank is needed, got {ranks}")
        self.ranks = ranks
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: object, timeout_s: float = 120.0) -> list[Any]:
        """`fn(*args)` on every rank at once; one result per rank.  Errors as in `run_ranks`."""
        task = pickle.dumps((fn, args))
        deadline = time.monotonic() + timeout_s
        if not self._workers:
            self._start(timeout_s)
        try:
            for worker in self._workers:
                worker.pipe.send_bytes(task)
            answers = self._collect(deadline)
        except BaseException:
            self._kill()
            raise
        if len(answers) < self.ranks or any(answer.died for answer in answers.values()):
            self._kill()
        # A rank that died takes its connections down; what the others then say is a consequence.
        failed = sorted(
            (rank for rank, answer in answers.items() if not answer.ok),
            key=lambda rank: not answers[rank].died,
        )
        if failed:
            rank = failed[0]
            raise RankError(f"rank {rank} of {self.ranks} failed:\n{answers[rank].value}", rank)
        if len(answers) < self.ranks:
            late = [rank for rank in range(self.ranks) if rank not in answers]
            raise TimeoutError(
                f"{_list_ranks(late)} of {self.ranks} did not finish `{_name(fn)}` within"
                f" {timeout_s:g} s; all ranks were stopped"
            )
        return [pickle.loads(answers[rank].value) for rank in range(self.ranks)]

    def close(self) -> None:
        """End the processes: by themselves if they are idle, else killed."""
        for worker in self._workers:
            worker.pipe.close()
        deadline = time.monotonic() + 2.0
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self, timeout_s: float) -> None:
        # A file store in a folder of its own: no port that another launch could take.
        self._folder = tempfile.TemporaryDirectory(prefix="shardwright-ranks-")
        store = str(Path(self._folder.name) / "store")
        context = _context()
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.ranks, store, timeout_s, dict(os.environ))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            with _safe_path():
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _collect(self, deadline: float) -> dict[int, _Answer]:
        """Answers in the order in which they came; fewer than ranks after failure or deadline."""
        answers: dict[int, _Answer] = {}
        waiting = {worker.pipe: rank for rank, worker in enumerate(self._workers)}
        while waiting:
            left = deadline - time.monotonic()
            ready = connection.wait(list(waiting), max(0.0, left))
            if not ready:
                return answers
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                answers[rank] = self._receive(pipe, rank)
                if not answers[rank].ok:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return answers

    def _receive(self, pipe: Connection, rank: int) -> _Answer:
        try:
            ok, value = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._workers[rank].process
            process.join(5.0)
            text = f"the process died with {_exit_reason(process.exitcode)}"
            return _Answer(False, text, died=True)
        return _Answer(ok, value)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@contextmanager
def _safe_path() -> Generator[None]:
    """Python processes that start now do not look for modules in the current folder.

    Whatever lies there (a `pickle.py`) would run in place of the library; where this process may
    import from, they are told later.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _context() -> ForkServerContext | SpawnContext:
    """How ranks start: forked from a clean server process that has imported torch once.

    Never forked from this process, whose threads and CUDA state a fork would break.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.device_mesh"])
    return context


def _serve(
    pipe: Connection,
    rank: int,
    ranks: int,
    store: str,
    timeout_s: float,
    environment: dict[str, str],
) -> None:
    """A rank's main loop: run what comes through the pipe until it is closed."""
    torch.set_num_threads(1)
    os.environ.update(environment)  # the server process has the one of when it was started
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            break
        pipe.send_bytes(pickle.dumps(_answer(task)))
    dist.destroy_process_group()


def _answer(task: bytes) -> tuple[bool, bytes | str]:
    try:
        fn, args = pickle.loads(task)
        return True, pickle.dumps(fn(*args))
    except Exception:  # whatever it is, it goes to the parent, which raises it
        return False, traceback.format_exc().rstrip()


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (SIGKILL: out of memory?)" if code == -9 else ""
        return f"signal {-code}{hint}"
    return f"exit code {code}"


def _list_ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", repr(fn))
