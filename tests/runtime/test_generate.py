"""A toy transformer with sharded caches: serving and generation against a plain loop."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.facts.phases import DECODE
from shardwright.runtime import (
    Cache,
    CacheFullError,
    Input,
    KVCache,
    Output,
    PageTable,
    Param,
    RankError,
    RankPool,
    ShardedModule,
    ops,
)
from shardwright.runtime.cache.pools import Pools
from shardwright.runtime.serving.arrange import arrange
from shardwright.runtime.serving.program import Program
from shardwright.runtime.serving.prompts import compact
from shardwright.runtime.serving.sampling import Choice, Sampling

Pool = Callable[[int], RankPool]
F64, I64 = torch.float64, torch.int64
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
VOCAB, WIDTH, HEADS, KEY_HEADS, DIM = 13, 12, 4, 2, 6
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3]]

SHAPES = {
    "embed": (VOCAB, WIDTH),
    **{
        f"layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "wq": (HEADS * DIM, WIDTH),
            "wk": (KEY_HEADS * DIM, WIDTH),
            "wv": (KEY_HEADS * DIM, WIDTH),
            "wo": (WIDTH, HEADS * DIM),
        }.items()
    },
    "head": (VOCAB, WIDTH),
}


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=F64) * 0.7 for name, shape in SHAPES.items()}


def embed_positions(positions: Tensor) -> Tensor:
    frequencies = torch.arange(1, WIDTH + 1, dtype=F64, device=positions.device) / 5
    return torch.sin(positions[..., None] * frequencies)


def toy(mesh: dict[str, int], algorithm: str = "local", window: int = 0, **changes: Any) -> type:
    """A sharded toy: batch over dp, heads over tp, the sequence over cp."""
    sizes = {"dp": 1, "cp": 1, "tp": 1} | mesh
    shared = algorithm in ("ring", "gather", "pass_q")  # cp cuts the new tokens, too
    tokens = Input("S0,S1,R" if shared else "S0,R,R", (4, 16), I64, (0, 1), VOCAB)
    specs = {"wq": "R,R,S0", "wk": "R,R,S0", "wv": "R,R,S0", "wo": "R,R,S1"}

    class Toy(ShardedModule):
        MESH = sizes
        PARAMETERS = {
            name: Param(
                shape, F64, specs.get(name.split(".")[-1], "R,R,S0" if name == "head" else "R,R,R")
            )
            for name, shape in SHAPES.items()
        }
        INPUTS = {"input_ids": tokens, "position_ids": replace(tokens, high=0)}
        OUTPUTS = (Output(("logits",), "S0,R,S2", (4, 1, VOCAB)),)
        CACHES = {
            "layers.{0..1}.kv": Cache(KEY_HEADS, DIM, DIM, F64, "S0,S2,S1", window),
        }

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
            return self.pack(self.logits(input_ids, position_ids, algorithm))

        def logits(self, ids: Tensor, positions: Tensor, algorithm: str) -> Tensor:
            _, cp, tp = self.mesh.axes
            cut = algorithm in ("ring", "gather", "pass_q")
            x = F.embedding(ids, self.embed) + embed_positions(positions)
            for layer in self.layers:
                heads = lambda w: F.linear(x, w).unflatten(-1, (-1, DIM)).transpose(1, 2)  # noqa: B023, E731
                mixed = ops.cached_attention(
                    heads(layer.wq), heads(layer.wk), heads(layer.wv), layer.kv, positions,
                    algorithm=algorithm, axis=None if algorithm == "local" else cp, window=window,
                )  # fmt: skip
                x = x + tp.all_reduce(F.linear(mixed.transpose(1, 2).flatten(2), layer.wo))
                x = x / x.square().mean(-1, keepdim=True).sqrt()
            last = ops.last_token(x, positions, cp if cut else None)
            return F.linear(cp.all_reduce(last) if cut else last, self.head)

    for name, value in changes.items():
        setattr(Toy, name, value)
    return Toy


def two_programs(mesh: dict[str, int]) -> type:
    """Prefill and append by ring, decode by tree, with the same weights and caches."""
    base = toy(mesh, "ring")
    whole = Input("S0,R,R", (4, 1), I64, (0,), VOCAB)

    class Two(base):  # pyright: ignore
        def programs(self) -> Any:
            programs = super().programs()
            inputs = {"input_ids": whole, "position_ids": replace(whole, high=0)}
            return {
                **programs,
                "decode": Program(inputs, self.OUTPUTS, self.CACHES, self.by_tree),
            }

        def by_tree(self, input_ids: Tensor, position_ids: Tensor) -> Any:
            return self.pack(self.logits(input_ids, position_ids, "tree"))

    return Two


def two_layouts(mesh: dict[str, int], first: str, second: str, window: int = 0) -> type:
    """Prefill and append by one algorithm, decode by another that wants the caches otherwise."""
    base, decoding = toy(mesh, first, window), toy(mesh, second, window)
    wanted = {
        name: "S0,R,S1" if name == "local" else "S0,S2,S1" for name in {first, second} | {"tree"}
    }
    name = "layers.{0..1}.kv"
    kind = Cache(KEY_HEADS, DIM, DIM, F64, wanted[first], window, path=(wanted[second],))

    class Decoding(decoding):  # pyright: ignore
        CACHES = {name: Cache(KEY_HEADS, DIM, DIM, F64, wanted[second], window)}

    class Two(base):  # pyright: ignore
        CACHES = {name: kind}
        DECODE = Decoding

    return Two


def plain_logits(tokens: Sequence[int], window: int = 0) -> Tensor:
    """Logits (v,) after `tokens`, without cache, sharding or kernels."""
    w, count = weights(), len(tokens)
    at = torch.arange(count)
    allowed = at <= at[:, None]
    if window:
        allowed &= at > at[:, None] - window
    x = w["embed"][list(tokens)] + embed_positions(at)
    for i in range(2):
        q, k, v = (
            (x @ w[f"layers.{i}.{n}"].T).unflatten(-1, (-1, DIM)).transpose(0, 1)
            for n in ("wq", "wk", "wv")
        )
        k, v = (y.repeat_interleave(HEADS // KEY_HEADS, 0) for y in (k, v))
        scores = (q @ k.transpose(1, 2) * DIM**-0.5).masked_fill(~allowed, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w[f"layers.{i}.wo"].T
        x = x / x.square().mean(-1, keepdim=True).sqrt()
    return x[-1] @ w["head"].T


def plain_choice(
    logits: Tensor, randomness: torch.Generator, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """One token for each row, by the definition of top-k and top-p."""
    probabilities = torch.zeros_like(logits)
    for i, row in enumerate(logits / temperature):
        best = row.argsort(descending=True).tolist()[: top_k or None]
        share = row[best].softmax(0)
        kept = 1
        while float(share[:kept].sum()) < top_p and kept < len(best):
            kept += 1
        probabilities[i, best[:kept]] = row[best[:kept]].softmax(0)
    return torch.multinomial(probabilities, 1, generator=randomness)[:, 0]


def plain_generate(
    prompts: list[list[int]], new: int, stop: Sequence[int] = (), window: int = 0, **sampling: Any
) -> list[list[int]]:
    """What follows each prompt, with 0 behind a stop token."""
    rows, out = [list(p) for p in prompts], [[] for _ in prompts]  # pyright: ignore
    ended = [False] * len(rows)
    seed = sampling.pop("seed", None)
    randomness = None if seed is None else torch.Generator().manual_seed(seed)
    for _ in range(new):
        logits = torch.stack([plain_logits(row, window) for row in rows])
        chosen = logits.argmax(1)
        if randomness is not None:
            chosen = plain_choice(logits, randomness, **sampling)
        for i, token in enumerate(chosen.tolist()):
            out[i].append(0 if ended[i] else token)
            rows[i].append(token)
            ended[i] |= token in stop
        if all(ended):
            break
    return out


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(p) for p in prompts])
    ids = torch.full((len(prompts), int(lengths.max())), 7)  # a real token as padding
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt)
    return ids, lengths


def generate(build: tuple[Callable[..., type], Any], new: int, options: dict[str, Any]) -> Tensor:
    make, arguments = build
    model = make(*arguments).from_state_dict(weights())
    ids, lengths = padded(PROMPTS)
    return model.generate(ids, new, lengths=lengths, **options)


def run(pool: Pool, build: tuple[Callable[..., type], Any], *arguments: Any) -> list[list[int]]:
    """The new tokens, which must be the same on all ranks."""
    ranks = 1
    for size in build[1][0].values():
        ranks *= size
    if ranks == 1:
        results = [generate(build, *arguments)]
    else:
        results = pool(ranks).run(generate, build, *arguments)
    ids, _ = padded(PROMPTS)
    for result in results:
        assert torch.equal(result, results[0]) and torch.equal(result[:, : ids.shape[1]], ids)
    return results[0][:, ids.shape[1] :].tolist()


BUILDS: dict[str, tuple[Callable[..., type], Any]] = {
    "one rank": (toy, ({},)),
    "batch": (toy, ({"dp": 2},)),
    "heads": (toy, ({"tp": 2},)),
    "ring": (toy, ({"cp": 2}, "ring")),
    "gather": (toy, ({"cp": 2}, "gather")),
    "pass_q": (toy, ({"cp": 2}, "pass_q")),
    "tree": (toy, ({"cp": 2}, "tree")),
    "window": (toy, ({"cp": 2}, "ring", 5)),
    "batch and heads": (toy, ({"dp": 2, "tp": 2},)),
    "tree and heads": (toy, ({"cp": 2, "tp": 2}, "tree")),
    "ring and batch": (toy, ({"dp": 2, "cp": 2}, "ring")),
    "tree of four": (toy, ({"cp": 4}, "tree")),
    "ring, then tree": (two_programs, ({"cp": 2, "tp": 2},)),
    "ring, then whole": (two_layouts, ({"cp": 2}, "ring", "local")),
    "whole, then tree": (two_layouts, ({"dp": 2, "cp": 2}, "local", "tree")),
}


@pytest.fixture(scope="module")
def greedy() -> list[list[int]]:
    return plain_generate(PROMPTS, 20)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.some(5)
def test_greedy(pool: Pool, name: str, greedy: list[list[int]]) -> None:
    window = BUILDS[name][1][2] if name == "window" else 0
    want = plain_generate(PROMPTS, 20, window=window) if window else greedy
    assert run(pool, BUILDS[name], 20, {}) == want


def test_the_reference_is_not_trivial(greedy: list[list[int]]) -> None:
    assert all(len(set(row)) > 3 for row in greedy)
    assert plain_generate(PROMPTS, 20, window=5) != greedy


@pytest.mark.parametrize("name", ["one rank", "batch and heads", "ring, then tree"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.5, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.8, "top_k": 4, "top_p": 1.0},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 0, "top_p": 1e-9},
    ],
)
def test_sampled(pool: Pool, name: str, sampling: dict[str, Any]) -> None:
    want = plain_generate(PROMPTS, 12, seed=5, **sampling)
    assert run(pool, BUILDS[name], 12, {"do_sample": True, "seed": 5, **sampling}) == want


@pytest.mark.parametrize("name", ["one rank", "batch", "ring", "tree"])
def test_stops(pool: Pool, name: str, greedy: list[list[int]]) -> None:
    stop = [greedy[0][3], greedy[1][5]]
    want = plain_generate(PROMPTS, 20, stop)
    assert any(0 in row for row in want) and want != greedy
    assert run(pool, BUILDS[name], 20, {"eos_token_id": stop, "pad_token_id": 0}) == want
    first = plain_generate(PROMPTS[:1], 20, stop[:1])
    model = toy({}).from_state_dict(weights())
    out = model.generate(torch.tensor(PROMPTS[:1]), 20, eos_token_id=stop[0])
    assert out[:, len(PROMPTS[0]) :].tolist() == first and len(first[0]) < 20
    ids, lengths = padded(PROMPTS)
    model.generate(ids, 20, lengths=lengths, eos_token_id=stop)
    ends = [next((j for j, token in enumerate(row) if token in stop), 19) for row in want]
    assert model.cached_lengths.tolist() == (lengths + torch.tensor(ends)).tolist()


def generate_one(build: tuple[Callable[..., type], Any]) -> list[list[int]]:
    make, arguments = build
    model = make(*arguments).from_state_dict(weights())
    out = [model.generate(torch.tensor(p)[None], 12)[0, len(p) :].tolist() for p in PROMPTS]
    return out


@pytest.mark.parametrize("name", ["batch", "tree of four", "ring and batch"])
def test_one_sequence_on_many_ranks(pool: Pool, name: str, greedy: list[list[int]]) -> None:
    """Some ranks have nothing but padding."""
    for result in pool(2 if name == "batch" else 4).run(generate_one, BUILDS[name]):
        assert result == [row[:12] for row in greedy]


def go_back() -> list[Tensor]:
    """A window of 5 over two ranks: a few tokens back, then further than the window kept."""
    model = toy({"cp": 2}, "tree", 5).from_state_dict(weights())
    model.new_cache(1, 200)
    tokens = torch.arange(120)[None] % VOCAB
    model.prefill(tokens[:, :100])
    model.append(tokens[:, 100:])
    model.truncate([118])
    after = model.decode(torch.tensor([1]))
    with pytest.raises(ValueError, match="cannot go back to 90|another rank has dropped"):
        model.truncate([90])  # which only one of the ranks cannot
    assert model.cached_lengths.tolist() == [119]
    return [after[0], model.decode(torch.tensor([2]))[0]]


def test_windows_limit_how_far_back(pool: Pool) -> None:
    tokens = [t % VOCAB for t in range(118)]
    for first, second in pool(2).run(go_back):
        torch.testing.assert_close(first, plain_logits([*tokens, 1], 5), **EXACT)
        torch.testing.assert_close(second, plain_logits([*tokens, 1, 2], 5), **EXACT)


def talk_in_windows(mesh: dict[str, int], algorithm: str) -> tuple[list[int], list[Tensor]]:
    """A long prompt and an answer under a window of 20: the pools' pages, and logits."""
    model = toy(mesh, algorithm, 20).from_state_dict(weights())
    model.new_cache(4, 400)
    tokens = torch.arange(200).repeat(4, 1) % VOCAB
    logits = [model.prefill(tokens[:, :150]), model.append(tokens[:, 150:])]
    logits += [model.decode(torch.full((4,), token % VOCAB)) for token in range(20)]
    return [layer.kv.table.pages for layer in model.layers], [x[0] for x in logits]


@pytest.mark.parametrize(
    "mesh, algorithm", [({}, "local"), ({"cp": 2}, "ring"), ({"cp": 2}, "tree")]
)
def test_a_windows_pool_is_that_of_the_window_and_a_run(
    pool: Pool, mesh: dict[str, int], algorithm: str
) -> None:
    """Planned are runs of 16 tokens: 20 + 16 tokens and a page, and two more where ranks share."""
    ranks = mesh.get("cp", 1)
    want = [range(150), range(200), *[[*range(200), *range(n)] for n in range(1, 21)]]
    for pages, logits in pool(ranks).run(talk_in_windows, mesh, algorithm):
        assert pages == [4 * {1: 4, 2: 5}[ranks]] * 2
        for got, given in zip(logits, want, strict=True):
            rows = [token % VOCAB for token in given]
            torch.testing.assert_close(got, plain_logits(rows, 20), **EXACT)


def test_attention_mask_on_either_side(greedy: list[list[int]]) -> None:
    model = toy({}).from_state_dict(weights())
    ids, lengths = padded(PROMPTS)
    right = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    left = right.flip(1)
    turned = ids.clone()
    for i, prompt in enumerate(PROMPTS):
        turned[i] = 7
        turned[i, ids.shape[1] - len(prompt) :] = torch.tensor(prompt)
    for given, mask in ((ids, right), (turned, left)):
        out = model.generate(given, 20, attention_mask=mask)
        assert torch.equal(out[:, : ids.shape[1]], given)
        assert out[:, ids.shape[1] :].tolist() == greedy


def serve(build: tuple[Callable[..., type], Any], changes: dict[str, Any]) -> dict[str, Tensor]:
    """Logits of a conversation: prefill, append, decode, back, append, decode."""
    make, arguments = build
    model = make(*arguments, **changes).from_state_dict(weights())
    model.new_cache(3, 50)
    ids, lengths = padded(PROMPTS)
    out = {"prefill": model.prefill(ids, lengths)}
    out["append"] = model.append(torch.tensor([[1, 2], [3, 0], [0, 0]]), [2, 1, 0])
    out["decode"] = model.decode(torch.tensor([4, 5, 6]))
    model.truncate([5, 100, 10])
    assert model.cached_lengths.tolist() == [5, 3, 10]
    out["again"] = model.append(torch.arange(12).expand(3, -1), [12, 7, 12])
    out["last"] = model.decode(torch.tensor([1, 1, 1]))
    assert model.cached_lengths.tolist() == [18, 11, 23]
    out["new"] = model.prefill(ids[:, :3], [3, 1, 2])
    return out


def conversation() -> dict[str, list[list[int] | None]]:
    """The tokens that each row of `serve` has seen; None where nothing new came."""
    a, b, c = PROMPTS
    before = {"prefill": [a, b, c], "append": [a + [1, 2], b + [3], None]}
    decode = [a + [1, 2, 4], b + [3, 5], c + [6]]
    again = [a[:5] + list(range(12)), decode[1] + list(range(7)), c[:10] + list(range(12))]
    last = [row + [1] for row in again]
    new = [a[:3], b, c[:2]]
    return {**before, "decode": decode, "again": again, "last": last, "new": new}  # pyright: ignore


def check_conversation(result: dict[str, Tensor], window: int = 0) -> None:
    for name, rows in conversation().items():
        assert result[name].shape == (3, VOCAB)
        for i, tokens in enumerate(rows):
            if tokens is not None:
                torch.testing.assert_close(result[name][i], plain_logits(tokens, window), **EXACT)


@pytest.mark.parametrize("name", BUILDS)
def test_conversation(pool: Pool, name: str) -> None:
    ranks = torch.tensor(list(BUILDS[name][1][0].values()) or [1]).prod().item()
    window = BUILDS[name][1][2] if name == "window" else 0
    if window:  # going back further than the window allows is refused, see test_cache.py
        return
    arguments = (BUILDS[name], {})
    results = [serve(*arguments)] if ranks == 1 else pool(int(ranks)).run(serve, *arguments)
    for result in results:
        check_conversation(result)


@pytest.mark.parametrize("columns", [2, 6, 8])
@pytest.mark.parametrize("name", ["heads", "ring", "tree"])
def test_sizes_that_are_fixed(pool: Pool, name: str, columns: int) -> None:
    """A program for exactly 4 sequences and so many columns takes 3 of any length in pieces."""
    spec = "S0,S1,R" if name == "ring" else "S0,R,R"
    fixed = Input(spec, (4, columns), I64, (), VOCAB)
    changes = {"INPUTS": {"input_ids": fixed, "position_ids": replace(fixed, high=0)}}
    for result in pool(2).run(serve, BUILDS[name], changes):
        check_conversation(result)


def lay_out_anew() -> list[Any]:
    """What goes wrong on the way to another layout, and what is filled for measurements."""
    made = two_layouts({"cp": 2}, "ring", "local", 5)
    model = made().from_state_dict(weights())
    model.new_cache(1, 100)
    tokens = torch.arange(60)[None] % VOCAB
    model.prefill(tokens[:, :40])
    first = model.decode(tokens[:, 40])
    model.truncate([40])  # the last token again
    again = model.decode(tokens[:, 40])
    with pytest.raises(ValueError, match="cannot go back to 30 tokens"):
        model.truncate([30])
    after = model.append(tokens[:, 41:])
    serving = model.serving
    serving.fill(CONTEXT, DECODE)
    kept = model.layers[0].kv.lengths.tolist()
    with pytest.raises(ValueError, match="cannot go back"):
        model.truncate([CONTEXT - 2])
    add_cache = Pools.add_cache

    def fail(pools: Pools, name: str, table: PageTable) -> KVCache:
        if name == "layers.1.kv":
            raise MemoryError
        return add_cache(pools, name, table)

    with patch.object(Pools, "add_cache", fail), pytest.raises(MemoryError):
        model.append(tokens[:, :1])
    assert model.cached_lengths.tolist() == [0]
    return [first, again, after, kept, model.prefill(tokens)]


def test_caches_in_two_layouts(pool: Pool) -> None:
    tokens = [t % VOCAB for t in range(60)]
    for first, again, after, kept, anew in pool(2).run(lay_out_anew):
        torch.testing.assert_close(first[0], plain_logits(tokens[:41], 5), **EXACT)
        torch.testing.assert_close(again, first, **EXACT)
        torch.testing.assert_close(after[0], plain_logits(tokens, 5), **EXACT)
        torch.testing.assert_close(anew[0], plain_logits(tokens, 5), **EXACT)
        assert kept == [5]  # no more than the window


def demonstrate() -> str:
    made: Any = two_layouts({"cp": 2}, "ring", "local")
    for each, phase, context in ((made, "prefill", 0), (made.DECODE, "decode", CONTEXT)):
        each.PHASE, each.CONTEXT = phase, context
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        made.demo(steps=1)
    return printed.getvalue()


def test_the_demonstration_converts(pool: Pool) -> None:
    said = pool(2).run(demonstrate)[0].splitlines()
    assert [line.split(":")[0] for line in said[-3:-1]] == ["warm-up", "conversion 1"]
    assert " ms per conversion of 4 x 16 cached tokens" in said[-1] and len(said) == 9


def test_a_module_must_say_how_to_convert() -> None:
    made: Any = two_layouts({}, "ring", "local")
    made.CACHES = {name: replace(cache, path=()) for name, cache in made.CACHES.items()}
    with pytest.raises(ValueError, match="cache layers.0.kv lies in S0,S2,S1 and for decoding in"):
        made().new_cache(1, 8)


# --- memory --------------------------------------------------------------------------------------


def share_memory(algorithm: str, mesh: dict[str, int], total: int) -> list[Any]:
    """Sequences of up to 96 tokens in small pools: what fits, and what does not."""
    model = toy(mesh, algorithm).from_state_dict(weights())
    model.new_cache(4, 96, total_tokens=total)
    ids = torch.arange(90).expand(4, -1) % VOCAB
    logits = model.prefill(ids, [90, 1, 1, 1])
    with pytest.raises(CacheFullError, match="a rank lacks .* the KV cache is full") as error:
        model.append(ids, [1, 90, 90, 90])
    model.truncate([1, 1, 1, 1])
    logits = torch.cat([logits[:1], model.append(ids[:, 1:], [0, 0, 0, 89])[3:]])
    return [str(error.value), logits, model.local("layers.0.kv").nbytes]


@pytest.mark.parametrize(
    ("algorithm", "mesh", "total"),
    [
        ("local", {}, 128),
        ("local", {"dp": 2}, 256),
        ("ring", {"cp": 2}, 64),
        ("tree", {"cp": 2}, 64),
    ],
)
def test_sequences_share_memory(
    pool: Pool, algorithm: str, mesh: dict[str, int], total: int
) -> None:
    arguments = (algorithm, mesh, total)
    results = pool(2).run(share_memory, *arguments) if mesh else [share_memory(*arguments)]
    want = plain_logits([t % VOCAB for t in range(90)])
    full = 4 * 96 * KEY_HEADS * DIM * 2 * 8 / mesh.get("dp", 1)
    for message, logits, nbytes in results:
        assert "tokens are free" in message
        torch.testing.assert_close(logits, want.expand(2, -1), **EXACT)
        assert nbytes < full * (0.9 if mesh.get("dp") else 0.6)


def test_errors() -> None:
    model = toy({}).from_state_dict(weights())
    with pytest.raises(RuntimeError, match=r"no KV cache yet; call new_cache\(batch, tokens\)"):
        model.decode(torch.tensor([1]))
    model.new_cache(2, 4)
    with pytest.raises(ValueError, match=r"integer tokens \(2, t\) for the 2 sequences"):
        model.prefill(torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers from 1 to 3, got \[0, 3\]"):
        model.prefill(torch.ones(2, 3, dtype=I64), [0, 3])
    model.prefill(torch.ones(2, 3, dtype=I64), [2, 3])
    model.decode(torch.tensor([1, 1]))
    with pytest.raises(CacheFullError, match=r"sequence 1 has 4 .* the cache holds 4 per sequence"):
        model.decode(torch.tensor([1, 1]))
    assert model.cached_lengths.tolist() == [3, 4]
    with pytest.raises(ValueError, match="a length of 0 or more for each of 2"):
        model.truncate([1])
    with pytest.raises(ValueError, match="temperature > 0"):
        model.generate(torch.ones(2, 3, dtype=I64), 1, do_sample=True, temperature=0.0)
    with pytest.raises(ValueError, match="either `lengths` or an attention_mask"):
        model.generate(torch.ones(2, 3, dtype=I64), 1, attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="planned for a batch of 4, which 5 sequences"):
        fixed = Input("S0,R,R", (4, 8), I64)
        toy({}, INPUTS={"input_ids": fixed, "position_ids": replace(fixed, high=0)})().new_cache(
            5, 8
        )
    with pytest.raises(ValueError, match="Toy has no KV caches; plan it with --phase"):
        toy({}, CACHES={})().new_cache(1, 8)


def fail_half_way() -> Tensor:
    """A step that fails in the second layer, and a new start after it."""
    model = toy({}).from_state_dict(weights())
    model.new_cache(1, 30)
    ids = torch.tensor([[1, 2, 3]])
    kv = model.layers[1].kv
    model.layers[1].kv = None
    with pytest.raises(AttributeError):
        model.prefill(ids)
    model.layers[1].kv = kv
    with pytest.raises(ValueError, match="does not follow position 2"):
        model.append(ids)
    return model.prefill(ids)


def test_prefill_starts_anew_after_a_failure() -> None:
    torch.testing.assert_close(fail_half_way()[0], plain_logits([1, 2, 3]), **EXACT)


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [1, 2, 3, 4])
def test_arrange_deals_out_every_token_once_and_evenly(ways: int) -> None:
    starts, counts = torch.tensor([0, 5, 40, 0, 16]), torch.tensor([100, 1, 37, 0, 1])
    for balanced in (True, False):
        order = arrange(starts, counts, ways, balanced=balanced)
        for row, count in zip(order, counts.tolist(), strict=True):
            assert sorted(row[row >= 0].tolist()) == list(range(count))
            held = (row.view(ways, -1) >= 0).sum(1)
            assert not balanced or held.max() - held.min() <= 2
    blocks = arrange(starts, counts, ways, balanced=True).view(5, ways, -1)
    assert (blocks[1, 0] >= 0).any() and (blocks[4, 1 % ways] >= 0).any()  # page by page in turn


def test_compact() -> None:
    ids, mask = torch.tensor([[0, 5, 6], [7, 0, 8]]), torch.tensor([[0, 1, 1], [1, 0, 1]])
    prompts, counts = compact(ids, None, mask)
    assert prompts.tolist() == [[5, 6], [7, 8]] and counts.tolist() == [2, 2]


def test_next_tokens_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, -1)
    numbers = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = Choice(Sampling(0.5, 3, 0.99)).of(logits, numbers)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    want = (logits[0, :3] / 0.5).softmax(0)
    torch.testing.assert_close(share[:3], want, rtol=0, atol=0.01)
    assert share[3] == 0


def fail_on_one_rank() -> None:
    model = toy({"cp": 2}, "ring").from_state_dict(weights())
    model.new_cache(1, 8)
    model.prefill(torch.arange(9)[None])


def test_every_rank_refuses_too_many_tokens(pool: Pool) -> None:
    with pytest.raises(RankError, match="got 9 more, but the cache holds 8 per sequence"):
        pool(2).run(fail_on_one_rank)


CONTEXT = 40


def fill_and_demonstrate(
    algorithm: str, mesh: dict[str, int], window: int
) -> tuple[list[list[int]], Tensor, str]:
    """(positions that this rank keeps, logits of two equal steps, what the demonstration prints)"""
    made = toy(mesh, algorithm, window, PHASE="decode", CONTEXT=CONTEXT, OPTIMIZER="none")
    model = made.from_state_dict(weights())
    model.new_cache(4, CONTEXT + 16)
    model.serving.fill(CONTEXT)
    table = model.layers[0].kv.table
    kept = [row[row >= 0].tolist() for row in table.positions]
    assert model.cached_lengths.tolist() == [CONTEXT] * 4
    logits = [model.decode(torch.arange(4))]
    model.truncate([CONTEXT] * 4)
    logits.append(model.decode(torch.arange(4)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        made.demo(steps=2)
    return kept, torch.stack(logits), printed.getvalue()


@pytest.mark.parametrize(
    "algorithm, mesh, window",
    [
        ("local", {"dp": 2}, 0),
        ("local", {"tp": 2}, 17),
        ("ring", {"cp": 2}, 0),
        ("tree", {"cp": 2}, 17),
    ],
)
def test_a_cache_that_is_filled_for_measurements(
    pool: Pool, algorithm: str, mesh: dict[str, int], window: int
) -> None:
    results = pool(2).run(fill_and_demonstrate, algorithm, mesh, window)
    kept = [rows for rows, _, _ in results]
    filled = list(range(CONTEXT - window if window else 0, CONTEXT))
    if "cp" in mesh:  # the ranks share every sequence
        pairs = list(zip(*kept, strict=True))
        assert all(sorted(a + b) == filled and a and b for a, b in pairs)
    else:
        assert all(row == filled for rows in kept for row in rows)
        assert [len(rows) for rows in kept] == ([2, 2] if "dp" in mesh else [4, 4])
    for _, (first, again), _ in results:
        torch.testing.assert_close(again, first, **EXACT)
        torch.testing.assert_close(first, results[0][1][0], **EXACT)
    said = results[0][2].splitlines()
    assert [line.split(":")[0] for line in said[:3]] == ["warm-up", "decode 1", "decode 2"]
    assert " per decode of 4 x 16 tokens over 40 cached ones, " in said[3]
    assert "tokens/s, peak" in said[3] and said[3].endswith("GB on rank 0") and len(said) == 4
    assert results[1][2] == ""
