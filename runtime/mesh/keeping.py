"""A layer that keeps a part of what it makes: what, and how the second run of it goes without.

In backward the layer runs again, and where it would compute a product or attention it gets the
first result.  Kept is what the second run will take, and no more: a result that something reads
before the last tensor that autograd saves, or that autograd saves itself.  A sum over ranks, or an
exchange, of such a result is kept as well, in its place if nothing else reads that.

Eagerly two modes see each operator as it runs.  In what `torch.compile` traces, the same choice
marks the nodes of the graph, and its partitioner keeps no more of them than backward needs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ...compat.torch import (
    OpOverload,
    TorchDispatchMode,
    looks_into,
    storage_key,
    tree_leaves,
    tree_map_only,
    watch_saved_tensors,
    written_operands,
)
from .opaque import is_kept

Contexts: TypeAlias = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
Operators: TypeAlias = frozenset[str]

_OF_EXPERTS = (  # products, and exchanges of tokens
    "aten._grouped_mm", "shardwright.product_of_experts", "shardwright.tell_rows",
    "shardwright.exchange_experts", "shardwright.exchange_rows",
)  # fmt: skip
KINDS: Mapping[str, Operators] = {
    "products": frozenset(
        {
            "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.mv", "aten.addmv",
            "aten.dot", *_OF_EXPERTS,
        }
    ),
    "attention": frozenset({
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "shardwright.run_attention",
    }),
}  # fmt: skip
"""What may be kept: operators as a dispatcher sees them, by the name of their kind."""

_MOVE = "shardwright.move"


def operators_of(keep: str) -> Operators:
    """The operators of `products, attention`.  Raises ValueError for another name."""
    names = [name.strip() for name in keep.split(",")]
    if unknown := sorted(set(names) - KINDS.keys()):
        raise ValueError(f"keep={keep!r}: `{unknown[0]}` is none of {', '.join(KINDS)}")
    return frozenset[str]().union(*(KINDS[name] for name in names))


class _Here(threading.local):
    """What runs on this thread: is it a layer that keeps a part?"""

    layers: int = 0


_here = _Here()


def is_keeping() -> bool:
    """Does a layer run on this thread that keeps a part of what it makes?"""
    return _here.layers > 0


@dataclass(slots=True)
class _Result:
    """A tensor that an operator gave: how it lies in its storage, which is held once it is needed.

    `read_at`: how many tensors autograd had saved when it was read first, or saved.  `again`: it is
    made again.  `changed`: in place, by now.  `alive` tells while nothing holds it when it goes.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    storage: torch.UntypedStorage | None = None
    read_at: int | None = None
    again: bool = False
    changed: bool = False
    alive: weakref.ref[torch.UntypedStorage] | None = None

    @staticmethod
    def of(x: Tensor) -> _Result:
        """A tensor that nothing has read so far."""
        offset = int(x.storage_offset())
        return _Result(tuple(x.size()), tuple(x.stride()), offset, x.dtype, x.device)

    def tensor(self) -> Tensor:
        """As it was; without values where nothing will read them."""
        if self.storage is None:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        found = empty.set_(self.storage, self.offset, self.size, self.stride)
        self.storage = None  # autograd has it now
        return found


@dataclass(slots=True)
class _Run:
    """What the first run of a layer has kept for the second: by operator, call after call."""

    operators: Operators
    results: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    known: dict[int, _Result] = field(default_factory=dict[int, _Result])  # by storage
    saved: int = 0  # tensors that autograd saved
    again: int = 0  # how often the layer ran again

    def may_keep(self, operator: Any) -> bool:
        """May the result of a call be kept?"""
        name = str(getattr(operator, "overloadpacket", ""))
        return name == _MOVE or name in self.operators

    def keeps(self, operator: Any, args: tuple[Any, ...]) -> bool:
        """Is it?"""
        if not self.may_keep(operator):
            return False
        moves = str(operator.overloadpacket) == _MOVE
        return not moves or (is_kept(args[2]) and self._find(args[0]) is not None)

    def _find(self, x: Tensor) -> _Result | None:
        if x.layout != torch.strided or not self.known:
            return None
        return self.known.get(storage_key(x.untyped_storage()))

    def note(self, operator: Any, args: tuple[Any, ...], kwargs: Any, *, kept: bool) -> None:
        """An operator runs: what it reads is needed, unless its own result is kept."""
        known = isinstance(operator, OpOverload)
        for x in written_operands(operator, args) if known else ():
            found = self._find(x) if isinstance(x, Tensor) else None
            if found is not None:
                found.changed = True
        if kept or (known and looks_into(operator)):
            return
        for x in tree_leaves((args, kwargs)):
            found = self._find(x) if isinstance(x, Tensor) else None
            if found is not None:
                self._need(found, x)

    def note_saved(self, x: Tensor) -> None:
        """Autograd saves a tensor."""
        found = self._find(x)
        if found is not None:
            self._need(found, x)
        self.saved += 1

    def _need(self, found: _Result, x: Tensor) -> None:
        if found.read_at is None:
            found.read_at, found.storage = self.saved, x.untyped_storage()

    def add(self, operator: Any, out: Any, *, kept: bool) -> None:
        """Note what a call gave that may be kept."""
        noted = tree_map_only(Tensor, self._noted, out) if kept else None
        self.results.setdefault(str(operator), []).append(noted)

    def _noted(self, x: Tensor) -> _Result:
        found, storage, known = _Result.of(x), x.untyped_storage(), self.known
        key = storage_key(storage)

        def forget(_: object) -> None:
            if known.get(key) is found:
                del known[key]

        known[key], found.alive = found, weakref.ref(storage, forget)
        return found

    def end(self) -> None:
        """The first run is over: what is read after the last saved tensor alone is not needed."""
        self.known.clear()
        for found in tree_leaves(list(self.results.values())):
            if not isinstance(found, _Result):
                continue
            found.alive = None  # which knows it, too
            if found.read_at == self.saved:
                found.storage, found.again = None, True

    def given(self, operator: Any, call: int) -> Any:
        """What a call gave in the first run; None where it is to run."""
        results = self.results.get(str(operator), [])
        found = results[call] if self.again == 1 and call < len(results) else None
        leaves = [x for x in tree_leaves(found) if isinstance(x, _Result)]
        if not leaves or any(x.again for x in leaves):
            return None
        if any(x.changed for x in leaves):
            raise RuntimeError(
                f"what {operator} gave was changed in place after a layer kept it for backward;"
                " change a copy instead"
            )
        return tree_map_only(_Result, _Result.tensor, found)


class _First(TorchDispatchMode):
    """Keeps what the second run will take."""

    supports_higher_order_operators = True

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        kept = self.run.keeps(func, args)
        self.run.note(func, args, kwargs, kept=kept)
        out = func(*args, **(kwargs or {}))
        if self.run.may_keep(func):
            self.run.add(func, out, kept=kept)
        return out


class _Second(TorchDispatchMode):
    """Gives what was kept in place of running an operator."""

    supports_higher_order_operators = True

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, or give its result."""
        if not self.run.may_keep(func):
            return func(*args, **(kwargs or {}))
        call = self.calls[str(func)] = self.calls.get(str(func), -1) + 1
        given = self.run.given(func, call)
        return func(*args, **(kwargs or {})) if given is None else given


def keeping(keep: str) -> Contexts:
    """Contexts for a first run that keeps results of such kinds, and for the second.

    Where backward comes a second time, all is made again.
    """
    run = _Run(operators_of(keep))

    @contextmanager
    def first() -> Generator[None]:
        try:
            with _on_this_thread(), watch_saved_tensors(run.note_saved), _First(run):
                yield
        finally:
            run.end()

    @contextmanager
    def second() -> Generator[None]:
        run.again += 1
        with _on_this_thread(), _Second(run):
            yield

    return first(), Each(second)


class Each(AbstractContextManager[None]):
    """A context that is made anew each time that it is entered: once for every backward pass."""

    def __init__(self, made: Callable[[], AbstractContextManager[Any]]) -> None:
        self._made = made
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        context = self._made()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


@contextmanager
def _on_this_thread() -> Generator[None]:
    _here.layers += 1
    try:
        yield
    finally:
        _here.layers -= 1


def both(outer: Contexts, inner: Contexts) -> Contexts:
    """Two pairs of contexts as one."""

    @contextmanager
    def entered(first: AbstractContextManager[Any], then: AbstractContextManager[Any]) -> Any:
        with first, then:
            yield

    return entered(outer[0], inner[0]), Each(lambda: entered(outer[1], inner[1]))


def keeping_in_graphs(keep: str) -> Contexts:
    """The same for `torch.compile`, which marks the nodes of a graph by it.

    All sums and exchanges are kept that backward needs the results of.
    """
    operators = operators_of(keep)

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(getattr(operator, "overloadpacket", ""))
        kept = name in operators or (name == _MOVE and is_kept(args[2]))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


__all__ = [
    "KINDS", "Contexts", "Each", "both", "is_keeping", "keeping", "keeping_in_graphs",
    "operators_of",
]  # fmt: skip
