"""Attention over a sharded sequence: what each algorithm moves, and what it takes.

The algorithms are choices of `shardwright.attention` (see `ir.ops`); `runtime/attention/` runs
them and counts the same bytes.  For p ranks along the axis, local shapes q (b, hq, s, d),
k (b, hk, s, d), v (b, hk, s, dv), and `kv` the bytes of one rank's keys and values together (of
its keys alone where they hold the values, see `ir.latent`, and of latents where both are made of
them):

| algorithm | forward                                   | backward                               |
|-----------|-------------------------------------------|----------------------------------------|
| `ring`    | p - 1 hops of kv, behind the compute      | p - 1 hops of kv, p - 1 of dk, dv fp32 |
| `gather`  | all-gather of kv                          | all-gather of kv, reduce-scatter dk, dv|
| `ulysses` | all-to-all of q, k, v and one of the result | the same, of the gradients           |
| `window`  | the last window - 1 rows of kv from the left | as many rows of dk, dv back, fp32   |

With a cache, new tokens q (b, hq, t, d) attend s cached rows per rank (the new ones included):

| `local`   | nothing                                                                            |
| `ring`    | p - 1 hops of kv, behind the compute                                               |
| `gather`  | all-gather of kv                                                                   |
| `pass_q`  | p - 1 hops of q behind the compute, and an all-to-all of partial results           |
| `tree`    | all-reduces of the largest score and of the partial results: q is on every rank    |

With fewer key heads than ranks Ulysses sends each rank those that its query heads attend.  A ring
hides its hops behind the compute, so that a step takes the longer of the two, and so does a window.
Of latents a rank makes keys and values of its heads before it computes with them, in backward again
and then their gradients.
Steps in which mask and order of the tokens leave nothing to compute still pass the keys on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...costmodel.compute import attention_s, matmul_s
from ...facts.spec import R, S, Spec
from ...ir.graph import Node
from ...ir.ops.attention import cached_per_head, decompressing, values_in_keys
from ...ir.ops.registry import attention_dims, operator_of, rule_of
from ...ir.ops.rule import Choice
from .conversion import Network

# Keys and values of latents in backward: made again, and two products for the gradients.
_MADE_BACKWARD = 3.0

# Flash attention: 2 matrix products forward, 5 backward (arXiv:2307.08691, section 3.1)
BACKWARD = 2.5


@dataclass(frozen=True, slots=True)
class Transfer:
    """`times` collectives of `kind` over one axis, each called with `bytes` (see
    `costmodel.collective`); `hidden` ones run while the op computes."""

    kind: str
    axis: int
    bytes: int
    times: int
    backward: bool
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Local:
    """One rank's part of an attention, and the algorithm that joins the parts."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    key_dim: int
    value_dim: int
    itemsize: int
    causal: bool
    window: int
    algorithm: str  # "" where no axis cuts queries and keys together
    axis: int
    ranks: int
    zigzag: bool
    query_ways: int  # how many ways the queries alone are cut
    cached: bool  # `keys` are those of the cache, of which the last `queries` are new
    values_in_keys: bool = False  # values are the first `value_dim` numbers of the keys
    # (r, rope) if latents of these sizes are cached, of which a rank makes the keys and values of
    # its heads: `kv_heads` is 1, the other sizes are those of the heads
    latent: tuple[int, int] | None = None

    @staticmethod
    def of(node: Node, choices: Sequence[Choice], sizes: Sequence[int], order: str) -> Local:
        """The part under `choices`, one for each mesh axis; `order` of the tokens."""
        rule = rule_of(node)
        ways = rule.ways(choices, sizes)
        if ways is None:
            raise ValueError(f"{node.loc}: attention cannot be cut {tuple(choices)} over {sizes}")
        batch, heads, kv_heads, queries, keys, key_dim = attention_dims(node, ways)
        cached = operator_of(node).remembers != ""
        if cached:
            keys = -(-rule.sizes["c"] // ways.get("c", 1))
        axis = next((i for i, choice in enumerate(choices) if choice in rule.algorithms), -1)
        window, up, latent = node.arg("window"), decompressing(node), None
        assert isinstance(window, int)
        if up is not None:
            rank = up.type.shape[2]
            latent = (rank, cached_per_head(node) - rank)
        return Local(
            batch, heads, kv_heads, queries, keys, key_dim, rule.sizes["e"],
            node.output.type.dtype.itemsize, cached or bool(node.arg("causal")), window,
            choices[axis] if axis >= 0 else "", axis, sizes[axis] if axis >= 0 else 1,
            order == "zigzag", 1 if axis >= 0 else ways.get("q", 1), cached,
            values_in_keys(node) and latent is None, latent,
        )  # fmt: skip

    @property
    def kv_bytes(self) -> int:
        """Bytes of this rank's keys and values, or of the latents of which they are made."""
        rows = self.batch * self.kv_heads * self.keys
        values = 0 if self.values_in_keys else self.value_dim
        numbers = sum(self.latent) if self.latent else self.key_dim + values
        return rows * numbers * self.itemsize

    @property
    def made_dim(self) -> int:
        """Numbers of a head's key and value that are made from a latent."""
        return self.key_dim - self.latent[1] + self.value_dim if self.latent else 0

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of this rank's keys and values, summed up in 32 bits or more."""
        return self.kv_bytes // self.itemsize * max(self.itemsize, 4)

    @property
    def halo(self) -> int:
        """Rows of keys that a window reaches to the left of this rank's own."""
        return min(self.window - 1, self.keys * (self.ranks - 1))


def transfers(local: Local, *, backward: bool) -> list[Transfer]:
    """What the algorithm moves in one forward pass and, if asked for, one backward pass."""
    p, axis = local.ranks, local.axis
    if p == 1 or not local.algorithm:
        return []
    kv, gradient = local.kv_bytes, local.gradient_bytes
    if local.cached:
        return _cached_transfers(local)
    found: list[Transfer] = []
    match local.algorithm:
        case "ring":
            found.append(Transfer("send_recv", axis, kv, p - 1, False, hidden=True))
            found.append(Transfer("send_recv", axis, kv, p - 1, True, hidden=True))
            found.append(Transfer("send_recv", axis, gradient, p - 1, True, hidden=True))
        case "gather":
            found.append(Transfer("all_gather", axis, kv * p, 1, False))
            found.append(Transfer("all_gather", axis, kv * p, 1, True))
            found.append(Transfer("reduce_scatter", axis, gradient * p, 1, True))
        case "ulysses":
            rows = local.batch * local.queries * local.itemsize
            wide = rows * local.heads * local.key_dim
            wide += kv // local.kv_heads * _kv_heads_each(local) * p
            result = rows * local.heads * local.value_dim
            for back in (False, True):
                found.append(Transfer("all_to_all", axis, wide, 1, back))
                found.append(Transfer("all_to_all", axis, result, 1, back))
        case "window":
            for rows in _halos(local):
                found.append(Transfer("send_recv", axis, rows * kv // local.keys, 1, False, True))
                back = rows * gradient // local.keys
                found.append(Transfer("send_recv", axis, back, 1, True, hidden=True))
        case _:
            raise ValueError(f"attention has no algorithm `{local.algorithm}`")
    return [transfer for transfer in found if backward or not transfer.backward]


def _cached_transfers(local: Local) -> list[Transfer]:
    p, axis = local.ranks, local.axis
    rows = local.batch * local.heads * local.queries
    wide = max(4, local.itemsize)  # partial results: sums in 32 bits or more
    match local.algorithm:
        case "ring":
            return [Transfer("send_recv", axis, local.kv_bytes, p - 1, False, hidden=True)]
        case "gather":
            return [Transfer("all_gather", axis, local.kv_bytes * p, 1, False)]
        case "pass_q":
            queries = rows * local.key_dim * local.itemsize
            partials = p * rows * (local.value_dim * local.itemsize + wide)
            return [
                Transfer("send_recv", axis, queries, p - 1, False, hidden=True),
                Transfer("all_to_all", axis, partials, 1, False),
            ]
        case "tree":
            return [
                Transfer("all_reduce", axis, rows * wide, 1, False),
                Transfer("all_reduce", axis, rows * (local.value_dim + 1) * wide, 1, False),
            ]
        case _:
            raise ValueError(f"attention over a cache has no algorithm `{local.algorithm}`")


def position_transfers(local: Local) -> list[Transfer]:
    """What tells ranks which tokens the others hold, once per step for all layers with one cache
    layout: how many (8 bytes), and their positions (4 bytes each), those of keys or of queries."""
    p, axis = local.ranks, local.axis
    rows = {"ring": local.keys, "gather": local.keys, "pass_q": local.queries}
    if not local.cached or p == 1 or local.algorithm not in rows:
        return []
    positions = local.batch * rows[local.algorithm] * 4
    return [Transfer("all_gather", axis, each * p, 1, False) for each in (8, positions)]


def cache_bytes(local: Local, run: int = 0) -> int:
    """Bytes of the KV cache that one rank keeps of this attention; what a window drops is not.

    A window keeps its own tokens and the new ones: those of this phase, or the `run` tokens of
    another that shares the cache.
    """
    if not local.cached:
        return 0
    return local.kv_bytes // local.keys * _cached_rows(local, run)


def _cached_rows(local: Local, run: int = 0) -> int:
    """Tokens of a sequence that one rank holds; `run` as in `cache_bytes`."""
    if not local.window or not local.cached:
        return local.keys
    return min(local.keys, local.window + max(local.queries, -(-run // local.ranks)))


def cache_spec(node: Node, choices: Sequence[Choice]) -> Spec:
    """How the KV cache (batch, heads, sequence) of an attention lies on the mesh."""
    dims = {"b": S(0), "n": S(1), **dict.fromkeys(rule_of(node).algorithms, S(2))}
    return tuple(dims.get(choice, R) for choice in choices)


def cache_bytes_in(node: Node, spec: Spec, sizes: Sequence[int], run: int = 0) -> int:
    """Bytes of the KV cache that one rank keeps of an attention in a layout (see `cache_spec`)."""
    choices = tuple({S(0): "b", S(1): "n", S(2): "tree"}.get(state, "R") for state in spec)
    return cache_bytes(Local.of(node, choices, sizes, "contiguous"), run)


def _kv_heads_each(local: Local) -> int:
    """Key heads that a rank needs when it computes its share of the query heads."""
    return max(1, local.kv_heads // local.ranks)


def _halos(local: Local) -> list[int]:
    """Rows from each neighbour to the left, the nearest first."""
    left, rows = local.halo, list[int]()
    while left > 0:
        rows.append(min(left, local.keys))
        left -= local.keys
    return rows


def seconds(
    local: Local, dtype: str, network: Network, *, backward: bool, moving: bool = True
) -> tuple[float, float]:
    """(forward, backward) seconds on the busiest rank; without `moving`, of its compute alone."""
    steps = _compute(local, dtype, network)
    made = _decompression(local, steps, dtype, network)
    moved = transfers(local, backward=backward) if moving else []

    def passing(times: float, made_times: float, back: bool) -> float:
        """Seconds of all steps, each so many `times` its forward pass, and of what moves meanwhile.

        `made_times` is that of making keys and values of latents.
        """
        compute = [times * a + made_times * b for a, b in zip(steps, made, strict=True)]
        hop = sum(
            network.seconds(t.kind, (t.axis,), t.bytes)
            for t in moved
            if t.backward == back and t.hidden
        )
        exposed = sum(
            t.times * network.seconds(t.kind, (t.axis,), t.bytes)
            for t in moved
            if t.backward == back and not t.hidden
        )
        if len(compute) == 1:
            return max(compute[0], hop) + exposed
        # the last step waits for nothing
        return sum(max(step, hop) for step in compute[:-1]) + compute[-1] + exposed

    back = passing(BACKWARD, _MADE_BACKWARD, True) if backward else 0.0
    return passing(1.0, 1.0, False), back


def _compute(local: Local, dtype: str, network: Network) -> tuple[float, ...]:
    """Seconds of each step of the busiest rank; all but rings have one."""
    p = local.ranks
    heads, queries, keys = local.heads, local.queries, local.keys
    kv_heads = heads if local.latent else local.kv_heads
    match local.algorithm:
        case _ if local.cached:
            keys *= p if local.algorithm == "gather" else 1
            steps = p if local.algorithm in ("ring", "pass_q") else 1
            shares = (_cached_share(local),) * steps
        case "ring":
            shares = ring_shares(keys, p, local.causal, local.window, local.zigzag)
        case "gather":
            keys *= p
            each = ring_shares(local.keys, p, local.causal, local.window, local.zigzag)
            shares = (sum(each) / p,)
        case "ulysses":
            heads, kv_heads = heads // p, _kv_heads_each(local)
            queries, keys = queries * p, keys * p
            shares = (_share(local, keys, 2),)
        case "window":
            keys = min(keys + local.halo, keys * p)
            shares = (min(1.0, local.window / keys),)
        case _:
            shares = (_share(local, keys, 2 * local.query_ways),)
    dims = (local.batch, heads, kv_heads, queries, keys, local.key_dim)
    shared = local.values_in_keys
    split = local.cached and 2 * queries <= keys  # kernels of prefill do not share keys out

    def step(share: float) -> float:
        if not share:
            return 0.0
        return network.once(
            ("attention", *dims, share, dtype, shared, split),
            lambda: attention_s(
                *dims, dtype, network.cluster, share, values_in_keys=shared, split_keys=split
            ),
        )

    return tuple(step(share) for share in shares)


def _decompression(
    local: Local, steps: Sequence[float], dtype: str, network: Network
) -> tuple[float, ...]:
    """Seconds of each step to make keys and values of the latents that it attends.

    A ring makes those of each hop that is attended, pass_q its own once.  A product makes them all,
    then keys are copied behind one another with what their heads share.
    """
    if local.latent is None:
        return (0.0,) * len(steps)
    rows = local.batch * _cached_rows(local) * (local.ranks if local.algorithm == "gather" else 1)
    made, rank = local.heads * local.made_dim, local.latent[0]
    seconds = network.once(
        ("matmul", rows, made, rank, 1, dtype),
        lambda: matmul_s(rows, made, rank, 1, dtype, network.cluster),
    )
    seconds += network.traffic_seconds(2.0 * rows * local.heads * local.key_dim * local.itemsize)
    again = seconds if local.algorithm == "ring" else 0.0
    return (seconds, *(again if step else 0.0 for step in steps[1:]))


@lru_cache(maxsize=1024)
def ring_shares(
    rows: int, ranks: int, causal: bool, window: int, zigzag: bool
) -> tuple[float, ...]:
    """Share of its queries x one rank's keys that the busiest rank computes in each step of a ring.

    Every rank holds `rows` tokens; in step s it has the keys of the rank s before it.  The busiest
    is the last rank, which attends most or, in zigzag order, has the two chunks in the middle, and
    without a causal mask or zigzag order the first, to which a window leaves all later keys.
    """
    chunk = -(-rows // 2) if zigzag else rows

    def chunks(rank: int) -> tuple[int, ...]:
        return (rank, 2 * ranks - 1 - rank) if zigzag else (rank,)

    busiest = ranks - 1 if causal or zigzag else 0
    return tuple(
        sum(
            _pairs((q - k) * chunk, chunk, causal, window)
            for q in chunks(busiest)
            for k in chunks((busiest - step) % ranks)
        )
        / (chunk * len(chunks(busiest))) ** 2
        for step in range(ranks)
    )


def _pairs(ahead: int, rows: int, causal: bool, window: int) -> int:
    """Pairs that attend, of `rows` queries and `rows` keys; the first query is `ahead` of the first
    key."""

    def at_least(distance: int) -> int:
        """Pairs whose query is so far or further ahead of its key: sum of 1, 2, ..., rows, rows."""

        def up_to(last: int) -> int:
            ramp = min(max(last, 0), rows)
            return ramp * (ramp + 1) // 2 + max(last - rows, 0) * rows

        return up_to(rows + ahead - distance) - up_to(ahead - distance)

    return (at_least(0) if causal else rows * rows) - (at_least(window) if window else 0)


def _share(local: Local, keys: int, cut: int) -> float:
    """Share of the scores (local queries x `keys`) that the busiest rank computes.

    Causal attention computes the lower triangle.  With queries cut in p contiguous blocks the last
    rank has the longest rows, 1 - 1 / (2p) of them (`cut` = 2p); in zigzag order all have half
    (`cut` = 2).  A causal window of w keys bounds each row by w.
    """
    share = 1.0 - 1.0 / cut if local.causal else 1.0
    if local.causal and 0 < local.window < keys:
        share = min(share, local.window / keys)
    return share


def _cached_share(local: Local) -> float:
    """Share of the scores (new queries x all keys) that are computed; new tokens are in an order
    that gives every rank as many."""
    p = local.ranks
    keys = local.keys * (p if local.algorithm else 1)
    new = local.queries * (p if local.algorithm not in ("", "tree") else 1)
    share = 1.0 - (new - 1) / 2 / keys
    return min(share, local.window / keys) if local.window else share


def buffer_bytes(local: Local) -> float:
    """Bytes that an attention holds beside its operands and result while it runs.

    With latents also the keys and values of the heads, those of one rank's latents at a time, and
    without a cache, in backward, their gradients.
    """
    held = 0
    if local.latent:
        rows = local.batch * local.heads * _cached_rows(local)
        held = rows * (local.key_dim + local.made_dim) * local.itemsize
        if not local.cached:
            held += rows * (local.key_dim + local.value_dim) * max(local.itemsize, 4)
    return held + _moved_bytes(local)


def _moved_bytes(local: Local) -> float:
    """Bytes of what the algorithm sends and receives, as far as it holds them at once."""
    p = local.ranks
    match local.algorithm:
        case "pass_q":
            return float(_cached_transfers(local)[1].bytes)
        case "ring":
            return 2.0 * local.kv_bytes
        case "gather":
            return float(local.kv_bytes * p)
        case "ulysses":
            return float(transfers(local, backward=False)[0].bytes) if p > 1 else 0.0
        case "window":
            return float(local.kv_bytes // local.keys * local.halo)
        case _:
            return 0.0


__all__ = [
    "BACKWARD", "Local", "Transfer", "buffer_bytes", "cache_bytes", "cache_bytes_in",
    "cache_spec", "position_transfers", "seconds", "transfers",
]  # fmt: skip
