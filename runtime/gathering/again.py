"""Weights that were moved for a block are not kept for backward: they are moved again.

Autograd saves the weight of every matmul.  Of a weight that was gathered from shards that is the
whole weight, and sharding it would have saved nothing; of one that was cast, a second copy.
`Recipes` swaps such saved tensors for the way in which the weights of their block came (see
`weights.py`); when backward asks for the first of them, those of the block that it will ask for
come again together, and each stays until its last use.  The block that backward needs next is on
its way meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ...compat.torch import backward_number, changes, storage_key, will_run
from .chains import Flight, Way


def in_backward() -> bool:
    """Is autograd running on this thread?"""
    return backward_number() != -1


class Borrowed:
    """The weights of a block in one forward pass, by number, and how to bring them again.

    `before` is what forward brought before: backward will ask for it next.  `node` runs if a
    gradient reaches the weights.
    """

    def __init__(
        self,
        starts: Sequence[Tensor],
        ways: Sequence[Way],
        before: Borrowed | None,
        node: Node | None,
    ) -> None:
        self.before = before
        self._starts = starts
        self._ways = ways
        self._node = node
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # while anything uses it
        self._kept: dict[int, torch.UntypedStorage] = {}  # from the first to the last of its uses
        self._uses = [0] * len(ways)  # how often a backward pass asks for each
        self._left = [0] * len(ways)  # how often the one that is running will
        self._task = -1
        self._under_way: tuple[list[int], Flight] | None = None

    def made(self, number: int, storage: weakref.ref[torch.UntypedStorage]) -> None:
        """Forward has brought a weight."""
        self._made[number] = storage

    def expect(self, number: int) -> None:
        """Backward will ask for a weight once more."""
        self._uses[number] += 1
        self._left[number] += 1

    def storage(self, number: int) -> torch.UntypedStorage:
        """The storage of a weight, brought again with others unless it is still there."""
        self._note_task()
        found = self._made[number]()
        while found is None:
            self._bring(number)
            found = self._made[number]()
        self._left[number] -= 1
        if self._left[number] <= 0:
            self._kept.pop(number, None)
        return found

    def _note_task(self) -> None:
        if self._task != backward_number():  # another pass over the same graph
            self._task = backward_number()
            self._left = list(self._uses)

    def _bring(self, number: int) -> None:
        if self._under_way is None:
            self._start({number})
        self._start_before()
        assert self._under_way is not None
        numbers, flight = self._under_way
        self._under_way = None
        for i, whole in zip(numbers, flight.finish(), strict=True):
            self._kept[i] = whole.untyped_storage()
            self._made[i] = weakref.ref(self._kept[i])

    def _start(self, besides: set[int]) -> None:
        """Start to bring the weights that backward still asks for and are gone, and `besides`."""
        numbers = sorted({i for i, left in enumerate(self._left) if left > 0} | besides)
        numbers = [i for i in numbers if self._made[i]() is None]
        tensors, ways = [self._starts[i] for i in numbers], [self._ways[i] for i in numbers]
        self._under_way = numbers, Flight(tensors, ways, "backward")

    def _start_before(self) -> None:
        """Start what backward will ask for next."""
        unit = self.before
        while unit is not None and unit._under_way is None and not unit._is_coming():
            unit = unit.before
        if unit is not None and unit._under_way is None:
            unit._start(set())

    def _is_coming(self) -> bool:
        """Will this backward ask for what is not there?"""
        if self._node is None or not in_backward() or not will_run(self._node):
            return False
        self._note_task()
        return any(left > 0 and self._made[i]() is None for i, left in enumerate(self._left))


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor that looks into weight `number` of a block."""

    of: Borrowed
    number: int
    dtype: torch.dtype
    device: torch.device
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The saved tensor again, as a view of the weight that was brought again."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(self.of.storage(self.number), self.offset, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A saved tensor that is none of ours, and its version when it was saved."""

    tensor: Tensor
    version: int


_Saved: TypeAlias = _View | _Kept


class Recipes:
    """The moved weights of one forward pass that are alive, by the address of their storage.

    `hooks()` is entered while forward runs; costs a dictionary look-up per saved tensor.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Borrowed, int]] = {}
        self._last: Borrowed | None = None

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Within, moved weights are freed after their last use in forward."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def remember(
        self,
        wholes: Sequence[Tensor],
        starts: Sequence[Tensor],
        ways: Sequence[Way],
        node: Node | None,
    ) -> None:
        """`wholes` came from `starts` along `ways`, and are used by one block."""
        if not wholes:
            return
        self._last = borrowed = Borrowed(starts, ways, self._last, node)
        known = self._known
        for number, whole in enumerate(wholes):
            storage = whole.untyped_storage()
            key = storage_key(storage)

            def forget(_: object, key: int = key) -> None:
                known.pop(key, None)

            known[key] = borrowed, number
            borrowed.made(number, weakref.ref(storage, forget))

    def _pack(self, x: Tensor) -> _Saved:
        """What to save in place of `x`."""
        found = None
        if x.layout == torch.strided:
            found = self._known.get(storage_key(x.untyped_storage()))
        if found is None:
            # Detached: an operation that saves its own result would otherwise hold itself alive.
            return _Kept(x if x.is_leaf else x.detach(), changes(x))
        borrowed, number = found
        borrowed.expect(number)
        offset, size, stride = int(x.storage_offset()), tuple(x.size()), tuple(x.stride())
        return _View(borrowed, number, x.dtype, x.device, offset, size, stride)


def _unpack(saved: _Saved) -> Tensor:
    if isinstance(saved, _View):
        return saved.tensor()
    if changes(saved.tensor) != saved.version:
        raise RuntimeError(
            f"a tensor of shape {tuple(saved.tensor.shape)} that backward needs was changed in"
            " place after the forward pass used it; change a copy instead"
        )
    return saved.tensor
