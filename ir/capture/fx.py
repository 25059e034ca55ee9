"""From the graph that `torch.export` makes to ours: flat, functional, without no-ops.

The steps, for each fx node in order (`_Converter.run`):
1. regions (`no_grad`, autocast) are inlined; what enters a no_grad region is detached, what an
   operator in an autocast region takes is cast as there
2. arguments get the names of the op's schema, defaults are filled in
3. nodes that compute nothing (asserts, aliases, casts to the same dtype) vanish
4. in-place ops become their functional twins: later readers see the new value
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, fx

from ...compat.torch import HigherOrderOperator, OpOverload, schema_arguments, tree_leaves
from ..graph import Arg, Call, FunctionCall, Loc, Node, Param, TensorType, Value
from ..ops.operator import PLACEMENT
from ..ops.random import is_draw
from ..ops.registry import find_op
from ..ops.users import (
    FUNCTION,
    UserError,
    check_rule,
    function_arguments,
    operator_arguments,
)
from .autocast import Region
from .batch_norm import BATCH_NORM, counts, written_out
from .functions import Called, Slot, called
from .location import Frame, definition, model_frames, place, statement

_T = TypeVar("_T")
_Bound: TypeAlias = Value | tuple["_Bound", ...] | int | float | bool | str | None

_CHECKS = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_async.msg",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)
_SAME_VALUE = frozenset(
    {
        "aten.alias.default",
        "aten.lift_fresh.default",
        "aten.positive.default",
        "aten.requires_grad_.default",
    }
)
REPLACED = "shardwright.replaced"
_CASTS = frozenset(
    {
        "aten._to_copy.default",
        "aten.to.device",
        "aten.to.dtype",
        "aten.to.dtype_layout",
        "aten.to.other",
        "aten.type_as.default",
    }
)
# read nothing but the type of a tensor
_MADE = tuple(
    f"aten.{name}" for name in ("empty_like.", "zeros_like.", "ones_like.", "full_like.", "new_")
)
_DETACH = frozenset({"aten.detach.default", "aten.detach_.default", "aten.detach_copy.default"})


EXPERTS_HINT = (
    "If this is a loop over experts that picks each one's tokens, mark the module of the experts "
    "with `@shardwright.experts(...)`"
)


class UnsupportedNode(ValueError):
    """A node that has no meaning in our graph; the message says why, and where it stands."""

    where = ""

    def __str__(self) -> str:
        return self.where + super().__str__()


@dataclass(slots=True)
class _Converter:
    """State of one conversion: nodes so far, and what each fx node stands for."""

    nodes: list[Node] = field(default_factory=list)
    modules: Mapping[str, Call] = field(default_factory=dict)  # path -> how its calls begin
    names: set[str] = field(default_factory=set)
    bases: dict[str, str] = field(default_factory=dict)  # value -> value whose memory it shares
    views: dict[str, Node] = field(default_factory=dict)  # value -> the node that views its operand
    frames: list[_Frames] = field(default_factory=list)  # of each node
    autocast: Region | None = None  # around what is converted now
    buffers: frozenset[str] = frozenset()  # and parameters that are not trained
    cut_off: dict[str, str] = field(default_factory=dict[str, str])  # on the way into a region
    parameters: frozenset[str] = frozenset()  # trained ones, which are changed before they are read
    leaves: frozenset[str] = frozenset()  # what gradients are of, each cast once in a region
    uncovered: dict[str, Value] = field(default_factory=dict[str, Value])  # detached -> parameter
    stands_for: dict[str, Value] = field(default_factory=dict[str, Value])  # changed -> parameter
    cast_leaves: dict[tuple[str, torch.dtype], Value] = field(default_factory=dict)

    # ---- naming and types ----------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """`name`, or `name_1`, `name_2`, ... where it is taken."""
        candidate, count = name, 0
        while candidate in self.names:
            count += 1
            candidate = f"{name}_{count}"
        self.names.add(candidate)
        return candidate

    def emit(
        self,
        op: str,
        args: tuple[tuple[str, Arg], ...],
        name: str,
        types: Iterable[TensorType],
        differentiable: bool | Sequence[bool],
        origin: fx.Node,
    ) -> tuple[Value, ...]:
        """Append a node; its output values, of which all or these are differentiable."""
        name = self.unique(name)
        types = tuple(types)
        parts = [f"{name}_part{i}" for i in range(len(types))] if len(types) > 1 else []
        names = [self.unique(part) for part in parts] or [name]
        each = [differentiable] * len(types) if isinstance(differentiable, bool) else differentiable
        outputs = tuple(
            Value(n, t, flows and t.continuous)
            for n, t, flows in zip(names, types, each, strict=True)
        )
        location, frame = _locate(origin, self.modules)
        self.nodes.append(Node(name, op, args, outputs, location))
        self.frames.append(frame)
        return outputs

    # ---- the walk ------------------------------------------------------------------------------

    def run(self, module: fx.GraphModule, env: dict[fx.Node, _Bound], grad: bool) -> _Bound:
        """Convert one fx graph whose placeholders are bound in `env`; what it returns."""
        for node in module.graph.nodes:
            # placeholders are bound by the caller; get_attr names a region's body
            if node.op == "call_function":
                try:
                    self.step(module, node, env, grad)
                except UnsupportedNode as error:
                    error.where = error.where or _where(module, node)
                    raise
        return _bind(_returned(module), env)

    def step(
        self, module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, _Bound], grad: bool
    ) -> None:
        """Convert one call."""
        if node.target is operator.getitem:
            container, index = node.args
            env[node] = _bind(container, env)[index]
        elif isinstance(node.target, HigherOrderOperator):
            env[node] = self.region(module, node, env, grad)
        else:
            self.call(node, env, grad)

    def region(
        self, module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, _Bound], grad: bool
    ) -> _Bound:
        """Inline a `torch.no_grad()` or `torch.autocast()` region."""
        name = str(node.target)
        inner, around = grad, self.autocast
        if name == "wrap_with_set_grad_enabled":
            inner, body, *operands = node.args
        elif name == "wrap_with_autocast":
            device, dtype, enabled, _, body, *operands = node.args
            assert isinstance(dtype, torch.dtype)
            self.autocast = Region(str(device), dtype) if enabled else None
        else:
            raise UnsupportedNode(f"the higher-order operator `{name}` cannot be planned")
        assert isinstance(body, fx.Node)
        submodule = module.get_submodule(str(body.target))
        assert isinstance(submodule, fx.GraphModule)
        placeholders = [n for n in submodule.graph.nodes if n.op == "placeholder"]
        bound = [_bind(operand, env) for operand in operands]
        if grad and not inner:
            bound = [self.detached(b, node) if isinstance(b, Value) else b for b in bound]
        within: dict[fx.Node, _Bound] = dict(zip(placeholders, bound, strict=True))
        self.run(submodule, within, bool(inner))
        for placeholder, before in zip(placeholders, bound, strict=True):
            after = within[placeholder]
            if isinstance(before, Value) and isinstance(after, Value) and after != before:
                new = self.changed_in_place(before, after, env, node)
                within.update({k: new for k in within if _is_same_tensor(k, placeholder)})
        self.autocast = around
        if (
            around is None
        ):  # autocast forgets its casts of parameters where its outermost region ends
            self.cast_leaves.clear()
        return _bind(_returned(submodule), within)

    def detached(self, value: Value, origin: fx.Node) -> Value:
        """`value`, cut off from its gradient if it has one."""
        if not value.differentiable:
            return value
        args: tuple[tuple[str, Arg], ...] = (("self", value),)
        made = self.emit("aten.detach.default", args, "detach", [value.type], False, origin)[0]
        self.cut_off[made.name] = value.name
        self.note_leaf(made, value)
        return made

    def call(self, node: fx.Node, env: dict[fx.Node, _Bound], grad: bool) -> None:
        """Convert one call of an aten or custom op."""
        target: Any = node.target
        if not isinstance(target, OpOverload):
            if (getattr(target, "__module__", None) or "").startswith("torch."):
                raise UnsupportedNode(
                    "`torch.func` (vmap, grad, scans) cannot be planned; write out what it does,"
                    " with the batch as a dim"
                )
            raise UnsupportedNode(f"`{target}` computes with sizes, which must be plain numbers")
        op = str(target)
        if op in _CHECKS:
            env[node] = None
            return
        if op == FUNCTION:
            env[node] = self.function(node, env, grad)
            return
        args = self.autocast_args(_schema_args(target, node, env), node, env)
        if op == BATCH_NORM and counts(dict(args)):
            env[node] = self.batch_norm(dict(args), node, env, grad)
            return
        _check_statistics(op, dict(args))
        operands = [v for _, arg in args for v in _values(arg)]
        same = _same_value(op, dict(args), node)
        if same is not None:
            env[node] = same
            return
        if op in _CASTS:
            op, args = "aten.to.dtype", _cast_args(operands[0], _tensor_types(node)[0].dtype)
        flows = op not in _DETACH and not (is_draw(op) or op.startswith(_MADE))
        differentiable = grad and flows and any(v.differentiable for v in operands)
        if op in _DETACH:
            op = "aten.detach.default"
        written = _written(target) if not op.startswith("aten.detach") else None
        if op == "aten.copy_.default":
            op, args = "aten.clone.default", self.copied(operands[0].type, operands[1], node)
        elif written is not None:
            op = self.functional_name(target, node)
        if find_op(op) is None:
            args = (*args, *_checked(lambda: operator_arguments(op)))
        outputs = self.emit(op, args, node.name, _tensor_types(node), differentiable, node)
        _checked(lambda: check_rule(self.nodes[-1]))
        self.note_views(target, operands, outputs)
        if op == "aten.detach.default":
            self.note_leaf(outputs[0], operands[0])
        is_tuple = isinstance(node.meta["val"], (tuple, list))
        env[node] = outputs if is_tuple else outputs[0]
        if written is not None:
            self.rebind(operands[0], outputs[0], env, node)

    def function(self, node: fx.Node, env: dict[fx.Node, _Bound], grad: bool) -> _Bound:
        """Convert a call of a function with its own backward."""
        tensors, number = (_bind(arg, env) for arg in node.args)
        call = called(number)
        self.check_call(call, tensors)
        given: tuple[Any, ...] = tuple(
            tensors[a.number] if isinstance(a, Slot) else a for a in call.arguments
        )
        args = _checked(
            lambda: function_arguments(
                call.function, given, call.in_tuple, call.saves, call.kept_bytes
            )
        )
        flows = grad and any(value.differentiable for value in tensors)
        each = [flows and one for one in call.flows]
        results = self.emit(FUNCTION, args, "applied", call.outputs, each, node)
        _checked(lambda: check_rule(self.nodes[-1]))
        return results

    # ---- autocast ------------------------------------------------------------------------------

    def autocast_args(
        self, args: tuple[tuple[str, Arg], ...], node: fx.Node, env: dict[fx.Node, _Bound]
    ) -> tuple[tuple[str, Arg], ...]:
        """The arguments, cast as the region around casts them."""
        if self.autocast is None:
            return args
        try:
            casts = self.autocast.casts(node)
        except ValueError as error:
            raise UnsupportedNode(str(error)) from error
        new = {old.name: self.cast(old, to, node) for old, to in _of_values(casts, env)}
        return tuple((name, _renamed(arg, new)) for name, arg in args)

    def cast(self, value: Value, to: torch.dtype, origin: fx.Node) -> Value:
        """`value` in the dtype `to`; a parameter is cast once in a region."""
        if value.type.dtype == to:
            return value
        if (value.name, to) in self.cast_leaves:
            return self.cast_leaves[value.name, to]
        kind = TensorType(value.type.shape, to)
        args = _cast_args(value, to)
        (found,) = self.emit("aten.to.dtype", args, "cast", [kind], value.differentiable, origin)
        if value.name in self.leaves:
            self.cast_leaves[value.name, to] = found
        return found

    def check_call(self, call: Called, tensors: Sequence[Value]) -> None:
        """Raises UnsupportedNode where a function would not run as it does in the model."""
        name = call.function.__qualname__
        if self.autocast is not None:
            raise UnsupportedNode(
                f"`{name}` is called inside of `torch.autocast`, which would cast inside of it; "
                "call it outside of the region"
            )
        pairs = zip(tensors, call.needs, strict=True)
        if any(value.differentiable and not needs for value, needs in pairs):
            raise UnsupportedNode(
                f"`{name}` is given what an operator without a derivative made of something that "
                "has a gradient; say with `.detach()` that it has none"
            )

    def batch_norm(
        self, args: dict[str, Arg], node: fx.Node, env: dict[fx.Node, _Bound], grad: bool
    ) -> _Bound:
        """A batch norm in training mode, written out; its running statistics are changed."""
        traced, operands = written_out(node, args)
        within: dict[fx.Node, _Bound] = dict(
            zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True)
        )
        returned = self.run(traced, within, grad)
        assert isinstance(returned, tuple)
        result, *statistics = returned
        for name, new in zip(("running_mean", "running_var"), statistics, strict=True):
            assert isinstance(new, Value)
            self.rebind(args[name], new, env, node)
        return result

    # ---- in-place ops --------------------------------------------------------------------------

    def copied(self, to: TensorType, source: Value, node: fx.Node) -> tuple[tuple[str, Arg], ...]:
        """Arguments of a clone of `source` in the type of what it overwrites."""
        grad = source.differentiable
        if source.type.dtype != to.dtype:
            cast = TensorType(source.type.shape, to.dtype)
            args = _cast_args(source, to.dtype)
            source = self.emit("aten.to.dtype", args, "cast", [cast], grad, node)[0]
        if source.type.shape != to.shape:
            args = (("self", source), ("size", to.shape), ("implicit", False))
            source = self.emit("aten.expand.default", args, "expand", [to], grad, node)[0]
        return (("self", source), ("memory_format", None))

    def functional_name(self, target: OpOverload, node: fx.Node) -> str:
        """`aten.add.Tensor` for `aten.add_.Tensor`."""
        packet, _, overload = str(target).rpartition(".")
        if named := _FUNCTIONAL.get(str(target)):
            return named
        name = packet.removeprefix("aten.").rstrip("_")
        first = schema_arguments(target)[0].alias_info
        known = hasattr(getattr(torch.ops.aten, name, None), overload)
        if not known or first is None or not first.is_write:
            raise UnsupportedNode(f"`{target}` changes its argument in place; use its other form")
        return f"aten.{name}.{overload}"

    def rebind(self, old: Arg, new: Value, env: dict[fx.Node, _Bound], node: fx.Node) -> None:
        """Later readers of `old`, and of what it is a view of, read the new value.

        Refused where another view of the same memory is read later.
        """
        assert isinstance(old, Value)
        changed = {old.name: new}
        while old.name in self.views:
            view = self.views[old.name]
            parent = view.operands[0]
            written = self.written_back(view, parent, new, node)
            self.views[new.name] = _with_operand(view, written)
            changed[parent.name] = written
            old, new = parent, written
        base = self.bases.get(old.name, old.name)
        kept = base in self.buffers or base in self.uncovered
        if (leaf := self.uncovered.get(old.name)) and leaf.name == base:
            kept = True
            made = self.of_leaf(old, new, node)
            changed |= dict.fromkeys(self.names_of(leaf), made)
        for key, bound in list(env.items()):
            if not isinstance(bound, Value) or key is node:
                continue
            shares = self.bases.get(bound.name, bound.name) == base
            if shares and key.op == "placeholder" and not kept:
                raise UnsupportedNode(f"`{node.target}` changes {self.what_is(bound)}")
            if bound.name in changed:
                env[key] = changed[bound.name]
            elif shares and any(user not in env for user in key.users):
                raise UnsupportedNode(
                    f"`{node.target}` writes in place into memory that another tensor views; "
                    "write `x = torch.where(...)` or `x = x.op(...)` instead"
                )
        self.bases.update({value.name: base for value in changed.values()})

    def note_leaf(self, detached: Value, value: Value) -> None:
        """Remember of which parameter, if any, `detached` has the numbers."""
        leaf = value if value.name in self.parameters else self.stands_for.get(value.name)
        if leaf is not None:
            self.uncovered[detached.name] = leaf

    def names_of(self, leaf: Value) -> set[str]:
        """A parameter and what it was changed to."""
        return {leaf.name} | {name for name, of in self.stands_for.items() if of == leaf}

    def changed_in_place(
        self, before: Value, after: Value, env: dict[fx.Node, _Bound], origin: fx.Node
    ) -> Value:
        """What is read as `before` in `env` is `after` from now on, or the result, which has a
        gradient: a region has changed it."""
        leaf = self.uncovered.get(before.name)
        old = {before.name} if leaf is None else self.names_of(leaf)
        new = self.of_leaf(before, after, origin)
        env.update({k: new for k, v in env.items() if isinstance(v, Value) and v.name in old})
        return new

    def of_leaf(self, old: Value, new: Value, origin: fx.Node) -> Value:
        """`new`, the value of what was `old`, with the gradient of the parameter that `old` is.

        Raises UnsupportedNode where the parameter was read before.
        """
        leaf = self.uncovered.get(old.name)
        if leaf is None:
            return new
        known = self.names_of(leaf)
        reads = [node for node in self.nodes if known & {value.name for value in node.operands}]
        if any(node.op != REPLACED and node.output.name not in self.uncovered for node in reads):
            raise UnsupportedNode(
                f"`{origin.target}` changes the parameter `{leaf.name}` in place after it was read,"
                " and backward would take the new numbers; change it before, or between two steps"
            )
        args: tuple[tuple[str, Arg], ...] = (("old", leaf), ("new", new))
        (made,) = self.emit(REPLACED, args, "replaced", [leaf.type], True, origin)
        self.stands_for[made.name], self.bases[made.name] = leaf, leaf.name
        return made

    def what_is(self, changed: Value) -> str:
        """What a tensor is that may not be changed in place, and what to do instead."""
        name = self.cut_off.get(changed.name, changed.name)
        if name in self.parameters:
            return (
                f"the parameter `{name}` in place, which a plan keeps as the optimizer"
                " leaves it; compute with a changed copy, or change it between two steps"
            )
        if changed.name in self.cut_off:
            return (
                "a tensor in place that comes from outside of this region without gradients (which"
                " would still flow as if it were the old one); compute a new tensor"
            )
        return (
            f"the input or non-persistent buffer `{name}` in place; compute a new tensor,"
            " or register the buffer with persistent=True"
        )

    def written_back(self, view: Node, parent: Value, part: Value, origin: fx.Node) -> Value:
        """`parent` with the part that `view` looks at replaced by `part`."""
        name, args = _WRITE_BACK[view.op]
        named = dict(view.args)
        values = {"self": parent, "src": part, "shape": parent.type.shape}
        if "src" not in args:
            values["self"] = part  # the view shows the whole parent
        found = tuple((arg, values[arg] if arg in values else named[arg]) for arg in args)
        differentiable = parent.differentiable or part.differentiable
        return self.emit(name, found, "written", [parent.type], differentiable, origin)[0]

    def note_views(
        self, target: OpOverload, operands: list[Value], outputs: tuple[Value, ...]
    ) -> None:
        """Remember which outputs share memory with an operand."""
        for argument in schema_arguments(target):
            info = argument.alias_info
            if info is not None and not info.is_write and operands:
                base = self.bases.get(operands[0].name, operands[0].name)
                self.bases.update({output.name: base for output in outputs})
                if str(target) in _WRITE_BACK:
                    self.views[outputs[0].name] = self.nodes[-1]


# ops in place whose functional forms are called otherwise
_FUNCTIONAL = {
    "aten.zero_.default": "aten.zeros_like.default",
    "aten.normal_.default": "aten.normal_functional.default",
    "aten.bernoulli_.float": "aten.bernoulli.p",
}
# view op -> op that puts a changed view back into its operand, and that op's arguments
_WRITE_BACK = {
    "aten.slice.Tensor": (
        "aten.slice_scatter.default",
        ("self", "src", "dim", "start", "end", "step"),
    ),
    "aten.select.int": ("aten.select_scatter.default", ("self", "src", "dim", "index")),
    "aten.view.default": ("aten.reshape.default", ("self", "shape")),
    "aten.transpose.int": ("aten.transpose.int", ("self", "dim0", "dim1")),
    "aten.t.default": ("aten.t.default", ("self",)),
    "aten.unsqueeze.default": ("aten.squeeze.dim", ("self", "dim")),
}


def _returned(module: fx.GraphModule) -> Any:
    """What the graph of a region returns."""
    (output,) = module.graph.find_nodes(op="output")
    return output.args[0]


def _is_same_tensor(node: fx.Node, placeholder: fx.Node) -> bool:
    """Is it the tensor of the placeholder, as an operator in place gives it back?"""
    while node.op == "call_function" and isinstance(node.target, OpOverload):
        first = node.args[0] if node.args else None
        if _written(node.target) is None or not isinstance(first, fx.Node):
            return False
        node = first
    return node is placeholder


def _with_operand(view: Node, operand: Value) -> Node:
    """`view` looking at `operand`, its first argument."""
    name, _ = view.args[0]
    return Node(view.name, view.op, ((name, operand), *view.args[1:]), view.outputs, view.loc)


def convert(
    module: fx.GraphModule,
    bound: dict[fx.Node, Value | None],
    modules: Mapping[str, Call],
    params: Iterable[Param] = (),
) -> tuple[list[Node], _Bound, dict[str, Value]]:
    """Nodes and returned structure of an exported graph whose placeholders are `bound`, and the new
    values of those `params` that it changes, by name.

    `modules` has the first call of each of the model's modules, by path.

    Raises UnsupportedNode, with the fx node's stack trace as a note, for what cannot be expressed.
    """
    values = [value for value in bound.values() if value is not None]
    leaves = frozenset(value.name for value in values if value.differentiable)
    kept = [param.value for param in params if param.kind != "constant"]
    trained = frozenset(value.name for value in kept if value.differentiable)
    others = frozenset(value.name for value in kept) - trained
    converter = _Converter(modules=modules, leaves=leaves, buffers=others, parameters=trained)
    converter.names.update(value.name for value in values)
    env: dict[fx.Node, _Bound] = dict(bound)
    result = converter.run(module, env, True)
    updated: dict[str, Value] = {}
    for node, before in bound.items():
        after = env[node]
        if before is not None and isinstance(after, Value) and after != before:
            updated[before.name] = converter.detached(after, node)
    read = {value.name for node in converter.nodes for value in node.operands}
    read |= {value.name for value in tree_leaves(result) if isinstance(value, Value)}
    return _with_targets(converter.nodes, converter.frames, read), result, updated


# ---- arguments ---------------------------------------------------------------------------------


def _bind(arg: Any, env: dict[fx.Node, _Bound]) -> Any:
    """An fx argument with its nodes replaced by what they stand for."""
    if isinstance(arg, fx.Node):
        return env[arg]
    if isinstance(arg, (list, tuple)):
        return tuple(_bind(item, env) for item in arg)
    return arg


# a norm whose schema does not say that it changes running statistics, and the flag that says so
_STATISTICS = {"aten.instance_norm.default": "use_input_stats"}


def _check_statistics(op: str, args: Mapping[str, Arg]) -> None:
    """Raises UnsupportedNode for a norm that changes its running statistics as it runs."""
    if op not in _STATISTICS or args[_STATISTICS[op]] is not True:
        return
    statistics = args["running_mean"]
    if isinstance(statistics, Value):
        raise UnsupportedNode(
            f"`{op}` changes the running statistics `{statistics.name}` as it runs; "
            "build it with track_running_stats=False"
        )


def _of_values(
    casts: Mapping[fx.Node, torch.dtype], env: Mapping[fx.Node, _Bound]
) -> Iterator[tuple[Value, torch.dtype]]:
    for node, dtype in casts.items():
        value = env[node]
        assert isinstance(value, Value)
        yield value, dtype


def _renamed(arg: Arg, new: Mapping[str, Value]) -> Arg:
    """`arg` with the values that have another in `new` replaced by it."""
    if isinstance(arg, Value):
        return new.get(arg.name, arg)
    return tuple(_renamed(item, new) for item in arg) if isinstance(arg, tuple) else arg


def _schema_args(
    target: OpOverload, node: fx.Node, env: dict[fx.Node, _Bound]
) -> tuple[tuple[str, Arg], ...]:
    """Every argument of the op's schema by name."""
    found: list[tuple[str, Arg]] = []
    for position, argument in enumerate(schema_arguments(target)):
        if argument.name in PLACEMENT:
            value: Any = None
        elif position < len(node.args):
            value = _bind(node.args[position], env)
        elif argument.name in node.kwargs:
            value = _bind(node.kwargs[argument.name], env)
        else:
            value = argument.default_value
        found.append((argument.name, _plain(value, argument.name, str(target))))
    return tuple(found)


def _checked(make: Callable[[], _T]) -> _T:
    """What `make` gives; why something of the user's cannot be planned is said with its place."""
    try:
        return make()
    except UserError as error:
        raise UnsupportedNode(str(error)) from error


def _plain(value: Any, name: str, op: str) -> Arg:
    """`value` as an `Arg`."""
    if value is None or isinstance(value, (Value, bool, int, float, complex, str, torch.dtype)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item, name, op) for item in value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise UnsupportedNode(
            f"`{op}` has an argument `{name}` that depends on the data: {value}; "
            "shapes must follow from the inputs' shapes"
        )
    raise UnsupportedNode(f"`{op}` has an argument `{name}` of type {type(value).__name__}")


def _values(arg: Arg) -> list[Value]:
    if isinstance(arg, Value):
        return [arg]
    return [v for item in arg for v in _values(item)] if isinstance(arg, tuple) else []


def _tensor_types(node: fx.Node) -> list[TensorType]:
    """Types of what the fx node returns; only tensors, or flat lists of them, are known."""
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else [value]
    types: list[TensorType] = []
    for item in items:
        if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            raise UnsupportedNode(
                "a number that depends on the data is read out of a tensor (`.item()`, `int(x)`, "
                "`x.tolist()`); a plan must hold for all inputs, so keep it a tensor"
            )
        if not isinstance(item, Tensor):
            raise UnsupportedNode(f"`{node.target}` returns a {type(item).__name__}, not a tensor")
        shape = tuple(item.shape)
        if not all(type(size) is int for size in shape):
            raise UnsupportedNode(
                f"`{node.target}` returns a tensor whose shape {shape} depends on the data. "
                f"{EXPERTS_HINT}"
            )
        types.append(TensorType(shape, item.dtype))
    return types


def _same_value(op: str, args: dict[str, Arg], node: fx.Node) -> Value | None:
    """The operand that the node returns unchanged, if it does."""
    value = next((arg for arg in args.values() if isinstance(arg, Value)), None)
    if value is None:
        return None
    dropout = op.startswith(("aten.dropout", "aten.native_dropout", "aten.feature_dropout"))
    if dropout and (not args["train"] or args["p"] == 0):
        return value if not isinstance(node.meta["val"], tuple) else None
    if op in _SAME_VALUE or (op in _DETACH and not value.differentiable):
        return value
    if op in _CASTS and _tensor_types(node)[0].dtype == value.type.dtype:
        return value
    return None


def _cast_args(value: Value, dtype: torch.dtype) -> tuple[tuple[str, Arg], ...]:
    """Arguments of `aten.to.dtype`."""
    return (
        ("self", value),
        ("dtype", dtype),
        ("non_blocking", False),
        ("copy", False),
        ("memory_format", None),
    )


def _written(target: OpOverload) -> str | None:
    """The argument that the op writes to, or None for a functional op."""
    for argument in schema_arguments(target):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return argument.name
    return None


# ---- locations ---------------------------------------------------------------------------------


def _where(module: fx.GraphModule, node: fx.Node) -> str:
    """`path:line: ` of the user's line; a region is where its first located node is."""
    nodes = [node]
    for argument in node.all_input_nodes:
        body = module.get_submodule(str(argument.target)) if argument.op == "get_attr" else None
        nodes += list(body.graph.nodes) if isinstance(body, fx.GraphModule) else []
    for candidate in nodes:
        if frames := model_frames(candidate.meta.get("stack_trace") or ""):
            return f"{place(frames[-1].path, frames[-1].line)}: "
    return ""


_Key: TypeAlias = tuple[str, int, str]  # a statement: path, first line, path of the module


_Called: TypeAlias = Call | FunctionCall


@dataclass(frozen=True, slots=True)
class _Frames:
    """The statements that a node belongs to, and those that made the calls in which it ran.

    `own` has the statement of the innermost `forward` and those of functions that it called.
    """

    own: tuple[_Key, ...]
    callers: Mapping[_Called, tuple[_Key, tuple[str, ...]]]  # with the names that each assigns


def _locate(node: fx.Node, modules: Mapping[str, Call]) -> tuple[Loc, _Frames]:
    """The node's location without targets, and the statements around it."""
    frames = model_frames(node.meta.get("stack_trace") or "")
    calls: list[Call] = []
    for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
        again = key.rpartition("@")[2]  # `L__self__layers_0@1`: called before
        call = modules.get(name) or Call(name)
        calls.append(replace(call, number=int(again) if again.isdigit() else 0))
    own = [call for call in calls if call.file]
    callers: dict[_Called, tuple[_Key, tuple[str, ...]]] = {}
    for outer, inner, frame in zip(own, own[1:], _forwards(own, frames), strict=False):
        around, index = statement(frame.path, frame.line), inner.path.rpartition(".")[2]
        turn = f"[{index}]" if index.isdigit() else ""  # of a loop over modules
        callers[inner] = (frame.path, around.line, outer.path + turn), around.targets
    owner = own[-1].path if own else ""
    if not frames:
        return Loc(calls=tuple(calls)), _Frames((), callers)
    begin = max((i for i, f in enumerate(frames) if f.function == "forward"), default=0)
    keys: list[_Key] = []
    for frame in frames[begin:]:
        keys.append((frame.path, frame.line, owner))
        owner += f" {frame.line}"  # what is called elsewhere runs other statements
    functions = _functions(own[-1], frames[begin:]) if own else ()
    for function in functions:
        path, line, owner = keys[len(function.site) - 1]
        around = statement(path, line)
        callers[function] = (path, around.line, owner), around.targets
    loc = Loc(frames[-1].file, frames[-1].line, tuple(calls), (), functions)
    return loc, _Frames(tuple(keys), callers)


def _functions(owner: Call, frames: Sequence[Frame]) -> tuple[FunctionCall, ...]:
    """The calls of the user's functions in the `forward` of `owner`, whose frame is the first;
    up to one that has no name, a lambda or a comprehension."""
    found: list[FunctionCall] = []
    for at, frame in enumerate(frames[1:], start=1):
        if not frame.function.isidentifier():
            break
        known = definition(frame.path, frame.line)
        if known is not None and known.name == frame.function:
            site = tuple(each.line for each in frames[:at])
            given = (known.arguments, known.taken, known.results, frame.file, known.line)
            found.append(FunctionCall(known.name, owner.path, owner.number, site, *given))
    return tuple(found)


def _forwards(calls: Sequence[Call], frames: Sequence[Frame]) -> Iterator[Frame]:
    """Of each call, outermost first, the frame of its `forward`, as far as they are found."""
    rest = iter(frames)
    for call in calls:
        for frame in rest:
            if frame.function == "forward" and frame.file == call.file and frame.line >= call.line:
                yield frame
                break
        else:
            return


def _with_targets(nodes: list[Node], frames: list[_Frames], read: set[str]) -> list[Node]:
    """Give the last node of each statement, or the call that it ran in, the names it assigns.

    Of `a, b = ...` a node with two results has the names; which name another has cannot be told.
    Of `a = ...` that may also be a node with one result in `read`, the names of values in use.
    """
    last: dict[_Key, int] = {}
    for index, frame in enumerate(frames):
        last.update((_begun(key), index) for key in frame.own)
        last.update((key, index) for key, _ in frame.callers.values())
    named: dict[_Called, Any] = {}
    for index, frame in enumerate(frames):
        for call, (key, targets) in frame.callers.items():
            named[call] = replace(call, targets=targets if last[key] == index else ())
    result: list[Node] = []
    for index, (node, frame) in enumerate(zip(nodes, frames, strict=True)):
        calls, functions = (
            tuple(named.get(call, call) for call in known)
            for known in (node.loc.calls, node.loc.functions)
        )
        loc = replace(node.loc, calls=calls, functions=functions)
        ends = (key for key in reversed(frame.own) if last[_begun(key)] == index)
        found = (_fitting(statement(path, line).targets, node, read) for path, line, _ in ends)
        result.append(replace(node, loc=replace(loc, targets=next(filter(None, found), ()))))
    return result


def _begun(key: _Key) -> _Key:
    """The statement that a line is one of."""
    path, line, owner = key
    return path, statement(path, line).line, owner


def _fitting(targets: tuple[str, ...], node: Node, read: set[str]) -> tuple[str, ...]:
    """The names of a node's results, `_` for one that nothing reads; none if they do not fit."""
    if len(targets) == len(node.outputs):
        return targets
    used = [value.name in read for value in node.outputs]
    if len(targets) != 1 or sum(used) != 1:
        return ()
    return tuple(targets[0] if use else "_" for use in used)


__all__ = ["EXPERTS_HINT", "UnsupportedNode", "convert"]
