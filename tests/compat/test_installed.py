"""What `compat` uses, and the versions installed lack: a list, also where nothing runs.

The files are read, not imported: a name that is gone would end every test that imports it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.proxy import TracerBase

from .test_private_names import COMPAT, LIBRARIES, files, imported, private_attributes

# how whole names begin in the files, and what that stands for
_ROOTS = {"torch": "torch", "_aten": "torch.ops.aten"}


def missing(text: str, owners: dict[str, object]) -> list[str]:
    """What a file uses of torch and transformers and does not find.

    Imports, keywords of calls of what is imported, and private attributes: those of modules by
    their whole names, others in `owners`, which has an object for each.
    """
    tree = ast.parse(text)
    lost = [name for _, name in imported(tree) if _is_library(name) and _find(name) is None]
    lost += [name for name in _keywords(tree) if name not in lost]
    for node, attribute in private_attributes(tree):
        name = _whole_name(node)
        if name:
            lost += [] if _find(name) is not None else [name]
        elif attribute not in owners:
            lost.append(f"{attribute}, of which the test has no owner")
        elif not hasattr(owners[attribute], attribute):
            lost.append(f"{type(owners[attribute]).__name__}.{attribute}")
    return sorted(set(lost))


def _is_library(name: str) -> bool:
    return name.split(".")[0] in LIBRARIES


def _find(name: str) -> Any:
    """The module or what is in it; None if there is none."""
    owner, _, last = name.rpartition(".")
    if not owner or owner.startswith("torch.ops"):
        return import_module(name) if not owner else _operator(name)
    found = getattr(_find(owner), last, None)
    try:
        return import_module(name) if found is None else found
    except ImportError:
        return None


def _operator(name: str) -> Any:
    """`torch.ops.aten.relu`: no module, although it looks like one."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def _whole_name(node: ast.expr) -> str:
    """`torch._C._thing` for what is reached from torch; "" for attributes of other objects."""
    name = ast.unparse(node)
    root, dot, rest = name.partition(".")
    return f"{_ROOTS[root]}{dot}{rest}" if root in _ROOTS else ""


def _keywords(tree: ast.AST) -> Iterator[str]:
    """Keywords that functions which are imported do not take by name."""
    functions = {name.rpartition(".")[2]: name for _, name in imported(tree) if _is_library(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = functions.get(node.func.id, "")
            function = _find(name) if name else None
            taken = inspect.signature(function).parameters if function is not None else {}
            lost = [word.arg for word in node.keywords if word.arg and word.arg not in taken]
            yield from (f"{name}({word}=)" for word in lost if function is not None)


def _one(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_torch_has_all_of_it() -> None:
    x = torch.zeros(1)
    mesh = torch.distributed.device_mesh.DeviceMesh
    one = torch.library.custom_op("shardwright_tests::one", _one, mutates_args=())
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 (stubs do not know it)
    owners: dict[str, object] = {
        "_autograd": torch._C,
        "_backward_hooks": x,
        "_backward_pre_hooks": nn.Module(),
        "_buffers": nn.Module(),
        "_cdata": x.untyped_storage(),
        "_filter_traceback_frames": TracerBase,
        "_flatten": mesh,
        "_forward_hooks": nn.Module(),
        "_forward_pre_hooks": nn.Module(),
        "_global_backward_hooks": nn.modules.module,
        "_global_backward_pre_hooks": nn.modules.module,
        "_init_fn": one,
        "_non_persistent_buffers_set": nn.Module(),
        "_parameters": nn.Module(),
        "_post_accumulate_grad_hooks": x,
        "_qualname": one,
        "_record_forward_stack_traces_only": TracerBase,
        "_schema": torch.ops.aten.relu.default,
        "_top_saved_tensors_default_hooks": autograd,
        "_version": x,
    }
    assert missing((COMPAT / "torch.py").read_text(), owners) == []


def test_transformers_has_all_of_it() -> None:
    hf = pytest.importorskip("transformers")
    mixtral = import_module("transformers.models.mixtral.modeling_mixtral")
    config = hf.MixtralConfig(
        hidden_size=8, intermediate_size=8, num_local_experts=2, num_hidden_layers=1
    )
    experts = mixtral.MixtralExperts(config)
    owners: dict[str, object] = {
        "_apply_gate": experts,
        "_attn_implementation_internal": config,
        "_can_set_attn_implementation": hf.PreTrainedModel,
        "_experts_implementation_internal": config,
        "_from_config": hf.PreTrainedModel,
    }
    text = (COMPAT / "transformers.py").read_text()
    assert missing(text, owners) == []
    assert [name for name in owners if name not in text or not hasattr(owners[name], name)] == []

    from shardwright.compat import transformers as compat

    assert compat.is_experts(experts) and not compat.is_experts(nn.Linear(1, 1))
    assert import_module(compat.WRAPPERS)
    masks = import_module("transformers.masking_utils")
    assert [
        f"{name}: {variable}"
        for name, variables in compat.MASK_FUNCTIONS.items()
        for variable in variables or ("",)
        if variable and variable not in getattr(masks, name).__code__.co_cellvars
    ] == []


def test_operators_with_private_names_are_there() -> None:
    names = {
        name for file in files() for name in re.findall(r'"(aten\._\w+\.\w+)"', file.read_text())
    }
    assert len(names) > 3
    assert sorted(name for name in names if _operator(f"torch.ops.{name}") is None) == []


def test_what_is_missing_is_listed() -> None:
    text = """\
import torch
from torch._gone import thing
from torch._ops import OpOverload, that
from torch.utils.checkpoint import checkpoint
def f(x):
    checkpoint(f, x, use_reentrant=False)
    checkpoint(f, x, also=1)
    torch._C._went(), _aten._left, _aten._softmax
    x._version, x._off, x._elsewhere
"""
    assert missing(text, {"_version": torch.zeros(1), "_off": torch.zeros(1)}) == [
        "Tensor._off",
        "_elsewhere, of which the test has no owner",
        "torch._C._went",
        "torch._gone.thing",
        "torch._ops.that",
        "torch.ops.aten._left",
        "torch.utils.checkpoint.checkpoint(also=)",
    ]
