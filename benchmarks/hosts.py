"""Ranks on this machine, or on two hosts that it plays: network namespaces joined by a cable.

A host is a namespace; a pair of virtual devices connects the two, each end held to a rate by a
token bucket, so that gloo's traffic between ranks of different hosts really passes that slowly.
Joining and shaping takes root and the commands `ip` and `tc`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[1]


class NoHostsError(RuntimeError):
    """This machine lets no two hosts be played; says why."""


@dataclass(frozen=True)
class Hosts:
    """Two namespaces, and the name of the device that connects each to the other."""

    names: tuple[str, str]
    devices: tuple[str, str]

    def shape(self, megabits: int) -> None:
        """Hold both ends of the cable to so many Mbit/s."""
        for name, device in zip(self.names, self.devices, strict=True):
            rate = ("rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms")
            shape = ("tc", "qdisc", "replace", "dev", device, "root", "tbf", *rate)
            _ip("netns", "exec", name, *shape)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@contextlib.contextmanager
def two_hosts(megabits: int) -> Generator[Hosts]:
    """Namespaces joined by a cable of so many Mbit/s each way; removed in any case.

    Raises NoHostsError where they may not be made.
    """
    if shutil.which("ip") is None or shutil.which("tc") is None or os.geteuid() != 0:
        raise NoHostsError("network namespaces need root and the commands `ip` and `tc`")
    tag = f"{os.getpid() % 10**6}"
    hosts = Hosts((f"sw{tag}a", f"sw{tag}b"), (f"sw{tag}va", f"sw{tag}vb"))
    try:
        try:
            _join(hosts)
            hosts.shape(megabits)
        except subprocess.CalledProcessError as error:
            reason = f"this kernel lets no namespaces be joined and shaped: {error.stderr}"
            raise NoHostsError(reason) from error
        yield hosts
    finally:
        for name in hosts.names:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def _join(hosts: Hosts) -> None:
    names, devices = hosts.names, hosts.devices
    for name in names:
        _ip("netns", "add", name)
    ends = ("type", "veth", "peer", "name", devices[1], "netns", names[1])
    _ip("link", "add", devices[0], "netns", names[0], *ends)
    for number, (name, device) in enumerate(zip(names, devices, strict=True), start=1):
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", device)
        _ip("-n", name, "link", "set", device, "up")


def run_ranks(
    target: str, folder: Path, ranks: int, hosts: Hosts | None = None, timeout_s: float = 150.0
) -> None:
    """Call `target` (`benchmarks.regret:measure`) with `folder` in every rank of a gloo group.

    Ranks fill the hosts in order, as many on each; None: all are on this machine.  All are killed
    if one fails or is late; then raises RuntimeError with what that rank has printed.
    """
    running: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + timeout_s
    (folder / "store").unlink(missing_ok=True)
    try:
        running += [_start(target, folder, rank, ranks, hosts) for rank in range(ranks)]
        while any(process.poll() is None for process in running):
            if any(p.poll() not in (None, 0) for p in running) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()
    for rank in sorted(range(ranks), key=lambda rank: running[rank].returncode == -9):
        if running[rank].returncode:
            text = (folder / f"{rank}.log").read_text()
            raise RuntimeError(f"rank {rank} ended with {running[rank].returncode}:\n{text}")


def _start(
    target: str, folder: Path, rank: int, ranks: int, hosts: Hosts | None
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.hosts", target, str(folder), str(rank), str(ranks)]
    if hosts is not None:
        host = rank * len(hosts.names) // ranks
        environment["GLOO_SOCKET_IFNAME"] = hosts.devices[host]
        command = ["ip", "netns", "exec", hosts.names[host], *command]
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def main(target: str, folder: str, rank: str, ranks: str) -> None:
    """What a rank's process runs."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), int(ranks))
    dist.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(ranks), timeout=timedelta(seconds=120)
    )
    module, _, name = target.partition(":")
    getattr(importlib.import_module(module), name)(Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
