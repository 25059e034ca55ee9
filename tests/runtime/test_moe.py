"""Experts on one rank and on several: results and all gradients of one token after another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.runtime import Axis, Mesh, RankPool, count_collectives, moe

Pool = Callable[[int], RankPool]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}
EXPERTS, HIDDEN, INNER, CHOICES = 8, 6, 4, 3
STACKED = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


@dataclass(frozen=True)
class Case:
    """All tensors of a layer, whole, and the options that say how its experts compute."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    stacked: dict[str, Tensor]
    options: dict[str, Any]


GPT_OSS = {
    "gating": "pairs", "alpha": 1.7, "limit": 0.8, "offset": 1.0, "transposed": True,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "halves": {"gating": "halves"},
    "pairs with all else": GPT_OSS,
    "separate": {"gating": "separate", "activation": "gelu_tanh", "transposed": True},
    "no gate": {"gating": "none", "activation": "relu2"},
    "weighed before": {"gating": "halves", "transposed": True, "weigh_input": True},
}
BIASED = ("pairs with all else", "separate")


def case_of(kind: str, router: str = "random", tokens: int = 13) -> Case:
    """A layer with random weights; `router` says which experts the tokens choose."""
    torch.manual_seed(0)
    options = OPTIONS[kind]
    rows = INNER * (2 if options["gating"] in ("halves", "pairs") else 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    shapes = {"up": (rows, HIDDEN), "down": (HIDDEN, INNER)}
    if options["gating"] == "separate":
        shapes["gate"] = (rows, HIDDEN)
    stacked: dict[str, Tensor] = {}
    for name, (out, into) in shapes.items():
        stacked[name] = random(
            EXPERTS, *((into, out) if options.get("transposed") else (out, into))
        )
        if kind in BIASED:
            stacked[f"{name}_bias"] = random(EXPERTS, out)
    return Case(
        random(tokens, HIDDEN), routed(router, tokens), random(tokens, CHOICES), stacked, options
    )


def routed(router: str, tokens: int) -> Tensor:
    """Expert numbers (tokens, CHOICES)."""
    if router == "random":
        return torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(tokens)])
    if router == "the last expert only":
        return torch.full((tokens, CHOICES), EXPERTS - 1)
    assert router == "a few experts"
    return torch.tensor([[1, 2, 6]]).expand(tokens, -1)


def expert(case: Case, number: int, x: Tensor) -> Tensor:
    """One expert on one token, written out with `F.linear`."""
    options = case.options

    def product(name: str, x: Tensor) -> Tensor:
        matrix = case.stacked[name][number]
        bias = case.stacked.get(f"{name}_bias")
        matrix = matrix.T if options.get("transposed") else matrix
        return F.linear(x, matrix, None if bias is None else bias[number])

    u = product("up", x)
    g = product("gate", x) if "gate" in case.stacked else None
    if options["gating"] == "halves":
        g, u = u[:INNER], u[INNER:]
    elif options["gating"] == "pairs":
        pairs = u.view(INNER, 2)
        g, u = pairs[:, 0], pairs[:, 1]
    if g is None:
        return product("down", torch.clamp(u, min=0) ** 2)
    if limit := options.get("limit"):
        g, u = torch.clamp(g, max=limit), torch.clamp(u, -limit, limit)
    if options.get("activation") == "gelu_tanh":
        g = F.gelu(g, approximate="tanh")
    else:
        g = g / (1 + torch.exp(-options.get("alpha", 1.0) * g))
    return product("down", g * (u + options.get("offset", 0.0)))


def expected(case: Case) -> dict[str, Tensor]:
    """The result and all gradients, token by token and choice by choice."""
    leaves = {n: t.clone().requires_grad_() for n, t in floats(case).items()}
    own = replace(case, stacked={name: leaves[name] for name in case.stacked})
    rows: list[Tensor] = []
    for x, chosen, weights in zip(leaves["x"], case.indices, leaves["weights"], strict=True):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for number, weight in zip(chosen.tolist(), weights, strict=True):
            if case.options.get("weigh_input"):
                total = total + expert(own, number, x * weight)
            else:
                total = total + weight * expert(own, number, x)
        rows.append(total)
    out = torch.stack(rows)
    (out * loss_weights(out)).sum().backward()
    return {"out": out.detach()} | {name: _grad(leaf) for name, leaf in leaves.items()}


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def floats(case: Case) -> dict[str, Tensor]:
    return {"x": case.x, "weights": case.weights, **case.stacked}


def loss_weights(out: Tensor) -> Tensor:
    """Fixed factors, so that the gradient of the result is not all ones."""
    return torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)


# --- the same on ranks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a layer lies on the ranks: which axis cuts experts, the hidden units, the tokens."""

    axes: dict[str, int]
    experts: str = ""
    partial: bool = False
    inner: str = ""
    tokens: tuple[int, ...] = ()  # on each rank of the experts' axis; empty: all on every rank


def run_layer(case: Case, layout: Layout) -> tuple[dict[str, Tensor], dict[str, float]]:
    """In one rank: result and gradients, each in the place that it has in the whole; bytes."""
    mesh = Mesh.create(layout.axes)
    parts = {name: _part(mesh, layout, case, name) for name in ("indices", *floats(case))}
    tensors = {"indices": case.indices, **floats(case)}
    own = {name: tensors[name][part].clone() for name, part in parts.items()}
    leaves = {name: own[name].requires_grad_() for name in floats(case)}
    axis = mesh[layout.experts] if layout.experts else None
    if layout.inner and mesh[layout.inner].rank and "down_bias" in leaves:
        leaves["down_bias"].data.zero_()  # added once, not by each rank
    with count_collectives() as counter:
        out = moe(
            leaves["x"], own["indices"], leaves["weights"],
            **{name: leaves[name] for name in case.stacked}, **case.options,
            expert_axis=axis, partial=layout.partial,
        )  # fmt: skip
        weights = loss_weights(case.x)[parts["x"]]
        (out * weights).sum().backward()
    bytes_of = {
        phase: counter.bytes("all_to_all", phase=phase) for phase in ("forward", "backward")
    }
    assert counter.bytes() == sum(bytes_of.values())
    own = {"out": out.detach()} | {name: _grad(leaf) for name, leaf in leaves.items()}
    whole: dict[str, Tensor] = {}
    for name, t in own.items():
        like = "x" if name == "out" else name
        whole[name] = torch.zeros_like(tensors[like])
        whole[name][parts[like]] = t
    if layout.inner and mesh[layout.inner].rank and "down_bias" in whole:
        whole["down_bias"].zero_()
    return whole, bytes_of


def _part(mesh: Mesh, layout: Layout, case: Case, name: str) -> Any:
    """The index of this rank's part of a tensor."""
    axis = mesh[layout.experts] if layout.experts else None
    if name not in STACKED:
        if not layout.tokens or axis is None:
            return slice(None)
        first = sum(layout.tokens[: axis.rank])
        return slice(first, first + layout.tokens[axis.rank])
    first = slice(None) if axis is None else _block(axis, EXPERTS)
    if not layout.inner or name == "down_bias":
        return (first,)
    transposed = bool(case.options.get("transposed"))
    if name.endswith("_bias"):
        dim = 1
    else:
        dim = 1 if transposed == (name == "down") else 2
    size = case.stacked[name].shape[dim]
    return (first, *[slice(None)] * (dim - 1), _block(mesh[layout.inner], size))


def _block(axis: Axis, size: int) -> slice:
    rows = axis.block(size)
    return slice(rows.start, rows.stop)


def check(pool: Pool, case: Case, layout: Layout) -> list[dict[str, float]]:
    """What all ranks have adds up to the whole; each rank's bytes."""
    ranks = 1
    for size in layout.axes.values():
        ranks *= size
    results = pool(ranks).run(run_layer, case, layout)
    for name, want in expected(case).items():
        got = torch.stack([whole[name] for whole, _ in results]).sum(0)
        torch.testing.assert_close(got, want, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    return [bytes_of for _, bytes_of in results]


ROUTERS = ("random", "the last expert only", "a few experts")


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("router", ROUTERS)
def test_one_rank(kind: str, router: str) -> None:
    case = case_of(kind, router)
    leaves = {n: t.clone().requires_grad_() for n, t in floats(case).items()}
    x, weights = leaves.pop("x"), leaves.pop("weights")
    out = moe(x, case.indices, weights, **leaves, **case.options)
    (out * loss_weights(out)).sum().backward()
    want = expected(case)
    torch.testing.assert_close(out, want["out"], **EXACT)
    for name, leaf in {"x": x, "weights": weights, **leaves}.items():
        torch.testing.assert_close(_grad(leaf), want[name], **EXACT)


def test_leading_dims_and_no_tokens() -> None:
    case = case_of("halves", tokens=12)
    flat = moe(case.x, case.indices, case.weights, **case.stacked)
    shaped = [t.view(3, 4, -1) for t in (case.x, case.indices, case.weights)]
    torch.testing.assert_close(moe(*shaped, **case.stacked), flat.view(3, 4, -1))
    nothing = moe(case.x[:0], case.indices[:0], case.weights[:0], **case.stacked)
    assert nothing.shape == (0, HIDDEN)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_on_ranks_with_the_same_tokens(
    pool: Pool, kind: str, router: str, ranks: int
) -> None:
    moved = check(pool, case_of(kind, router), Layout({"ep": ranks}, "ep", partial=True))
    assert moved == [{"forward": 0, "backward": 0}] * ranks


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("tokens", [(6, 7), (13, 0), (0, 6, 6, 1)])
def test_tokens_go_to_experts_and_back(
    pool: Pool, kind: str, router: str, tokens: tuple[int, ...]
) -> None:
    case = case_of(kind, router)
    layout = Layout({"ep": len(tokens)}, "ep", tokens=tokens)
    assert check(pool, case, layout) == [
        counted_by_hand(case, tokens, r) for r in range(len(tokens))
    ]


def counted_by_hand(case: Case, tokens: tuple[int, ...], rank: int) -> dict[str, float]:
    """Bytes that `rank` receives, from the router's choices."""
    ranks = len(tokens)
    owners = case.indices // (EXPERTS // ranks)
    served = in_return = first = 0
    for source, count in enumerate(tokens):
        for chosen in owners[first : first + count].tolist():
            if source != rank:
                served += rank in chosen
            else:
                in_return += len(set(chosen) - {rank})
        first += count
    row = 8 * HIDDEN
    forward = 8 * (ranks - 1) + served * (row + CHOICES * (8 + 4)) + in_return * row
    # gradients: of results for the tokens served, of tokens and weights sent away
    return {"forward": forward, "backward": served * row + in_return * (row + 8 * CHOICES)}


def test_bytes_expected_of_a_balanced_router() -> None:
    """The formula in the docstring, against the average over random choices."""
    torch.manual_seed(0)
    ranks, trials = 4, 20_000
    owners = torch.rand(trials, EXPERTS).argsort(1)[:, :CHOICES] // (EXPERTS // ranks)
    served = (owners == 0).any(1).double().mean().item()
    q = 1 - comb(EXPERTS - EXPERTS // ranks, CHOICES) / comb(EXPERTS, CHOICES)
    assert served == pytest.approx(q, abs=0.02)


@pytest.mark.parametrize("kind", ["pairs with all else", "separate", "no gate"])
def test_hidden_units_of_each_expert_on_ranks(pool: Pool, kind: str) -> None:
    check(pool, case_of(kind), Layout({"tp": 2}, inner="tp"))


@pytest.mark.parametrize("kind", ["pairs with all else", "separate"])
@pytest.mark.parametrize("tokens", [(6, 7), (13, 0)])
def test_experts_and_their_hidden_units_on_ranks(
    pool: Pool, kind: str, tokens: tuple[int, ...]
) -> None:
    check(pool, case_of(kind), Layout({"ep": 2, "tp": 2}, "ep", inner="tp", tokens=tokens))
    check(pool, case_of(kind), Layout({"tp": 2, "ep": 2}, "ep", partial=True, inner="tp"))


def run_twice(case: Case) -> bool:
    layout = Layout({"ep": 2}, "ep", tokens=(6, 7))
    (first, _), (second, _) = run_layer(case, layout), run_layer(case, layout)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_bits_every_time(pool: Pool) -> None:
    assert pool(2).run(run_twice, case_of("halves")) == [True, True]


def half_precision(case: Case) -> tuple[Tensor, Tensor]:
    """In one rank: results of bfloat16 experts with float32 weights of choices."""
    mesh = Mesh.create({"ep": 2})
    axis = mesh["ep"]
    whole = [t.to(torch.bfloat16) for t in case.stacked.values()]
    stacked = {n: t[_block(axis, EXPERTS)] for n, t in zip(case.stacked, whole, strict=True)}
    x, weights = case.x.to(torch.bfloat16), case.weights.float()
    rows = slice(0, 6) if axis.rank == 0 else slice(6, 13)
    out = moe(x[rows], case.indices[rows], weights[rows], **stacked, expert_axis=axis)
    assert out.dtype == torch.bfloat16
    exact = moe(
        x.double(), case.indices, weights.double(),
        **{n: t.double() for n, t in zip(case.stacked, whole, strict=True)},
    )  # fmt: skip
    return out, exact[rows]


def test_half_precision(pool: Pool) -> None:
    for out, exact in pool(2).run(half_precision, case_of("halves")):
        error = (out.double() - exact).abs().max() / exact.abs().max()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_kernel_is_the_loop(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    """torch's grouped product, which GPUs use, gives results and gradients of our loop."""
    torch.manual_seed(0)
    x, weights = torch.randn(20, 16), torch.rand(20, 2)
    indices = torch.randint(0, 3, (20, 2))  # the last expert has no token
    shapes = ((4, 16, 32), (4, 16, 16)) if transposed else ((4, 32, 16), (4, 16, 16))
    found: list[list[Tensor]] = []
    for one_kernel in (False, True):
        monkeypatch.setattr(sys.modules[moe.__module__], "_one_kernel", lambda *_, k=one_kernel: k)
        torch.manual_seed(1)
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        leaves += [torch.randn(shape, requires_grad=True) for shape in shapes]
        out = moe(leaves[0], indices, *leaves[1:], transposed=transposed)
        (out * loss_weights(out)).sum().backward()
        found.append([out.detach(), *(_grad(leaf) for leaf in leaves)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_whole_is_not_all_zeros() -> None:
    """The comparisons above would not notice if every weight were zero."""
    for kind in OPTIONS:
        assert all(t.abs().max() > 0.01 for t in expected(case_of(kind)).values())


def test_refusals() -> None:
    case = case_of("halves")
    given = (case.x, case.indices, case.weights)
    with pytest.raises(ValueError, match="whole numbers of experts and weights of the same shape"):
        moe(case.x, case.indices[:, :2], case.weights, **case.stacked)
    with pytest.raises(ValueError, match=r"choices for each token: x is \(12, 6\)"):
        moe(case.x[1:], case.indices, case.weights, **case.stacked)
    with pytest.raises(IndexError, match="token sent to expert 8 of 8"):
        moe(case.x, case.indices + 8 * (case.indices == 0), case.weights, **case.stacked)
    with pytest.raises(ValueError, match="knows the activations silu, gelu"):
        moe(*given, **case.stacked, activation="tanh")
    with pytest.raises(ValueError, match="takes `gate` with gating='separate'"):
        moe(*given, **case.stacked, gating="separate")
