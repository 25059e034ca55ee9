"""Work on whole parameters, each by one rank: parts to their owners, and what these make back.

Ranks agree without a message on who owns what (`facts/orthogonal.py`).  What they exchange goes in
rounds, so that a rank holds a few whole matrices at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from ...facts.orthogonal import NUMBER_BYTES, ROUND_BYTES, newton_schulz_flops, owners, portions
from ..mesh import transport
from ..mesh.mesh import Mesh
from .pieces import Box, Piece, Whole


@dataclass(frozen=True, slots=True)
class Matrices:
    """What is stepped as whole matrices: names of originals, those of other ranks' stages too, what
    makes `Whole`s of names, and the mesh of the ranks that share them."""

    names: Collection[str]
    wholes: Callable[[Collection[str]], list[Whole]]
    mesh: Mesh


@dataclass(frozen=True, slots=True)
class Task:
    """A matrix, or those of a stack, at `box` of the original, which rank `owner` works on."""

    whole: Whole
    box: Box
    owner: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is worked on."""
        return _shape(self.box)

    @property
    def cost(self) -> float:
        """FLOPs."""
        return _cost(self.box)


Parcel: TypeAlias = tuple[Task, int, Box]  # of a task, in a rank's piece of that number, at a box


@dataclass(frozen=True, slots=True)
class Route:
    """What this rank gives to each rank and takes from each, in numbers `send` and `receive`.

    `moves`: whether any rank gives something to another.
    """

    gives: tuple[Parcel, ...]
    send: tuple[int, ...]
    takes: tuple[Parcel, ...]
    receive: tuple[int, ...]
    moves: bool

    def pass_on(self, given: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
        """What is taken (`takes`), in the place of what is given (`gives`); flat tensors."""
        if not self.moves:  # then what this rank gives it takes itself
            return list(given)
        axis = mesh[mesh.names]
        empty = torch.empty(0, dtype=torch.bfloat16, device=mesh.device)
        rows = torch.cat([empty, *given]).unsqueeze(1)
        others = sum(self.receive) - self.receive[axis.rank]
        axis.record("all_to_all", float(others * NUMBER_BYTES), "step")
        come = transport.all_to_all_rows(rows, self.send, self.receive, axis.group)
        return list(come.squeeze(1).split([_numel(box) for _, _, box in self.takes]))


@dataclass(frozen=True, slots=True)
class Round:
    """An exchange: the tasks that are this rank's, the way there and the way back."""

    own: tuple[Task, ...]
    there: Route
    back: Route

    def run(
        self,
        mesh: Mesh,
        read: Callable[[Piece, Box], Tensor],
        work: Callable[[Task, Tensor], Tensor],
        write: Callable[[Piece, Box, Tensor], None],
    ) -> None:
        """`work` on what all ranks `read` of their pieces, which they then `write`.

        Boxes are those of the original; tensors are bfloat16.
        """
        given = [read(t.whole.pieces[i], box).flatten() for t, i, box in self.there.gives]
        wholes = {
            id(task): torch.empty(task.shape, dtype=torch.bfloat16, device=mesh.device)
            for task in self.own
        }
        for (task, _, box), x in zip(
            self.there.takes, self.there.pass_on(given, mesh), strict=True
        ):
            wholes[id(task)][within(box, task.box)] = x.view(_shape(box))
        made = {id(task): work(task, wholes.pop(id(task))) for task in self.own}
        results = [made[id(t)][within(box, t.box)].flatten() for t, _, box in self.back.gives]
        for (task, number, box), x in zip(
            self.back.takes, self.back.pass_on(results, mesh), strict=True
        ):
            write(task.whole.pieces[number], box, x.view(_shape(box)))


def rounds_of(wholes: Sequence[Whole], mesh: Mesh) -> list[Round]:
    """All work on some parameters, shared out among the ranks of `mesh`, the costliest first."""
    tasks = _shared_out(wholes, mesh.size)
    runs = [_runs([task for task in tasks if task.owner == rank]) for rank in range(mesh.size)]
    found: list[Round] = []
    for some in zip_longest(*runs, fillvalue=()):
        all_tasks = [task for own in some for task in own]
        own = tuple(task for task in all_tasks if task.owner == mesh.rank)
        found.append(Round(own, _there(all_tasks, mesh), _back(all_tasks, mesh)))
    return found


def _shared_out(wholes: Sequence[Whole], ranks: int) -> list[Task]:
    boxes = [(whole, box) for whole in wholes for box in _matrices(whole, ranks)]
    may = [_most_held(whole, box) for whole, box in boxes]
    owned = owners([_cost(box) for _, box in boxes], may, ranks)
    return [Task(whole, box, owner) for (whole, box), owner in zip(boxes, owned, strict=True)]


def _matrices(whole: Whole, ranks: int) -> Iterator[Box]:
    """The whole matrix, or ranges of a stack."""
    *stack, rows, columns = whole.shape
    matrix = slice(0, rows), slice(0, columns)
    if not stack:
        yield matrix
        return
    edges = {edge for own in whole.held for box in own for edge in (box[0].start, box[0].stop)}
    for first, last in portions(stack[0], sorted(edges), ranks):
        yield slice(first, last), *matrix


def _most_held(whole: Whole, box: Box) -> list[int]:
    """The ranks that hold most of it."""
    held = [sum(_numel(found) for _, found in _overlaps(whole, r, box)) for r in _ranks(whole)]
    return [rank for rank, numel in enumerate(held) if numel == max(held)]


def _runs(tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
    """One rank's tasks for each round: as many as go together."""
    runs: list[tuple[Task, ...]] = []
    room = 0
    for task in sorted(tasks, key=lambda task: -task.cost):
        size = _numel(task.box) * NUMBER_BYTES
        if size > room:
            runs.append(())
            room = ROUND_BYTES
        runs[-1] += (task,)
        room -= size
    return runs


def _there(tasks: Sequence[Task], mesh: Mesh) -> Route:
    """Each part from one of the ranks that hold it to the task's owner."""

    def sent(rank: int, owner: int) -> list[Parcel]:
        return [
            (task, number, box)
            for task in tasks
            if task.owner == owner
            for number, box in _overlaps(task.whole, rank, task.box)
            if task.whole.gives(number, rank, owner)
        ]

    moves = any(_numel(task.box) > _held_by_owner(task) for task in tasks)
    ranks = range(mesh.size)
    return _route([sent(mesh.rank, o) for o in ranks], [sent(r, mesh.rank) for r in ranks], moves)


def _back(tasks: Sequence[Task], mesh: Mesh) -> Route:
    """From a task's owner its part to every rank that holds one."""

    def sent(owner: int, rank: int) -> list[Parcel]:
        return [
            (task, number, box)
            for task in tasks
            if task.owner == owner
            for number, box in _overlaps(task.whole, rank, task.box)
        ]

    moves = any(
        rank != task.owner and any(_overlaps(task.whole, rank, task.box))
        for task in tasks
        for rank in range(mesh.size)
    )
    ranks = range(mesh.size)
    return _route([sent(mesh.rank, r) for r in ranks], [sent(o, mesh.rank) for o in ranks], moves)


def _route(
    given: Sequence[Sequence[Parcel]], taken: Sequence[Sequence[Parcel]], moves: bool
) -> Route:
    return Route(
        tuple(parcel for some in given for parcel in some),
        tuple(sum(_numel(box) for _, _, box in some) for some in given),
        tuple(parcel for some in taken for parcel in some),
        tuple(sum(_numel(box) for _, _, box in some) for some in taken),
        moves,
    )


def _held_by_owner(task: Task) -> int:
    return sum(_numel(box) for _, box in _overlaps(task.whole, task.owner, task.box))


def _overlaps(whole: Whole, rank: int, box: Box) -> Iterator[tuple[int, Box]]:
    """What a rank holds of a box, by the numbers of its pieces."""
    for number, held in enumerate(whole.held[rank]):
        found = tuple(
            slice(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(held, box, strict=True)
        )
        if all(part.start < part.stop for part in found):
            yield number, found


def within(box: Box, outer: Box) -> Box:
    """A box as one of the tensor that is at `outer`."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer, strict=True)
    )


def _ranks(whole: Whole) -> range:
    return range(len(whole.held))


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def _numel(box: Box) -> int:
    return prod(_shape(box))


def _cost(box: Box) -> float:
    *stack, rows, columns = _shape(box)
    return prod(stack) * newton_schulz_flops(rows, columns)


__all__ = ["Matrices", "Round", "Task", "rounds_of", "within"]
