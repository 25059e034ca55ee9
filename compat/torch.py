"""What is used of torch beyond its public interface: each thing once, with what it is for.

Runtime and generated modules load this file, so it imports torch only, and what they do not need is
imported where it is called.  Operators are no names of Python: graphs have those that an export
records, also `aten._softmax`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from types import ClassMethodDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import Node
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

# -- names as they are, and what for
#
# HigherOrderOperator   what the fx node of a `no_grad` or autocast region calls (capture)
# OpOverload            what the fx node of any other operator calls (capture)
# TorchDispatchMode     sees every operator that runs: live bytes on a CPU, dtypes in `plan verify`
# is_traceable_wrapper_subclass  is a tensor made of others (quantised weights, DTensor)?
# tree_leaves           tensors in what a model or an operator returns
# tree_map_only         changes the tensors in what an operator returns
# tree_unflatten        from the placeholders of an export to the keywords that they stand for
# DDP_ASKS              what DistributedDataParallel asks a module for before it takes it
# CheckpointFunction    the class behind `checkpoint(use_reentrant=True)`, which capture leaves out

DDP_ASKS = "_ddp_params_and_buffers_to_ignore"
EXPORT_PRINTS = "torch.export._trace"
"""The module that prints the whole graph to stderr when an export fails; `plan` leaves that out."""

_aten: Any = torch.ops.aten

BINDS_EARLY = isinstance(vars(torch.autograd.Function).get("apply"), ClassMethodDescriptorType)
"""From torch 2.14 on `Function.apply` is C: what was bound before (`f = Doubled.apply`) does not
see another one that is put in its place, and ends in the class's own `forward`."""

FunctionBase: Any = torch.autograd.Function if BINDS_EARLY else _SingleLevelFunction
"""The class in whose `apply` all ways to call a function end, but for those."""


# -- tensors and modules


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that no other storage has as long as this one is alive.

    `data_ptr()` would not do: storages of no bytes share one.
    """
    return storage._cdata


def changes(x: Tensor) -> int:
    """How often `x` was changed in place: tells whether what backward needs is still there."""
    return x._version


def gradient_hooks(item: nn.Module | Tensor) -> bool:
    """Does anything look at, or change, gradients when backward passes the module or tensor?"""
    if isinstance(item, Tensor):
        return bool(item._backward_hooks or item._post_accumulate_grad_hooks)
    return bool(item._backward_hooks or item._backward_pre_hooks)


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """What is called before and after the module's `forward`."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def gradient_hooks_of_all() -> bool:
    """Does anything do so for every module?"""
    modules: Any = torch.nn.modules.module
    return bool(modules._global_backward_hooks or modules._global_backward_pre_hooks)


@contextmanager
def watch_saved_tensors(told: Callable[[Tensor], None]) -> Generator[None]:
    """Within, autograd tells of each tensor that it saves, before those hooks that are set now."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 (stubs do not know it)
    hooks = autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        yield
        return
    pack, unpack = hooks

    def telling(x: Tensor) -> Any:
        told(x)
        return pack(x)

    with torch.autograd.graph.saved_tensors_hooks(telling, unpack):
        yield


def looks_into(operator: OpOverload) -> bool:
    """Are its results other views of its operand?"""
    return operator.is_view or operator is torch.ops.aten._unsafe_view.default


def written_operands(operator: OpOverload, args: tuple[Any, ...]) -> list[Any]:
    """Those of the operands that it writes to."""
    if not operator._schema.is_mutable:
        return []
    pairs = zip(operator._schema.arguments, args, strict=False)
    return [x for each, x in pairs if each.alias_info is not None and each.alias_info.is_write]


def registered(module: nn.Module, name: str) -> Tensor:
    """The module's own parameter or buffer `name`, also while an attribute hides it."""
    found = module._parameters.get(name)
    found = module._buffers[name] if found is None else found
    assert found is not None
    return found


def transient_buffers(module: nn.Module) -> set[str]:
    """Names of the module's own buffers that no state dict holds."""
    return module._non_persistent_buffers_set


# -- autograd


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call it when the backward pass that is running has all gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore


def backward_number() -> int:
    """The number of the backward pass that runs on this thread; -1 where none does."""
    return torch._C._current_graph_task_id()


def will_run(node: Node) -> bool:
    """Will the backward pass that is running reach `node`?"""
    return torch._C._will_engine_execute_node(node)  # pyright: ignore


# -- ranks


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The mesh of one dim, `name`, over all ranks of `mesh`: several axes as one group."""
    return mesh._flatten(name)


# -- kernels: unlike `F.scaled_dot_product_attention` they give the log-sum-exp, which merging needs


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention by the device's fused kernel: result (b, h, s, d) and log-sum-exp (b, h, s).

    All heads are d wide.  `mask` is added to the scores, on the CPU alone.  On CUDA alone, with
    `window` > 0 the last query stands at the last key, and each attends the last `window` keys.
    """
    q, k, v = map(in_rows, (q, k, v))
    if not q.is_cuda:
        assert not window
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    assert mask is None
    if not window:
        kernel = _aten._scaled_dot_product_flash_attention
        return kernel(q, k, v, 0.0, causal, False, scale=scale)[:2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale,
        window_size_left=window - 1, window_size_right=0,
    )[:2]  # fmt: skip
    return out.transpose(1, 2), lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of what `flash` computes without a mask."""
    grad, q, k, v, out = map(in_rows, (grad, q, k, v, out))
    if not q.is_cuda:
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    # Without dropout the kernel reads neither the random state nor the lengths.
    unused, lse = torch.empty(2, dtype=torch.uint64, device=q.device), lse.contiguous()
    if not window:
        kernel = _aten._scaled_dot_product_flash_attention_backward
        return kernel(
            grad, q, k, v, out, lse, None, None, q.shape[2],
            k.shape[2], 0.0, causal, unused, unused, scale=scale,
        )  # fmt: skip
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    dq, dk, dv = _aten._flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused,
        scale=scale, window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def in_rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a head beside each other, as kernels read them without a look at the
    last stride: that of a slice with steps is another."""
    return x if x.stride(-1) == 1 else x.contiguous()


# -- capture


class TooManyOperators(RuntimeError):
    """More of them ran than were allowed."""


def fake_tensors(*, beside_real: bool = False) -> AbstractContextManager[object]:
    """Inside, new tensors have shape, dtype and device, but no memory.

    `beside_real`: operations may take real tensors, too, such as constants inside a model.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=beside_real)


@contextmanager
def at_most(operators: int | None) -> Generator[None]:
    """Inside, no more operators than these run on fake tensors, or TooManyOperators is raised.

    So a loop over very many tokens ends, also in a decomposition of torch's.  Rows of a tensor that
    is taken apart count.  Questions about a tensor's form are no operators: C++ asks them where an
    exception would end the process.
    """
    if operators is None:
        yield
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    before, left = FakeTensorMode.dispatch, operators

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nonlocal left
        if not any("Tensor" in str(result.type) for result in func._schema.returns):
            return before(self, func, types, args, kwargs)
        rows = func is _aten.unbind.int and args[0].shape[args[1] if len(args) > 1 else 0]
        left -= 1 + rows
        if left < 0:
            raise TooManyOperators
        return before(self, func, types, args, kwargs)

    FakeTensorMode.dispatch = dispatch
    try:
        yield
    finally:
        FakeTensorMode.dispatch = before


def is_fake(x: Tensor) -> bool:
    """Is `x` one of `fake_tensors`, without values?"""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)


def as_if_exported() -> AbstractContextManager[object]:
    """Inside, models that ask whether they are being exported are told so."""
    from torch._export.utils import _compiling_state_context

    return _compiling_state_context()


@contextmanager
def outside_modes() -> Generator[None]:
    """Inside, nothing that runs is recorded, faked or replaced by what is around."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def whole_stacks() -> Generator[None]:
    """Inside, an export records all frames from a `forward` on, not those of `forward`s alone."""
    from torch.fx.proxy import TracerBase

    tracer: Any = TracerBase
    forwards = tracer._filter_traceback_frames

    def all_frames(self: TracerBase, frames: Any) -> Any:
        before = self._record_forward_stack_traces_only
        self._record_forward_stack_traces_only = False
        try:
            return forwards(self, frames)
        finally:
            self._record_forward_stack_traces_only = before

    tracer._filter_traceback_frames = all_frames
    try:
        yield
    finally:
        tracer._filter_traceback_frames = forwards


@contextmanager
def own_hooks() -> Generator[None]:
    """Afterwards all modules have the hooks on buffers that they had before.

    An export that fails in torch 2.11 leaves its own, which refuses every real buffer from then on.
    """
    hooks: Any = torch.nn.modules.module._global_buffer_registration_hooks
    before = dict(hooks)
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)


@contextmanager
def flex_attention_by(attention: Any, block_mask: Any) -> Generator[None]:
    """Inside, `flex_attention` and `create_block_mask` run these two, under every name.

    Also where a name was imported before, or is `torch.compile` of one: their code is exchanged.
    """
    from torch.nn.attention import flex_attention as module

    pairs: list[tuple[Any, Any]] = [
        (module.flex_attention, attention),
        (module.create_block_mask, block_mask),
    ]
    before = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f, _ in pairs]
    try:
        for function, by in pairs:
            function.__code__ = _calling.__code__
            function.__defaults__, function.__kwdefaults__ = None, {"_by": by}
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for function, code, defaults, named in before:
            function.__code__ = code
            function.__defaults__, function.__kwdefaults__ = defaults, named


def _calling(*args: Any, _by: Any, **kwargs: Any) -> Any:
    return _by(*args, **kwargs)


def indexing_by_tensors() -> AbstractContextManager[object]:
    """Inside, `x[i]` under `vmap` takes a tensor `i` of one number as an index."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


def makes_tensors(function: object) -> bool:
    """Does `function` (`torch.zeros`, ...) make a tensor on the device that is the default?"""
    from torch.utils._device import _device_constructors

    return function in _device_constructors()


def defined_by(name: str) -> Any:
    """The function that `torch.library.custom_op` made the operator `space::name` of, or None."""
    from torch._library.custom_ops import OPDEFS

    found = OPDEFS.get(name)
    return None if found is None else found._init_fn


def operator_name(op: object) -> str:
    """`space.name` of an operator, in any of the forms that Python has of it; empty for others."""
    from torch._library.custom_ops import CustomOpDef
    from torch._ops import OpOverloadPacket

    if isinstance(op, CustomOpDef):
        return op._qualname.replace("::", ".")
    if isinstance(op, OpOverload | OpOverloadPacket):
        return ".".join(str(op).split(".")[:2])
    return ""


def schema_arguments(operator: OpOverload) -> list[Any]:
    """What an operator takes: `name`, `default_value`, `kwarg_only`, ... of each argument."""
    return operator._schema.arguments


def compile_failures() -> tuple[type[Exception], ...]:
    """What a compiled function raises at its first call where it can't be compiled."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


__all__ = [
    "BINDS_EARLY",
    "DDP_ASKS",
    "EXPORT_PRINTS",
    "CheckpointFunction",
    "FunctionBase",
    "HigherOrderOperator",
    "OpOverload",
    "TooManyOperators",
    "TorchDispatchMode",
    "as_if_exported",
    "at_most",
    "at_end_of_backward",
    "backward_number",
    "changes",
    "compile_failures",
    "defined_by",
    "fake_tensors",
    "flex_attention_by",
    "indexing_by_tensors",
    "flash",
    "flash_backward",
    "flattened",
    "forward_hooks",
    "gradient_hooks",
    "gradient_hooks_of_all",
    "in_rows",
    "is_fake",
    "is_traceable_wrapper_subclass",
    "looks_into",
    "makes_tensors",
    "operator_name",
    "outside_modes",
    "registered",
    "schema_arguments",
    "storage_key",
    "transient_buffers",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "whole_stacks",
    "watch_saved_tensors",
    "will_run",
    "written_operands",
]
