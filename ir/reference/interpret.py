"""Run a graph on real tensors, node by node: the meaning that every pass must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ..graph import Arg, Graph, Loop, Node, Param, Value
from ..ops.attention import attention_math
from ..ops.experts import moe_math, moe_operator

_REDUCTION = {1: "mean", 2: "sum"}


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a cache was given: keys and values (b, heads, s, d), positions (b, s), -1 is padding."""

    k: Tensor
    v: Tensor
    positions: Tensor


Caches: TypeAlias = dict[str, Tokens]  # by the path of the cache: `model.layers.0.kv`


def interpret(
    graph: Graph,
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    caches: Caches | None = None,
) -> dict[tuple[str | int, ...], Tensor]:
    """The graph's outputs by their paths; autograd works through all of it.

    `params` maps the original names of parameters and persistent buffers to tensors (a state
    dict); constants come from the graph.  A graph of serving reads and extends `caches`
    (default: empty ones).  Raises KeyError for a missing name, ValueError for an op that does
    not exist.
    """
    device = next(iter(inputs.values())).device
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
        if param.kind == "constant":
            env[param.value.name] = torch.tensor(param.data, dtype=param.value.type.dtype)
        elif (part := param.part) is not None:
            size = param.value.type.shape[part.dim]
            env[param.value.name] = params[prefix + part.name].narrow(part.dim, part.start, size)
        else:
            env[param.value.name] = params[prefix + param.name]


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
    args = {name: _real(arg, env) for name, arg in node.args}
    if node.op == "shardwright.cached_attention":
        path = f"{prefix}{args.pop('cache')}"
        result, caches[path] = cached_attention_math(caches.get(path), **args)
    else:
        result = operator(node.op)(**args)
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


def operator(op: str) -> Callable[..., Any]:
    """The function that `Node.op` names, taking the node's arguments by name."""
    if op in _OURS:
        return _OURS[op]
    packet, _, overload = op.removeprefix("aten.").rpartition(".")
    function = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if function is None:
        raise ValueError(f"there is no operator `{op}`")

    def call(**args: Any) -> Any:
        # placement arguments are None in the graph and mean the default; `self` may be positional
        schema = function._schema.arguments
        positional = [args[a.name] for a in schema if a.name in args and not a.kwarg_only]
        keywords = {a.name: args[a.name] for a in schema if a.name in args and a.kwarg_only}
        return function(*positional, **keywords)

    return call


def _cross_entropy(
    logits: Tensor, labels: Tensor, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Cross entropy over the last dim of `logits`, any number of leading dims."""
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        reduction=_REDUCTION[reduction],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def _affine(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """input @ weight + bias with weight (in, out)."""
    return input @ weight + bias


def _moe(**args: Any) -> Tensor:
    """Which rows an expert gets depends on values, which fake tensors do not have."""
    return moe_operator(**args) if isinstance(args["x"], FakeTensor) else moe_math(**args)


def _last_token(x: Tensor, positions: Tensor) -> Tensor:
    """The row of the highest position of each sequence, (b, 1, ...)."""
    last = positions.argmax(1).reshape(-1, *[1] * (x.ndim - 1))
    return x.gather(1, last.expand(-1, 1, *x.shape[2:]))


def cached_attention_math(
    cached: Tokens | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    context: int,
    value_dim: int = 0,
    sinks: Tensor | None = None,
    chunk: int = 0,
    up: Tensor | None = None,
) -> tuple[Tensor, Tokens]:
    """Attention of new tokens over all that are known, and all that are known then.

    Without `v` the values are the first `value_dim` numbers of the keys.  `sinks` (hq,) and
    `chunk`: see `attention_math`.  `context`, the number that was planned for, changes nothing.
    With `up` (hq, d + dv, r) the keys are latents, of which keys and values of all heads are made.
    """
    v = k[..., :value_dim] if v is None else v
    keys = positions
    if cached is not None:
        k, v = torch.cat([cached.k, k], 2), torch.cat([cached.v, v], 2)
        keys = torch.cat([cached.positions, positions], 1)
    rows, columns = positions[:, None, :, None], keys[:, None, None, :]
    mask = (columns >= 0) & (columns <= rows)
    if window:
        mask &= columns > rows - window
    if chunk:
        mask &= columns // chunk == rows // chunk
    heads_k, heads_v = (k, v) if up is None else _decompressed(k, up, q.shape[3])
    out = attention_math(
        q, heads_k, heads_v, mask, scale, causal=False, window=0, softcap=softcap, dropout_p=0.0,
        sinks=sinks,
    )  # fmt: skip
    return out, Tokens(k, v, keys)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    up: Tensor | None = None,
    value_dim: int = 0,
    **options: Any,
) -> Tensor:
    """`attention_math`; with `up` (hq, d + dv, r) over keys and values made from latents k.

    `value_dim` r, their numbers without the rotated part, follows from `up`.
    """
    if up is not None:
        k, v = _decompressed(k, up, q.shape[3])
    assert v is not None, "values are an operand, or made from latents"
    return attention_math(q, k, v, **options)


def _decompressed(latents: Tensor, up: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads from latents (b, 1, s, r + rope), rotated part last."""
    heads, rank = up.shape[0], up.shape[2]
    rope = latents[..., rank:].expand(-1, heads, -1, -1)
    made = torch.einsum("bsr,hur->bhsu", latents[:, 0, :, :rank], up)
    nope = key_dim - rope.shape[3]
    return torch.cat([made[..., :nope], rope], -1), made[..., nope:]


_OURS: dict[str, Callable[..., Any]] = {
    "shardwright.attention": _attention,
    "shardwright.affine": _affine,
    "shardwright.last_token": _last_token,
    "shardwright.cross_entropy": _cross_entropy,
    "shardwright.moe": _moe,
}

__all__ = ["Caches", "Tokens", "cached_attention_math", "interpret", "operator"]
