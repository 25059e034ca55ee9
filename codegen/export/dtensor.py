"""A Python file that cuts the user's own model with `torch.distributed.tensor` and FSDP2.

Layers are cut by `parallelize_module`, by columns or rows as the plan uses their weights; what each
gives is a plain tensor, so that the model's forward sees its part of the heads or hidden units: it
must not write their number down (`view(b, s, -1, width)` and not `view(b, s, heads, width)`).
Weights are sharded, and gradients reduced, by `fully_shard`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...facts.spec import R, Spec, is_shard
from ...ir.graph import Node, Param, Value
from ...ir.ops.registry import operator_of
from ...planner.errors import PlanError
from ...planner.plan.plan import MIXED, PlanData
from ...planner.plan.program import BlockBody, Compute, Convert, LoopCall, Weight
from ...planner.strategies.layout import Layout
from ...planner.strategies.roles import Role
from .target import Target, Written, ranks

# By the class of a layer and the dim of its weight that is cut: how `parallelize_module` does it
_STYLES = {
    ("Linear", 0): "columns",
    ("Linear", 1): "rows",
    ("Embedding", 0): "table rows",
    ("Embedding", 1): "table columns",
}
_WRITTEN = {
    "columns": "ColwiseParallel()",
    "columns, gathered": "ColwiseParallel(output_layouts=Replicate())",
    "rows": "RowwiseParallel()",
    "table rows": "RowwiseParallel(input_layouts=Replicate())",
    "table columns": "ColwiseParallel(output_layouts=Replicate())",
}


class Dtensor(Target):
    """Data parallelism, FSDP and tensor parallelism of training."""

    name = "dtensor"
    title = "torch.distributed.tensor"
    trains = True
    recompute = recompute_some = True
    roles = {
        "ddp": "ddp", "fsdp": "fsdp", "zero1": "fsdp", "zero2": "fsdp", "tp": "tp", "tp+sp": "tp",
    }  # fmt: skip
    order = ("ddp", "fsdp", "tp")

    def write(self, plan: PlanData, layout: Layout | None) -> Written:
        """The file."""
        assert layout is not None
        sizes = {
            "replicate": ranks(layout, "ddp"),
            "shard": ranks(layout, "fsdp"),
            "tensor": ranks(layout, "tp"),
        }
        lost: list[str] = []
        layers = _tensor_layers(plan, layout, lost) if sizes["tensor"] > 1 else {}
        if plan.request.micro_batches > 1:
            lost.append("micro-batches are the caller's: each adds to the gradients")
        recomputed = {
            loop.path: max(len(loop.order) - plan.decisions.kept_layers, 0)
            for loop in plan.graph.loops
            if plan.decisions.recompute
        }
        parts = [
            _HEAD,
            f"MESH = {sizes!r}  # outermost first",
            f"LAYERS = {tuple(loop.path for loop in plan.graph.loops)!r}",
            f"RECOMPUTED = {recomputed!r}  # of these lists so many first layers",
            _styles(layers),
            f"PRECISION = {_precision(plan)}",
            _BODY,
        ]
        return Written("\n".join(parts), tuple(lost))


def _styles(layers: Mapping[str, str]) -> str:
    rows = [f"        {path!r}: {_WRITTEN[style]}," for path, style in layers.items()]
    body = ["    return {", *rows, "    }"] if rows else ["    return {}"]
    text = '    """How each layer is cut over `tensor`."""'
    return "\n".join(["", "", "def styles() -> dict[str, ParallelStyle]:", text, *body, "", ""])


def _precision(plan: PlanData) -> str:
    request = plan.request
    if request.precision != MIXED:
        return "MixedPrecisionPolicy()"
    reduced = "bfloat16" if request.reduce_dtype == "bfloat16" else "float32"
    return f"MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.{reduced})"


@dataclass(frozen=True, slots=True)
class _Place:
    """A straight run of statements with its weights: a kind of layer, or what is outside."""

    prefix: str
    params: tuple[Param, ...]
    weights: tuple[Weight, ...]
    statements: Sequence[Convert | Compute]
    ends: frozenset[str]

    @staticmethod
    def of(prefix: str, body: BlockBody) -> _Place:
        ends = frozenset(item.value.name for item in body.outputs)
        return _Place(prefix, body.block.params, body.weights, body.statements, ends)

    @property
    def computed(self) -> Iterator[Compute]:
        """What runs here."""
        return (item for item in self.statements if isinstance(item, Compute))


def _places(plan: PlanData) -> Iterator[_Place]:
    program = plan.program
    outside = [item for item in program.statements if not isinstance(item, LoopCall)]
    ends = frozenset(item.value.name for item in program.outputs)
    yield _Place("", program.graph.params, program.weights, outside, ends)
    for call in program.statements:
        if isinstance(call, LoopCall):
            yield from (_Place.of(f"{call.loop.path}.*.", body) for body in call.bodies)


def _tensor_layers(plan: PlanData, layout: Layout, lost: list[str]) -> dict[str, str]:
    """By the path of a layer, how it is cut.  Raises PlanError for what these styles cannot do."""
    cuts = [Role.parse(role).cuts == "weights" for role in layout.roles]
    sizes = plan.mesh.sizes
    axes = [i for i, cut in enumerate(cuts) if cut and sizes[i] > 1]
    found: dict[str, str] = {}
    for place in _places(plan):
        styles = _styles_of(place, axes)
        for path, style in styles.items():
            if found.setdefault(path, style) != style:
                raise PlanError(
                    f"`{path}` is cut by {found[path]} in some layers and by {style} in others, "
                    "which `parallelize_module` has no pattern for"
                )
    for path, style in found.items():
        if style == "columns, gathered":
            lost.append(f"`{path}` gathers its result: what follows (the loss) is not cut")
    return found


def _styles_of(place: _Place, axes: Sequence[int]) -> dict[str, str]:
    modules = _modules(place)
    found: dict[str, str] = {}
    cut: dict[str, str] = {}  # by the name of a value that is a weight
    for weight in place.weights:
        dims = {weight.used[axis] for axis in axes}
        path, kind = modules.get(weight.param.value.name, ("", ""))
        dim = next((d for d in dims if is_shard(d)), None)
        style = _STYLES.get((kind, -1 if dim is None else dim))
        own = place.prefix + weight.param.name
        if dim is not None and style and len(dims) == 1 and own == f"{path}.weight":
            if weight.param.aliases:
                raise PlanError(
                    f"`{own}` is also `{weight.param.aliases[0]}`, and `parallelize_module` cuts "
                    "each layer's own weights; plan with --layout fsdp, or ddp"
                )
            found[path] = cut[weight.param.value.name] = style
        elif dims - {R} and not (path in found or own.endswith(".bias")):
            raise PlanError(
                f"`{own}` is used in parts over the GPUs that share weights, in a layer ({kind}) "
                "that `parallelize_module` has no style for; plan with --layout fsdp, or ddp"
            )
    for path in [path for path, style in found.items() if style == "columns"]:
        if _leaves(place, path, modules, cut, axes):
            found[path] = "columns, gathered"
    return found


def _modules(place: _Place) -> dict[str, tuple[str, str]]:
    """By the value of a parameter, path (layers as `*`) and class of the module that uses it."""
    names = {param.value.name for param in place.params}
    depth = len(place.prefix.split(".")) - 1
    found: dict[str, tuple[str, str]] = {}
    for item in place.computed:
        parts = item.node.loc.module.split(".")
        rest = ".".join(parts[depth:]) if place.prefix else item.node.loc.module
        for value in item.node.operands:
            if value.name in names:
                found.setdefault(value.name, (place.prefix + rest, item.node.loc.module_class))
    return found


def _leaves(
    place: _Place,
    path: str,
    modules: Mapping[str, tuple[str, str]],
    cut: Mapping[str, str],
    axes: Sequence[int],
) -> bool:
    """Does what a layer cut by columns gives go anywhere but to layers that are cut by rows?"""

    def of_layer(node: Node) -> bool:
        return any(modules.get(value.name, ("",))[0] == path for value in node.operands)

    def is_cut(spec: Spec) -> bool:
        return all(is_shard(spec[axis]) for axis in axes)

    def ends(node: Node) -> bool | None:
        """True: it needs the whole; False: it takes the part; None: follow what it gives."""
        styles = {cut[value.name] for value in node.operands if value.name in cut}
        if styles:
            return "rows" not in styles
        operator = operator_of(node)
        return True if operator.heavy and not operator.attends else None

    seen: set[Value] = {
        value for item in place.computed if of_layer(item.node) for value in item.node.outputs
    }
    todo, needs = list(seen), False
    while todo:
        value = todo.pop()
        needs |= value.name in place.ends
        for item in place.computed:
            reads = [o for o in item.operands if o.value == value and is_cut(o.spec)]
            if not reads:
                continue
            verdict = ends(item.node)
            needs |= verdict is True
            if verdict is None:
                new = [out for out in item.node.outputs if out not in seen]
                seen.update(new)
                todo += new
    return needs


_HEAD = """import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint
"""

_BODY = '''

def make_mesh(device_type: str = "cuda") -> DeviceMesh:
    """The mesh of all ranks; the process group must be there."""
    return init_device_mesh(device_type, tuple(MESH.values()), mesh_dim_names=tuple(MESH))


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model, cut in place; all ranks begin with the same weights.

    Make the optimizer afterwards.  Each data rank then takes its own rows (`own_rows`).
    """
    if MESH["tensor"] > 1:
        parallelize_module(model, mesh["tensor"], styles())
    for path, count in RECOMPUTED.items():
        for layer in list(model.get_submodule(path).children())[:count]:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if MESH["replicate"] * MESH["shard"] == 1:
        return model
    data = mesh["replicate", "shard"] if MESH["replicate"] > 1 else mesh["shard"]
    for path in LAYERS:
        for layer in model.get_submodule(path).children():
            fully_shard(layer, mesh=data, mp_policy=PRECISION)
    fully_shard(model, mesh=data, mp_policy=PRECISION)
    return model


def own_rows(batch: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """This rank's rows of a batch that all ranks have."""
    parts = MESH["replicate"] * MESH["shard"]
    at = mesh["replicate"].get_local_rank() * MESH["shard"] + mesh["shard"].get_local_rank()
    return {
        name: value.chunk(parts)[at] if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
'''

__all__ = ["Dtensor"]
