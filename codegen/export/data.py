"""A plan's structure as plain JSON: the mesh, what is cut in every operator, how tensors lie."""

from __future__ import annotations

import json
from typing import Any

from ...facts.spec import format_spec
from ...ir.ops.labels import label_dims
from ...ir.ops.registry import operator_of
from ...planner.errors import PlanError
from ...planner.plan.plan import PlanData
from ...planner.plan.program import Compute
from ...planner.plan.words import choices_text
from ...planner.strategies.layout import Layout
from ...planner.strategies.params import all_params
from .target import Target, Written

SCHEMA = "shardwright.layout/1"


class Data(Target):
    """Any plan; of a pipeline each kind of stage.  `plan.json` has all else that a plan knows."""

    name = "json"
    title = "JSON"
    exact = trains = serves = True

    def write(self, plan: PlanData, layout: Layout | None) -> Written:
        """One object."""
        request = plan.request
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "model": plan.graph.name,
            "cluster": request.cluster,
            "gpus": request.gpus,
            "batch": request.batch,
            "micro_batches": request.micro_batches,
            "sequence": request.seq,
            "mesh": [{"axis": name, "size": size} for name, size in plan.mesh.axes],
        }
        if plan.pipeline is not None:
            pipeline = plan.pipeline
            found["schedule"] = pipeline.schedule
            found["stages"] = [
                {"kind": stage.kind, "layers": stage.layers} for stage in pipeline.stages
            ]
            found["kinds"] = [_phase(kind) for kind in pipeline.kinds]
        elif plan.decode is not None:
            found["phases"] = {"prefill": _phase(plan), "decode": _phase(plan.decode)}
        else:
            found["phases"] = {request.phase: _phase(plan)}
        return Written(json.dumps(found, indent=1, allow_nan=False) + "\n")


def _phase(plan: PlanData) -> dict[str, Any]:
    decided, labels = plan.decisions, label_dims(plan.graph)
    if plan.pipeline is not None:
        raise PlanError("a stage has no stages of its own")
    return {
        "seconds": plan.seconds,
        "memory_bytes": plan.memory.total,
        "recomputed": decided.recompute,
        "kept_layers": decided.kept_layers,
        "part_layers": decided.part_layers,
        "tokens": decided.order,
        "parameters": {
            ref.name: {
                "shape": list(ref.param.value.type.shape),
                "layers": ref.weight,
                "stored": format_spec(decided.specs[ref.param.value.name]),
                "home": str(home) if (home := decided.homes.get(ref.param.value.name)) else None,
            }
            for ref in all_params(plan.graph)
        },
        "inputs": {
            item.name: format_spec(decided.specs[item.value.name]) for item in plan.graph.inputs
        },
        "operators": [
            {
                "module": item.node.loc.module,
                "operator": item.node.op,
                "layers": layers,
                "cuts": choices_text(item.node, item.choices, plan.mesh, labels),
                "operands": [format_spec(operand.spec) for operand in item.operands],
                "results": [format_spec(output.spec) for output in item.outputs],
            }
            for item, layers in _computed(plan)
            if operator_of(item.node).heavy
        ],
    }


def _computed(plan: PlanData) -> list[tuple[Compute, int]]:
    return [(item, times) for item, times in plan.program.flat() if isinstance(item, Compute)]


__all__ = ["SCHEMA", "Data"]
