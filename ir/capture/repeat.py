"""Record a deep model from a few of its layers, after checking that the others repeat them.

`torch.export` takes about 0.1 s for a layer; a stack of 126 equal ones need not be exported whole.
`repeats` runs `forward` twice on meta tensors, which is fast, and writes down every torch function
that is called: once with all layers, once with each stack cut to its first layers.  The cut model
stands for the whole one if
1. each layer that is left out calls the same functions on corresponding operands as a layer that
   stays (own parameters by relative name, the layer before by position, anything else identical);
2. everything before, in, and after the layers that stay is called identically in both runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...compat.torch import as_if_exported, transient_buffers, tree_leaves

# Stacks of fewer layers are not worth the two extra runs.
_WORTHWHILE = 4

_Scope = tuple[str, int] | None  # (path of the stack, layer), or None outside all stacks


@dataclass(frozen=True, slots=True)
class Repeats:
    """`kept[path]` layers of a stack stand for all; layer i is like layer `like[path][i]`."""

    kept: Mapping[str, int]
    like: Mapping[str, tuple[int, ...]]


class _Unknown(Exception):
    """An argument that cannot be compared between two runs."""


@dataclass(slots=True)
class _Log:
    """What one run called.  `calls[scope]` lists (function, arguments) in order."""

    calls: dict[_Scope, list[object]] = field(default_factory=dict)
    order: list[_Scope] = field(default_factory=list)  # scopes as entered
    returned: tuple[object, ...] = ()


class _Recorder(TorchFunctionMode):
    """Writes every torch function call into a `_Log`, tensors replaced by labels.

    A label says where a tensor comes from: ("param", name), ("input", name), or ("call", scope,
    number of the call in its scope, number of the result).
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = _Log()
        self.scope: _Scope = None
        self.labels: dict[int, object] = {}
        self.keep: list[Tensor] = []  # so that no id is used twice

    def name(self, labels: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Give tensors labels of their own."""
        self.labels |= {id(tensor): labels[name] for name, tensor in tensors.items()}
        self.keep += tensors.values()

    def enter(self, scope: _Scope) -> None:
        self.scope = scope
        self.log.order.append(scope)

    def label(self, item: Any) -> object:
        """`item` as something that compares equal between runs."""
        if isinstance(item, Tensor):
            if id(item) not in self.labels:
                raise _Unknown
            return self.labels[id(item)]
        if isinstance(item, (tuple, list)):
            return (type(item).__name__, *(self.label(part) for part in item))
        if isinstance(item, dict):
            return tuple((key, self.label(part)) for key, part in item.items())
        if isinstance(item, slice):
            return ("slice", self.label(item.start), self.label(item.stop), self.label(item.step))
        if item is None or item is Ellipsis or callable(item):
            return item
        if isinstance(
            item, (bool, int, float, str, torch.dtype, torch.device, torch.memory_format)
        ):
            return (type(item).__name__, item)
        raise _Unknown

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # x.shape, x.dtype, ...
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        else:
            result = None
        call = (func, self.label(args), self.label(kwargs))
        calls = self.log.calls.setdefault(self.scope, [])
        calls.append(call)
        number = len(calls)
        result = func(*args, **kwargs) if result is None else result
        leaves = result if isinstance(result, (tuple, list)) else (result,)
        for position, leaf in enumerate(leaves):
            # in-place functions give back an operand, which keeps its label
            if isinstance(leaf, Tensor) and id(leaf) not in self.labels:
                self.labels[id(leaf)] = ("call", self.scope, number, position)
                self.keep.append(leaf)
        return result


def repeats(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    prepared: Callable[[], AbstractContextManager[None]],
) -> Repeats | None:
    """How few layers of `model` stand for all of it; None if it needs all.

    `prepared` gives the context to run `model` in, its tensors on the meta device.
    """
    stacks = _candidates(model)
    whole = _record(model, inputs, stacks, prepared) if stacks else None
    stacks = {} if whole is None else {p: n for p, n in stacks.items() if _in_order(whole, p, n)}
    if whole is None or not stacks:
        return None
    like = {path: _like(whole, model, path, count) for path, count in stacks.items()}
    kept = {path: max(2, max(layers) + 1) for path, layers in like.items()}
    if all(kept[path] == count for path, count in stacks.items()):
        return None
    with cut(model, kept):
        short = _record(model, inputs, kept, prepared)
    if short is None or _normal(short, kept) != _normal(whole, stacks, kept):
        return None
    return Repeats(kept, like)


@contextmanager
def cut(model: nn.Module, kept: Mapping[str, int]) -> Generator[None]:
    """Inside, each module list in `kept` has only its first so many modules."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, count in kept.items():
            parent_path, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            stack = getattr(parent, name)
            assert isinstance(stack, nn.ModuleList)
            before.append((parent, name, stack))
            setattr(parent, name, nn.ModuleList(list(stack)[:count]))
        yield
    finally:
        for parent, name, stack in before:
            setattr(parent, name, stack)


def _candidates(model: nn.Module) -> dict[str, int]:
    """Path -> length of the outermost module lists that may be cut.

    Their layers share no parameter with other modules, and have no non-persistent buffers, whose
    values could differ between layers.
    """
    owners: dict[int, int] = {}
    for _, tensor in model.named_parameters(remove_duplicate=False):
        owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if type(module) is nn.ModuleList and len(module) >= _WORTHWHILE and path and not nested:
            alone = all(owners[id(p)] == 1 for p in module.parameters())
            if alone and not any(transient_buffers(m) for m in module.modules()):
                found[path] = len(module)
    return found


def _record(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    stacks: Mapping[str, int],
    prepared: Callable[[], AbstractContextManager[None]],
) -> _Log | None:
    """Run `forward` on meta tensors and write down its calls; None if it does not run there."""
    arguments = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in inputs.items()}
    recorder = _Recorder()
    recorder.name({name: ("input", name) for name in arguments}, arguments)
    handles: list[Any] = []
    for path in stacks:
        stack = model.get_submodule(path)
        assert isinstance(stack, nn.ModuleList)
        for index, layer in enumerate(stack):
            handles += _watch(layer, (path, index), recorder)
    try:
        # models that ask whether they are being exported must answer as they will in `export`
        with prepared(), as_if_exported(), torch.device("meta"):
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            recorder.name({name: ("param", name) for name in tensors}, tensors)
            with recorder:
                result = model(**arguments)
            recorder.log.returned = tuple(recorder.label(leaf) for leaf in tree_leaves(result))
    except (_Unknown, RuntimeError, IndexError, TypeError, ValueError):
        return None  # `torch.export` of the whole model will say what is wrong, if anything is
    finally:
        for handle in handles:
            handle.remove()
    return recorder.log


def _watch(layer: nn.Module, scope: _Scope, recorder: _Recorder) -> list[Any]:
    """Hooks that tell the recorder when a layer begins and ends."""

    def begin(*_: Any) -> None:
        recorder.enter(scope)

    def end(*_: Any) -> None:
        recorder.enter(None)

    return [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]


def _in_order(log: _Log, path: str, count: int) -> bool:
    """Was each layer of the stack called once, in order, with nothing in between?"""
    entered = [scope for scope in log.order if scope is not None and scope[0] == path]
    return entered == [(path, index) for index in range(count)]


def _like(log: _Log, model: nn.Module, path: str, count: int) -> tuple[int, ...]:
    """For each layer the first layer that does the same; layer 0 is only like itself."""
    seen: dict[object, int] = {}
    like = [0]
    for index in range(1, count):
        layer = model.get_submodule(f"{path}.{index}")
        calls = tuple(_relative(call, path, index) for call in log.calls.get((path, index), []))
        like.append(seen.setdefault((calls, _tensors(layer)), index))
    return tuple(like)


def _tensors(layer: nn.Module) -> tuple[object, ...]:
    """Names, shapes and dtypes of a layer's parameters and buffers."""
    named = (*layer.named_parameters(), *layer.named_buffers())
    return tuple((name, t.shape, t.dtype, t.requires_grad, type(t)) for name, t in named)


def _relative(item: object, path: str, index: int) -> object:
    """A recorded call with everything that names the layer itself made relative."""
    if not isinstance(item, tuple):
        return item
    if len(item) == 2 and item[0] == "param" and isinstance(item[1], str):
        own = f"{path}.{index}."
        return ("own", item[1].removeprefix(own)) if item[1].startswith(own) else item
    if len(item) == 4 and item[0] == "call" and isinstance(item[1], tuple) and item[1][0] == path:
        return ("call", index - item[1][1], *item[2:])
    return tuple(_relative(part, path, index) for part in item)


def _normal(log: _Log, stacks: Mapping[str, int], kept: Mapping[str, int] | None = None) -> object:
    """The log with layers numbered from the end where they are read from outside their stack.

    With `kept`, only the layers that stay are listed.
    """

    def counted(item: object, inside: str | None) -> object:
        if not isinstance(item, tuple):
            return item
        if len(item) == 4 and item[0] == "call" and isinstance(item[1], tuple):
            path, index = item[1]
            if path in stacks and path != inside:
                return ("call", path, stacks[path] - index, *item[2:])
            return item
        return tuple(counted(part, inside) for part in item)

    limits = stacks if kept is None else kept
    return (
        {
            scope: [counted(call, scope[0] if scope else None) for call in calls]
            for scope, calls in log.calls.items()
            if scope is None or scope[0] not in limits or scope[1] < limits[scope[0]]
        },
        tuple(counted(label, None) for label in log.returned),
    )


__all__ = ["Repeats", "cut", "repeats"]
