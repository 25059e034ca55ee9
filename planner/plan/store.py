"""A plan as JSON and back.  A plan file is data: nothing in it is ever executed.

What is written and what is read is held to the same: `schema` field by field, `check` as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...facts import schema
from ...facts.files import DataError, read_json
from ...facts.mesh import Mesh
from ...facts.spec import Spec, format_spec, parse_spec, parse_state
from ...facts.traffic import Traffic
from ...ir.graph.serialize import graph_from_json, graph_to_json
from ..errors import PlanError
from ..strategies.build import Decisions
from ..strategies.pricing import Work
from ..strategies.steps import Step
from ..strategies.storage import Home
from .check import check_plan
from .plan import (
    Baseline,
    Memory,
    Pipeline,
    PlanData,
    PlannedStage,
    Recache,
    Request,
    Search,
)
from .program import PricedStep
from .schema import PLAN, VERSION

_T = TypeVar("_T")


def plan_to_json(plan: PlanData) -> dict[str, Any]:
    """The plan as plain JSON data, with its schema version."""
    d = plan.decisions
    return {
        "schema": VERSION,
        "request": _fields(plan.request),
        "mesh": [[name, size] for name, size in plan.mesh.axes],
        "seconds": plan.seconds,
        "optimizer_s": plan.optimizer_s,
        "casts_s": plan.casts_s,
        "memory": _fields(plan.memory),
        "baselines": [_fields(b) for b in plan.baselines],
        "search": _fields(plan.search),
        "notes": list(plan.notes),
        "choices": {name: list(choices) for name, choices in d.choices.items()},
        "specs": {name: format_spec(spec) for name, spec in d.specs.items()},
        "outputs": {name: format_spec(spec) for name, spec in d.outputs.items()},
        "homes": {
            name: {"spec": format_spec(home.spec), "late": home.late}
            for name, home in d.homes.items()
        },
        "recompute": d.recompute,
        **({"kept_layers": d.kept_layers} if d.kept_layers else {}),
        **({"part_layers": d.part_layers} if d.part_layers else {}),
        "order": d.order,
        "work": {name: [w.forward_s, w.backward_s] for name, w in plan.work.items()},
        "moving": {
            name: [w.forward_moving_s, w.backward_moving_s, list(w.axes)]
            for name, w in plan.work.items()
            if w.axes
        },
        **_spared(plan.work),
        "conversions": [
            {
                "value": value,
                "from": format_spec(a),
                "to": format_spec(b),
                "steps": [_step_to_json(step) for step in steps],
            }
            for (value, a, b), steps in plan.paths.items()
        ],
        "graph": graph_to_json(plan.graph),
        "decode": None if plan.decode is None else plan_to_json(plan.decode),
        "recached": [_recache_to_json(recache) for recache in plan.recached],
        **({"pipeline": _pipeline_to_json(plan.pipeline)} if plan.pipeline else {}),
    }


def _pipeline_to_json(pipeline: Pipeline) -> dict[str, Any]:
    return {
        "schedule": pipeline.schedule,
        "ranks": pipeline.ranks,
        "bubble": pipeline.bubble,
        "stages": [_fields(stage) for stage in pipeline.stages],
        "kinds": [plan_to_json(kind) for kind in pipeline.kinds],
    }


def _recache_to_json(recache: Recache) -> dict[str, Any]:
    return {
        **_fields(recache),
        "source": format_spec(recache.source),
        "target": format_spec(recache.target),
        "steps": [_step_to_json(step) for step in recache.steps],
    }


def _fields(item: Any) -> dict[str, Any]:
    return {name: _plain(getattr(item, name)) for name in item.__slots__}


def _plain(item: Any) -> Any:
    return [_plain(part) for part in item] if isinstance(item, tuple) else item


def _step_to_json(priced: PricedStep) -> dict[str, Any]:
    step = priced.step
    return {
        "axes": list(step.axes),
        "from": format_spec((step.a,)),
        "to": format_spec((step.b,)),
        **({"by": step.by} if step.by else {}),
        "seconds": priced.seconds,
        "traffic": [[t.kind, list(t.axes), t.bytes, t.backward] for t in priced.traffic],
    }


def checked_json(plan: PlanData) -> dict[str, Any]:
    """The same, of a plan that is to be written.  Raises PlanError where no one could read it."""
    data = plan_to_json(plan)
    _check_fields(data)
    check_plan(plan, operators=False)
    return data


def plan_from_json(data: object) -> PlanData:
    """Inverse of `plan_to_json`.  Raises PlanError naming the field that is wrong."""
    _check_fields(data)
    try:
        plan = _read_plan(data)
    except schema.Mismatch:
        raise
    except ValueError as error:
        raise PlanError(f"plan field `graph`: {error}") from error
    check_plan(plan)
    return plan


def _check_fields(data: object) -> None:
    found = data.get("schema") if isinstance(data, dict) else None
    family, _, number = VERSION.partition("/")
    if found != VERSION and re.fullmatch(rf"{re.escape(family)}/\d{{1,6}}", str(found)):
        raise PlanError(
            f"the plan is of format {str(found).rpartition('/')[2]}, which another version of"
            f" Shardwright wrote; this one reads format {number}: plan the model again"
        )
    try:
        schema.check(PLAN, data, "plan")
    except schema.Mismatch as error:
        raise PlanError(str(error)) from error


def _read_plan(data: Any) -> PlanData:
    """The plan in data that has been checked field by field."""
    search, moving, spared = data["search"], data["moving"], data.get("spared", {})
    return PlanData(
        request=_made(Request, data["request"], pins=tuple(data["request"]["pins"])),
        graph=graph_from_json(data["graph"]),
        mesh=Mesh(_rows(data["mesh"])),
        decisions=Decisions(
            {name: tuple(choices) for name, choices in data["choices"].items()},
            _read_specs(data["specs"]),
            _read_specs(data["outputs"]),
            {
                name: Home(parse_spec(home["spec"]), home["late"])
                for name, home in data["homes"].items()
            },
            data["recompute"],
            data["order"],
            data.get("kept_layers", 0),
            data.get("part_layers", 0),
        ),
        paths={
            (row["value"], parse_spec(row["from"]), parse_spec(row["to"])): _read_steps(row)
            for row in data["conversions"]
        },
        work={
            name: _read_work(row, moving.get(name), spared.get(name, (0.0, 0.0)))
            for name, row in data["work"].items()
        },
        seconds=data["seconds"],
        optimizer_s=data["optimizer_s"],
        casts_s=data["casts_s"],
        memory=_made(Memory, data["memory"]),
        baselines=tuple(
            _made(Baseline, row, spent=_rows(row["spent"]), whole=tuple(row.get("whole", ())))
            for row in data["baselines"]
        ),
        search=_made(Search, search, seconds=_rows(search["seconds"])),
        notes=tuple(data["notes"]),
        decode=data["decode"] and _read_plan(data["decode"]),
        recached=tuple(_read_recache(row) for row in data["recached"]),
        pipeline=_read_pipeline(data["pipeline"]) if "pipeline" in data else None,
    )


def _read_pipeline(data: Any) -> Pipeline:
    stages = [
        _made(
            PlannedStage,
            row,
            first=_rows(row["first"]),
            taken=tuple(row["taken"]),
            given=tuple(row["given"]),
        )
        for row in data["stages"]
    ]
    kinds = tuple(map(_read_plan, data["kinds"]))
    return Pipeline(data["schedule"], data["ranks"], data["bubble"], tuple(stages), kinds)


def _made(kind: type[_T], data: Mapping[str, Any], **others: Any) -> _T:
    """A dataclass of the fields in `data`, but for `others`."""
    fields: dict[str, Any] = {**data, **others}
    return kind(**fields)


def _rows(rows: Any) -> tuple[Any, ...]:
    return tuple(tuple(row) for row in rows)


def _read_specs(specs: dict[str, str]) -> dict[str, Spec]:
    return {name: parse_spec(spec) for name, spec in specs.items()}


def _read_work(row: Any, moving: Any, spared: Any) -> Work:
    """Seconds of a node; `moving` has those of its own collectives, where it runs any, `spared`
    those that a second run goes without."""
    forward, backward = row
    forward_moving, backward_moving, axes = moving or (0.0, 0.0, ())
    return Work(forward, backward, forward_moving, backward_moving, tuple(axes), *spared)


def _spared(work: Mapping[str, Work]) -> dict[str, Any]:
    """What second runs go without, where they do."""
    rows = {name: [w.spared_s, w.spared_moving_s] for name, w in work.items() if w.spared_s}
    return {"spared": rows} if rows else {}


def _read_recache(row: Any) -> Recache:
    ends = {name: parse_spec(row[name]) for name in ("source", "target")}
    return _made(Recache, row, **ends, steps=_read_steps(row))


def _read_steps(row: Any) -> tuple[PricedStep, ...]:
    return tuple(
        PricedStep(
            Step(
                tuple(step["axes"]),
                parse_state(step["from"]),
                parse_state(step["to"]),
                step.get("by", ""),
            ),
            step["seconds"],
            tuple(Traffic(kind, tuple(axes), n, back) for kind, axes, n, back in step["traffic"]),
        )
        for step in row["steps"]
    )


def read_plan(path: Path) -> PlanData:
    """The plan in `path`, a plan.json or a folder with one."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        data = read_json(path)
    except DataError as error:
        raise PlanError(f"{error}; give the folder of a plan") from error
    return plan_from_json(data)


__all__ = ["checked_json", "plan_from_json", "plan_to_json", "read_plan"]
