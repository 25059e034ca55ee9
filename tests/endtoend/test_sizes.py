"""A module is right at every size that it takes, and refuses the others at the call."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.capturing import capture_graph, phase_graph
from shardwright.ir.graph import Extent, Graph
from shardwright.ir.graph.serialize import graph_from_json, graph_to_json
from shardwright.loading import Loaded, load_target
from shardwright.planner.errors import PlanError
from shardwright.runtime import RankPool
from tests.sharded import (
    assert_close,
    builder_of,
    import_source,
    mesh_of,
    random_decisions,
    source_of,
    whole_outputs,
)

Pool = Callable[[int], RankPool]
F64 = torch.float64
BATCH, TOKENS, WIDTH = 4, 16, 8
ANY = Extent()
EXAMPLES = Path(__file__).parents[2] / "examples"


class Net(nn.Module):
    """A linear layer, what `mixed` makes of its result, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, dtype=F64), nn.Linear(WIDTH, WIDTH, dtype=F64)
        self.register_buffer("table", torch.linspace(1, 2, 40, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mixed(self.up(x)))

    def mixed(self, x: Tensor) -> Tensor:
        """What takes (b, s, h) to (b, s, h)."""
        return x


class Scaled(Net):
    """A number."""

    def mixed(self, x: Tensor) -> Tensor:
        return x * (7.0 / x.shape[1])


class Filled(Net):
    """A tensor that is filled with a number."""

    def mixed(self, x: Tensor) -> Tensor:
        return x * torch.full((WIDTH,), x.shape[1] ** -0.5, dtype=F64)


class PerSequence(Net):
    """A number that only the batch decides."""

    def mixed(self, x: Tensor) -> Tensor:
        return x / x.shape[0]


class LogScaled(Net):
    """A number that the library for numbers makes, over the heads of an attention."""

    def mixed(self, x: Tensor) -> Tensor:
        q = (x * math.log(x.shape[1])).unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


class Looked(Net):
    """A row of a table at the size."""

    def mixed(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("table")[x.shape[1]]


class Listed(Net):
    """A mask that Python makes."""

    def mixed(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        rows = [[1.0 if j <= i else 0.0 for j in range(n)] for i in range(n)]
        return torch.tensor(rows, dtype=F64) @ x


class Halved(Net):
    """Half of the tokens."""

    def mixed(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : x.shape[1] // 2] * 2, x[:, x.shape[1] // 2 :]], 1)


class Last(Net):
    """The last token, counted from the front."""

    def mixed(self, x: Tensor) -> Tensor:
        return x + x[:, x.shape[1] - 1, None]


class Branching(Net):
    """A branch for long sequences."""

    def mixed(self, x: Tensor) -> Tensor:
        return x.sin() if x.shape[1] > 10 else x.cos()


class Longest(Net):
    """A sequence that is too long is refused."""

    def mixed(self, x: Tensor) -> Tensor:
        assert x.shape[1] <= 32, "too long"
        return x.sin()


class Chunked(Net):
    """Chunks of four tokens."""

    def mixed(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)


class Counting(Net):
    """Positions that torch counts."""

    def mixed(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=F64)
        return x * torch.cos(places[:, None] * torch.arange(1, WIDTH + 1) / WIDTH)


class Masked(Net):
    """A mask that torch makes, and a mean over the tokens."""

    def mixed(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        seen = torch.arange(n)[:, None] >= torch.arange(n)
        scores = (x @ x.transpose(1, 2)).masked_fill(~seen, -math.inf)
        return scores.softmax(-1) @ x + x.mean(1, keepdim=True)


def loaded(model: nn.Module) -> Loaded:
    x = torch.empty(BATCH, TOKENS, WIDTH, dtype=F64)
    return Loaded(model, {"x": x}, {"x": ("b", "s", "")}, None)


def captured(kind: type[Net]) -> tuple[Net, Graph]:
    torch.manual_seed(0)
    model = kind()
    graph = capture_graph(loaded(model), training=True)
    assert graph_from_json(graph_to_json(graph)) == graph
    return model, graph


# model -> what its batch and its sequence may be besides the planned sizes
FOUND: dict[type[Net], tuple[Extent | None, Extent | None]] = {
    Net: (ANY, ANY),
    Scaled: (ANY, None),
    Filled: (ANY, None),
    PerSequence: (None, ANY),
    LogScaled: (ANY, None),
    Looked: (ANY, None),
    Listed: (ANY, None),
    Halved: (ANY, None),
    Last: (ANY, None),
    Branching: (ANY, Extent(16, 0, 1)),
    Longest: (ANY, Extent(1, 32, 1)),
    Chunked: (ANY, Extent(8, 0, 4)),
    Counting: (ANY, ANY),
    Masked: (ANY, ANY),
}


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.some(6)
def test_sizes_are_found_for_which_one_module_holds(kind: type[Net]) -> None:
    _, graph = captured(kind)
    assert graph.inputs[0].extents == (*FOUND[kind], None)
    assert bool(graph.bounds) == (FOUND[kind] != (ANY, ANY))
    assert all("test_sizes.py:" in bound for bound in graph.bounds)


def answers(
    source: str, state: dict[str, Tensor], batches: list[Tensor]
) -> list[str | tuple[Tensor, dict[str, Tensor | None]]]:
    """In a rank: of each batch the output whole and the gradients, or why it is refused."""
    model = import_source(source).ShardedModel.from_state_dict(state)
    found: list[str | tuple[Tensor, dict[str, Tensor | None]]] = []
    for x in batches:
        try:
            inputs = model.shard_inputs(x=x)
        except ValueError as error:
            found.append(str(error))
            continue
        out = model(**inputs)
        whole = whole_outputs(model, out)
        model.zero_grad()
        out.backward(model.local_part(2 * whole, model.OUTPUTS[0].spec))
        found.append((whole, model.full_gradients()))
    return found


SIZES = [(4, 16), (2, 16), (6, 16), (4, 8), (4, 12), (4, 18), (2, 36), (4, 2)]


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.some(6)
def test_modules_are_right_at_the_sizes_that_they_take(kind: type[Net], pool: Pool) -> None:
    model, graph = captured(kind)
    batches = [torch.randn(*size, WIDTH, dtype=F64) for size in SIZES]
    builder = builder_of(graph, mesh_of(2))
    source = source_of(builder, random_decisions(builder, len(kind.__name__)))
    state = {name: x.detach() for name, x in model.state_dict().items()}
    results = pool(2).run(answers, source, state, batches)
    for x, *each in zip(batches, *results, strict=True):
        for found in each:
            if isinstance(found, str):
                assert not fits(kind, x) or "divide" in found or "multiple" in found
                continue
            assert fits(kind, x)
            model.zero_grad()
            (expected := model(x)).square().sum().backward()
            assert_close(found[0], expected.detach(), 1e-9, "output")
            for name, p in model.named_parameters():
                got = found[1][name]
                assert got is not None and p.grad is not None
                assert_close(got, p.grad, 1e-9, name)


def fits(kind: type[Net], x: Tensor) -> bool:
    """May the inputs have this size?"""
    planned = zip(FOUND[kind], x.shape, (BATCH, TOKENS), strict=False)
    return all(size == was or (e is not None and holds(e, size)) for e, size, was in planned)


def holds(extent: Extent, size: int) -> bool:
    return (
        size >= extent.least
        and (not extent.most or size <= extent.most)
        and size % extent.step == 0
    )


class Decoder(nn.Module):
    """A decoder of tokens at positions, whose hidden states are scaled by `factor`."""

    def __init__(self, factor: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.qkv, self.factor = nn.Linear(WIDTH, 3 * WIDTH), factor

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + position_ids[..., None]
        x = x * self.factor(x)
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(out.transpose(1, 2).flatten(2))


def served(factor: Callable[[Tensor], float], phase: str) -> Graph:
    ids = torch.empty(BATCH, 1 if phase == "decode" else TOKENS, dtype=torch.int64)
    given = {"input_ids": ids, "position_ids": ids}
    model = Loaded(Decoder(factor), given, dict.fromkeys(given, ("b", "s")), None)
    return phase_graph(model, phase, 8)


@pytest.mark.parametrize("phase", ["prefill", "decode", "append"])
@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (lambda x: 7.0 / x.shape[1], r"test_sizes\.py:\d+: `aten\.mul\.Tensor` gets other=.*"),
        (lambda x: 3.0 if x.shape[1] > 100 else 2.0, r"test_sizes\.py:\d+: .*gets other=2\.0, and"),
        (lambda x: 1.0 / x.shape[0], r"test_sizes\.py:\d+: other operators run then: .*"),
    ],
)
def test_served_models_must_not_compute_with_sizes(
    factor: Callable[[Tensor], float], said: str, phase: str
) -> None:
    with pytest.raises(PlanError, match=said + r".*compute with positions instead"):
        served(factor, phase)


@pytest.mark.parametrize("phase", ["prefill", "append"])
def test_served_models_may_have_any_number_of_tokens(phase: str) -> None:
    graph = served(lambda x: 2.0 / x.shape[2], phase)
    assert [item.extents for item in graph.inputs] == [(ANY, ANY)] * 2


class Stepping(nn.Module):
    """Tokens one after another, each scaled by `factor`."""

    def __init__(self, factor: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.factor = factor

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        state, states = torch.zeros_like(x[:, 0]), list[Tensor]()
        for t in range(x.shape[1]):
            state = torch.tanh(state + x[:, t] * self.factor(x))
            states.append(state)
        return self.head(torch.stack(states, 1))


def test_recurrences_that_are_written_out_must_not_compute_with_sizes() -> None:
    ids = {"input_ids": torch.empty(2, 5, dtype=torch.int64)}
    labels = {"input_ids": ("b", "s")}
    graph = phase_graph(Loaded(Stepping(lambda x: 0.5), ids, labels, None), "prefill", 0)
    assert [item.extents for item in graph.inputs] == [(ANY, None)] * 2
    wrong = Loaded(Stepping(lambda x: 1 / x.shape[1]), ids, labels, None)
    with pytest.raises(PlanError, match=r"test_sizes\.py:\d+: .*other=0\.\d+.*with the number of"):
        phase_graph(wrong, "prefill", 0)


# example -> what its sequence may be; none has lost its batch
STAY = {"llama": ANY, "moe": ANY, "gpt": Extent(1, 1024), "encoder_decoder": Extent(1, 1024)}


@pytest.mark.parametrize("name", STAY)
@pytest.mark.some(1)
def test_ordinary_models_take_any_size(name: str) -> None:
    path = str(EXAMPLES / f"{name}.py")
    graph = capture_graph(
        load_target(path, batch=4, seq=16, phase="train", formats="own"), training=True
    )
    assert {item.extents for item in graph.inputs} == {(ANY, STAY[name])}
