"""Odd but plausible models: what ranks compute, at any size that they take, is what the model does.

The reference is the model itself in one process, and no graph of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.capturing import capture_graph
from shardwright.ir.capture.capture import CaptureError, capture, capture_folded
from shardwright.loading import Loaded
from shardwright.planner.ilp.solve import solve
from shardwright.planner.strategies.roles import Roles
from shardwright.runtime import RankPool
from tests.sharded import (
    assert_close,
    builder_of,
    combine,
    flatten,
    import_source,
    mesh_of,
    random_decisions,
    source_of,
)

Pool = Callable[[int], RankPool]
Inputs = dict[str, Tensor]
WIDTH, ROWS = 16, 37


class Net(nn.Module):
    """Some layers, and what a function makes of them and of the inputs."""

    average: Tensor

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.table = nn.Linear(WIDTH, ROWS), nn.Embedding(ROWS, WIDTH)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, **inputs: Tensor) -> Any:
        return self.run(self, **inputs)


def strided_heads(net: Net, x: Tensor) -> Tensor:
    """Columns of q, k and v in turn: numbers of a head that are apart in memory."""
    y = net.up(x)
    q, k, v = (y[..., i::3].unflatten(-1, (4, -1)).transpose(1, 2) for i in range(3))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return net.down(mixed.transpose(1, 2).flatten(2))


def spectral_norm(net: Net, x: Tensor) -> Tensor:
    """Power iterations, which torch writes to buffers by `out=`."""
    return net.spectral(net.down(x).tanh())


def written_out(net: Net, x: Tensor) -> Tensor:
    """`out=` of one tensor, of two, and of a buffer."""
    h = net.down(x)
    with torch.no_grad():
        mean, best, place = torch.empty(WIDTH).to(h), torch.empty(WIDTH).to(h), torch.empty(WIDTH)
        torch.mul(h.mean((0, 1)), 2.0, out=mean)
        torch.max(h.flatten(0, 1), 0, out=(best, place := place.long()))
        torch.add(net.average, mean, out=net.average)
    return h * mean + best + net.average + place % 2


def contrastive(net: Net, a: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The classes of a cross entropy are the rows of the batch."""
    a, p = F.normalize(net.down(a), dim=-1), F.normalize(net.down(p), dim=-1)
    scores, own = a @ p.t() * 4, torch.arange(a.shape[0])
    loss = F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)
    return loss, (scores.argmax(-1) == own).sum()


def parts_of_a_vocabulary(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Labels beyond the classes of a loss, before they are clamped."""
    logits = net.head(x)
    return F.cross_entropy(logits[..., :30].flatten(0, 1), y.clamp(max=29).flatten())


def hashed(net: Net, y: Tensor) -> Tensor:
    """Numbers beyond the rows of a table, before their remainders, and one row to the left."""
    return net.table((y * 31 + 7) % 11) + net.table(y.clamp(min=1) - 1) + net.table(36 - y)


def running_products(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Along the tokens, which ranks then share: no label says of how many."""
    h = net.down(x)
    return h.cumprod(1).tanh(), h.sort(1).values[:, ::2] * 2


def pooled(net: Net, x: Tensor) -> Tensor:
    """Half as many places, rounded up."""
    return F.avg_pool1d(net.down(x).tanh().transpose(1, 2), 2, ceil_mode=True)


def over_tokens(net: Net, x: Tensor) -> Tensor:
    """A norm over the tokens, and not over the channels."""
    h = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3)
    return net.down(h) + net.head(h).logsumexp(-1, keepdim=True)


def of_any_rank(net: Net, x: Tensor) -> tuple[Tensor, ...]:
    """Attention without heads, with more dims than usual, over keys that all sequences share."""
    h, attend = net.down(x), F.scaled_dot_product_attention
    q, own = h.unflatten(-1, (4, -1)).transpose(1, 2), net.table.weight[:12].unflatten(-1, (4, -1))
    keys = own.transpose(0, 1)[None]
    grouped = q.unflatten(1, (2, 2))
    shown = x[..., None, :, 0] < x[..., 0].amax(1)[:, None, None]  # (b, 1, s)
    return (
        attend(h, h, h, is_causal=True),
        attend(h, h, h, attn_mask=shown),
        attend(grouped, grouped, grouped),
        attend(q, keys, keys.flip(2)),
        attend(q, q[:, :1], q),
    )


def named_alike(net: Net, up: Tensor, average: Tensor) -> Tensor:
    """Arguments with the names of a part and of a buffer."""
    return net.up(up[..., :WIDTH])[..., :WIDTH] * average + net.average


def _named(batch: int, tokens: int) -> Inputs:
    return {"up": _x(batch, tokens)["x"], "average": _x(batch, tokens)["x"]}


def _x(batch: int, tokens: int) -> Inputs:
    return {"x": torch.randn(batch, tokens, WIDTH, dtype=torch.float64)}


def _y(batch: int, tokens: int) -> Inputs:
    return {"y": torch.randint(ROWS, (batch, tokens))}


def _xy(batch: int, tokens: int) -> Inputs:
    return _x(batch, tokens) | _y(batch, tokens)


def _pairs(batch: int, tokens: int) -> Inputs:
    return {name: torch.randn(batch, WIDTH, dtype=torch.float64) for name in "ap"}


MODELS: dict[Callable[..., Any], Callable[[int, int], Inputs]] = {
    strided_heads: _x, spectral_norm: _x, written_out: _x, contrastive: _pairs,
    parts_of_a_vocabulary: _xy, hashed: _y, running_products: _x, pooled: _x, over_tokens: _x,
    of_any_rank: _x, named_alike: _named,
}  # fmt: skip


def loaded(run: Callable[..., Any], sizes: tuple[int, int]) -> Loaded:
    """The model and its inputs, drawn alike each time."""
    torch.manual_seed(0)
    model, inputs = Net(run).double(), MODELS[run](*sizes)
    labels = {name: ("b", "s", *[""] * x.ndim)[: x.ndim] for name, x in inputs.items()}
    return Loaded(model, inputs, labels, None)


def alone(run: Callable[..., Any], sizes: tuple[int, int]) -> tuple[Inputs, Mapping[str, Any]]:
    """Inputs of these sizes, and what one process makes of them: outputs, gradients, buffers."""
    at = loaded(run, sizes)
    inputs = dict(at.tensors)
    out = {str(path): t for path, t in flatten((at.model(**inputs),))}
    combine(out).backward()
    gradients = {name: p.grad for name, p in at.model.named_parameters()}
    buffers = {name: b.clone() for name, b in at.model.named_buffers()}
    return inputs, {"outputs": out, "gradients": gradients, "buffers": buffers}


def on_rank(source: str, state: Inputs, batches: list[Inputs]) -> list[Any]:
    """In a rank: as `alone` of each batch, or why the module does not take it."""
    found: list[Any] = []
    for inputs in batches:
        model = import_source(source).ShardedModel.from_state_dict(state)
        try:
            local = model.shard_inputs(**inputs)
        except ValueError as error:
            found.append(str(error))
            continue
        out = {str(path): t for path, t in flatten((model.gather_outputs(model(**local)),))}
        combine(out).backward()
        outputs = {name: t.detach() for name, t in out.items()}
        whole = model.full_state_dict()
        found.append({"outputs": outputs, "gradients": model.full_gradients(), "buffers": whole})
    return found


@pytest.mark.some(4)
@pytest.mark.parametrize("sizes", [(4, 8), (6, 6)], ids=["even", "uneven"])
@pytest.mark.parametrize("run", MODELS, ids=lambda run: run.__name__)
def test_ranks_compute_what_the_model_does(
    pool: Pool, run: Callable[..., Any], sizes: tuple[int, int]
) -> None:
    """Under any decisions, and at every size that is not refused; the planned one is taken."""
    graph, state = capture_graph(loaded(run, sizes), training=True), dict[str, Tensor]()
    state |= {name: t.clone() for name, t in loaded(run, sizes).model.state_dict().items()}
    wanted = [alone(run, at) for at in (sizes, (8, 8), (12, 6), (6, 9), (7, 6))]
    for seed, mesh in enumerate(((2,), (4,), (2, 2), (4,), (2,))):
        builder = builder_of(graph, mesh_of(*mesh))
        source = source_of(builder, random_decisions(builder, seed))
        ranks = 2 if mesh == (2,) else 4
        for found in pool(ranks).run(on_rank, source, state, [inputs for inputs, _ in wanted]):
            assert not isinstance(found[0], str), found[0]
            for got, (inputs, want) in zip(found, wanted, strict=True):
                if not isinstance(got, str):
                    shapes = [tuple(x.shape) for x in inputs.values()]
                    _same(got, want, f"{run.__name__} {shapes} on {mesh}, seed {seed}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_of_torch(pool: Pool, kind: type[nn.RNNBase]) -> None:
    """Whose steps torch writes out, on two and four ranks under any decisions."""
    torch.manual_seed(0)
    layer = kind(WIDTH, WIDTH, batch_first=True).double()
    model, inputs = Net(lambda net, x: layer(net.down(x))), _x(4, 6)
    model.layer = layer.double()
    model = model.double()
    out = {str(path): t for path, t in flatten((model(**inputs),))}
    combine(out).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    graph = capture_folded(model, inputs, training=True)
    for seed, mesh in enumerate(((2,), (4,), (2, 2))):
        builder = builder_of(graph, mesh_of(*mesh))
        source = source_of(builder, random_decisions(builder, seed))
        for (found,) in pool(prod(mesh)).run(on_rank, source, model.state_dict(), [inputs]):
            _same(found, {"outputs": out, "gradients": gradients}, f"{kind.__name__} on {mesh}")


def _same(got: Mapping[str, Any], want: Mapping[str, Any], what: str) -> None:
    for kind, tensors in want.items():
        for name, expected in tensors.items():
            found = got[kind].get(name)
            if expected is None:
                assert found is None or not found.any(), f"{what}: {kind} {name}"
                continue
            assert_close(found, expected.detach(), 1e-9, f"{what}: {kind} {name}")


class Layer(nn.Linear):
    """A layer with its residual, as loops are made of."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input).tanh()


class Towers(nn.Module):
    """Words are looked up before a loop over images runs, and get them afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)
        self.layers = nn.ModuleList(Layer(WIDTH, WIDTH) for _ in range(2))
        self.double()

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        words, places = self.table(y), (y % 2 == 0)[..., None]
        for layer in self.layers:
            x = layer(x)
        return self.head(words.masked_scatter(places, x.flatten(0, 1)))


def test_a_weight_is_read_before_the_loop_that_it_stands_before(pool: Pool) -> None:
    """Its gradient is added up then: behind the loop it would be each rank's own."""
    torch.manual_seed(0)
    model, inputs = Towers(), _xy(4, 6)
    out = {str(path): t for path, t in flatten((model(**inputs),))}
    combine(out).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    graph = capture_folded(model, inputs, training=True)
    labelled = [
        replace(item, labels=("b", "s", "")[: len(item.value.type.shape)]) for item in graph.inputs
    ]
    builder = builder_of(replace(graph, inputs=tuple(labelled)), mesh_of(2))
    built = builder.build(Roles(("ddp",), builder.graph, builder.network.mesh))
    solution = solve(built.problem())
    assert solution.assignment is not None
    source = source_of(builder, built.read(solution.assignment))
    places = [source.index(text) for text in ("self.table(", "for layer", ".masked_scatter(")]
    assert places == sorted(places)
    for (found,) in pool(2).run(on_rank, source, model.state_dict(), [inputs]):
        _same(found, {"outputs": out, "gradients": gradients}, "towers")


@pytest.mark.slow
def test_a_loop_over_very_many_tokens_ends() -> None:
    """torch itself takes a GRU apart into steps to tell the shape of its result."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.GRU(WIDTH, WIDTH, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.steps(x)[0]

    inputs = {"x": torch.randn(4, 8, WIDTH)}
    graph = capture_graph(Loaded(Recurrent(), inputs, {"x": ("b", "s", "")}, None), training=True)
    assert any("runs more than 20,000 operators" in bound for bound in graph.bounds)
    extent = graph.inputs[0].extents[1]
    assert extent is not None and extent.most >= 64


def test_why_a_size_stays() -> None:
    graph = capture_graph(loaded(over_tokens, (6, 8)), training=True)
    builder = builder_of(graph, mesh_of(4))
    sources = [source_of(builder, random_decisions(builder, seed)) for seed in range(5)]
    why = "# the batch stays: ranks share it, or what follows from it, unevenly"
    assert any(why in source for source in sources)


def test_out_of_another_shape_is_refused() -> None:
    def resized(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = torch.mul(x, 2, out=torch.empty(0, dtype=x.dtype))
        return net.down(out)

    with pytest.raises(
        CaptureError, match=r"test_odd_models.py:\d+: what is written to has shape \(0,\)"
    ):
        capture(Net(resized), _x(2, 4), training=True)
