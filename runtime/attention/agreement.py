"""Do all ranks make the same call?  Messages of unequal sizes would hang, or end the process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .links import Link
from .scores import Scores
from .tokens import Layout

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Hashes of the calls on which the ranks of a group agreed, the oldest first, and how many are kept.
# All ranks of a group make the same calls, so that all of them find a call here, or none does.
_agreed: WeakKeyDictionary[ProcessGroup, dict[int, None]] = WeakKeyDictionary()
_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Call:
    """What must be the same on all ranks.  `k_rows` is 0 where they may differ."""

    name: str
    scores: Scores
    sinks: bool
    layouts: tuple[Layout, ...]
    shape: tuple[int, int, int, int]  # of q
    key_heads: int
    k_rows: int
    v_dim: int  # 0 with latents
    dtype: torch.dtype
    latent: tuple[int, ...]  # numbers of a latent, and sizes of what makes heads of them

    @staticmethod
    def of(
        name: str,
        scores: Scores,
        tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        layouts: tuple[Layout, ...],
        *,
        k_rows: int | None = None,
        up: Tensor | None = None,
    ) -> Call:
        """The call with `tensors` q, k, v and sinks; with `up`, k are latents and v is None."""
        q, k, v, sinks = tensors
        b, heads, rows, d = q.shape
        k_rows = k.shape[2] if k_rows is None else k_rows
        return Call(
            name, scores, sinks is not None, layouts, (b, heads, rows, d), k.shape[1], k_rows,
            0 if v is None else v.shape[3], q.dtype, () if up is None else (k.shape[3], *up.shape),
        )  # fmt: skip

    def numbers(self) -> dict[str, int]:
        """By title; hashes of what is not a number, the same in every process."""
        s, (b, heads, rows, d) = self.scores, self.shape
        given = (s.bias, s.slopes, s.mask.keys, s.mask.documents)
        options = (s.causal, s.window, s.scale, s.softcap, s.mask.prefix, self.sinks, self.latent)
        return {
            "function": crc32(self.name.encode()),
            "batch": b,
            "query heads": heads,
            "key heads": self.key_heads,
            "rows of q": rows,
            "rows of k": self.k_rows,
            "d": d,
            "dv": self.v_dim,
            "dtype": _DTYPES.index(self.dtype) if self.dtype in _DTYPES else -1,
            "layout": hash(self.layouts),
            "options": hash((*options, *(x is None for x in given))),
        }


def agree(call: Call, links: Sequence[Link], device: torch.device, *, every_time: bool) -> None:
    """Raise ValueError on every rank if the ranks' calls differ; one all-gather of 96 bytes a link.

    Without `every_time` only at the first such call of a process on the groups of `links`, which is
    not counted: later ones move nothing.  That is for callers who say by a layout what the ranks
    hold.  A rank whose later call differs from those that were compared waits with the others until
    the time limit of the group.
    """
    links = [link for link in links if link.size > 1]
    if not links:
        return
    numbers = call.numbers()
    known = _agreed.setdefault(links[0].group, {})
    signature = hash((*numbers.values(), *(link.size for link in links)))
    if not every_time and signature in known:
        return
    error = ""
    for link in links:  # all of them, so that ranks which share no group are told by a third
        own = torch.tensor([*numbers.values(), bool(error)], device=device)
        rows = link.all_gather(own, "forward") if every_time else link.tell(own)
        error = error or _difference([*numbers, ""], rows.tolist(), link.name)
    if error:
        raise ValueError(f"{call.name}: {error}")
    if not every_time:
        known[signature] = None
        if len(known) > _KEPT:
            del known[next(iter(known))]


def _difference(titles: Sequence[str], rows: Sequence[Sequence[int]], group: str) -> str:
    """What the ranks of a group differ in, if anything; `titles` of the numbers in each row."""
    for title, column in zip(titles, zip(*rows, strict=True), strict=True):
        if len(set(column)) == 1:
            continue
        if not title:
            return f"rank {column.index(1)} of `{group}` differs from others; see its message"
        return f"the ranks of `{group}` differ in {title}{_values(title, column)}"
    return ""


def _values(title: str, column: Sequence[int]) -> str:
    if title == "dtype":
        names = [str(_DTYPES[i]).removeprefix("torch.") if i >= 0 else "another" for i in column]
        return f": [{', '.join(names)}]"
    if title in ("function", "options", "layout"):
        others = [str(rank) for rank, value in enumerate(column) if value != column[0]]
        return f": rank {', '.join(others)} from rank 0"
    return f": {list(column)}"
