"""No text of a plan file becomes code of the generated module."""

from __future__ import annotations

import ast
import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright import plan
from shardwright.codegen.write import module_source
from shardwright.planner.errors import PlanError
from shardwright.planner.plan.store import plan_from_json, plan_to_json, read_plan

HOSTILE = ('x"""); import os #', "x\nimport os", "__class__")


class Decoder(nn.Module):
    """Two blocks, and an op without a rule whose arguments are `from` and `to`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + position_ids[..., None]
        for block in self.blocks:
            x = block(x)
        shift = torch.ops.aten.special_i1.default(self.head.weight)
        return F.linear(x, self.head.weight + shift)


class Block(nn.Module):
    """Attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + mixed.transpose(1, 2).reshape(b, t, 8)


def saved(phase: str) -> Any:
    """A plan as JSON."""
    with torch.device("meta"):
        ids = torch.zeros(4, 8, dtype=torch.long)
        made = plan(
            Decoder(),
            {"input_ids": ids, "position_ids": ids},
            gpus=2,
            cluster="cpu",
            phase=phase,
            mesh="2",
        )
    return json.loads(json.dumps(plan_to_json(made)))


def strings(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where strings stand in JSON data."""
    items: Any = data.items() if isinstance(data, dict) else enumerate(data)
    for key, item in items:
        if isinstance(item, str):
            yield (*path, key)
        elif isinstance(item, (dict, list)):
            yield from strings(item, (*path, key))


def places(data: Any) -> list[tuple[Any, ...]]:
    """One place of each kind: of the items of a list, and of what is kept by nodes, the first."""
    kinds: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for path in strings(data):
        named = path[0] in ("choices", "specs", "outputs")
        loc = [path[i + 1] for i, key in enumerate(path) if key == "loc"]
        fields = [key for key in path if isinstance(key, str)]
        kinds.setdefault((fields[0],) if named else (*fields, *loc), path)
    return list(kinds.values())


def replaced(data: Any, path: tuple[Any, ...], text: str) -> Any:
    """`data` with `text` at `path`, the rest shared."""
    if not path:
        return text
    changed = copy.copy(data)
    changed[path[0]] = replaced(data[path[0]], path[1:], text)
    return changed


def code(source: str) -> str:
    """The module's syntax without strings and without what variables are called."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
            bound = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
            bound |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
            for name in names:
                name.id = "variable" if name.id in bound else name.id
    return ast.dump(tree)


def parts(source: str) -> Counter[str]:
    """What the module's syntax is made of but for statements: names of values decide what nests."""
    found = Counter[str]()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=str() as name):
                found[f".{name}"] += 1
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.alias(name=name):
                found[f"def {name}"] += 1
            case ast.Constant(value=value) if not isinstance(value, str):
                found[repr(value)] += 1
            case ast.Call() | ast.BinOp() | ast.Import() | ast.ImportFrom():
                found[type(node).__name__] += 1
            case _:
                pass
    return found


@pytest.mark.parametrize("phase", ["train", pytest.param("serve", marks=pytest.mark.slow)])
def test_every_string_of_a_plan_is_refused_or_changes_no_code(phase: str) -> None:
    data = saved(phase)
    source = module_source(plan_from_json(data))
    assert "torch.ops.aten.special_i1.default(" in source
    refused: set[tuple[Any, ...]] = set()
    for path in places(data):
        for text in HOSTILE:
            try:
                read = plan_from_json(replaced(data, path, text))
            except PlanError:
                refused.add(path)
                continue
            same = parts(module_source(read)) == parts(source)
            if "loc" not in path and "calls" not in path:
                same = same and code(module_source(read)) == code(source)
            assert same, (path, text)
    assert len(refused) > len(places(data)) / 2


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000])
def test_a_file_that_no_reader_can_take_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="is not (valid )?JSON"):
        read_plan(tmp_path)
