"""Attention as one operator of a compiled function: results, gradients and bytes as without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.runtime import Mesh, RankError, RankPool, count_collectives, ops, ring_attention

Pool = Callable[[int], RankPool]


def check(leaves: Mapping[str, Tensor], options: Mapping[str, Any], backend: str) -> None:
    """A compiled call is one graph and equals one that is not, also in the bytes that it moves."""
    torch.compiler.reset()

    def call(options: Mapping[str, Any], **tensors: Any) -> Tensor:
        return ops.attention(tensors.pop("q") * 2, tensors.pop("k"), **tensors, **options)

    found: list[tuple[list[Tensor], dict[Any, float]]] = []
    for run in (call, torch.compile(call, backend=backend, fullgraph=True)):
        own = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        with count_collectives() as counter:
            out = run(options, **({"v": None} | own))
            (
                out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            ).sum().backward()
        gradients = [x.grad for x in own.values() if x.grad is not None]
        assert len(gradients) == len(own)
        counts = {key: count.bytes for key, count in counter.counts.items()}
        found.append(([out.detach(), *gradients], counts))
    (want, want_counts), (got, got_counts) = found
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got_counts == want_counts


def tensors(sizes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
        for name, size in sizes.items()
    }


HEADS = {"q": (2, 4, 8, 8), "k": (2, 2, 8, 8), "v": (2, 2, 8, 5)}
LATENTS = {"q": (2, 4, 8, 8), "k": (2, 1, 8, 6 + 2), "up": (4, 6 + 5, 6)}
SINKS = {"sinks": (4,)}
OVER_SHARDS: list[tuple[int, dict[str, tuple[int, ...]], dict[str, Any]]] = [
    (2, HEADS, {"algorithm": "ring", "zigzag": True, "causal": True, "scale": 0.3}),
    (2, HEADS | SINKS, {"algorithm": "ring", "causal": True, "window": 5, "softcap": 3.0}),
    (2, LATENTS | SINKS, {"algorithm": "ring", "causal": True}),
    (3, LATENTS, {"algorithm": "gather", "zigzag": True, "causal": True}),
    (2, HEADS | SINKS, {"algorithm": "pass_q"}),
    (2, HEADS | SINKS, {"algorithm": "ulysses", "causal": True, "softcap": 2.0}),
    (4, HEADS, {"algorithm": "ulysses", "zigzag": True, "causal": True}),
    (3, HEADS | SINKS, {"algorithm": "window", "causal": True, "window": 11}),
]  # fmt: skip


def over_shards(sizes: dict[str, tuple[int, ...]], options: dict[str, Any]) -> None:
    """In one rank."""
    axis = Mesh.create({"cp": dist.get_world_size()})["cp"]
    same = tensors({name: s for name, s in sizes.items() if name in ("sinks", "up")}, 0)
    check(tensors(sizes, axis.rank) | same, options | {"axis": axis}, "aot_eager")


@pytest.mark.parametrize(("ranks", "sizes", "options"), OVER_SHARDS)
@pytest.mark.some(3)
def test_over_shards(
    pool: Pool, ranks: int, sizes: dict[str, tuple[int, ...]], options: dict[str, Any]
) -> None:
    pool(ranks).run(over_shards, sizes, options)


ALONE: list[tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = [
    (HEADS, {"causal": True, "softcap": 3.0}),
    (HEADS | SINKS, {"causal": True, "window": 5}),
    (HEADS | {"mask": (1, 4, 8, 8)}, {"causal": True}),
    (HEADS | {"k": (2, 2, 12, 8), "v": (2, 2, 12, 5)}, {"causal": True, "query_start": 3}),
    (LATENTS, {"causal": True}),
]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sizes", "options"), ALONE)
def test_on_one_rank(
    sizes: dict[str, tuple[int, ...]], options: dict[str, Any], backend: str
) -> None:
    check(tensors(sizes, 0), options, backend)


def test_many_lengths_are_two_graphs() -> None:
    """One of the first length and one of any."""
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, causal=True, softcap=2.0)

    for rows in (8, 9, 12, 31, 64):
        call(*tensors({name: (*s[:2], rows, s[3]) for name, s in HEADS.items()}, 0).values())
    assert len(graphs) == 2


def ring_alone() -> None:
    """In one rank: what `ring_attention` itself says in a compiled function."""
    axis = Mesh.create({"cp": dist.get_world_size()})["cp"]
    q = tensors(HEADS, 0)["q"]
    call = torch.compile(lambda: ring_attention(q, q, q, group=axis), fullgraph=True)
    call()


def test_functions_that_are_no_operators_say_so(pool: Pool) -> None:
    with pytest.raises(RankError, match="ring_attention can't be compiled; call"):
        pool(2).run(ring_alone)
