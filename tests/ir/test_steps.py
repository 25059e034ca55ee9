"""Recurrences that a model writes out token by token are found, and gone on with over a state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import capture, capture_folded
from shardwright.ir.graph import Graph
from shardwright.ir.passes.serving import ServingError, serving_graph, with_own_positions
from shardwright.ir.reference.interpret import Caches, interpret

BATCH, TOKENS, WIDTH = 2, 11, 6
Mix = Callable[[Tensor, Tensor], Tensor]


class Mixing(nn.Module):
    """Two layers in which `mix` makes something of all tokens (b, t, h), and of a weight (h,)."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = mix
        self.embed, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.start = nn.Parameter(torch.randn(WIDTH))
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + self.mix(layer(x), self.start)
        return self.head(x)


def decay(x: Tensor, start: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), list[Tensor]()
    for t in range(x.shape[1]):
        state = 0.5 * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


def from_a_weight(x: Tensor, start: Tensor) -> Tensor:
    """A first state that is learned, and is the same for all sequences."""
    state, rows = start, list[Tensor]()
    for row in x.unbind(1):
        state = torch.tanh(state * row)
        rows.append(state * start)
    return torch.stack(rows, dim=1)


def read_before_written(x: Tensor, start: Tensor) -> Tensor:
    """What the last token leaves is read by nothing; two states, one of a matrix."""
    b, t, h = x.shape
    memory, total = x.new_zeros(b, h, h), torch.zeros(b, h, dtype=x.dtype)
    out, written = torch.empty_like(x), x.exp()
    for i in range(t):
        row = torch.sigmoid(x[:, i])
        out[:, i] = (memory @ row[:, :, None]).squeeze(-1) + total
        memory = memory * 0.9 + row[:, :, None] * row[:, None]
        total = 0.5 * total + written[:, i]
    return out


def by_pieces(x: Tensor, start: Tensor) -> Tensor:
    state, rows = torch.full((len(x), 1, WIDTH), 0.25, dtype=x.dtype), list[Tensor]()
    for t in range(x.shape[1]):
        state = torch.maximum(state * 0.7, x[:, t : t + 1])
        rows.append(state + start)
    return torch.cat(rows, 1)


def shifted(x: Tensor, start: Tensor) -> Tensor:
    """What it carries is the token before."""
    last, rows = torch.zeros_like(x[:, 0]), list[Tensor]()
    for t in range(x.shape[1]):
        rows.append(x[:, t] - 0.5 * last)
        last = x[:, t]
    return torch.stack(rows, 1)


def by_sequences(x: Tensor, start: Tensor) -> Tensor:
    """Sequences one by one, too; rows are written into what all of them have."""
    state, out = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for t in range(x.shape[1]):
        state = 0.5 * state + x[:, t]
        out[:, t] = state
    return torch.stack([row * 2.0 for row in out.unbind(0)])


def added_up(x: Tensor, start: Tensor) -> Tensor:
    """Running sums, of numbers and of how many are above 0; no step is written out."""
    return x.cumsum(1) * start - (x > 0).cumsum(1) * 0.1


def added_up_last(x: Tensor, start: Tensor) -> Tensor:
    return torch.tanh(x.transpose(1, 2).cumsum(-1)).transpose(1, 2) + start


def averaged(x: Tensor, start: Tensor) -> Tensor:
    """Over the tokens so far, which are counted from 1."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None] + start


def averaged_by_fractions(x: Tensor, start: Tensor) -> Tensor:
    """The count is no whole number."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None] + start


def served(mix: Mix, tokens: int = 5, batch: int = BATCH) -> tuple[Mixing, Graph]:
    model = Mixing(mix)
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    graph = with_own_positions(capture(model, {"input_ids": ids}, training=False, serving=True))
    assert graph is not None
    return model, serving_graph(graph, 0)


@pytest.mark.parametrize("batch", [BATCH, 5])
@pytest.mark.parametrize(
    "mix",
    [
        decay,
        from_a_weight,
        read_before_written,
        by_pieces,
        shifted,
        by_sequences,
        added_up,
        added_up_last,
        averaged,
        averaged_by_fractions,
    ],
)
def test_steps_go_on_where_they_ended(mix: Mix, batch: int) -> None:
    """Ragged runs of up to five tokens, some of them empty, against whole sequences at once; also
    of as many sequences as tokens."""
    model, graph = served(mix, batch=batch)
    ids = torch.randint(16, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    whole, caches, done = model(ids), Caches(), torch.zeros(batch, dtype=torch.long)
    columns = torch.arange(5)
    for counts in ([5, 2], [0, 3], [1, 1], [4, 5]):
        count = torch.tensor((counts * 3)[:batch])
        at = torch.where(columns < count[:, None], done[:, None] + columns, -1)
        inputs = {"input_ids": ids.gather(1, at.clamp(min=0)), "position_ids": at}
        (out,) = interpret(graph, model.state_dict(), inputs, caches).values()
        done = done + count
        for row in torch.nonzero(count).flatten().tolist():
            want = whole[row, int(done[row]) - 1]
            torch.testing.assert_close(out[row, 0], want, rtol=0, atol=1e-12)
    assert done.tolist() == ([10, 11] * 3)[:batch]


def ahead(x: Tensor, start: Tensor) -> Tensor:
    state, rows, t = torch.zeros_like(x[:, 0]), list[Tensor](), x.shape[1]
    for i in range(t):
        state = 0.5 * state + x[:, min(i + 1, t - 1)]
        rows.append(state)
    return torch.stack(rows, 1)


def backwards(x: Tensor, start: Tensor) -> Tensor:
    return decay(x.flip(1), start).flip(1)


def last_for_all(x: Tensor, start: Tensor) -> Tensor:
    """The last state is added to all tokens."""
    steps = decay(x, start)
    return steps + steps[:, -1:]


def first_for_all(x: Tensor, start: Tensor) -> Tensor:
    return decay(x, start) + x[:, :1]


def uneven(x: Tensor, start: Tensor) -> Tensor:
    """The third step is another one."""
    state, rows = torch.zeros_like(x[:, 0]), list[Tensor]()
    for t in range(x.shape[1]):
        state = 0.5 * state + (x[:, t].exp() if t == 2 else x[:, t])
        rows.append(state)
    return torch.stack(rows, 1)


def over_channels(x: Tensor, start: Tensor) -> Tensor:
    """A recurrence over channels, as many as there are tokens, in sequences of tokens."""
    return decay(x.transpose(1, 2), x[:, :, 0]).transpose(1, 2)


@pytest.mark.parametrize("mix", [ahead, uneven])
def test_what_is_no_step_keeps_no_state(mix: Mix) -> None:
    inputs = {"input_ids": torch.zeros(BATCH, 5, dtype=torch.long)}
    graph = capture_folded(Mixing(mix), inputs, training=False, serving=True)
    assert with_own_positions(graph) is None


@pytest.mark.parametrize(
    ("mix", "tokens", "op"),
    [
        (backwards, 5, "flip"),
        (last_for_all, 5, "slice"),
        (first_for_all, 5, "slice"),
        (over_channels, WIDTH, "select"),
    ],
)
def test_what_mixes_tokens_besides_is_refused(mix: Mix, tokens: int, op: str) -> None:
    with pytest.raises(ServingError, match=rf"test_steps.py:\d+: `aten.{op}.* mixes the tokens"):
        served(mix, tokens)


def by_heads(x: Tensor, start: Tensor) -> Tensor:
    """Sequences and tokens are one dim for a while, in front of the recurrence and behind it."""
    b, t, h = x.shape
    rows = torch.tanh(x.reshape(b * t, 2, h // 2)) * 2.0
    return torch.sin(decay(rows.reshape(b, t, h), start).flatten(0, 1)).view(b, t, h)


def by_tokens_first(x: Tensor, start: Tensor) -> Tensor:
    """Merged the other way round: what is dim 0 then are tokens."""
    t, b, h = len(x[0]), len(x), x.shape[2]
    rows = torch.tanh(x.transpose(0, 1).reshape(t * b, h)).view(t, b, h)
    return decay(rows.transpose(0, 1), start)


@pytest.mark.parametrize("mix", [by_heads, by_tokens_first])
def test_tokens_are_told_from_as_many_sequences(mix: Mix) -> None:
    model, graph = served(mix, batch=5)
    assert any(node.op == "shardwright.state_after" for node in graph.nodes)
    ids = torch.randint(16, (5, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "position_ids": torch.arange(5).expand(5, 5)}
    (out,) = interpret(graph, model.state_dict(), inputs, Caches()).values()
    torch.testing.assert_close(out[:, 0], model(ids)[:, -1], rtol=0, atol=1e-12)
