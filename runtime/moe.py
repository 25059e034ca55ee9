"""A layer of experts: each token goes through the few experts that its router chose.

`moe` runs in one of three forms; `axis` is the mesh axis that cuts the stacked experts:

| call                         | experts on a rank | tokens on a rank   | result            |
|------------------------------|-------------------|--------------------|-------------------|
| `moe(...)`                   | all               | any                | of these tokens   |
| `expert_axis=a, partial=True`| a block           | the same on all    | summand (`P`)     |
| `expert_axis=a`              | a block           | each rank its own  | of its own tokens |

The last one sends tokens to experts and results back by all-to-all with uneven splits.  A token
goes to a rank once, however many of its experts live there, and comes back as one weighted sum.
No token is dropped and there is no capacity.  Sums are added up in the order of a token's choices
and of ranks, so results do not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .mesh import transport
from .mesh.collectives import Axis
from .mesh.counter import Phase
from .mesh.derivatives import first_order
from .mesh.keeping import is_keeping
from .mesh.opaque import axis_known_as, not_compiled

Gating: TypeAlias = Literal["none", "separate", "halves", "pairs"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
# What torch's grouped product computes in one kernel, from this generation of GPUs on.
_GROUPED_DTYPES = frozenset({torch.bfloat16, torch.float16})
_GROUPED_CAPABILITY = (8, 0)


@not_compiled("the routing of experts")
def moe(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gating: Gating = "halves",
    activation: str = "silu",
    alpha: float = 1.0,
    limit: float = 0.0,
    offset: float = 0.0,
    transposed: bool = False,
    weigh_input: bool = False,
    expert_axis: Axis | None = None,
    partial: bool = False,
) -> Tensor:
    """The weighted sum over a token's choices j of expert `indices[..., j]` applied to the token.

    x (..., h), indices (..., k) whole numbers, weights (..., k); result (..., o) in the dtype of x.
    Expert i computes `down[i] (act(g) * (u + offset))` with u and g from `gating`:

    - `halves`: up is (e, 2f, h), the gate's rows first (`gate_up_proj`); `pairs`: they alternate;
    - `separate`: up and gate are (e, f, h) each;
    - `none`: up is (e, f, h), and the expert is `down[i] act(u)`.

    down is (e, o, f), mostly with o = h; `transposed`: up and gate are (e, h, ...), down (e, f, o).
    Biases are (e, rows of their matrix).  `limit` > 0: g is cut off above it, u on both sides.
    `alpha`: silu is g * sigmoid(alpha g).  `weigh_input`: the weight multiplies the token on its
    way in.

    `expert_axis` cuts the experts in blocks: up, gate, down and biases are this rank's e experts of
    e * p on p ranks.  With `partial`, x, indices and weights are the same on all of the axis and
    the result is a summand.  Otherwise each rank has tokens of its own, possibly none.

    Bytes that a rank receives of others, forward: its experts' tokens, h values, k weights and k
    int32 each, their number (8 bytes a rank), and one row of o values for each of its tokens and
    other rank that serves it.  Backward: the same without integers.  With balanced routing over
    E experts a rank serves a token with probability q = 1 - C(E - E/p, k) / C(E, k), so that n
    tokens on each rank make n (p - 1) q rows each way.

    Raises ValueError for shapes that do not fit, IndexError (on CPU) for an expert that is not.
    """
    ways = 1 if expert_axis is None else expert_axis.size
    form = _Form(activation, alpha, limit, offset, gating, transposed, weigh_input)
    experts = _Experts(up, down, gate, up_bias, gate_bias, down_bias, form)
    _check(x, indices, weights, experts, ways)
    chosen = _Chosen(
        x.reshape(-1, x.shape[-1]),
        indices.reshape(-1, indices.shape[-1]).long(),
        weights.reshape(-1, weights.shape[-1]),
    )
    if expert_axis is None or ways == 1:
        out = experts.run(chosen, some=False)
    elif partial:
        out = _own_part(chosen, experts, expert_axis)
    else:
        out = _dispatched(chosen, experts, expert_axis)
    return out.view(*x.shape[:-1], out.shape[-1])


# --- the experts of one rank ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Tokens (n, h) with the numbers (n, k) of their experts and weights (n, k)."""

    tokens: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class _Form:
    """How an expert computes; see `moe`."""

    activation: str
    alpha: float
    limit: float
    offset: float
    gating: Gating
    transposed: bool
    weigh_input: bool

    def apply(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """The hidden units (m, f) from what the first product gave."""
        if gate is None and self.gating == "halves":
            gate, up = up.chunk(2, dim=-1)
        elif gate is None and self.gating == "pairs":
            gate, up = up[..., ::2], up[..., 1::2]
        if gate is None:
            return self._activated(up)
        if self.limit > 0:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self._activated(gate) * (up + self.offset if self.offset else up)

    def _activated(self, x: Tensor) -> Tensor:
        if self.alpha != 1.0:
            return x * torch.sigmoid(self.alpha * x)
        return _ACTIVATIONS[self.activation](x)


@dataclass(frozen=True, slots=True)
class _Experts:
    """The stacked weights of this rank's experts."""

    up: Tensor
    down: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None
    form: _Form

    @property
    def count(self) -> int:
        """Number of experts on this rank."""
        return self.up.shape[0]

    def run(self, chosen: _Chosen, *, some: bool) -> Tensor:
        """The weighted sum (n, h) over the choices that name one of these experts.

        `some`: other choices may exist; they say `count` for "not here".
        """
        groups = _Groups.of(chosen.experts, self.count, some)
        rows: Tensor = _Spread.apply(chosen.tokens, groups.tokens, groups.place)
        weights = chosen.weights.flatten().index_select(0, groups.pairs).unsqueeze(1)
        if self.form.weigh_input:
            rows = (rows * weights).to(rows.dtype)
        up = self._product(rows, self.up, self.up_bias, groups)
        gate = None if self.gate is None else self._product(rows, self.gate, self.gate_bias, groups)
        out = self._product(self.form.apply(up, gate), self.down, self.down_bias, groups)
        if not self.form.weigh_input:
            out = out * weights
        whole: Tensor = _Collect.apply(out, groups.tokens, groups.place)
        return whole.to(chosen.tokens.dtype)

    def _product(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, groups: _Groups
    ) -> Tensor:
        """Each row times the matrix of its expert, plus that expert's bias."""
        if _one_kernel(rows, weight):
            matrices = weight if self.form.transposed else weight.transpose(1, 2)
            out = F.grouped_mm(rows, matrices, offs=groups.ends.to(torch.int32))
        else:
            out = _Product.apply(rows, weight, tuple(groups.ends.tolist()), self.form.transposed)
        return out if bias is None else out + bias[groups.experts]


@dataclass(frozen=True, slots=True)
class _Groups:
    """Pairs (token, choice) sorted by expert: a row for each pair that has its expert here."""

    pairs: Tensor  # (m,) the pair of a row, counted token by token
    tokens: Tensor  # (m,) the token of a row
    experts: Tensor  # (m,) the expert of a row
    ends: Tensor  # (e,) where the rows of an expert end
    place: Tensor  # (n, k) the row of a pair, -1 where it has none

    @staticmethod
    def of(experts: Tensor, count: int, some: bool) -> _Groups:
        """Group choices (n, k) of experts 0 ... count - 1; `count` itself, if `some`, is nowhere.

        Only `some` needs to know the number of rows, for which a GPU is waited for.
        """
        flat = experts.flatten()
        sizes = flat.new_zeros(count + 1).scatter_add_(0, flat, torch.ones_like(flat))
        ends = sizes[:count].cumsum(0)
        pairs = flat.argsort(stable=True)
        if some:
            pairs = pairs[: int(ends[-1])]
        place = torch.full_like(flat, -1)
        place[pairs] = torch.arange(len(pairs), device=flat.device)
        return _Groups(
            pairs,
            pairs // max(experts.shape[1], 1),
            flat.index_select(0, pairs),
            ends,
            place.view(experts.shape),
        )


def _one_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Can torch's grouped product take these?  Rows of both must begin at multiples of 16 bytes."""
    if not rows.is_cuda or rows.dtype not in _GROUPED_DTYPES or not len(rows):
        return False
    widths = (*weight.shape[1:], rows.shape[1])
    aligned = all(width * weight.element_size() % 16 == 0 for width in widths)
    aligned = aligned and weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return aligned and torch.cuda.get_device_capability(rows.device) >= _GROUPED_CAPABILITY


class _Product(torch.autograd.Function):
    """Grouped matrix product, expert by expert: rows (m, in), weight (e, out, in) -> (m, out).

    `ends[i]` is where the rows of expert i end.  An expert without rows costs nothing, and its
    weight has a gradient of zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: tuple[int, ...], transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.ends, ctx.transposed = ends, transposed
        if is_keeping():
            return _product_operator(rows, weight, list(ends), transposed)
        return _product(rows, weight, ends, transposed)

    @staticmethod
    @first_order("a product of experts")
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for expert, first, last in _spans(ctx.ends):
            own = grad[first:last]
            if of_rows is not None:
                matrix = weight[expert].t() if ctx.transposed else weight[expert]
                torch.mm(own, matrix, out=of_rows[first:last])
            if of_weight is not None:
                left, right = rows[first:last], own
                if not ctx.transposed:
                    left, right = right, left
                torch.mm(left.t(), right, out=of_weight[expert])
        return of_rows, of_weight, None, None


def _product(rows: Tensor, weight: Tensor, ends: Sequence[int], transposed: bool) -> Tensor:
    out = rows.new_empty(len(rows), weight.shape[2 if transposed else 1])
    for expert, first, last in _spans(ends):
        matrix = weight[expert] if transposed else weight[expert].t()
        torch.mm(rows[first:last], matrix, out=out[first:last])
    return out


@torch.library.custom_op("shardwright::product_of_experts", mutates_args=())
def _product_operator(rows: Tensor, weight: Tensor, ends: list[int], transposed: bool) -> Tensor:
    """`_product` as one operator, of a layer that keeps its result."""
    return _product(rows, weight, ends, transposed)


def _spans(ends: Sequence[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, end of its rows) of the experts that have rows.

    >>> _spans((2, 2, 5))
    [(0, 0, 2), (2, 2, 5)]
    """
    return [
        (expert, first, last)
        for expert, (first, last) in enumerate(zip((0, *ends), ends, strict=False))
        if last > first
    ]


# --- rows of tokens ------------------------------------------------------------------------------


class _Spread(torch.autograd.Function):
    """Row i of the result is token `tokens[i]`; the gradient of a token is the sum of its rows'.

    `place` (n, c) holds the rows of each token, -1 for none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _added(grad_outputs[0], ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Row t of the result is the sum of the rows `place[t]`: what `_Spread` undoes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _added(rows, place)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].index_select(0, ctx.saved_tensors[0]), None, None


def _added(rows: Tensor, place: Tensor) -> Tensor:
    """The sum of the rows `place[t]` for each t, column by column of `place`.

    Unlike `index_add` it gives the same bits every time on a GPU, too.  Half precision is added
    up in float32 and rounded once.
    """
    wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
    out = rows.new_zeros((len(place), rows.shape[1]), dtype=wide)
    if len(rows):
        for column in place.unbind(1):
            part = rows.index_select(0, column.clamp(min=0))
            out += part.masked_fill_((column < 0).unsqueeze(1), 0)
    return out.to(rows.dtype)


# --- experts on several ranks --------------------------------------------------------------------


def _own_part(chosen: _Chosen, experts: _Experts, axis: Axis) -> Tensor:
    """What this rank's experts add to the result of every token."""
    local = chosen.experts - axis.rank * experts.count
    here = (local >= 0) & (local < experts.count)
    local = local.masked_fill(~here, experts.count)
    return experts.run(_Chosen(chosen.tokens, local, chosen.weights), some=True)


def _dispatched(chosen: _Chosen, experts: _Experts, axis: Axis) -> Tensor:
    """Send each token to the ranks of its experts, run them there, and add up what comes back."""
    tokens, place, sent = _destinations(chosen.experts // experts.count, axis.size)
    tell, exchange = (
        (_tell_operator, _exchange_operator) if is_keeping() else (_tell_rows, _exchange_experts)
    )
    told = tell(sent, axis.known_as).clone()  # an operator, which says that what is kept is read
    received, sent = told.tolist(), sent.tolist()
    numbers = chosen.experts.index_select(0, tokens).to(torch.int32)
    numbers = exchange(numbers, axis.known_as, sent, received, experts.count).long()
    rows, weights = _Exchange.apply(
        axis,
        sent,
        received,
        _Spread.apply(chosen.tokens, tokens, place),
        _Spread.apply(chosen.weights, tokens, place),
    )
    out = _own_part(_Chosen(rows, numbers, weights), experts, axis)
    (back,) = _Exchange.apply(axis, received, sent, out)
    return _Collect.apply(back, tokens, place)


def _tell_rows(sent: Tensor, axis: str) -> Tensor:
    """How many rows come from each rank of the axis that is `known_as` this."""
    over = axis_known_as(axis)
    over.record("all_to_all", (over.size - 1) * sent.element_size(), "forward")
    return transport.tell_rows(sent, over.group)


def _exchange_experts(
    numbers: Tensor, axis: str, sent: list[int], received: list[int], count: int
) -> Tensor:
    """Numbers of the experts of rows, of which each rank has `count`."""
    over = axis_known_as(axis)
    over.record("all_to_all", _bytes_received(over, numbers, received), "forward")
    return transport.exchange_experts(numbers, sent, received, count, over.group)


def _exchange_ahead(x: Tensor, axis: str, sent: list[int], received: list[int]) -> Tensor:
    """Rows of a forward pass."""
    return _exchange_rows(axis_known_as(axis), x, sent, received, "forward")


# The same as operators, of a layer that keeps their results.
_tell_operator = torch.library.custom_op(
    "shardwright::tell_rows",
    _tell_rows,
    mutates_args=(),
    schema="(Tensor sent, str axis) -> Tensor",
)
_exchange_operator = torch.library.custom_op(
    "shardwright::exchange_experts", _exchange_experts, mutates_args=(),
    schema="(Tensor numbers, str axis, int[] sent, int[] received, int count) -> Tensor",
)  # fmt: skip
_ahead_operator = torch.library.custom_op(
    "shardwright::exchange_rows", _exchange_ahead, mutates_args=(),
    schema="(Tensor x, str axis, int[] sent, int[] received) -> Tensor",
)  # fmt: skip


def _destinations(owners: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to send for tokens whose experts are on the ranks `owners` (n, k).

    (token of each row, rows sorted by rank; row (n, ranks) of each token for each rank, -1 for
    none; number of rows for each rank).
    """
    goes = torch.zeros(len(owners), ranks, dtype=torch.bool, device=owners.device)
    by_rank = goes.scatter_(1, owners, True).t().contiguous()
    rows = (by_rank.flatten().cumsum(0) - 1).view(by_rank.shape)
    tokens = by_rank.nonzero()[:, 1]
    return tokens, rows.masked_fill(~by_rank, -1).t(), by_rank.sum(1)


class _Exchange(torch.autograd.Function):
    """Rows of several tensors to other ranks, `sent[i]` to rank i; gradients go the way back.

    The tensors are exchanged one after another, so that all ranks do it in the same order.
    """

    @staticmethod
    def forward(
        ctx: Any, axis: Axis, sent: list[int], received: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        run = _ahead_operator if is_keeping() else _exchange_ahead
        return tuple(run(x, axis.known_as, sent, received) for x in tensors)

    @staticmethod
    @first_order("an exchange of tokens between experts")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            _exchange_rows(ctx.axis, grad, ctx.received, ctx.sent, "backward") if needed else None
            for grad, needed in zip(grad_outputs, ctx.needs_input_grad[3:], strict=True)
        ]
        return (None, None, None, *grads)


def _exchange_rows(
    axis: Axis, x: Tensor, sent: list[int], received: list[int], phase: Phase
) -> Tensor:
    """All-to-all of the rows of `x`, without gradient."""
    axis.record("all_to_all", _bytes_received(axis, x, received), phase)
    return transport.all_to_all_rows(x.contiguous(), sent, received, axis.group)


def _bytes_received(axis: Axis, x: Tensor, received: list[int]) -> int:
    """Bytes of rows like those of `x` that come from other ranks."""
    from_others = sum(received) - received[axis.rank]
    return from_others * prod(x.shape[1:]) * x.element_size()


# --- what does not fit ---------------------------------------------------------------------------


def _check(x: Tensor, indices: Tensor, weights: Tensor, experts: _Experts, ways: int) -> None:
    """Raise ValueError or IndexError, naming what does not fit."""
    form = experts.form
    if indices.is_floating_point() or indices.shape != weights.shape:
        raise ValueError(
            "moe takes whole numbers of experts and weights of the same shape, got indices"
            f" {indices.dtype} {tuple(indices.shape)} and weights {tuple(weights.shape)}"
        )
    if indices.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"moe takes choices for each token: x is {tuple(x.shape)}, indices"
            f" {tuple(indices.shape)}"
        )
    if form.activation not in _ACTIVATIONS or (form.alpha != 1.0 and form.activation != "silu"):
        raise ValueError(
            f"moe knows the activations {', '.join(_ACTIVATIONS)}, and `alpha` for silu; got"
            f" {form.activation!r} with alpha={form.alpha}"
        )
    if form.gating not in ("none", "separate", "halves", "pairs"):
        raise ValueError(f"gating is none, separate, halves or pairs, got {form.gating!r}")
    if (experts.gate is not None) != (form.gating == "separate"):
        raise ValueError("moe takes `gate` with gating='separate', and only then")
    if indices.device.type == "cpu" and indices.numel():
        low, high = indices.min().item(), indices.max().item()
        if low < 0 or high >= experts.count * ways:
            wrong = low if low < 0 else high
            raise IndexError(f"token sent to expert {wrong} of {experts.count * ways}")


__all__ = ["Gating", "moe"]
