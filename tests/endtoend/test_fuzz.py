"""Files from strangers, with one value in them replaced by another that was not meant there.

Whatever stands there, the tool ends soon, in its own words, and no text becomes code.
`SHARDWRIGHT_FUZZ=10000` sets how many values are tried.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright import runtime
from shardwright.api import Plan, plan_file
from shardwright.costmodel.machines.cluster import built_in_text, load_cluster
from shardwright.facts.files import DataError
from shardwright.facts.moves import MOVES
from shardwright.ir.capture.huggingface import from_config
from shardwright.planner.errors import PlanError
from shardwright.planner.ilp.solve import solve
from shardwright.planner.iopddl import format_solution, problem_from_json
from shardwright.planner.plan.store import plan_from_json
from shardwright.terminal import printable

ROOT = Path(__file__).resolve().parents[2]
TRIES = int(os.environ.get("SHARDWRIGHT_FUZZ", "8"))
TEXTS = (
    'x"""); import os #', "x\nimport os", "__class__", "a'b", 'a"b', "\\", "", "\u202e", "\x1b[2J",
    "\r", "os.system", "x" * 5000, "9" * 30, "S0", "V", "P", "P0", "S9", "S0,R,R,R", "../../x",
    "/dev/zero", "aten.from_file.default", "prim.x.y", "class", "self", "torch", "None", "\ud800",
    "é", "²", "S²", "float64", "complex64", "decode", "train", "zigzag", "dp=1", "shardwright.moe",
    "aten.add.Tensor", "a.b.c.d", "{x}", "%s", "#", "]",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 7, 16, 1000, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63),
    1e308, -1e308, 5e-324, 0.5, -0.0, 1e16, True, False,
)  # fmt: skip
OTHERS = (None, [], {}, [[]], {"value": "x"})
PATIENCE_S = 5.0

tried = settings(
    max_examples=TRIES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where strings, numbers, flags and nulls stand in JSON data."""
    for key, item in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(item, (dict, list)):
            yield from leaves(item, (*path, key))
        else:
            yield (*path, key)


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """What stands at `path`."""
    for key in path:
        data = data[key]
    return data


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`data` with `value` at `path`, the rest shared."""
    if not path:
        return value
    changed = copy.copy(data)
    changed[path[0]] = replaced(data[path[0]], path[1:], value)
    return changed


@st.composite
def changes(draw: st.DrawFn, honest: list[Any]) -> tuple[int, tuple[Any, ...], Any]:
    """Which of these files, where in it, and what to put there."""
    number = draw(st.integers(0, len(honest) - 1))
    data = honest[number]
    places = list(leaves(data))
    path = places[draw(st.integers(0, len(places) - 1))]
    own = st.integers(0, len(places) - 1).map(lambda place: at(data, places[place]))
    free = st.text(max_size=20) if isinstance(at(data, path), str) else st.floats(width=64)
    known = [st.sampled_from(values) for values in (TEXTS, NUMBERS, OTHERS)]
    return number, path, draw(st.one_of(*known, own, free))


def ends_well(act: Any, *errors: type[Exception]) -> Any:
    """What `act` gives, or None for one of these errors; soon, and in words that can be printed."""
    started = time.process_time()
    try:
        return act()
    except errors as error:
        assert "\n" not in str(error) and str(error), error
        assert all(c.isprintable() for c in printable(str(error)))
        return None
    finally:
        assert time.process_time() - started < PATIENCE_S


# --- plans ---------------------------------------------------------------------------------------


@cache
def plans() -> list[Any]:
    """Plans of training and serving, of dense models and one with experts."""
    common: dict[str, Any] = dict(
        gpus=4, cluster="cpu", batch=4, seq=32, dtype="float32", memory_bytes=None, pins=(),
        solver="highs", time_limit_s=60.0,
    )  # fmt: skip
    asked = [
        ("llama", dict(phase="train", mesh="2x2", optimizer="adamw")),
        ("moe", dict(phase="train", mesh="2x2", optimizer="sgd")),
        ("encoder_decoder", dict(phase="train", mesh="4", optimizer="adamw")),
        ("llama", dict(phase="serve", mesh="2x2", optimizer="none")),
    ]
    made = [plan_file(str(ROOT / f"examples/{name}.py"), **common, **rest) for name, rest in asked]
    return [json.loads(json.dumps(plan.to_json())) for plan in made]


@cache
def vocabulary() -> frozenset[str]:
    """What modules of honest plans are made of, and what the runtime has for others."""
    held = (runtime, runtime.ops, runtime.ShardedModule)
    own = {name for each in held for name in dir(each) if not name.startswith("_")}
    moves = {str(name) for name in MOVES.values()} | {"copy", "shard", "partial", "own_gradient"}

    own |= {"Block"}  # a layer whose class has no name that could be one
    own |= {"bool", "complex", "float", "int", "len", "max", "min", "range", "tuple"}
    return frozenset().union(own, moves, *(words(made.module_source()) for made in loaded()))


def loaded() -> list[Plan]:
    """The honest plans."""
    return [Plan.of(plan_from_json(data)) for data in plans()]


def words(source: str) -> set[str]:
    """Kinds of nodes, what is imported, names that nothing binds, and private attributes.

    Public attributes and keywords are those of torch and the runtime: `codegen.allowed` holds them.
    """
    tree = ast.parse(source)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    found = {name.id for name in names} - bound
    for node in ast.walk(tree):
        found.add(type(node).__name__)
        match node:
            case ast.Attribute(attr=name) if name.startswith("_"):
                found.add(name)
            case ast.alias(name=name):
                found.add(name)
            case _:
                pass
    return found


@pytest.mark.long
@tried
@given(data=st.data())
def test_plans(data: st.DataObject) -> None:
    number, path, value = data.draw(changes(plans()))
    changed = replaced(plans()[number], path, value)

    def run() -> tuple[str, str]:
        plan = Plan.of(plan_from_json(json.loads(json.dumps(changed))))
        plan.check()
        plan.dump("plan")
        plan.launch_command("module.py")
        source = plan.module_source()
        source.encode()
        return str(plan), source

    result = ends_well(run, PlanError, ValueError)
    if result is not None:
        new = {word.rstrip("0123456789") for word in words(result[1])}  # `MLP2`: a second class
        new -= {word.rstrip("0123456789") for word in vocabulary()}
        known = {part for path in leaves(changed) for part in names(at(changed, path))}
        known |= {f"Decoding{name}" for name in known}  # classes of a second program
        assert not new - known
        assert not {"os", "system", "import_module", "from_file"} & new


def names(item: Any) -> list[str]:
    """Parts of a dotted name, which a parameter or a module that is held may have."""
    parts = item.split(".") if isinstance(item, str) else []
    return [part.rstrip("0123456789") for part in parts]


# --- cluster files and problems ------------------------------------------------------------------


@tried
@given(data=st.data())
def test_clusters(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    honest = [tomllib.loads(built_in_text(name)) for name in ("h100", "l40s", "cpu")]
    number, path, value = data.draw(changes(honest))
    file = tmp_path_factory.getbasetemp() / "mine.toml"
    try:
        file.write_text(toml(replaced(honest[number], path, value)), encoding="utf-8")
    except UnicodeEncodeError:
        return
    ends_well(lambda: str(load_cluster(file, 8)), ValueError)


def toml(table: Any, prefix: str = "") -> str:
    """A table as TOML, the tables in it after its values."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines = [f"{json.dumps(k)} = {json.dumps(v, ensure_ascii=False)}" for k, v in plain.items()]
    lines = [line for line in lines if not line.endswith("null")]
    for key, inner in table.items():
        if isinstance(inner, dict):
            lines += [f"[{prefix}{json.dumps(key)}]", toml(inner, f"{prefix}{json.dumps(key)}.")]
    return "\n".join(lines)


# --- configurations of Hugging Face models -------------------------------------------------------

CONFIGS: list[Any] = [
    {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                            "original_max_position_embeddings": 32},
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "dtype": "float32", "bos_token_id": 1, "attention_bias": False, "initializer_range": 0.02,
    },
    {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
        "router_aux_loss_coef": 0.001, "output_router_logits": False, "rope_theta": 1e4,
    },
    {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8, "final_logit_softcapping": None,
    },
]  # fmt: skip


@tried
@given(data=st.data())
def test_configs(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Built on the meta device, or refused in a sentence."""
    number, path, value = data.draw(changes(CONFIGS))
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(replaced(CONFIGS[number], path, value)))

    def run() -> None:
        with torch.device("meta"):
            from_config(folder, dtype=torch.float32)

    ends_well(run, ValueError)


PROBLEM = {
    "problem": {
        "name": "p",
        "nodes": {
            "intervals": [[0, 2], [1, 3], [2, 4]],
            "costs": [[1, 2], [3, 4, 5], [6, 7]],
            "usages": [[5, 4], [3, 2, 1], [2, 1]],
            "names": ["a", "b", "c"],
        },
        "edges": {"nodes": [[0, 1], [1, 2]], "costs": [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]},
        "usage_limit": 9,
    }
}


@tried
@given(data=st.data())
def test_problems(data: st.DataObject) -> None:
    _, path, value = data.draw(changes([PROBLEM]))
    content = replaced(PROBLEM, path, value)

    def run() -> str:
        problem = problem_from_json(json.loads(json.dumps(content)))
        return format_solution(problem, solve(problem, time_limit_s=2.0), "highs", 0.0)

    ends_well(run, ValueError, DataError)


@pytest.mark.parametrize(
    ("op", "name", "value", "says"),
    [
        ("aten.arange.default", "dtype", -1, "`dtype` is no dtype"),  # torch would crash
        ("aten.arange.default", "device", "cpu", "`device` is not for a plan to say"),
        ("shardwright.cached_attention", "cache", 0, "`cache` must be identifiers and numbers"),
    ],
)
def test_arguments_that_torch_does_not_look_at(op: str, name: str, value: Any, says: str) -> None:
    for data in plans():
        for path in leaves(data):
            at_op = path[-1] == "op" and at(data, path) == op
            names = [arg[0] for arg in at(data, path[:-1])["args"]] if at_op else []
            if name in names:
                place = (*path[:-1], "args", names.index(name), 1)
                with pytest.raises(PlanError, match=says):
                    plan_from_json(replaced(data, place, value))
                return
    raise AssertionError(f"no plan has {op}")


def test_what_has_no_gradient_has_no_summands_of_one() -> None:
    with pytest.raises(PlanError, match="`specs.source`: V is for what has a gradient"):
        plan_from_json(replaced(plans()[2], ("specs", "source"), "V"))
