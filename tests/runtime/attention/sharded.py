"""Run an attention function on ranks, and put the shards together again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright import runtime
from shardwright.runtime import Axis, Layout, Mesh, RankPool, count_collectives
from shardwright.runtime.mesh import transport
from shardwright.runtime.mesh.counter import Phase
from tests.runtime.attention.reference import Case, make, reference

Pool = Callable[[int], RankPool]
Counts = dict[tuple[str, str, Phase], tuple[float, int]]  # (op, axis, phase): bytes, messages

RING, GATHER, PASS_Q = "ring_attention", "gather_kv_attention", "pass_q_attention"
ULYSSES, USP, WINDOW = "ulysses_attention", "usp_attention", "window_attention"
TREE = "tree_attention"


@dataclass(frozen=True)
class Call:
    """One algorithm on one case: `ulysses` ranks in the inner group, `delays` seconds per rank."""

    name: str
    case: Case
    ulysses: int = 2
    stride: int = 0
    delays: tuple[float, ...] = ()

    def layout(self) -> Layout:
        """Which tokens each rank holds."""
        if self.name == USP:
            return self.case.make_layout(self.case.ranks // self.ulysses).split(self.ulysses)
        return self.case.make_layout()


def on_rank(call: Call) -> tuple[list[Tensor], Counts]:
    """(result and gradients of this rank's shards, what was counted)."""
    case, layout, inputs = call.case, call.layout(), make(call.case)
    names = {"ring": case.ranks // call.ulysses, "ulysses": call.ulysses}
    mesh = Mesh.create(names if call.name == USP else {"cp": case.ranks})
    rank, post = mesh.rank, transport.post
    tokens = (inputs.q, inputs.k, inputs.v)[: _tokens(case)]
    leaves = [layout.shard(x, 2, rank).requires_grad_() for x in tokens]
    tensors = [*leaves, None][:3]  # q, k, v
    options: dict[str, Any] = {
        "causal": case.causal, "window": case.window, "softcap": case.softcap, "layout": layout,
        "scale": case.scale, "slopes": inputs.slopes, "mask": inputs.mask,
    }  # fmt: skip
    if inputs.sinks is not None:
        leaves.append(inputs.sinks.clone().requires_grad_())
        options["sinks"] = leaves[-1]
    if inputs.up is not None:
        leaves.append(inputs.up.clone().requires_grad_())
        options["up"] = leaves[-1]
    if inputs.bias is not None:
        leaves.append(layout.shard(inputs.bias, 2, rank).requires_grad_())
        options["bias"] = leaves[-1]
    if call.stride:
        options["stride"] = call.stride
    groups = {name: mesh[name] for name in mesh.names} if call.name == USP else mesh_group(mesh)
    if call.delays:
        transport.post = _late(call.delays[rank])
    try:
        with count_collectives() as counter:
            out = getattr(runtime, call.name)(*tensors, **groups, **options)
            out.backward(layout.shard(inputs.grad, 2, rank))
    finally:
        transport.post = post
    counts: Counts = {key: (row.bytes, row.messages) for key, row in counter.counts.items()}  # pyright: ignore
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)], counts


def mesh_group(mesh: Mesh) -> dict[str, Axis]:
    """The option `group` for a mesh of one axis."""
    return {"group": mesh.axes[0]}


def _late(seconds: float) -> Any:
    post = transport.post

    def late(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return post(*args, **options)

    return late


def _tokens(case: Case) -> int:
    """How many of q, k, v there are: latents have no v."""
    return 2 if case.rank else 3


def run(pool: Pool, call: Call) -> list[Tensor]:
    """Whole result and gradients, in the order of `reference`."""
    results = [shards for shards, _ in pool(call.case.ranks).run(on_rank, call)]
    layout, first = call.layout(), 1 + _tokens(call.case)
    whole = [layout.unshard(parts, 2) for parts in zip(*(r[:first] for r in results), strict=True)]
    last = len(results[0]) - bool(call.case.bias)
    for summands in zip(*(r[first:last] for r in results), strict=True):  # of sinks and up
        whole.append(torch.stack(summands).sum(0))
    if call.case.bias:
        whole.append(layout.unshard([r[-1] for r in results], 2))
    return whole


def check(pool: Pool, name: str, case: Case, tolerance: float = 1e-10, **options: Any) -> None:
    """The sharded result and its gradients are those of one process."""
    wants = reference(case, make(case), torch.float64)
    gots = run(pool, Call(name, case, **options))
    assert len(gots) == len(wants)
    for got, want in zip(gots, wants, strict=True):
        assert got.dtype == case.dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
