"""A plan as JSON and back.  A plan file is data: nothing in it is ever executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...facts.collectives import find_collective
from ...facts.files import DataError, read_json
from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.spec import Spec, format_spec, parse_spec
from ...facts.traffic import Traffic
from ...ir.graph import Graph
from ...ir.graph.names import check_names
from ...ir.graph.serialize import graph_from_json, graph_to_json
from ...ir.ops.registry import rule_of
from ...ir.ops.users import check_arguments
from ..errors import PlanError
from ..strategies.build import Decisions
from ..strategies.conversion import Step
from ..strategies.pricing import Work
from .plan import Baseline, Memory, PlanData, Recache, Request, Search
from .program import PricedStep

SCHEMA = "shardwright.plan/1"
_WORDS = ("phase", "dtype", "optimizer")  # fields that stand as they are in a generated module
_PLAIN: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


def plan_to_json(plan: PlanData) -> dict[str, Any]:
    """The plan as plain JSON data, with its schema version."""
    d = plan.decisions
    return {
        "schema": SCHEMA,
        "request": _fields(plan.request),
        "mesh": [[name, size] for name, size in plan.mesh.axes],
        "seconds": plan.seconds,
        "optimizer_s": plan.optimizer_s,
        "memory": _fields(plan.memory),
        "baselines": [_fields(b) for b in plan.baselines],
        "search": {**_fields(plan.search), "seconds": [list(row) for row in plan.search.seconds]},
        "notes": list(plan.notes),
        "choices": {name: list(choices) for name, choices in d.choices.items()},
        "specs": {name: format_spec(spec) for name, spec in d.specs.items()},
        "outputs": {name: format_spec(spec) for name, spec in d.outputs.items()},
        "recompute": d.recompute,
        "order": d.order,
        "work": {name: [w.forward_s, w.backward_s] for name, w in plan.work.items()},
        "moving": {
            name: [w.forward_moving_s, w.backward_moving_s, list(w.axes)]
            for name, w in plan.work.items()
            if w.axes
        },
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
    }


def _recache_to_json(recache: Recache) -> dict[str, Any]:
    return {
        **_fields(recache),
        "source": format_spec(recache.source),
        "target": format_spec(recache.target),
        "steps": [_step_to_json(step) for step in recache.steps],
    }


def _fields(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}


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


def plan_from_json(data: object) -> PlanData:
    """Inverse of `plan_to_json`.  Raises PlanError naming the field that is wrong."""
    reader = _Reader(data, "plan")
    schema = reader.get("schema", str)
    if schema != SCHEMA:
        raise PlanError(f"plan field `schema` is `{schema}`; this version reads `{SCHEMA}`")
    try:
        graph = graph_from_json(reader.get("graph", dict))
        check_names(graph)
    except ValueError as error:
        raise PlanError(f"plan field `graph`: {error}") from error
    axes = reader.rows("mesh", str, int)
    decisions = _decisions(reader)
    _check_choices(graph, decisions)
    search = reader.child("search")
    return PlanData(
        request=_request(reader),
        graph=graph,
        mesh=_mesh(axes),
        decisions=decisions,
        paths=dict(_path(row) for row in reader.children("conversions")),
        work={name: _work(reader, name) for name in reader.get("work", dict)},
        seconds=reader.get("seconds", float),
        optimizer_s=reader.get("optimizer_s", float),
        memory=reader.build("memory", Memory),
        baselines=tuple(row.make(Baseline) for row in reader.children("baselines")),
        search=Search(
            search.get("solver", str),
            search.get("status", str),
            search.get("gap", float),
            search.get("meshes", int),
            search.rows("seconds", str, float),
        ),
        notes=reader.many("notes", str),
        decode=None if reader.is_null("decode") else plan_from_json(reader.get("decode", dict)),
        recached=tuple(_recache(row) for row in reader.children("recached")),
    )


def _request(reader: _Reader) -> Request:
    request: Request = reader.build("request", Request)
    try:
        find_phase(request.phase)
    except ValueError as error:
        raise PlanError(f"plan field `request.phase`: {error}") from error
    return request


def _work(reader: _Reader, name: str) -> Work:
    """Seconds of a node; `moving` has those of its own collectives, where it runs any."""
    forward, backward = reader.row("work", name, float, float)
    if name not in reader.get("moving", dict):
        return Work(forward, backward)
    *moving, axes = reader.row("moving", name, float, float, list)
    if not all(type(axis) is int for axis in axes):
        raise PlanError(f"plan field `moving.{name}` must end with a list of mesh axes")
    return Work(forward, backward, moving[0], moving[1], tuple(axes))


def _mesh(axes: tuple[tuple[str, int], ...]) -> Mesh:
    try:
        return Mesh(axes)
    except ValueError as error:
        raise PlanError(f"plan field `mesh`: {error}") from error


def _decisions(reader: _Reader) -> Decisions:
    rows = reader.child("choices")
    choices = {name: rows.many(name, str) for name in reader.get("choices", dict)}
    recompute, order = reader.get("recompute", bool), reader.get("order", str)
    if order not in ("contiguous", "zigzag"):
        raise PlanError(f"plan field `order` is `{order}`; expected contiguous or zigzag")
    return Decisions(choices, reader.specs("specs"), reader.specs("outputs"), recompute, order)


def _check_choices(graph: Graph, decisions: Decisions) -> None:
    for node in graph.nodes:
        try:
            check_arguments(node)
            known = rule_of(node).choices()
        except ValueError as error:
            raise PlanError(f"plan field `graph`: node {node.name}: {error}") from error
        if not set(decisions.choices.get(node.name, ("",))) <= set(known):
            raise PlanError(
                f"plan field `choices.{node.name}` must have, per mesh axis, one of "
                f"{', '.join(known)}"
            )


def _path(row: _Reader) -> tuple[tuple[str, Spec, Spec], tuple[PricedStep, ...]]:
    return (row.get("value", str), row.spec("from"), row.spec("to")), _steps(row)


def _recache(row: _Reader) -> Recache:
    return Recache(
        row.get("name", str),
        row.get("node", str),
        row.get("count", int),
        row.spec("source"),
        row.spec("target"),
        _steps(row),
        row.get("seconds", float),
    )


def _steps(row: _Reader) -> tuple[PricedStep, ...]:
    steps: list[PricedStep] = []
    for step in row.children("steps"):
        by = step.collective(step.get("by", str)) if step.has("by") else ""
        traffic = tuple(
            Traffic(step.collective(kind), tuple(axes), n, back)
            for kind, axes, n, back in step.rows("traffic", str, list, int, bool)
        )
        a, b = step.spec("from")[0], step.spec("to")[0]
        axes = step.many("axes", int)
        steps.append(PricedStep(Step(axes, a, b, by), step.get("seconds", float), traffic))
    return tuple(steps)


class _Reader:
    """Reads fields of a JSON object; every complaint names the field by its path."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise PlanError(f"`{where}` must be a JSON object, got {type(data).__name__}")
        self._data: Mapping[str, Any] = data
        self._where = where

    def get(self, name: str, kind: type) -> Any:
        """The field `name`, which must be of `kind` (an int will do for a float)."""
        if name not in self._data:
            raise PlanError(f"`{self._where}` has no field `{name}`")
        return self._checked(self._data[name], kind, f"{self._where}.{name}")

    def _checked(self, value: Any, kind: type, where: str) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise PlanError(f"`{where}` must be {kind.__name__}, got {type(value).__name__}")
        if isinstance(value, str) and not value.isprintable():
            raise PlanError(f"`{where}` must be one line of text, got {value[:40]!r}")
        return value

    def has(self, name: str) -> bool:
        """Is there a field `name`?"""
        return name in self._data

    def collective(self, name: str) -> str:
        """`name`, which must be that of a collective."""
        try:
            return find_collective(name).name
        except ValueError as error:
            raise PlanError(f"`{self._where}`: {error}") from error

    def is_null(self, name: str) -> bool:
        """Is the field `name` null?"""
        return self._data.get(name, 0) is None

    def many(self, name: str, kind: type) -> tuple[Any, ...]:
        """The list in field `name`, its items of `kind`."""
        where = f"{self._where}.{name}"
        items = enumerate(self.get(name, list))
        return tuple(self._checked(item, kind, f"{where}[{i}]") for i, item in items)

    def child(self, name: str) -> _Reader:
        """The object in field `name`."""
        return _Reader(self.get(name, dict), f"{self._where}.{name}")

    def children(self, name: str) -> list[_Reader]:
        """The objects of the list in field `name`."""
        rows = self.get(name, list)
        return [_Reader(row, f"{self._where}.{name}[{i}]") for i, row in enumerate(rows)]

    def rows(self, name: str, *kinds: type) -> tuple[tuple[Any, ...], ...]:
        """The lists in field `name`, each with one item of each of `kinds`."""
        rows = enumerate(self.get(name, list))
        return tuple(self._row(row, f"{self._where}.{name}[{i}]", kinds) for i, row in rows)

    def row(self, name: str, key: str, *kinds: type) -> tuple[Any, ...]:
        """The list under `key` of the object in field `name`, with one item of each of `kinds`."""
        return self._row(self.get(name, dict)[key], f"{self._where}.{name}.{key}", kinds)

    def _row(self, row: Any, where: str, kinds: tuple[type, ...]) -> tuple[Any, ...]:
        if not isinstance(row, list) or len(row) != len(kinds):
            raise PlanError(f"`{where}` must be a list of {len(kinds)} items")
        pairs = zip(row, kinds, strict=True)
        return tuple(self._checked(item, kind, where) for item, kind in pairs)

    def spec(self, name: str) -> Spec:
        """The spec in field `name`."""
        try:
            return parse_spec(self.get(name, str))
        except ValueError as error:
            raise PlanError(f"`{self._where}.{name}`: {error}") from error

    def specs(self, name: str) -> dict[str, Spec]:
        """The object of specs in field `name`."""
        child = self.child(name)
        return {key: child.spec(key) for key in child._data}

    def make(self, kind: type[Any]) -> Any:
        """A flat dataclass from this object's fields of the same names."""
        return kind(**{item.name: self._field(item.name, str(item.type)) for item in fields(kind)})

    def _field(self, name: str, annotation: str) -> Any:
        """The field of a dataclass: `annotation` is its type as the source has it."""
        if annotation.endswith(" | None") and self._data.get(name, 0) is None:
            return None
        if annotation == "tuple[str, ...]":
            return self.many(name, str)
        if annotation == "tuple[tuple[str, float], ...]":
            return self.rows(name, str, float)
        value = self.get(name, _PLAIN[annotation.removesuffix(" | None")])
        if isinstance(value, str) and name in _WORDS and not value.isidentifier():
            raise PlanError(f"`{self._where}.{name}` must be one word, got {value[:40]!r}")
        if isinstance(value, str) and '"""' in value:  # it would end the module's docstring
            raise PlanError(f"`{self._where}.{name}` may not hold three quotes")
        return value

    def build(self, name: str, kind: type[Any]) -> Any:
        """The flat dataclass in field `name`."""
        return self.child(name).make(kind)


def read_plan(path: Path) -> PlanData:
    """The plan in `path`, a plan.json or a folder with one."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        data = read_json(path)
    except DataError as error:
        raise PlanError(f"{error}; give the folder of a plan") from error
    return plan_from_json(data)
