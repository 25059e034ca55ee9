"""`flex_attention`: attention whose scores and mask are functions of the model's own.

Torch refuses it without a GPU.  Capture evaluates the functions once, on index tensors that
broadcast: (b, 1, 1, 1), (1, h, 1, 1), (1, 1, q, 1) and (1, 1, 1, k).  What they compute becomes a
part of the graph, and the tensors that they read its operands.  A mask, and scores that are scaled,
capped, added to or masked, are options of `shardwright::attention`; any other function has its
scores written out, which are cut by batch, heads and queries.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...compat.torch import flex_attention_by, indexing_by_tensors
from ..ops.attention import attention

ScoreMod = Callable[..., Any]


@contextmanager
def captured_flex() -> Generator[None]:
    """Inside, the model's `flex_attention` is operators that a graph can have."""
    with flex_attention_by(_captured, _mask_alone):
        yield


@contextmanager
def written_out_flex() -> Generator[list[str]]:
    """Inside, `flex_attention` is its formula on whole tensors; the list has an entry per call."""
    calls: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("flex_attention")
        return _written_out(*args, **kwargs)

    with flex_attention_by(counted, _mask_alone):
        yield calls


@dataclass(frozen=True, slots=True)
class _Mask:
    """What `create_block_mask` is asked for; which blocks it skips changes no value."""

    mask_mod: Callable[..., Any]


def _mask_alone(mask_mod: Callable[..., Any], *args: Any, **kwargs: Any) -> _Mask:
    return _Mask(mask_mod)


# ---- what is the same in a graph and on whole tensors ------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call:
    """One checked call: q (b, hq, q, d), k (b, hk, k, d), v (b, hk, k, dv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    score_mod: ScoreMod | None
    mask_mod: Callable[..., Any] | None
    scale: float

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: ScoreMod | None = None,
        block_mask: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        kernel_options: Any = None,
        *,
        return_aux: Any = None,
    ) -> _Call:
        """The arguments are those of `flex_attention`.  Raises ValueError."""
        if return_lse or return_aux is not None:
            raise ValueError(
                "flex_attention is asked for more than its result (`return_lse`, `return_aux`); "
                "leave that out"
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise ValueError(
                f"flex_attention has {query.shape[1]} query heads over {key.shape[1]} key heads "
                "without `enable_gqa=True`"
            )
        mask = None if block_mask is None else block_mask.mask_mod
        if getattr(mask, "__name__", "") == "noop_mask":
            raise ValueError(
                "flex_attention has a block mask without a `mask_mod`: the blocks alone hide keys. "
                "Make it with `create_block_mask(mask_mod, ...)`"
            )
        factor = float(query.shape[3]) ** -0.5 if scale is None else float(scale)
        return _Call(query, key, value, score_mod, mask, factor)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(b, hq, q, k)."""
        batch, heads, queries, _ = self.q.shape
        return batch, heads, queries, self.k.shape[2]

    def whole_heads(self, x: Tensor) -> Tensor:
        """Keys or values with a head for each query head."""
        groups = self.q.shape[1] // x.shape[1]
        if groups == 1:
            return x
        return x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)

    def scores(self) -> Tensor:
        """q k^T scale (b, hq, q, k), in float32 or float64."""
        product = self.q @ self.whole_heads(self.k).transpose(-2, -1)
        wide = torch.float64 if product.dtype == torch.float64 else torch.float32
        return product.to(wide) * self.scale

    def attended(self, scores: Tensor) -> Tensor:
        """The values' mean by softmax of the scores; zeros for a query all of whose are -inf."""
        empty = scores.detach().amax(-1, keepdim=True) == -torch.inf
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        return weights.to(self.v.dtype) @ self.whole_heads(self.v)


# ---- in a graph --------------------------------------------------------------------------------


def _captured(*args: Any, **kwargs: Any) -> Tensor:
    """`flex_attention` while a model is captured."""
    call = _Call.of(*args, **kwargs)
    places = [
        torch.arange(size, device=call.q.device).view([-1 if i == dim else 1 for i in range(4)])
        for dim, size in enumerate(call.sizes)
    ]
    scores = _Scores(call.scores(), _Form())
    given: Any = scores
    with _Elementwise():
        if call.score_mod is not None:
            given = call.score_mod(scores, *places)
        mask = None if call.mask_mod is None else call.mask_mod(*places)
    if mask is not None:
        mask = torch.as_tensor(mask, device=call.q.device)
    if isinstance(given, _Scores):
        if mask is not None:
            given = given.where(mask)
        options = given.form.options(call)
        if options is not None:
            return attention(call.q, call.k, call.v, *options)
    whole = given.whole() if isinstance(given, _Scores) else given.expand(call.sizes)
    if mask is not None and not isinstance(given, _Scores):
        whole = whole.masked_fill(~mask, -torch.inf)
    return call.attended(whole)


@dataclass(frozen=True, slots=True)
class _Form:
    """inner s, or cap tanh(inner s), plus an addend; -inf where the mask is False."""

    inner: float = 1.0
    cap: float | None = None
    addend: Tensor | None = None
    mask: Tensor | None = None

    def scaled(self, number: float) -> _Form | None:
        """Times a positive number."""
        if number <= 0:
            return None
        addend = None if self.addend is None else self.addend * number
        if self.cap is None:
            return replace(self, inner=self.inner * number, addend=addend)
        return replace(self, cap=self.cap * number, addend=addend)

    def tanh(self) -> _Form | None:
        """The hyperbolic tangent, where nothing else is done yet."""
        plain = self.cap is None and self.addend is None and self.mask is None
        return replace(self, cap=1.0) if plain else None

    def plus(self, other: Tensor) -> _Form:
        """With another addend."""
        return replace(self, addend=other if self.addend is None else self.addend + other)

    def where(self, seen: Tensor) -> _Form:
        """-inf where `seen` is False, too."""
        return replace(self, mask=seen if self.mask is None else self.mask & seen)

    def options(self, call: _Call) -> tuple[Any, ...] | None:
        """(mask, scale, causal, window, softcap, dropout) of `attention`; None for no such form."""
        scale, softcap = call.scale * self.inner, 0.0
        if self.cap is not None:
            scale, softcap = scale * self.cap, self.cap
        mask, shape = self.mask, call.sizes[2:]
        if self.addend is not None:
            mask = self.addend.to(call.q.dtype)
            if self.mask is not None:
                mask = torch.where(self.mask, mask, -torch.inf)
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
            mask = mask.expand(*mask.shape[:2], *shape)
        return mask, scale, False, 0, softcap, 0.0


class _Scores:
    """The scores that a function is given; what it does to them is noted in a form, if it can be.

    Anything else is done to the whole scores, which from then on are a tensor as any other.
    """

    def __init__(self, raw: Tensor, form: _Form) -> None:
        self.raw, self.form = raw, form

    @property
    def dtype(self) -> torch.dtype:
        return self.raw.dtype

    @property
    def device(self) -> torch.device:
        return self.raw.device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.Tensor, name).__get__(self)

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # pyright: ignore[reportArgumentType, reportCallIssue]

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return torch.sub(self, other)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def __rsub__(self, other: Any) -> Any:
        return torch.add(torch.neg(self), other)  # pyright: ignore[reportArgumentType]

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)  # pyright: ignore[reportArgumentType, reportCallIssue]

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def __neg__(self) -> Any:
        return torch.neg(self)  # pyright: ignore[reportArgumentType]

    def where(self, seen: Tensor) -> _Scores:
        """-inf where `seen` is False."""
        return _Scores(self.raw, self.form.where(seen))

    def whole(self) -> Tensor:
        """The scores as a tensor (b, hq, q, k)."""
        form, scores = self.form, self.raw * self.form.inner
        if form.cap is not None:
            scores = form.cap * torch.tanh(scores)
        if form.addend is not None:
            scores = scores + form.addend
        return scores if form.mask is None else scores.masked_fill(~form.mask, -torch.inf)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """A form where one is known for the function, else the function of whole scores."""
        name = _name(function)
        if not kwargs and name in _FORMS:
            found = _FORMS[name](*args)
            if found is not None:
                scores = next(x for x in args if isinstance(x, _Scores))
                return _Scores(scores.raw, found)
        whole = [x.whole() if isinstance(x, _Scores) else x for x in args]
        named = {k: x.whole() if isinstance(x, _Scores) else x for k, x in (kwargs or {}).items()}
        return function(*whole, **named)


def _added(a: Any, b: Any) -> _Form | None:
    scores, other = (a, b) if isinstance(a, _Scores) else (b, a)
    if isinstance(other, _Scores):
        return None
    return scores.form.plus(torch.as_tensor(other, dtype=scores.dtype, device=scores.device))


def _taken(a: Any, b: Any) -> _Form | None:
    return _added(a, -b) if isinstance(a, _Scores) and not isinstance(b, _Scores) else None


def _times(a: Any, b: Any) -> _Form | None:
    scores, other = (a, b) if isinstance(a, _Scores) else (b, a)
    return scores.form.scaled(float(other)) if isinstance(other, (int, float)) else None


def _over(a: Any, b: Any) -> _Form | None:
    plain = isinstance(a, _Scores) and isinstance(b, (int, float)) and b
    return a.form.scaled(1 / b) if plain else None


def _tanh(a: Any) -> _Form | None:
    return a.form.tanh()


def _where(seen: Any, a: Any, b: Any) -> _Form | None:
    if isinstance(seen, _Scores) or isinstance(a, _Scores) == isinstance(b, _Scores):
        return None
    if isinstance(a, _Scores):
        return a.form.where(seen) if _is_never(b) else None
    return b.form.where(~seen) if _is_never(a) else None


def _filled(a: Any, hidden: Any, number: Any) -> _Form | None:
    return a.form.where(~hidden) if isinstance(a, _Scores) and _is_never(number) else None


def _is_never(number: Any) -> bool:
    return isinstance(number, (int, float)) and number == -torch.inf


_FORMS: dict[str, Callable[..., _Form | None]] = {
    "add": _added, "sub": _taken, "subtract": _taken, "mul": _times, "multiply": _times,
    "div": _over, "divide": _over, "true_divide": _over, "truediv": _over, "tanh": _tanh,
    "where": _where, "masked_fill": _filled,
}  # fmt: skip


# ---- what functions may do ---------------------------------------------------------------------

_ALSO_CALLED = {
    "truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and",
    "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not",
}  # fmt: skip
# nothing of these mixes numbers of different places
_OF_EACH = frozenset(
    "to type type_as float double half bfloat16 int long clone detach get size dim as_tensor tensor"
    " zeros_like ones_like full_like new_tensor is_floating_point is_complex".split()
)


class _Elementwise(TorchFunctionMode):
    """Inside, tensors are computed with place by place, and read one number at a time.

    A function means one score; only then does it mean the same on all of them at once.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if name == "getitem":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            whole = len(index) == args[0].ndim
            if not whole or not all(type(i) is int or isinstance(i, Tensor) for i in index):
                raise ValueError(
                    "a function of flex_attention reads a part of a tensor of shape "
                    f"{tuple(args[0].shape)}; give an index for every dim, so that it is a number"
                )
        elif func in (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item):
            raise ValueError(
                "a function of flex_attention decides by the value of a score or an index (an "
                "`if`, a `.item()`); use `torch.where`"
            )
        elif name not in _OF_EACH and func is not Tensor.bool and not _is_pointwise(name):
            raise ValueError(
                f"a function of flex_attention calls `{name}`, which is not elementwise: it must "
                "compute one score from that score and its place"
            )
        return func(*args, **(kwargs or {}))


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function)).strip("_")


def _is_pointwise(name: str) -> bool:
    """Does torch declare the function as elementwise?"""
    found = {name, name.removeprefix("r"), _ALSO_CALLED.get(name.removeprefix("r"), "")}
    found |= {_ALSO_CALLED.get(name, "")}
    packets = [getattr(torch.ops.aten, each) for each in found if hasattr(torch.ops.aten, each)]
    overloads = (getattr(packet, each) for packet in packets for each in packet.overloads())
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


# ---- on whole tensors --------------------------------------------------------------------------


def _written_out(*args: Any, **kwargs: Any) -> Tensor:
    """`flex_attention` by its formula: the functions are mapped over every single score."""
    call = _Call.of(*args, **kwargs)
    scores = call.scores()
    places = [torch.arange(size, device=scores.device) for size in call.sizes]
    with indexing_by_tensors():
        if call.score_mod is not None:
            scores = _mapped(call.score_mod, 1)(scores, *places)
        if call.mask_mod is not None:
            seen = _mapped(call.mask_mod, 0)(*places)
            scores = scores.masked_fill(~seen, -torch.inf)
    return call.attended(scores)


def _mapped(function: Callable[..., Any], scores: int) -> Callable[..., Tensor]:
    """`function` of `scores` scores and four places, over all of them."""
    for dim in reversed(range(4)):
        places = tuple(0 if i == dim else None for i in range(4))
        function = torch.vmap(function, in_dims=(*(0,) * scores, *places))
    return function


__all__ = ["captured_flex", "written_out_flex"]
