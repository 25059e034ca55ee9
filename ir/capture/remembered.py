"""What a forward pass leaves in Python for the next one, other than buffers.

A plan holds one forward pass.  A counter in an attribute of a module, a global variable or a
closure, or a tensor that is kept there, would be in it as it was when the model was captured.  So a
model that changes such values (`reached.py`) is captured again as it was left: where its graph is
another one then, the next pass would compute something else.  What is only written (statistics for
a log, the loss of a router that the same pass adds up) makes no difference.  Tables that follow
from no input and no weight may be kept.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeAlias, cast

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...compat.torch import tree_leaves
from .errors import CaptureError
from .reached import Holder, Reached, turned

_Held: TypeAlias = dict[str, Any]  # values by name
_Left: TypeAlias = dict[int, _Held]  # by the number of their holder
_MANY = 999_983  # passes later: odd, so that what alternates differs
_DRAWS = ("rand", "bernoulli", "multinomial", "normal", "poisson", "dropout", "exponential")
_MISSING = object()
_MAPPINGS = (dict, defaultdict, OrderedDict, Counter)


class Watched(TorchFunctionMode):
    """Inside, what `model` holds and its code reaches is noted when its forward begins and ends,
    and which tensors are tables: made of nothing but numbers and other tables."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._reached: list[Holder] = []
        self._before: list[_Held] = []
        self._after: list[_Held] = []
        self._objects: list[_Held] = []  # those that `_before` has copies of
        self._tables: dict[int, Tensor] = {}  # which keeps them, so that no id is used twice
        self._caches: list[Any] = []
        self._hooks: list[Any] = []
        self._hooked = 0
        self._drawn: dict[str, str] = {}
        self.installs = False  # hooks, once and for all: the next pass is the one to look at
        self.clocks = False  # its code names what gives another answer each time

    def __enter__(self) -> Watched:
        def begin(*_: object) -> None:
            reached = Reached(self._model)
            self._reached, self.clocks = reached.holders, reached.clocks
            self._caches = reached.caches
            self._forget()
            self._objects = [holder.held() for holder in self._reached]
            self._before = [_copied(held) for held in self._objects]
            self._hooked = _hooks(self._model)
            self._drawn = self._generators()

        def end(*_: object) -> None:
            self._check_generators()
            self._after = [_copied(holder.held()) for holder in self._reached]
            self.installs = self._hooked != _hooks(self._model)

        self._hooks = [
            self._model.register_forward_pre_hook(begin, prepend=True),
            self._model.register_forward_hook(end),
        ]
        return cast("Watched", super().__enter__())

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)
        self._forget()
        if not self.installs:
            for holder, held, objects in self._all(self._before):
                _put(holder, held, objects)

    def _forget(self) -> None:
        """Functions that remember (`functools.cache`) keep no tensor without values."""
        for function in self._caches:
            function.cache_clear()

    def _all(self, values: list[_Held]) -> Iterator[tuple[Holder, _Held, _Held]]:
        return zip(self._reached, values, self._objects, strict=False)  # none where none began

    def _generators(self) -> dict[str, str]:
        """States of generators that no graph has: those of libraries, and what is reached."""
        states = {
            "Python's `random`": repr(random.getstate()),
            "numpy's `random`": repr(numpy.random.get_state()),  # noqa: NPY002
        }
        for holder, held in zip(self._reached, self._objects, strict=True):
            for name, value in held.items():
                state = turned(value)
                states |= {holder.told(name): state} if state else {}
        return states

    def _check_generators(self) -> None:
        """Raises CaptureError where one of them was asked."""
        for whose, state in self._generators().items():
            if state != self._drawn.get(whose, state):
                raise CaptureError(
                    f"{type(self._model).__name__} draws with {whose} while it runs: the plan"
                    " would hold what came out once. Draw a tensor (`torch.rand`), and use"
                    " `torch.where`"
                )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        drawn = getattr(func, "__name__", "").startswith(_DRAWS)
        if not drawn and all(map(self._is_table, taken)):
            self._tables |= {id(x): x for x in tree_leaves(made) if isinstance(x, Tensor)}
        return made

    def _is_table(self, x: Tensor) -> bool:
        return type(x) is Tensor or id(x) in self._tables  # not fake: a constant of the model's

    def left(self) -> _Left:
        """By holder the values that a pass leaves otherwise than it finds them, but for holders
        that keep tables."""
        found: _Left = {}
        for number, (before, after) in enumerate(zip(self._before, self._after, strict=False)):
            changed = {
                name: value
                for name, value in after.items()
                if not _same(before.get(name, _MISSING), value)
            }
            known = {id(x) for x in tree_leaves(before)}
            new = [x for x in tree_leaves(changed) if isinstance(x, Tensor) and id(x) not in known]
            if changed and not any(map(self._is_table, new)):
                found[number] = changed
        return found

    def later(self) -> Iterator[_Left]:
        """What is held after one pass, and, where passes are counted, after very many."""
        left = self.left()
        if left or self.clocks:
            yield left
        counts = {
            (number, name): value + (value - before) * _MANY
            for number, held in left.items()
            for name, value in held.items()
            if isinstance(before := self._before[number].get(name), int)
            and isinstance(value, int)
            and abs(value - before) == 1
        }
        if counts:
            yield {
                number: {name: counts.get((number, name), value) for name, value in held.items()}
                for number, held in left.items()
            }

    @contextmanager
    def as_left(self, left: _Left) -> Generator[None]:
        """Inside, holders have these values, tensors among them without values."""
        before = {number: self._reached[number].held() for number in left}
        copies = {number: _copied(held) for number, held in before.items()}
        for number, held in left.items():
            now = copies[number] | {name: _without_values(value) for name, value in held.items()}
            _put(self._reached[number], now, before[number])
        try:
            yield
        finally:
            for number, held in copies.items():
                _put(self._reached[number], held, before[number])

    def told(self, left: _Left) -> str:
        """The sentence for a model whose next pass depends on these values."""
        names = [self._reached[number].told(name) for number, held in left.items() for name in held]
        name, kept = type(self._model).__name__, ", ".join(names[:3])
        if not names:
            return (
                f"{name} computes with what gives another answer each time (the clock): a plan"
                " would hold the one of its capture. Pass it to `forward` as a tensor"
            )
        return (
            f"{name} changes {kept} in its forward pass, and the next one computes with what is"
            " left there: a plan would hold what it was when the model was captured. Register a"
            " persistent buffer and change that in place, or pass it to `forward` as a tensor"
        )


def _hooks(model: nn.Module) -> int:
    """How many hooks on results its modules have."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(vars(module)[name]) for module in model.modules() for name in names)


def _put(holder: Holder, values: _Held, objects: _Held) -> None:
    """Have it hold these values and no others, in the `objects` that hold them, where they do."""
    for name in holder.held().keys() - values.keys():
        del holder.space[name]
    now = holder.held()
    for name, value in values.items():
        put = _refilled(objects.get(name, value), value)
        if now.get(name, _MISSING) is not put:
            holder.space[name] = put


def _copied(value: Any, within: tuple[int, ...] = ()) -> Any:
    """Containers anew, with the same leaves."""
    if id(value) in within:  # it holds itself
        return value
    within = (*within, id(value))
    if type(value) in _MAPPINGS:
        anew = copy(value)
        for key, item in value.items():
            anew[key] = _copied(item, within)
        return anew
    if type(value) in (list, tuple, deque):
        return type(value)(_copied(item, within) for item in value)
    return copy(value) if isinstance(value, (set, numpy.ndarray)) else value


def _refilled(held: Any, then: Any) -> Any:
    """The container that was held, with what it has in the copy `then`; else what `then` is."""
    if type(held) is not type(then):
        return then
    if _same(held, then):
        return held
    if type(held) in _MAPPINGS:
        items = {key: _refilled(held.get(key, item), item) for key, item in then.items()}
        held.clear()
        held.update(items)
    elif type(held) in (list, deque):
        held.clear()
        held.extend(then)
    elif type(held) is set:
        held.clear()
        held.update(then)
    elif isinstance(held, numpy.ndarray) and held.shape == then.shape:
        held[...] = then
    elif type(held) is tuple and len(held) == len(then):
        parts = tuple(map(_refilled, held, then))
        return held if _same(held, parts) else parts
    else:
        return then
    return held


def _same(one: Any, other: Any) -> bool:
    """Are they alike?  Objects of unknown kinds are not looked into."""
    if one is other:
        return True
    if type(one) is not type(other):
        return not (_plain(one) or _plain(other))
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in other)  # pyright: ignore
    if isinstance(other, (list, tuple, deque)):
        return len(one) == len(other) and all(map(_same, one, other))  # pyright: ignore
    if isinstance(other, numpy.ndarray):
        return numpy.array_equal(one, other)
    return not _plain(other) or (not isinstance(other, Tensor) and bool(one == other))


def _plain(value: Any) -> bool:
    """Is it a number, text, a tensor, a container of such, or nothing at all?"""
    kinds = (int, float, complex, str, Tensor, numpy.ndarray, dict, list, tuple, set, deque)
    return value is None or value is _MISSING or isinstance(value, kinds)


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if type(value) in _MAPPINGS:
        anew = copy(value)
        for key, item in value.items():
            anew[key] = _without_values(item)
        return anew
    if type(value) in (list, tuple, deque):
        return type(value)(_without_values(item) for item in value)
    return value


__all__ = ["Watched"]
