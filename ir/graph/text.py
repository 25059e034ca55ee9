"""A graph as text: one line per node, stable, made for reading and for comparing in tests."""

from __future__ import annotations

from ...facts.nested import spelled
from .nodes import Arg, Block, Graph, Input, Loop, Node, Param, Value


def format_graph(graph: Graph, *, locations: bool = True) -> str:
    """The whole graph: inputs, parameters outside loops, body, outputs.

    Without `locations` it says nothing of files, lines and the names that they assign: the same
    for every version of a library in which the model computes the same.
    """
    lines = [f"graph {graph.name}"]
    lines += [f"  input {item.value}{_within(item)}" for item in graph.inputs]
    if graph.signature is not None:
        lines += [f"  fixed {spelled(path)} = {value!r}" for path, value in graph.signature.fixed]
    lines += [f"  {format_param(param)}" for param in graph.params]
    for item in graph.body:
        if isinstance(item, Node):
            lines.append(f"  {format_node(item, locations=locations)}")
        else:
            lines += [f"  {line}" for line in _loop(item, locations)]
    for output in graph.outputs:
        path = ".".join(str(key) for key in output.path) or "(result)"
        lines.append(f"  output {path} = {output.value.name}")
    return "\n".join(lines) + "\n"


def _within(item: Input) -> str:
    return f" = {spelled(item.path)}" if item.path else ""


def format_param(param: Param) -> str:
    """`parameter wte.weight: float32[64, 32] = lm_head.weight`; a part as a slice of the original.

    `parameter attn.qkv.weight_k: float32[32, 32] = attn.qkv.weight[32:64]`
    """
    slices = ""
    if (part := param.part) is not None:
        bounds = f"{part.start}:{part.start + param.value.type.shape[part.dim]}"
        slices = f"[{', '.join([':'] * part.dim + [bounds])}]"
    names = param.aliases if part is None else (part.name, *param.aliases)
    stored = f" of {str(param.stored).removeprefix('torch.')}" if param.stored else ""
    return f"{param.kind} {param.name}: {param.value.type}{stored}" + "".join(
        f" = {name}{slices}" for name in names
    )


def format_node(node: Node, *, locations: bool = True) -> str:
    """`q: float32[2, 8, 32] = aten.linear.default(input=x, weight=w, bias=None)  # model.py:7`"""
    results = ", ".join(str(value) for value in node.outputs)
    args = ", ".join(f"{name}={format_arg(arg)}" for name, arg in node.args)
    targets = f" {', '.join(node.loc.targets)}" if node.loc.targets else ""
    location = f"  # {node.loc}{targets}" if locations else ""
    return f"{results} = {node.op}({args}){location}"


def format_arg(arg: Arg) -> str:
    """A value by its name, anything else as Python writes it."""
    if isinstance(arg, Value):
        return arg.name
    if isinstance(arg, tuple):
        inner = ", ".join(format_arg(item) for item in arg)
        return f"({inner},)" if len(arg) == 1 else f"({inner})"
    return str(arg).removeprefix("torch.") if arg.__class__.__name__ == "dtype" else repr(arg)


def _loop(loop: Loop, locations: bool) -> list[str]:
    lines = [
        f"loop {loop.name} over {loop.path}: {len(loop.order)} x, order {_runs(loop.order)}",
        f"  carried {', '.join(value.name for value in loop.carried)}",
        f"  invariants {', '.join(value.name for value in loop.invariants) or 'none'}",
    ]
    for number, block in enumerate(loop.blocks):
        lines += [f"  {line}" for line in _block(number, block, locations)]
    lines.append(f"  gives {', '.join(str(value) for value in loop.outputs)}")
    return lines


def _block(number: int, block: Block, locations: bool) -> list[str]:
    lines = [f"block {number} {block.class_name}({', '.join(map(str, block.inputs))})"]
    lines += [f"  {format_param(param)}" for param in block.params]
    lines += [f"  {format_node(node, locations=locations)}" for node in block.nodes]
    lines.append(f"  return {', '.join(value.name for value in block.outputs)}")
    return lines


def _runs(order: tuple[int, ...]) -> str:
    """`0 x5, 1, 0 x5, 1` for (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1)."""
    parts: list[tuple[int, int]] = []
    for kind in order:
        if parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + 1)
        else:
            parts.append((kind, 1))
    return ", ".join(f"{kind} x{count}" if count > 1 else str(kind) for kind, count in parts)


__all__ = ["format_arg", "format_graph", "format_node", "format_param"]
