"""The graph that everything else reads: values, nodes, loops over repeated blocks.

Flat, frozen data.  A `Value` is known by its name, unique in the graph; a `Node` lists its
arguments by the names of the op's schema, every argument present (defaults filled in), tensors as
`Value`s.  Capture makes a flat graph; `fold` replaces runs of repeated nodes by a `Loop`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias, Union

import torch

from ...facts.nested import Constant, Path


@dataclass(frozen=True, slots=True)
class TensorType:
    """Global shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.dtype.itemsize

    @property
    def continuous(self) -> bool:
        """Real or complex numbers, which have gradients and can be summands of one another."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph.

    `differentiable` says that a gradient flows back through it: it is floating point and depends
    on a trainable parameter (or on a floating-point input that requires grad).
    """

    name: str
    type: TensorType
    differentiable: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"


Arg: TypeAlias = Union[Value, int, float, complex, bool, str, None, torch.dtype, "tuple[Arg, ...]"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module's `forward` in the run that was captured."""

    path: str  # of the module: `model.layers.0.self_attn`; empty for the model itself
    number: int = 0  # how often it had been called before
    class_name: str = ""  # `LlamaAttention`
    arguments: tuple[str, ...] = ()  # names of what `forward` takes, in its order, without self
    file: str = ""  # where the class's `forward` stands; empty for the modules of torch itself
    line: int = 0
    targets: tuple[str, ...] = ()  # names that the caller's line assigns just what it returns to

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else (self.path or "?")


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """One call of a function of the user's, no method, in the `forward` of a module."""

    name: str
    path: str  # of the module; empty for the model itself
    number: int  # of the call of the module, as `Call` has it
    site: tuple[int, ...]  # lines of the calls that led to it, from `forward` on
    arguments: tuple[str, ...] = ()  # names of what it takes, in its order
    taken: tuple[str, ...] = ()  # those that may be tensors, as its operators first take them
    results: int = 1  # how many it returns
    file: str = ""  # where it stands
    line: int = 0
    targets: tuple[str, ...] = ()  # names that the caller's line assigns just what it returns to

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Loc:
    """Where a node comes from in the user's program."""

    file: str = ""  # path of the source file, as short as the report prints it: `model.py`
    line: int = 0
    calls: tuple[Call, ...] = ()  # in which it ran, outermost (the model's) first
    targets: tuple[str, ...] = ()  # names that the source line assigns the results to, if any
    functions: tuple[FunctionCall, ...] = ()  # in the innermost `forward`, outermost first

    @property
    def module(self) -> str:
        """Path of the innermost module: `model.layers.0.self_attn.q_proj`."""
        return self.calls[-1].path if self.calls else ""

    @property
    def module_class(self) -> str:
        """Class of the innermost module: `Linear`."""
        return self.calls[-1].class_name if self.calls else ""

    @property
    def target(self) -> str:
        """The name that the line assigns a single result to, if it has one."""
        return self.targets[0] if len(self.targets) == 1 else ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else (self.module or "?")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Node:
    """One operation: `op` is the registry's name, `aten.linear.default` or `shardwright.attention`.

    `args` holds (schema name, argument) pairs in schema order.
    """

    name: str
    op: str
    args: tuple[tuple[str, Arg], ...]
    outputs: tuple[Value, ...]
    loc: Loc = field(default_factory=Loc)
    operands: tuple[Value, ...] = field(init=False, compare=False, repr=False)
    """Tensor operands in argument order, lists flattened, repeats kept."""

    def __post_init__(self) -> None:
        operands = tuple(value for _, arg in self.args for value in values_in(arg))
        object.__setattr__(self, "operands", operands)

    def arg(self, name: str) -> Arg:
        """The argument called `name` in the op's schema."""
        for key, value in self.args:
            if key == name:
                return value
        raise KeyError(f"{self.op} has no argument `{name}`; it has {[k for k, _ in self.args]}")

    def int_arg(self, name: str) -> int:
        """The argument called `name`, which must be a number."""
        value = self.arg(name)
        if not isinstance(value, int):
            raise ValueError(f"{self.loc}: argument `{name}` of `{self.op}` is {value}, no integer")
        return value

    @property
    def output(self) -> Value:
        """The first (usually only) output."""
        return self.outputs[0]


def values_in(arg: Arg) -> Iterator[Value]:
    """All `Value`s inside a possibly nested argument, in order."""
    if isinstance(arg, Value):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from values_in(item)


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of an original tensor a parameter is: along `dim`, from `start` on."""

    name: str  # of the original tensor, relative in a block as `Param.name` is
    dim: int
    start: int


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter, buffer or constant.

    `name` is the original qualified name (`model.layers.0.mlp.up_proj.weight`); inside a `Block`
    it is relative to the loop's path and index (`mlp.up_proj.weight`).  `aliases` are further
    names under which the same tensor appears in state dicts (tied weights).  `data` holds
    the values of what no state dict carries: non-persistent buffers and constants, as a
    (nested) tuple of Python numbers.

    A fused weight that was taken apart is several parameters, whose `part` says which slice of
    the original each is; `aliases` are then names of the whole original.

    A parameter may be stored in another dtype, `stored`, than that of its value, in which it is
    used: float32 for products in bfloat16, say.

    `matrix`: it is a matrix of a hidden layer, or a stack of them (see `ir/passes/matrices.py`); of
    a part, the whole original is.
    """

    name: str
    value: Value
    kind: str = "parameter"  # parameter | buffer (persistent) | constant (data is in `data`)
    aliases: tuple[str, ...] = ()
    data: tuple[object, ...] | float | int | bool | None = None
    part: Part | None = None
    stored: torch.dtype | None = None
    matrix: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is stored."""
        return self.stored or self.value.type.dtype


def originals(params: Iterable[Param]) -> tuple[Param, ...]:
    """`params` as the original model has them: parts of one tensor put together, in its place."""
    found: dict[str, Param] = {}
    for param in params:
        if param.part is None:
            found[param.name] = param
            continue
        name, dim = param.part.name, param.part.dim
        shape = list(param.value.type.shape)
        if name in found:
            shape[dim] += found[name].value.type.shape[dim]
        whole = TensorType(tuple(shape), param.value.type.dtype)
        value = Value(name, whole, param.value.differentiable)
        found[name] = Param(
            name, value, param.kind, param.aliases, stored=param.stored, matrix=param.matrix
        )
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class Block:
    """The body of a loop: one distinct repeated block, seen as a function.

    `inputs` are first the carried values, then the loop's invariants, in the order of
    `Loop.carried` and `Loop.invariants`; `outputs` are the carried values for the next iteration.
    """

    class_name: str  # class of the user's module: `LlamaDecoderLayer`
    params: tuple[Param, ...]
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """`for i, kind in enumerate(order): carried = blocks[kind](carried, invariants)`.

    `path` is the module list that is looped over (`model.layers`).  All blocks take the same
    inputs and give the same outputs; `outputs` are the carried values after the last iteration.
    """

    name: str
    path: str
    blocks: tuple[Block, ...]
    order: tuple[int, ...]
    carried: tuple[Value, ...]  # values before the first iteration
    invariants: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Extent:
    """Sizes that a dim may have besides the captured one: multiples of `step` from `least` to
    `most`, which is 0 where there is no limit."""

    least: int = 1
    most: int = 0
    step: int = 1

    def allows(self, size: int) -> bool:
        """May the dim be of this size?"""
        until = not self.most or size <= self.most
        return size >= self.least and until and (size - self.least) % self.step == 0


@dataclass(frozen=True, slots=True)
class Input:
    """A user input by its keyword; `labels` names its dims (`b`, `s`) where they are known.

    `path` says where in the arguments of `forward` it stands (`("batch", "ids")`); `()` is for the
    argument `name` itself.  `extents` has for each dim the sizes for which the graph holds, None
    where that is only the captured one; `()` is for none but those.
    """

    name: str
    value: Value
    labels: tuple[str, ...] = ()
    path: Path = ()
    extents: tuple[Extent | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """A model output: the path of keys to it in what the model returns (`("logits",)`, `(0,)`)."""

    path: tuple[str | int, ...]
    value: Value


@dataclass(frozen=True, slots=True)
class Signature:
    """Arguments of a `forward` that takes more than tensors by name.

    The first `by_position` of `names` may be given without their names.  `fixed` are the numbers,
    flags, texts and None in the arguments, by path: the graph holds for these values alone.
    """

    names: tuple[str, ...]
    by_position: int
    fixed: tuple[tuple[Path, Constant], ...]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Graph:
    """A captured model.  `body` is in topological order.

    `signature` is None where `forward` takes `inputs` by name, and nothing else.  `bounds` say in
    words why inputs may not have any size.
    """

    name: str  # class of the model: `LlamaForCausalLM`
    inputs: tuple[Input, ...]
    params: tuple[Param, ...]
    body: tuple[Node | Loop, ...]
    outputs: tuple[Output, ...]
    signature: Signature | None = None
    bounds: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node once: those of a loop stand in its blocks, one for each kind of layer."""
        found: list[Node] = []
        for item in self.body:
            if isinstance(item, Loop):
                found += [node for block in item.blocks for node in block.nodes]
            else:
                found.append(item)
        return tuple(found)

    @property
    def read(self) -> frozenset[str]:
        """Names of the values that something takes: nodes, loops, blocks' ends, outputs."""
        found = {value.name for item in self.body for value in reads(item)}
        found |= {out.value.name for out in self.outputs}
        for block in (block for loop in self.loops for block in loop.blocks):
            found |= {value.name for node in block.nodes for value in node.operands}
            found |= {value.name for value in block.outputs}
        return frozenset(found)

    @property
    def loops(self) -> tuple[Loop, ...]:
        """The loops of the body, in order."""
        return tuple(item for item in self.body if isinstance(item, Loop))


def reads(item: Node | Loop) -> tuple[Value, ...]:
    """The values that an item of a body takes."""
    return item.operands if isinstance(item, Node) else (*item.carried, *item.invariants)


__all__ = [
    "Arg", "Block", "Call", "Extent", "Graph", "Input", "Loc", "Loop", "Node", "Output", "Param",
    "Part", "Signature", "TensorType", "Value", "originals", "reads",
    "values_in",
]  # fmt: skip
