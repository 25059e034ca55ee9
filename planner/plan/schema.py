"""The JSON form of a plan, as `store` writes it: what each field may be.

`plan schema` prints it as JSON Schema.  What must fit together is in `check`.
"""

from __future__ import annotations

import re
from typing import Any

from ...costmodel.memory import OPTIMIZERS
from ...facts.collectives import COLLECTIVES
from ...facts.mesh import MOST_RANKS, can_be_axis
from ...facts.phases import PHASES
from ...facts.schedules import FORWARD, SCHEDULES
from ...facts.schema import (
    Either,
    Flag,
    ListOf,
    Named,
    Null,
    Number,
    OneOf,
    Record,
    Row,
    Shape,
    Table,
    Text,
    Whole,
    nesting,
    published,
)
from ...ir.graph.schema import DTYPES, GRAPH, LINE
from .plan import MIXED, OUTPUT_LAYOUTS

VERSION = "shardwright.plan/3"  # a new one whenever an older file can't be read
ORDERS = ("contiguous", "zigzag")
PRECISIONS = ("own", MIXED)

_AXIS = Whole(0, 2)
_LAYERS = Whole(0, 2**31)
_AXES = ListOf(_AXIS, 3)
_SIZE = Whole(0, 2**62)
_SECONDS = Number(0, 1e15)
_TIME = Number(1e-18, 1e15)  # seconds that something takes
_BYTES = Number(0, 2.0**63)
_STATE = Text("a sharding state: R, P, V or S0, S1, ...", r"[RPV]|S[0-9]{1,2}", str.isascii)
_SPEC = Text("a spec such as S0,R", r"(?:[RPV]|S[0-9]{1,2})(?:,(?:[RPV]|S[0-9]{1,2})){0,2}")
_QUOTED = Text("one line of text without three quotes", "", lambda text: '"""' not in text)
_COLLECTIVE = OneOf(COLLECTIVES)

_REQUEST = Record(
    {
        "target": _QUOTED,
        "gpus": Whole(1, MOST_RANKS),
        "cluster": _QUOTED,
        "phase": OneOf(PHASES),
        "batch": Whole(1, 2**31),
        "seq": Whole(1, 2**40),
        "dtype": OneOf(("own", *DTYPES)),
        "optimizer": OneOf(OPTIMIZERS),
        "memory_bytes": Number(1, 2.0**63),
        "pins": ListOf(LINE),
        "context": Whole(0, 2**40),
        "output_tokens": Whole(0, 2**40),
        "expert_imbalance": Number(0, 2.0**31),
        "output_layout": OneOf(OUTPUT_LAYOUTS),
        "precision": OneOf(PRECISIONS),
        "reduce_dtype": OneOf(("own", *DTYPES)),
        "micro_batches": Whole(1, 2**31),
    },
    optional={"layout": LINE, "schedule": LINE},
)
_MEMORY = Record(
    {
        name: _BYTES
        for name in (
            "parameters", "gradients", "optimizer", "activations", "transient", "cache",
        )
    }
)  # fmt: skip
_SPENT = ListOf(Row(LINE, _SECONDS))
_BASELINE = Record(
    {
        "name": LINE,
        "mesh": LINE,
        "seconds": Either(Null(), _TIME),
        "peak_bytes": _BYTES,
        "spent": _SPENT,
    },
    optional={
        "recompute": Flag(),
        "whole": ListOf(LINE),
        "refused": LINE,
        "kept_layers": _LAYERS,
        "part_layers": _LAYERS,
    },
)
_SEARCH = Record(
    {
        "solver": LINE,
        "status": LINE,
        "gap": Number(0),
        "meshes": Whole(1, 2**31),
        "seconds": _SPENT,
    }
)
_STEP = Named(
    "step",
    Record(
        {
            "axes": _AXES,
            "from": _STATE,
            "to": _STATE,
            "seconds": _SECONDS,
            "traffic": ListOf(Row(_COLLECTIVE, _AXES, _SIZE, Flag()), 4),
        },
        optional={"by": _COLLECTIVE},
    ),
)
_STEPS = ListOf(_STEP, 64)
_RECACHED = Record(
    {
        "name": LINE,
        "node": LINE,
        "count": Whole(1, 2**14),
        "source": _SPEC,
        "target": _SPEC,
        "steps": _STEPS,
        "seconds": _SECONDS,
    }
)
_CONVERSION = Record({"value": LINE, "from": _SPEC, "to": _SPEC, "steps": _STEPS})
_SPECS = Table(LINE, _SPEC)
_HOME = Record({"spec": _SPEC, "late": Flag()})
_MESH = ListOf(Row(Text("a name for an axis", "", can_be_axis), Whole(1, MOST_RANKS)), 4)
_NAMES = ListOf(Text("a name", "", str.isidentifier))
_STAGE = Record(
    {
        "kind": Whole(0, 2**14),
        "layers": Whole(1, 2**14),
        "first": ListOf(Row(LINE, Whole(0, 2**14))),
        "taken": _NAMES,
        "given": _NAMES,
        **dict.fromkeys(("forward_s", "backward_s", "once_s", "send_s", "send_back_s"), _SECONDS),
    }
)


def _pipeline(plan: Shape) -> Shape:
    return Record(
        {
            "schedule": OneOf((*SCHEDULES, FORWARD)),
            "ranks": Whole(2, MOST_RANKS),
            "bubble": Number(0, 1),
            "stages": ListOf(_STAGE, 2**14),
            "kinds": ListOf(plan, 2**14),
        }
    )


def _plan(decode: Shape, stage: Shape | None) -> Shape:
    return Record(
        {
            "schema": Text(f"`{VERSION}`, which this version reads", re.escape(VERSION)),
            "request": _REQUEST,
            "mesh": _MESH,
            "seconds": _TIME,
            "optimizer_s": _SECONDS,
            "casts_s": _SECONDS,
            "memory": _MEMORY,
            "baselines": ListOf(_BASELINE),
            "search": _SEARCH,
            "notes": ListOf(Text("one line of text")),
            "choices": Table(LINE, ListOf(LINE, 3)),
            "specs": _SPECS,
            "outputs": _SPECS,
            "homes": Table(LINE, _HOME),
            "recompute": Flag(),
            "order": OneOf(ORDERS),
            "work": Table(LINE, Row(_SECONDS, _SECONDS)),
            "moving": Table(LINE, Row(_SECONDS, _SECONDS, _AXES)),
            "conversions": ListOf(_CONVERSION),
            "graph": GRAPH,
            "decode": decode,
            "recached": ListOf(_RECACHED),
        },
        optional={
            "spared": Table(LINE, Row(_SECONDS, _SECONDS)),
            "kept_layers": _LAYERS,
            "part_layers": _LAYERS,
            "module_sha256": Text("64 hexadecimal digits", "[0-9a-f]{64}"),
            **({} if stage is None else {"pipeline": _pipeline(stage)}),
        },
    )


PLAN = nesting("plan", _plan(Null(), None), lambda inner: _plan(Either(Null(), inner), inner), 2)


def json_schema() -> dict[str, Any]:
    """The schema of plan.json, as JSON Schema."""
    return published(PLAN, VERSION)


__all__ = ["PLAN", "VERSION", "json_schema"]
