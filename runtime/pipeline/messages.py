"""Messages between the stages of a pipeline: activations to the next, gradients to the one before.

Every rank knows the whole schedule, so that a receiver knows in which order a sender sends: it asks
for messages in that order, one ahead of the one that it waits for.  Messages of one kind in one
direction have a process group of their own on CUDA, where those of a group are sent in the order
in which both sides ask for them; gloo tells them apart by tags.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ...facts.schedules import Action, PipelineSchedule
from ..mesh.counter import Phase, record
from ..mesh.mesh import Mesh

# What two ranks send each other: "F" or "B", the stage that made it, the micro-batch
Key: TypeAlias = tuple[str, int, int]
_PHASES: dict[str, Phase] = {"F": "forward", "B": "backward"}


@dataclass(frozen=True, slots=True)
class Form:
    """Local shape and dtype of a tensor in a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Links:
    """The way to other stages, along the outermost axis of `mesh`.  All ranks make it together."""

    def __init__(self, mesh: Mesh) -> None:
        self._axis = mesh.names[0]
        self.rank, self.ranks = mesh.coordinates[0], mesh.sizes[0]
        self._stride = mesh.size // self.ranks
        self._place = mesh.rank % self._stride
        self.device = mesh.device
        self._groups: dict[tuple[str, bool], Any] = {}
        if mesh.device.type != "cuda" or self.ranks == 1:
            return
        for kind, up in product("FB", (True, False)):
            for place in range(self._stride):
                column = [place + n * self._stride for n in range(self.ranks)]
                group = dist.new_group(column)
                if place == self._place:
                    self._groups[kind, up] = group

    def open(self, schedule: PipelineSchedule, forms: dict[tuple[str, int], list[Form]]) -> Post:
        """The messages of a step; `forms` has what those of a kind from a stage are."""
        coming: dict[tuple[str, int], deque[Key]] = {}
        for rank, actions in enumerate(schedule.actions):
            for action in actions if rank != self.rank else ():
                key, receiver = key_of(action), receiver_of(action, schedule)
                if receiver == self.rank:
                    coming.setdefault((key[0], rank), deque()).append(key)
        return Post(self, schedule, forms, coming)

    def begin(self, x: Tensor, *, kind: str, peer: int, tag: int, sends: bool) -> Any:
        """Start to send or receive the bytes of a contiguous tensor to or from a rank of the
        pipeline."""
        group = self._groups.get((kind, (peer > self.rank) == sends))
        run = dist.isend if sends else dist.irecv
        x = x.reshape(-1).view(torch.uint8)
        return run(x, self._place + peer * self._stride, group=group, tag=tag)

    def empty(self, form: Form) -> Tensor:
        """Room for a tensor."""
        return torch.empty(form.shape, dtype=form.dtype, device=self.device)

    def count(self, kind: str, x: Tensor) -> None:
        """Tell counters of what has come."""
        record("send_recv", self._axis, _PHASES[kind], x.numel() * x.element_size(), (2,))


def key_of(action: Action) -> Key:
    """What an action makes: an activation, or a gradient; `W` makes nothing for others."""
    return ("B" if action.kind in "BI" else action.kind), action.stage, action.batch


def receiver_of(action: Action, schedule: PipelineSchedule) -> int | None:
    """The rank of the pipeline that waits for what an action makes, if another stage does."""
    if action.kind == "W":
        return None
    following = action.stage + (1 if action.kind == "F" else -1)
    return schedule.rank_of[following] if 0 <= following < schedule.stages else None


class Post:
    """The messages of one step."""

    def __init__(
        self,
        links: Links,
        schedule: PipelineSchedule,
        forms: dict[tuple[str, int], list[Form]],
        coming: dict[tuple[str, int], deque[Key]],
    ) -> None:
        self._links = links
        self._schedule = schedule
        self._forms = forms
        self._coming = coming
        self._asked: dict[Key, list[tuple[Any, Tensor]]] = {}
        self._sent: deque[tuple[Any, Tensor, Key, int]] = deque()

    def send(self, key: Key, peer: int, tensors: Sequence[Tensor]) -> None:
        """Send what a stage has made, and go on."""
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        for number, (x, form) in enumerate(zip(tensors, self._forms[key[:2]], strict=True)):
            if (tuple(x.shape), x.dtype) != (form.shape, form.dtype):
                raise ValueError(
                    f"stage {key[1]} makes {x.dtype} {tuple(x.shape)} of micro-batch {key[2]}, but"
                    f" the plan has {form.dtype} {form.shape}: micro-batches have the size that was"
                    " planned"
                )
            own = x.detach().contiguous()
            with self._told(f"could not send {_words(key)} to rank {peer}"):
                work = self._links.begin(
                    own, kind=key[0], peer=peer, tag=_tag(key, number), sends=True
                )
            self._sent.append((work, own, key, peer))

    def receive(self, key: Key, peer: int) -> list[Tensor]:
        """What the stage of `key` has made, when it has come.

        Raises RuntimeError, which says who waited for what, where the other rank is gone.
        """
        queue = self._coming[key[0], peer]
        while key not in self._asked:
            self._ask(queue.popleft(), peer)
        if queue:
            self._ask(queue.popleft(), peer)
        found: list[Tensor] = []
        for work, x in self._asked.pop(key):
            with self._told(f"waited for {_words(key)} from rank {peer}, which did not come"):
                work.wait()
            self._links.count(key[0], x)
            found.append(x)
        return found

    def close(self) -> None:
        """Until all is sent.  Raises RuntimeError as `receive` does."""
        for work, _, key, peer in self._sent:
            with self._told(f"waited until rank {peer} had {_words(key)}, which it did not get"):
                work.wait()
        self._sent.clear()

    @contextmanager
    def _told(self, what: str) -> Generator[None]:
        """An error of a message says which rank of the pipeline waited for what."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self._links.rank} of the pipeline {what}: {error}"
            ) from error

    def _ask(self, key: Key, peer: int) -> None:
        if key in self._asked:
            return
        room = [self._links.empty(form) for form in self._forms[key[:2]]]
        with self._told(f"could not ask rank {peer} for {_words(key)}"):
            self._asked[key] = [
                (self._links.begin(x, kind=key[0], peer=peer, tag=_tag(key, n), sends=False), x)
                for n, x in enumerate(room)
            ]


def _words(key: Key) -> str:
    """`the gradient of micro-batch 1 that stage 2 makes`."""
    what = "the activation" if key[0] == "F" else "the gradient"
    return f"{what} of micro-batch {key[2]} that stage {key[1]} makes"


def _tag(key: Key, number: int) -> int:
    """Of a tensor of a message; those of later micro-batches come later."""
    return (key[1] * 2 + (key[0] == "B")) * 64 + number


__all__ = ["Form", "Key", "Links", "Post", "key_of", "receiver_of"]
