"""One call of an attention that ranks share: who takes part, and who attends whom."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .agreement import Call, agree
from .links import Group, Link, link_of
from .options import Options
from .partial import wide
from .scores import Scores
from .tokens import Layout
from .work import Work


@dataclass(frozen=True, slots=True)
class Task(ABC):
    """What an algorithm asks about a call; a subclass knows where the keys come from."""

    link: Link
    scores: Scores

    @abstractmethod
    def work(self, queries: int, keys: int) -> Work:
        """What the queries of rank `queries` attend of the keys of rank `keys`."""

    def of_heads(self, first: int, count: int) -> Self:
        """The same for the query heads `first` to `first + count`."""
        return replace(self, scores=self.scores.of_heads(first, count))

    def with_bias_gradient(self, wanted: bool) -> tuple[Self, Tensor | None]:
        """(this task for a backward pass, what then has the gradient of the bias, if wanted).

        The gradient is float32 or float64; autograd rounds it to the dtype of the bias.
        """
        bias = self.scores.bias
        if bias is None or not wanted:
            return self, None
        dbias = torch.zeros_like(bias, dtype=wide(bias.dtype))
        return replace(self, scores=replace(self.scores, dbias=dbias)), dbias


@dataclass(frozen=True, slots=True)
class KnownTask(Task):
    """Every rank's queries attend the own keys in one way that is known from the start."""

    known: Work

    def work(self, queries: int, keys: int) -> Work:
        """The one that is known."""
        return self.known


@dataclass(frozen=True, slots=True)
class ShardTask(Task):
    """Queries and keys are shards of a sequence, in layouts that all ranks know."""

    queries: Layout
    keys: Layout

    @staticmethod
    def of(
        options: Options,
        group: Group,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        layout: Layout | None,
        query_layout: Layout | None = None,
    ) -> ShardTask:
        """Checked, also against the other ranks; layouts as in `layouts_of`."""
        options.check_keys(q, k, v)
        link = link_of(options.name, group)
        scores = options.scores(q)
        layouts = layouts_of(link.size, q, k, layout, query_layout)
        call = Call.of(options.name, scores, (q, k, v, options.sinks), layouts, up=options.up)
        agree(call, [link], q.device, every_time=layout is None)
        check_rows(options, link.rank, link.size, q, k, layouts)
        options.check_covers(scores, *layouts)
        return ShardTask(link, scores, *layouts)

    def work(self, queries: int, keys: int) -> Work:
        """As the layouts say."""
        return Work.alike(self.scores.pieces(self.queries, queries, self.keys, keys))


def layouts_of(
    ranks: int, q: Tensor, k: Tensor, layout: Layout | None, query_layout: Layout | None
) -> tuple[Layout, Layout]:
    """The layouts of queries and keys.

    `layout` is that of the keys and, if `query_layout` is None, of the queries.  Without one
    the ranks hold equal shards one after the other.
    """
    keys = layout or Layout.contiguous(k.shape[2] * ranks, ranks)
    return query_layout or layout or Layout.contiguous(q.shape[2] * ranks, ranks), keys


def check_rows(
    options: Options, rank: int, ranks: int, q: Tensor, k: Tensor, layouts: tuple[Layout, Layout]
) -> None:
    """Refuse layouts of queries and keys that do not fit the shards of this rank.

    After `agree`: the other ranks must hear of a shard that is wrong on one of them alone.
    """
    for title, x, layout in zip("qk", (q, k), layouts, strict=True):
        if layout.ranks != ranks:
            options.refuse(f"the layout has {layout.ranks} shards where there are {ranks} ranks")
        if x.shape[2] != layout.rows:
            options.refuse(
                f"{title} {tuple(x.shape)} on rank {rank} has {x.shape[2]} rows, its layout has"
                f" {layout.rows}; cut it with layout.shard(x, 2, rank)"
            )
