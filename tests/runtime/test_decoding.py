"""Decode steps that the device does alone: attention over pages, no word to the host, who joins."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.facts.phases import DECODE
from shardwright.runtime import (
    CacheFullError,
    Input,
    KVCache,
    Mesh,
    Output,
    PageTable,
    Param,
    RankPool,
    SequenceState,
    ShardedModule,
    StateTable,
    ops,
)
from shardwright.runtime.attention.paged import paged_attention, partial_over_pages
from shardwright.runtime.attention.scores import Scores
from shardwright.runtime.cache.cache import PAGE
from shardwright.runtime.cache.device import DeviceStates, DeviceTable
from shardwright.runtime.serving.buckets import bucket
from shardwright.runtime.serving.captured import Graphs
from shardwright.runtime.serving.program import Program
from tests.runtime.test_generate import (
    BUILDS,
    PROMPTS,
    VOCAB,
    WIDTH,
    plain_generate,
    plain_logits,
    toy,
    weights,
)

Pool = Callable[[int], RankPool]
F64 = torch.float64
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}

# --- attention over pages ------------------------------------------------------------------------


def paged(counts: Sequence[int], t: int, seed: int = 0) -> tuple[Tensor, ...]:
    """(q, keys, values, blocks, counts, positions, queries): pages of a pool in any order.

    Every third token of a sequence is another rank's, and its first new query is padding.
    """
    generator = torch.Generator().manual_seed(seed)
    b, pages = len(counts), -(-max(counts) // PAGE) + 1
    q = torch.randn(b, 4, t, 6, generator=generator, dtype=F64)
    keys = torch.randn(b * pages * PAGE, 2, 6, generator=generator, dtype=F64)
    values = torch.randn(b * pages * PAGE, 2, 5, generator=generator, dtype=F64)
    blocks = torch.randperm(b * pages, generator=generator).view(b, pages).int()
    positions = torch.full((b, pages * PAGE), 77)  # what stands behind the end means nothing
    queries = torch.empty(b, t, dtype=torch.int64)
    for i, count in enumerate(counts):
        positions[i, :count] = torch.arange(count) * 3 // 2
        queries[i] = positions[i, count - 1] + torch.arange(t) - t + 1
    queries[0, 0] = -1
    return q, keys, values, blocks, torch.tensor(counts).int(), positions.int(), queries


def by_definition(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, counts: Tensor, positions: Tensor,
    queries: Tensor, options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = torch.zeros(*q.shape[:3], values.shape[2], dtype=F64), torch.zeros(q.shape[:3])
    lse = lse.to(F64).fill_(-torch.inf)
    for i, head, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        at, allowed = int(queries[i, t]), list[int]()
        for j in range(int(counts[i])):
            key = int(positions[i, j])
            near = not options["window"] or key > at - options["window"]
            same = not options["chunk"] or key // options["chunk"] == at // options["chunk"]
            if at >= 0 and (key <= at or not options["causal"]) and near and same:
                allowed.append(int(blocks[i, j // PAGE]) * PAGE + j % PAGE)
        if allowed:
            scores = keys[allowed, head // 2] @ q[i, head, t] * options["scale"]
            if options["softcap"]:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            lse[i, head, t] = scores.logsumexp(0)
            out[i, head, t] = scores.softmax(0) @ values[allowed, head // 2]
    return out, lse


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize(
    "change",
    [{}, {"causal": False}, {"window": 9}, {"chunk": 7}, {"softcap": 1.5}, {"window": 1}],
    ids=str,
)
def test_paged_attention(t: int, change: dict[str, Any]) -> None:
    options = {"scale": 0.6, "causal": True, "window": 0, "chunk": 0, "softcap": 0.0, **change}
    given = paged([3, 40, 17], t)
    want_out, want_lse = by_definition(*given, options)  # pyright: ignore
    out, lse = paged_attention(*given, **options)  # pyright: ignore
    torch.testing.assert_close(out, want_out, **EXACT)
    torch.testing.assert_close(lse, want_lse, **EXACT)


@pytest.mark.parametrize("in_place", [True, False])
def test_steps_over_a_cache(in_place: bool) -> None:
    """Rounds of steps and tokens of the host in turn: what is read equals what was stored."""
    table = PageTable(3, 12, window=0)
    cache = KVCache(3, 0, 2, 6, 5, dtype=F64, table=table)
    generator = torch.Generator().manual_seed(0)
    stored: list[list[tuple[Tensor, Tensor]]] = [[], [], []]

    def new(at: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (
            torch.randn(len(at), 2, at.shape[1], d, generator=generator).to(F64) for d in (6, 5)
        )
        return k, v

    def keep(rows: Sequence[int], at: Tensor, k: Tensor, v: Tensor) -> None:
        for i, t in (at >= 0).nonzero().tolist():
            stored[rows[i]].append((k[i, :, t], v[i, :, t]))

    def host(at: list[list[int]]) -> None:
        positions = torch.tensor(at)
        k, v = new(positions)
        cache.append(k, v, positions)
        keep(range(3), positions, k, v)

    host([[0, 1, 2], [0, 1, -1], [0, -1, -1]])
    if not in_place:  # one sequence takes another's page
        table.truncate([3, 2, 0])
        table.reserve(
            torch.arange(100).expand(3, -1).clone().masked_fill_(torch.ones(3, 1) > 0, -1)
        )
        host([[-1] * 70, list(range(2, 72)), [-1] * 70])
        stored[2].clear()
    twin = DeviceTable(table, 100)
    lengths = table.counts.tolist()
    for rows, steps in (([0, 1, 2], 20), ([1, -1, 0, 2][:3], 5), ([2, 1, 0], 3)):
        ahead = torch.full((3, steps), -1)
        for row in rows:
            if row >= 0:
                ahead[row] = lengths[row] + torch.arange(steps)
        table.reserve(ahead)
        twin.upload(rows)
        for number in range(steps):
            at = torch.tensor([[lengths[r] + number if r >= 0 else -1] for r in rows])
            twin.open(at)
            step = table.on_device
            assert step is not None and bool(step.in_place) == (in_place and rows == [0, 1, 2])
            k, v = new(at)
            cache.put(k, v, step)
            keep(rows, at, k, v)
            q = torch.randn(len(rows), 4, 1, 6, generator=generator).to(F64)
            got = partial_over_pages(q, cache, step, Scores(0.5, True))
            for i, row in enumerate(rows):
                if row < 0:
                    assert (got.lse[i] == -torch.inf).all() and got.out[i].isfinite().all()
                    continue
                keys, values = (torch.stack(x, 1) for x in zip(*stored[row], strict=True))
                scores = q[i].unflatten(0, (2, 2)) @ keys[:, None].mT * 0.5
                want = (scores.softmax(-1) @ values[:, None]).flatten(0, 1)
                torch.testing.assert_close(got.out[i], want, **EXACT)
        table.on_device = None
        table.record(ahead[:, : steps - 1])  # the last tokens did not count
        table.give_back()
        lengths = table.counts.tolist()
        for row, own in enumerate(stored):
            assert lengths[row] == len(own) - (row in rows)
            del own[lengths[row] :]
        host([[n, -1] for n in lengths])
        lengths = table.counts.tolist()


# --- steps that ask no host ----------------------------------------------------------------------


class NoHost(TorchDispatchMode):
    """Refuses operators whose result the host must see, or which bring something from it."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]  # pyright: ignore
        self.seen.append(name)
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"):
            raise AssertionError(f"a step asks the host: {name}")
        if name == "lift_fresh":
            raise AssertionError("a step makes a tensor of numbers of the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host() -> Generator[list[str]]:
    """Inside it what would be captured asks no host; what it ran."""
    seen, run = list[str](), Graphs.run

    def watched(self: Graphs, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        with NoHost(seen):
            return run(self, key, step)

    with patch.object(Graphs, "run", watched):
        yield seen


def generate_without_host(name: str, options: dict[str, Any]) -> tuple[list[list[int]], int]:
    make, arguments = BUILDS[name]
    model = make(*arguments).from_state_dict(weights())
    ids, lengths = padded()
    with no_host() as seen:
        out = model.generate(ids, 20, lengths=lengths, **options)
    return out[:, ids.shape[1] :].tolist(), len(seen)


def padded() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(p) for p in PROMPTS])
    ids = torch.zeros(len(PROMPTS), int(lengths.max()), dtype=torch.int64)
    for i, prompt in enumerate(PROMPTS):
        ids[i, : len(prompt)] = torch.tensor(prompt)
    return ids, lengths


SAMPLED = {"do_sample": True, "seed": 5, "temperature": 2.0, "top_k": 9, "top_p": 0.7}
LED = ("ring", "gather", "pass_q", "ring and batch", "window")  # by the host


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["one rank", "batch", "heads", "tree", "ring, then tree", "ring"])
@pytest.mark.some(3)
def test_no_step_asks_the_host(pool: Pool, name: str, options: dict[str, Any]) -> None:
    reference = dict(options)
    reference.pop("do_sample", None)
    want = plain_generate(PROMPTS, 20, **reference)
    if name == "one rank":
        results = [generate_without_host(name, options)]
    else:
        ranks = 4 if name == "ring, then tree" else 2
        results = pool(ranks).run(generate_without_host, name, options)
    for tokens, seen in results:
        assert tokens == want
        assert (seen > 500) == (name not in LED)


# --- who joins and leaves ------------------------------------------------------------------------


def converse(build: tuple[Callable[..., type], Any], seed: int) -> list[list[int]]:
    """Sequences of random lengths join and leave a batch of 4 at random; the tokens of each."""
    made: Any = build[0](*build[1])
    model = made.from_state_dict(
        {name: x for name, x in weights().items() if name in made.PARAMETERS}
    )
    model.new_cache(4, 60)
    rng, out = random.Random(seed), list[list[int]]()
    waiting, left, tokens = wishes(seed), dict[int, tuple[int, int]](), torch.zeros(4).long()
    while waiting or left:
        room = 4 - len(left)
        if waiting and room and rng.random() < 0.7:
            some = [waiting.pop(0) for _ in range(min(room, len(waiting), rng.choice([1, 1, 3])))]
            ids = torch.zeros(len(some), max(len(p) for p, _ in some), dtype=torch.int64)
            for i, (prompt, _) in enumerate(some):
                ids[i, : len(prompt)] = torch.tensor(prompt)
            rows, logits = model.admit(ids, [len(p) for p, _ in some])
            for row, (_, count), chosen in zip(rows, some, logits.argmax(1).tolist(), strict=True):
                left[row] = len(out), count - 1
                out.append([chosen])
                tokens[row] = chosen
        for row, (_, count) in list(left.items()):
            if not count:
                model.free(row)
                del left[row]
        if not left:
            continue
        tokens = model.decode(tokens).argmax(1)
        for row, (number, count) in list(left.items()):
            out[number].append(int(tokens[row]))
            left[row] = number, count - 1
    assert model.cached_lengths.tolist() == [0] * 4
    return out


def wishes(seed: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens are to follow."""
    rng = random.Random(100 + seed)
    return [
        ([rng.randrange(VOCAB) for _ in range(rng.randint(1, 25))], rng.randint(1, 20))
        for _ in range(9)
    ]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "mesh, algorithm, window",
    [
        ({}, "local", 0),
        ({}, "local", 6),
        ({"dp": 2}, "local", 0),
        ({"cp": 2}, "tree", 0),
        ({"cp": 2}, "tree", 20),
        ({"cp": 2}, "ring", 0),
    ],
)
@pytest.mark.some(3)
def test_sequences_join_and_leave(
    pool: Pool, mesh: dict[str, int], algorithm: str, window: int, seed: int
) -> None:
    arguments = (toy, (mesh, algorithm, window)), seed
    results = pool(2).run(converse, *arguments) if mesh else [converse(*arguments)]
    want = [plain_generate([p], count, window=window)[0] for p, count in wishes(seed)]
    assert all(result == want for result in results)


def remembering(mesh: dict[str, int]) -> type:
    """A model whose only layer is a convolution over the last four tokens, its batch over dp."""
    tokens = Input("S0", (4, 16), torch.int64, (0, 1), VOCAB)

    class Remembering(ShardedModule):
        MESH = {"dp": 1} | mesh
        PARAMETERS = {name: Param((VOCAB, WIDTH), F64, "R") for name in ("embed", "head")}
        INPUTS = {"input_ids": tokens, "position_ids": replace(tokens, high=0)}
        OUTPUTS = (Output(("logits",), "S0", (4, 1, VOCAB)),)
        CACHES = {"state": SequenceState((WIDTH, 3), F64, "S0")}

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
            x = F.embedding(input_ids, self.embed).transpose(1, 2)  # pyright: ignore
            kernel = self.head[:, None, :4][:WIDTH]  # pyright: ignore
            mixed = ops.cached_convolution(x, kernel, self.state, position_ids)  # pyright: ignore
            last = ops.last_token(mixed.transpose(1, 2), position_ids)
            return self.pack(F.linear(last, self.head))  # pyright: ignore

    return Remembering


def remembered(prompt: list[int], count: int) -> list[int]:
    w, tokens = weights(), list(prompt)
    for _ in range(count):
        last = F.pad(w["embed"][tokens].T, (4, 0))[:, -4:]
        mixed = (last * w["head"][:WIDTH, :4]).sum(1)
        tokens.append(int((w["head"] @ mixed).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("mesh", [{}, {"dp": 2}], ids=str)
def test_sequences_with_a_state_join_and_leave(pool: Pool, mesh: dict[str, int]) -> None:
    arguments = (remembering, (mesh,)), 3
    results = pool(2).run(converse, *arguments) if mesh else [converse(*arguments)]
    assert all(result == [remembered(*wish) for wish in wishes(3)] for result in results)


def test_a_state_is_fresh_until_its_first_token() -> None:
    table = StateTable(3)
    table.record(torch.tensor([0, 2, 0]))
    twin = DeviceStates(table)
    twin.upload([2, 1, -1])
    seen: list[Any] = []
    for positions in ([[-1], [2], [-1]], [[0], [-1], [-1]], [[1], [3], [-1]]):
        twin.open(torch.tensor(positions))
        turn = table.on_device
        assert turn is not None and turn.rows is not None and turn.rows.tolist() == [2, 1, 3]
        seen.append((turn.fresh.tolist()[:2], turn.counts.tolist()))
    assert seen == [
        ([True, False], [0, 1, 0]),
        ([True, False], [1, 0, 0]),
        ([False, False], [1, 1, 0]),
    ]


def test_who_may_join_and_leave() -> None:
    model = toy({}).from_state_dict(weights())
    model.new_cache(2, 30)
    assert model.admit(torch.tensor([[1, 2]]))[0] == [0]
    with pytest.raises(ValueError, match="2 sequences cannot join, as 1 of 2 are free"):
        model.admit(torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match=r"sequence 1 is none of \[0\], which are there"):
        model.free(1)
    assert model.admit(torch.tensor([[4, 5]]), [1])[0] == [1]
    model.free(0)
    assert model.cached_lengths.tolist() == [0, 1]
    model.decode(torch.tensor([9, 3]))  # the token of a free place is not read
    model.decode(torch.tensor([9, 3]))
    assert model.cached_lengths.tolist() == [0, 3]


def test_few_tokens_and_few_sequences_take_a_step_of_their_own() -> None:
    """Appended tokens are stored by such a step, and who joins does not compute the others."""
    model = toy({}).from_state_dict(weights())
    model.new_cache(4, 80)
    a, b = PROMPTS[0], PROMPTS[2]
    model.admit(torch.tensor([a]))
    sizes, run = list[tuple[int, ...]](), Program.next_logits_on_device

    def watched(self: Program, mesh: Mesh, ids: Tensor, positions: Tensor) -> Tensor:
        sizes.append(tuple(ids.shape))
        return run(self, mesh, ids, positions)

    with patch.object(Program, "next_logits_on_device", watched):
        _, joined = model.admit(torch.tensor([b]))
        with no_host() as seen:
            added = model.append(torch.tensor([[1, 2], [3, 0], [0, 0], [0, 0]]), [2, 1, 0, 0])
    assert sizes == [(1, len(b)), (2, 2)] and len(seen) > 50
    torch.testing.assert_close(joined[0], plain_logits(b), **EXACT)
    torch.testing.assert_close(added[0], plain_logits([*a, 1, 2]), **EXACT)
    torch.testing.assert_close(added[1], plain_logits([*b, 3]), **EXACT)
    long = torch.arange(40).repeat(4, 1) % VOCAB
    logits = model.append(long, [40, 0, 40, 0])
    torch.testing.assert_close(logits[0], plain_logits([*a, 1, 2, *long[0].tolist()]), **EXACT)
    torch.testing.assert_close(logits[2], plain_logits(long[0].tolist()), **EXACT)


def test_rows_of_a_step() -> None:
    assert bucket([0, 1, 2], 16, 1) == [0, 1, 2, -1]
    assert bucket([9], 16, 1) == [9]
    assert bucket([9], 16, 1, step=3) == [9, -1, -1]
    assert bucket([1, 9], 16, 4) == [1, -1, 9, -1]
    assert bucket(list(range(9)), 16, 1) == list(range(16))
    assert bucket([], 2, 2) == [0, 1]


# --- pools that are small ------------------------------------------------------------------------


def fill_up() -> tuple[list[list[int]], str, list[int]]:
    """Four sequences in a pool for six pages: rounds get shorter, then one step finds no room."""
    model = toy({}).from_state_dict(weights())
    model.new_cache(4, 60, total_tokens=32)
    chosen = model.prefill(torch.tensor([[1], [2], [3], [4]])).argmax(1)
    out = [chosen.tolist()]
    with pytest.raises(CacheFullError, match="a rank lacks . pages") as error:
        while True:
            chosen = model.decode(chosen).argmax(1)
            out.append(chosen.tolist())
    return out, str(error.value), model.cached_lengths.tolist()


def test_a_full_pool_changes_nothing() -> None:
    out, message, lengths = fill_up()
    assert "the KV cache is full: 4 new tokens" in message and lengths == [16] * 4
    want = plain_generate([[1], [2], [3], [4]], 17)
    assert [list(row) for row in zip(*out, strict=True)] == [row[: len(out)] for row in want]
    model = toy({}).from_state_dict(weights())
    model.new_cache(4, 60, total_tokens=32)
    ids = torch.tensor([[1], [2], [3], [4]])
    assert model.generate(ids, 15)[:, 1:].tolist() == [row[:15] for row in want]


def test_a_step_that_fails_leaves_the_cache_as_it_was() -> None:
    model = toy({}).from_state_dict(weights())
    model.new_cache(1, 30)
    model.prefill(torch.tensor([[1, 2, 3]]))
    kv = model.layers[1].kv
    model.layers[1].kv = None
    with pytest.raises(AttributeError):
        model.decode(torch.tensor([4]))
    model.layers[1].kv = kv
    want = plain_generate([[1, 2, 3]], 1)[0][0]
    after = model.decode(torch.tensor([want])).argmax(1).tolist()
    assert after == [plain_generate([[1, 2, 3]], 2)[0][1]] and model.cached_lengths.tolist() == [4]


# --- capture -------------------------------------------------------------------------------------


def test_capture_needs_cuda() -> None:
    with pytest.raises(ValueError, match="capture=True: a step is captured as a CUDA graph, and"):
        toy({}).from_state_dict(weights()).new_cache(1, 8, capture=True)
    toy({}).from_state_dict(weights()).new_cache(1, 8, capture=False)


class Recorded:
    """In the place of a CUDA graph: counts how often it is started."""

    replays = 0

    def replay(self) -> None:
        Recorded.replays += 1

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def pretended() -> ExitStack:
    """Without CUDA: what is captured is run, once, and replays do nothing."""
    Recorded.replays = 0
    stack = ExitStack()
    stack.enter_context(patch("torch.cuda.CUDAGraph", Recorded))
    stack.enter_context(patch("torch.cuda.graph", lambda graph, **options: nullcontext()))  # pyright: ignore
    stack.enter_context(patch("torch.cuda.synchronize", lambda: None))
    stack.enter_context(
        patch("shardwright.runtime.serving.captured._beside", lambda step: step())  # pyright: ignore
    )
    return stack


def test_a_step_is_captured_once_and_replayed() -> None:
    runs = list[int]()

    def step() -> Tensor:
        runs.append(1)
        return torch.tensor([len(runs)])

    graphs = Graphs(None, torch.device("cuda"))
    with pretended():
        out = [int(graphs.run("a", step)) for _ in range(4)]
        assert (out, len(runs), Recorded.replays) == ([1, 2, 2, 2], 2, 3)
        assert int(graphs.run("b", step)) == 3  # another form of the step is captured by itself
        graphs.keep(1)  # caches lie elsewhere
        assert [int(graphs.run("a", step)) for _ in range(2)] == [4, 5]
    off = Graphs(False, torch.device("cuda"))
    with pretended():
        assert [int(off.run("a", step)) for _ in range(3)] == [6, 7, 8] and not Recorded.replays


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: the operators of a step, run again on the very same memory."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._first = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            self._calls.append((func, args, kwargs, tensors_in(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        if self._first:  # what was captured here has run already
            self._first = False
            return
        Tape.replays += 1
        for func, args, kwargs, out in self._calls:
            for old, new in zip(out, tensors_in(func(*args, **kwargs)), strict=True):
                if new is not old:
                    old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def tensors_in(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]  # pyright: ignore


def taped() -> ExitStack:
    """Steps are captured on the CPU."""
    stack, init = pretended(), Graphs.__init__

    def on_cuda(self: Graphs, capture: bool | None, device: torch.device, *models: Any) -> None:
        init(self, capture, torch.device("cuda"), *models)

    stack.enter_context(patch("torch.cuda.CUDAGraph", Tape))
    stack.enter_context(patch("torch.cuda.graph", lambda graph, **options: graph))  # pyright: ignore
    stack.enter_context(patch.object(Graphs, "__init__", on_cuda))
    Tape.replays = 0
    return stack


@pytest.mark.parametrize(
    "options",
    [{}, SAMPLED, {"min_p": 0.3, "do_sample": True, "seed": 1}, {"eos_token_id": [4, 9]}],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 5])
def test_captured_steps_read_and_change_the_same_memory(
    options: dict[str, Any], window: int
) -> None:
    ids, lengths = padded()
    plain = toy({}, "local", window).from_state_dict(weights())
    want = plain.generate(ids, 60, lengths=lengths, **options)
    with taped():
        model = toy({}, "local", window).from_state_dict(weights())
        for _ in range(2):
            assert torch.equal(model.generate(ids, 60, lengths=lengths, **options), want)
    assert Tape.replays > 20


@pytest.mark.parametrize("build", [(toy, ({},)), (remembering, ({},))], ids=["cache", "state"])
def test_sequences_join_and_leave_captured_steps(build: Any) -> None:
    want = converse(build, 5)
    with taped():
        assert converse(build, 5) == want
    assert Tape.replays > 20


@pytest.mark.parametrize("capture", [None, True])
def test_what_cannot_be_captured_is_named(capture: bool | None) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU()))
    captured = list[int]()

    def step() -> Tensor:
        model(torch.ones(1, 2))
        if captured:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return torch.ones(1)

    graphs = Graphs(capture, torch.device("cuda"), model)
    said = r"`1.0` \(ReLU\) does what a graph can't hold \(operation not permitted when stream"
    with pretended():
        graphs.run("a", step)
        captured.append(1)
        if capture:
            with pytest.raises(RuntimeError, match=said):
                graphs.run("a", step)
            return
        with pytest.warns(UserWarning, match=said), pytest.raises(RuntimeError):
            graphs.run("a", step)  # the step fails as it is, too
        captured.clear()
        assert [int(graphs.run("a", step)) for _ in range(3)] == [1, 1, 1]
        assert not Recorded.replays


def test_what_the_host_leads_is_named() -> None:
    make, arguments = BUILDS["one rank"]
    model = make(*arguments).from_state_dict(weights())
    model.new_cache(1, 40)
    serving = model.serving
    assert serving.follows(DECODE)  # nothing is known before the first step
    model.prefill(torch.tensor([PROMPTS[0]]))
    assert not serving.follows(DECODE)
    serving._graphs = Graphs(True, torch.device("cuda"))  # pyright: ignore[reportPrivateUsage]
    serving._needs_host = dict.fromkeys(serving._needs_host, "layers.1.kv: `ring` sends")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RuntimeError, match=r"can't be captured as a CUDA graph: layers.1.kv: `ri"):
        model.decode(torch.tensor([1]))
