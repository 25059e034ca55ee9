"""What is known of an operator: the base of all declarations.

A declaration says how an operator may be cut (`rule`), how it is written in a generated module
(`emit`), which tensors autograd keeps (`saves`), and what it computes (`evaluate`).  Strategies,
local shapes, FLOPs, communication and memory follow from these; nothing outside of `ir/ops` and
`runtime` knows an operator by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from keyword import iskeyword
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ...compat.torch import OpOverload, schema_arguments
from ...facts.traffic import Traffic
from ...facts.users import Import
from ...facts.work import Kernel, Kernels, Stream
from ..graph import Arg, Node, TensorType, Value, values_in
from .local import Local
from .rule import Choice, Rule, opaque_rule
from .sizes import Resizing, Sizes

# arguments that say where and how a tensor lies in memory, which the plan decides: None in a graph
PLACEMENT = frozenset({"device", "layout", "pin_memory", "memory_format", "generator"})


class Render(Protocol):
    """What an op needs to know to write itself for one rank."""

    def arg(self, name: str) -> str:
        """Source text of the argument `name`."""
        ...

    def items(self, name: str) -> list[str]:
        """Source texts of the items of the list argument `name`."""
        ...

    def sizes(self) -> list[str]:
        """Source text of the local size of each dim of the first result."""
        ...

    def view(self) -> str:
        """Source text of the first operand in the shape of the first result."""
        ...

    def axis(self, factor: str) -> str:
        """The `Axis` expression that cuts `factor`, or an empty string."""
        ...

    def ways(self, factor: str) -> int:
        """Over how many ranks `factor` is cut."""
        ...

    def sharded_axes(self) -> tuple[str, ...]:
        """Names of the mesh axes over which the result is sharded."""
        ...

    def algorithm(self) -> tuple[str, str]:
        """The algorithm that the op runs over an axis, and that axis; empty strings if none."""
        ...

    def imported(self, item: Import) -> str:
        """The name that the module gives to something of the user's."""
        ...

    def order(self) -> str:
        """In which order ranks hold the tokens of a sequence: `contiguous` or `zigzag`."""
        ...


@dataclass(frozen=True, slots=True)
class Limit:
    """Whole numbers below the size of one dim of `table`.

    `read`: they say which rows are read, so that the rows must be there.  `ignored`: a number
    outside that means none of them.  `averaged`: the result is a mean over those that are not.
    """

    table: Value
    dim: int
    read: bool = False
    ignored: int | None = None
    averaged: bool = False

    @property
    def rows(self) -> int:
        """How many different numbers there are."""
        return self.table.type.shape[self.dim]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A module of torch's that runs a node: `nn.<kind>`, with the other tensors as parameters.

    Its forward takes the argument `input`; `options` are told when it is made.
    """

    kind: str
    input: str = "input"
    options: tuple[tuple[str, Arg], ...] = ()


class Operator:
    """The base of all declarations, and that of an operator of which nothing is known.

    Such a one runs replicated, keeps everything for backward, and the report names it.
    """

    # decided alone: light operators are decided together with their neighbours
    heavy: bool = True
    # does it neither compute nor move anything: is its result another view of its operand?
    free: bool = False
    # may the result share the memory of the first operand, where the dtype is the same?
    aliases: bool = False
    # what cutting a factor, or running an algorithm, is called in reports
    words: Mapping[str, str] = MappingProxyType({})
    # other names of factors, which pins may use
    also: Mapping[str, str] = MappingProxyType({})
    # do queries, its first operand (b, h, t, d), attend keys, its second (b, h, t, d)?
    attends: bool = False
    # the factor that counts experts, each of which computes some of the tokens; "" without any
    experts: str = ""
    # what its time is counted as in reports
    spent_on: str = "other ops"
    # what its result is called where the user gives it no name; its own name if it has none
    noun: str = ""
    # is its result the operand in another form, which goes by the same name?
    shows: bool = False
    # is its module named by it: the main op of a layer?
    names_module: bool = False
    # may its small result be summed up over ranks inside a region, as the mean of a norm?
    sums_inside: bool = False
    # where a layer keeps a part of what it makes, is its result kept, and not made again?
    stays: bool = False
    # does one kernel add up rows and use the sums, as that of a norm?
    rowwise: bool = False
    # do the factors that cannot be cut keep their sizes in a smaller graph?
    rigid: bool = False
    # arguments that are others in eval mode, without random numbers
    in_eval: Mapping[str, Arg] = MappingProxyType({})
    # does it draw random numbers, in eval mode too?
    draws: bool = False
    # does torch work out one of its sizes that is given as -1?
    infers_size: bool = False
    # the argument that names what it remembers from call to call (a cache), if it does
    remembers: str = ""
    # the operator that goes on with it in serving, over a state, if there is one
    continued_by: str = ""
    # the dim of its first operand that counts the tokens that such a one sees; -1: it sees none
    tokens_dim: int = -1
    # is its result what it is without padding, the tokens at position -1?
    keeps_out_padding: bool = False
    # does it change something besides its result, so that it is needed though nothing reads that?
    acts: bool = False

    def title(self, node: Node) -> str:
        """What reports call it where the user gives it no name: `aten.add.Tensor`."""
        return node.op

    def rule(self, node: Node) -> Rule:
        """Which dims are which factors."""
        return opaque(node)

    def emit(self, node: Node, render: Render) -> str:
        """The expression that runs the node on local tensors.

        What is None is left out, but where torch has no default for it.
        """
        needed = self.needed(node)
        texts = [(name, render.arg(name)) for name, _ in node.args]
        given = [(name, text) for name, text in texts if text != "None" or name in needed]
        args = [f"{name}={text}" for name, text in given if not iskeyword(name)]
        reserved = [f'"{name}": {text}' for name, text in given if iskeyword(name)]  # `from`
        args += [f"**{{{', '.join(reserved)}}}"] if reserved else []
        return f"torch.ops.{node.op}({', '.join(args)})"

    def needed(self, node: Node) -> frozenset[str]:
        """The arguments that have no default."""
        return _without_default(node.op)

    def leaf(self, node: Node, choices: Sequence[Choice]) -> Leaf | None:
        """The module of torch's own that runs the node on one rank, if there is one.

        Its parameters are called as the node's arguments are.
        """
        return None

    def saves(self, node: Node) -> tuple[Value, ...]:
        """Values that autograd keeps for the backward pass, if there is one."""
        return (*node.operands, *node.outputs)

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Any:
        """The result on whole tensors; `name` is the operator's, `args` the node's.

        Raises ValueError if torch has no operator of that name.
        """
        return _call_torch(name, args)

    def continued(self, memory: Any, args: Mapping[str, Any]) -> tuple[Any, Any]:
        """The result, and what is remembered then; `memory` is what was before, None at first.

        For operators with `remembers`, instead of `evaluate`; `args` are without that argument.
        """
        raise NotImplementedError(f"{type(self).__name__} remembers nothing")

    def work(self, local: Local) -> Kernels:
        """What one rank computes: here one kernel that reads operands and writes results.

        In backward it reads as much again, and writes the gradients of its operands.
        """
        needs, gives = local.specs()
        operands = list(zip(local.node.operands, needs, strict=True))
        moved = sum(local.bytes(value, spec) for value, spec in operands)
        moved += sum(map(local.bytes, local.node.outputs, gives))
        if not local.backward:
            return Kernels(((Stream(float(moved)),),))
        back = moved + sum(local.bytes(*one) for one in operands if one[0].differentiable)
        return Kernels(((Stream(float(moved)),),), ((Stream(float(back)),),))

    def causal(self, node: Node) -> tuple[tuple[Value, int], ...]:
        """The dims of tokens of a causal self-attention, of which later ones have more work.

        Ranks may hold these tokens in another order, which shares the work evenly (`order.py`).
        """
        return ()

    def contiguous(self, node: Node) -> tuple[Choice, ...]:
        """Cuts that need each rank's tokens to follow one another; an algorithm has `orders`."""
        return ()

    def flops(self, local: Local) -> float:
        """FLOPs of the forward pass; what is bound by memory has none."""
        return self.work(local).flops

    def traffic(self, local: Local) -> tuple[Traffic, ...]:
        """The collectives that it runs itself, forward and, where there is one, backward."""
        return ()

    def buffers(self, local: Local) -> float:
        """Bytes that it holds beside operands and results while it runs."""
        return 0.0

    def both_buffers(self, local: Local) -> tuple[float, float]:
        """The same, and bytes that backward holds beside what it was given and what it gives."""
        size = self.buffers(local)
        return size, size

    def load(self, local: Local) -> float:
        """Rows that come to the busiest rank, over those that a rank sends, where it sends any."""
        return 1.0

    def extra_bytes(self, local: Local) -> float:
        """Bytes that autograd keeps, and that it holds while it runs, besides `saves`."""
        return 0.0

    def part_bytes(self, local: Local) -> float:
        """Of those that autograd keeps what a layer keeps that keeps a part of what it makes, and
        what it keeps of `spares`."""
        return self.extra_bytes(local) if self.stays else 0.0

    def spares(self, local: Local) -> tuple[tuple[Kernel, ...], tuple[Traffic, ...]]:
        """Where such a layer runs it again, the kernels and collectives of its forward pass whose
        results are kept, so that they do not run."""
        return (), ()

    def unfused_bytes(self, local: Local) -> float:
        """Bytes that autograd keeps besides where torch has no kernel for it."""
        return 0.0

    def limits(self, node: Node) -> Mapping[str, Limit]:
        """By the names of arguments: of what the whole numbers in them are indices."""
        return {}

    def shift(self, node: Node) -> int | None:
        """What it adds to the whole numbers of its operands, which may be indices further on; None
        where its results are others, or not all."""
        return None

    def ties(self, sizes: Sizes, node: Node) -> bool:
        """Say what the rule leaves free of the sizes; False if there is nothing to say.

        Then the sizes of a node whose rule keeps all dims whole stay.
        """
        return False

    def resized(self, node: Node, new: Resizing) -> dict[str, Arg]:
        """The arguments that hold a size, for the shapes of another graph; -1 stays -1."""
        result = new.shape(node.outputs[0])
        given = {name: arg for name, arg in node.args if name in ("size", "shape")}
        return {
            name: tuple(-1 if was == -1 else n for was, n in zip(arg, result, strict=True))
            for name, arg in given.items()
            if isinstance(arg, tuple)
        }

    def remembered(self, local: Local, run: int = 0) -> float:
        """Bytes of what it `remembers` on one rank, by the end of this phase.

        `run`: of how many tokens at once another phase adds to it.
        """
        return 0.0

    def state(self, node: Node) -> TensorType:
        """The state (b, ...) that it `remembers`, where that has a fixed size for each sequence."""
        raise NotImplementedError(f"{type(self).__name__} keeps no state")

    def cut_state(self, node: Node) -> Mapping[Choice, int]:
        """The choices that cut its state, and which dim of it."""
        return {}

    def holds(self, node: Node, choices: Sequence[Choice]) -> tuple[Value, ...]:
        """The values of `saves` that autograd keeps themselves, and not something made of them."""
        return self.saves(node)


class Light(Operator):
    """An operator of one line: a rule, a template over the names of its schema, what it saves.

    `emit` may be a function instead.  `saves` has names of arguments, and `result` for the output;
    `weight if input`: only where the gradient of `input` is needed.
    """

    heavy = False

    def __init__(
        self,
        rule: Callable[[Node], Rule],
        emit: str | Callable[[Node, Render], str],
        saves: Sequence[str] = (),
        *,
        ties: Callable[[Sizes, Node], None] | None = None,
        resized: Callable[[Node, Resizing], dict[str, Arg]] | None = None,
    ) -> None:
        self._rule, self._emit, self._saves = rule, emit, tuple(saves)
        self._ties, self._resized = ties, resized

    def rule(self, node: Node) -> Rule:
        """Which dims are which factors."""
        return self._rule(node)

    def emit(self, node: Node, render: Render) -> str:
        """The template, filled with the source texts of the arguments."""
        if isinstance(self._emit, str):
            return self._emit.format(**{name: render.arg(name) for name, _ in node.args})
        return self._emit(node, render)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """The arguments and results that are named in the declaration."""
        return named_values(node, self._saves)

    def ties(self, sizes: Sizes, node: Node) -> bool:
        """What the function of the declaration says, if there is one."""
        if self._ties is None:
            return False
        self._ties(sizes, node)
        return True

    def resized(self, node: Node, new: Resizing) -> dict[str, Arg]:
        """As for any operator, and what the function of the declaration gives."""
        return super().resized(node, new) | (self._resized(node, new) if self._resized else {})


class View(Light):
    """A light operator that moves nothing: its results are other views of its operand."""

    free = True
    aliases = True

    def work(self, local: Local) -> Kernels:
        """Nothing."""
        return Kernels()

    def shift(self, node: Node) -> int | None:
        """They are as they were."""
        return 0


class Family(dict[str, Operator]):
    """The operators of one file, by their names."""

    def add(self, names: str, op: Operator) -> None:
        """Declare one or more space-separated names; a second declaration is an error."""
        for name in names.split():
            if name in self:
                raise ValueError(f"duplicate registration of op `{name}`")
            self[name] = op

    def called(self, noun: str, names: str) -> None:
        """What the results of these operators are called: all overloads of `add`, `pow`."""
        for name in names.split():
            found = [op for key, op in self.items() if key.split(".")[1] == name]
            if not found:
                raise ValueError(f"there is no op `{name}` that could be called `{noun}`")
            for op in found:
                op.noun = noun


def named_values(node: Node, entries: Sequence[str]) -> tuple[Value, ...]:
    """The values that `Light.saves` names."""
    kept: list[Value] = []
    for entry in entries:
        name, _, other = entry.partition(" if ")
        if other and not any(value.differentiable for value in values_in(node.arg(other))):
            continue
        kept += node.outputs[:1] if name == "result" else values_in(node.arg(name))
    return tuple(kept)


def shapes_of(values: Sequence[Value]) -> list[tuple[int, ...]]:
    """The shapes of `values`."""
    return [value.type.shape for value in values]


def opaque(node: Node) -> Rule:
    """The rule of a node of which nothing is known: every dim is whole."""
    return opaque_rule(shapes_of(node.operands), shapes_of(node.outputs))


def torch_operator(name: str) -> OpOverload:
    """The operator of torch that is called so in full.  Raises ValueError where there is none."""
    space, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    function = getattr(getattr(getattr(torch.ops, space), packet, None), overload, None)
    if not isinstance(function, OpOverload):
        raise ValueError(f"there is no operator `{name}`")
    return function


@cache
def _without_default(name: str) -> frozenset[str]:
    """The arguments of torch's operator that must be given."""
    arguments = schema_arguments(torch_operator(name))
    return frozenset(each.name for each in arguments if not each.has_default_value())


def _call_torch(name: str, args: Mapping[str, Any]) -> Any:
    function = torch_operator(name)
    # placement arguments are None in the graph and mean the default; `self` may be positional
    schema = schema_arguments(function)
    positional = [args[a.name] for a in schema if a.name in args and not a.kwarg_only]
    keywords = {a.name: args[a.name] for a in schema if a.name in args and a.kwarg_only}
    return function(*positional, **keywords)


__all__ = [
    "PLACEMENT", "Family", "Leaf", "Light", "Limit", "Operator", "Render", "View",
    "named_values", "opaque", "shapes_of", "torch_operator",
]  # fmt: skip
