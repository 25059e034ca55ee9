"""What a forward pass leaves in attributes of modules for the next one, other than buffers.

A plan holds one forward pass.  A counter in Python, or a tensor that is kept as a plain attribute,
would be in it as it was when the model was captured.  So a model that changes such attributes is
captured again as it was left: where its graph is another one then, the next pass would compute
something else.  What is only written (statistics for a log, the loss of a router that the same pass
adds up) makes no difference.  Tables that follow from no input and no weight may be kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...compat.torch import tree_leaves

_Held: TypeAlias = dict[str, Any]  # attributes of a module by name
_MANY = 999_983  # passes later: odd, so that what alternates differs
_OWN = frozenset(vars(nn.Module())) | {"forward"}
_DRAWS = ("rand", "bernoulli", "multinomial", "normal", "poisson", "dropout", "exponential")
_MISSING = object()


class Watched(TorchFunctionMode):
    """Inside, what `model` holds is noted when its forward begins and ends, and which tensors are
    tables: made of nothing but numbers and other tables."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._before: dict[str, _Held] = {}
        self._after: dict[str, _Held] = {}
        self._objects: dict[str, _Held] = {}  # those that `_before` has copies of
        self._tables: dict[int, Tensor] = {}  # which keeps them, so that no id is used twice
        self._hooks: list[Any] = []
        self._hooked = 0
        self.installs = False  # hooks, once and for all: the next pass is the one to look at

    def __enter__(self) -> Watched:
        def begin(*_: object) -> None:
            self._before = _held(self._model)
            self._objects = {path: dict(vars(m)) for path, m in self._model.named_modules()}
            self._hooked = _hooks(self._model)

        def end(*_: object) -> None:
            self._after = _held(self._model)
            self.installs = self._hooked != _hooks(self._model)

        self._hooks = [
            self._model.register_forward_pre_hook(begin),
            self._model.register_forward_hook(end),
        ]
        return cast("Watched", super().__enter__())

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)
        if not self.installs:
            self._restore()

    def _restore(self) -> None:
        """Modules hold what they held before, also where containers were changed in place."""
        modules = dict(self._model.named_modules())
        for path, before in self._before.items():
            now, objects = vars(modules[path]), self._objects[path]
            for name in [name for name in now if name not in _OWN and name not in before]:
                del now[name]
            for name, value in before.items():
                now[name] = _refilled(objects[name], value)

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

    def left(self) -> dict[str, _Held]:
        """By module the attributes that a pass leaves otherwise than it finds them, but for modules
        that keep tables."""
        found: dict[str, _Held] = {}
        for path, after in self._after.items():
            before = self._before.get(path, {})
            changed = {
                name: value
                for name, value in after.items()
                if not _same(before.get(name, _MISSING), value)
            }
            known = {id(x) for x in tree_leaves(before)}
            new = [x for x in tree_leaves(changed) if isinstance(x, Tensor) and id(x) not in known]
            if changed and not any(map(self._is_table, new)):
                found[path] = changed
        return found

    def later(self) -> Iterator[dict[str, _Held]]:
        """What modules hold after one pass, and, where they count passes, after very many."""
        left = self.left()
        if not left:
            return
        yield left
        counts = {
            (path, name): value + (value - before) * _MANY
            for path, held in left.items()
            for name, value in held.items()
            if isinstance(before := self._before[path].get(name), int)
            and isinstance(value, int)
            and abs(value - before) == 1
        }
        if counts:
            yield {
                path: {name: counts.get((path, name), value) for name, value in held.items()}
                for path, held in left.items()
            }


@contextmanager
def as_left(model: nn.Module, left: Mapping[str, _Held]) -> Generator[None]:
    """Inside, modules hold these attributes, tensors among them without values."""
    modules = dict(model.named_modules(remove_duplicate=False))
    before = {path: dict(vars(modules[path])) for path in left}
    for path, held in left.items():
        vars(modules[path]).update({name: _without_values(value) for name, value in held.items()})
    try:
        yield
    finally:
        for path, held in left.items():
            for name in held:
                if name in before[path]:
                    vars(modules[path])[name] = before[path][name]
                else:
                    vars(modules[path]).pop(name, None)


def told(model: nn.Module, left: Mapping[str, _Held]) -> str:
    """The sentence for a model whose next pass depends on these attributes."""
    names = [f"`{path}.{name}`".replace("`.", "`") for path, held in left.items() for name in held]
    kept = ", ".join(names[:3])
    return (
        f"{type(model).__name__} changes {kept} in its forward pass, and the next one computes with"
        " what is left there: a plan would hold what it was when the model was captured. Register a"
        " persistent buffer and change that in place, or pass it to `forward` as a tensor"
    )


def _hooks(model: nn.Module) -> int:
    """How many hooks on results its modules have."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(vars(module)[name]) for module in model.modules() for name in names)


def _held(model: nn.Module) -> dict[str, _Held]:
    """All attributes of all modules but for parameters, buffers and parts."""
    return {
        path: {name: _copied(value) for name, value in vars(module).items() if name not in _OWN}
        for path, module in model.named_modules()
    }


def _copied(value: Any) -> Any:
    """Containers anew, with the same leaves."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple, set, deque):
        return type(value)(_copied(item) for item in value)
    return value


def _refilled(held: Any, copy: Any) -> Any:
    """The container that was held, with what it had then; anything else as it is."""
    if _same(held, copy):
        return held
    if type(held) is dict:
        items = {key: _refilled(held.get(key, item), item) for key, item in copy.items()}
        held.clear()
        held.update(items)
    elif type(held) in (set, deque, list):
        held.clear()
        (held.update if type(held) is set else held.extend)(copy)
    return held


def _same(one: Any, other: Any) -> bool:
    """Are they alike?  Objects of unknown kinds are not looked into."""
    if one is other:
        return True
    if type(one) is not type(other):
        return not (_plain(one) or _plain(other))
    if type(other) is dict:
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in other)
    if type(other) in (list, tuple, deque):
        return len(one) == len(other) and all(map(_same, one, other))
    return not _plain(other) or (not isinstance(other, Tensor) and bool(one == other))


def _plain(value: Any) -> bool:
    """Is it a number, text, a tensor, a container of such, or nothing at all?"""
    kinds = (int, float, complex, str, Tensor, dict, list, tuple, set, deque)
    return value is None or value is _MISSING or isinstance(value, kinds)


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if type(value) is dict:
        return {key: _without_values(item) for key, item in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple, set, deque):
        return type(value)(_without_values(item) for item in value)
    return value


__all__ = ["Watched", "as_left", "told"]
