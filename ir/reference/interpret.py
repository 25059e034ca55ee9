"""Run a graph on real tensors, node by node: the meaning that every pass must keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..graph import Arg, Graph, Loop, Node, Param, Value
from ..ops.registry import operator_of

Caches: TypeAlias = dict[str, Any]  # by the path of the cache: `model.layers.0.kv`


def interpret(
    graph: Graph,
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    caches: Caches | None = None,
) -> dict[tuple[str | int, ...], Tensor]:
    """The graph's outputs by their paths; autograd works through all of it.

    `params` maps the original names of parameters and persistent buffers to tensors (a state
    dict), which are converted to the formats that the graph has for them; constants come from
    the graph.  A graph of serving reads and extends `caches` (default: empty ones).  Raises
    KeyError for a missing name, ValueError for an op that does not exist.
    """
    device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))
    env = {item.value.name: inputs[item.name] for item in graph.inputs}
    caches = {} if caches is None else caches
    with torch.device(device):
        _bind(graph.params, "", params, env)
        for item in graph.body:
            if isinstance(item, Node):
                _run(item, env, caches, "")
            else:
                _run_loop(item, params, env, caches)
    return {output.path: env[output.value.name] for output in graph.outputs}


def _bind(
    declared: Sequence[Param], prefix: str, params: Mapping[str, Tensor], env: dict[str, Tensor]
) -> None:
    """Put the tensors of the declared parameters into `env`."""
    for param in declared:
        kind = param.value.type
        if param.kind == "constant":
            tensor = torch.tensor(param.data, dtype=kind.dtype)
        elif (part := param.part) is not None:
            whole = params[prefix + part.name]
            tensor = whole.narrow(part.dim, part.start, kind.shape[part.dim])
        else:
            tensor = params[prefix + param.name]
        env[param.value.name] = tensor.to(kind.dtype)


def _run_loop(
    loop: Loop, params: Mapping[str, Tensor], env: dict[str, Tensor], caches: Caches
) -> None:
    """Run the blocks one after another."""
    carried = [env[value.name] for value in loop.carried]
    invariants = [env[value.name] for value in loop.invariants]
    for index, kind in enumerate(loop.order):
        block = loop.blocks[kind]
        names = [value.name for value in block.inputs]
        inner = dict(zip(names, [*carried, *invariants], strict=True))
        _bind(block.params, f"{loop.path}.{index}.", params, inner)
        for node in block.nodes:
            _run(node, inner, caches, f"{loop.path}.{index}.")
        carried = [inner[value.name] for value in block.outputs]
    env.update({value.name: tensor for value, tensor in zip(loop.outputs, carried, strict=True)})


def _run(node: Node, env: dict[str, Tensor], caches: Caches, prefix: str) -> None:
    """Run one node; its cache, if it has one, is `prefix` and its own name."""
    args, op = {name: _real(arg, env) for name, arg in node.args}, operator_of(node)
    if op.remembers:
        path = f"{prefix}{args.pop(op.remembers)}"
        result, caches[path] = op.continued(caches.get(path), args)
    else:
        result = op.evaluate(node.op, args)
    results = result if isinstance(result, (tuple, list)) else [result]
    for value, tensor in zip(node.outputs, results, strict=True):
        if tuple(tensor.shape) != value.type.shape or tensor.dtype != value.type.dtype:
            raise ValueError(
                f"{node.loc}: `{node.op}` gives {tensor.dtype} {list(tensor.shape)}, but the graph "
                f"says {value}"
            )
        env[value.name] = tensor


def _real(arg: Arg, env: Mapping[str, Tensor]) -> Any:
    if isinstance(arg, Value):
        return env[arg.name]
    return [_real(item, env) for item in arg] if isinstance(arg, tuple) else arg


__all__ = ["Caches", "interpret"]
