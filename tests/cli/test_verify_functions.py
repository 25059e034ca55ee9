"""Functions of the user's own: planned by their rules, verified against their own backward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .test_strangers import as_sent_by_another

if TYPE_CHECKING:
    from .conftest import Run

SMALL = "--gpus 2 --cluster cpu --mesh tp=2 --batch 2 --seq 4 --out out".split()
TP = ["--pin", "up.weight=S0", "--pin", "down.weight=S1"]
# `Shift` subtracts a row's mean, so that no element is by itself
MODEL = """
import shardwright
import torch
from torch import nn

print("model file runs")

class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, grad):
        return grad

class Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

class BackwardAlone(Straight):
    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(-1, keepdim=True)

RULE

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.down(FUNCTION.apply(self.up(x)))

def build_model():
    return Net()

def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 16)}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_model(function: str, rule: str) -> None:
    declared = f'shardwright.rule({function}, "{rule}")' if rule else ""
    Path("model.py").write_text(MODEL.replace("FUNCTION", function).replace("RULE", declared))


@pytest.mark.parametrize(
    "function, rule, code",
    [
        pytest.param("Straight", "", 0, marks=pytest.mark.slow),
        ("Straight", "... -> ...", 0),
        pytest.param("Shift", "b s [h] -> b s [h]", 0, marks=pytest.mark.slow),
        ("Shift", "b s h -> b s h", 1),
        ("BackwardAlone", "b s h -> b s h", 1),
    ],
)
@pytest.mark.some(1)
def test_rules_are_tried_against_one_process(run: Run, function: str, rule: str, code: int) -> None:
    write_model(function, rule)
    ran = run("model.py", *SMALL, *TP)
    assert ran.code == 0, ran.err
    said = rf"`{function}` \(model.py:\d+\) has no sharding rule and runs replicated, until"
    assert bool(re.search(said, ran.out)) == (not rule), ran.out
    assert bool(re.search(rf"{function} +tp: ", ran.out)) == (rule[-1:] in ("h", ".")), ran.out
    text = Path("out/sharded_model.py").read_text()
    line = f'{function} = ops.import_user("{Path("model.py").resolve()}", "{function}")'
    assert line in text.splitlines() and f"{function}.apply(" in text
    verified = run("verify", "out")
    assert verified.code == code, verified.out + verified.err
    assert verified.out.startswith("FAIL" if code else "PASS")
    assert "Net itself from model.py" in verified.out


@pytest.mark.slow
def test_a_strangers_plan_imports_no_function(run: Run) -> None:
    write_model("Straight", "... -> ...")
    assert run("model.py", *SMALL).code == 0
    as_sent_by_another()
    other = run("verify", "out")
    assert other.code == 2 and "plan was not written here by you: nothing is run" in other.err
    assert "model file runs" not in other.out + other.err
    assert run("show", "out").code == 0
    alone = run("rehearse", "out", "--steps", "1")
    assert alone.code == 2 and "plan was not written here by you: nothing is run" in alone.err
    asked = run("verify", "out", "--model", "model.py")
    assert asked.code == 0 and "model file runs" in asked.err
    rehearsed = run("rehearse", "out", "--steps", "1", "--model", "model.py")
    assert rehearsed.code in (0, 1) and rehearsed.out.startswith("Rank 0 of "), rehearsed.err


CHANGES = [
    ('"... -> ..."', '"... -> ... h"', "rule `... -> ... h` has `h` in a result alone"),
    ('"... -> ..."', '"b s -> b s"', "has 2 dims for a tensor of 3"),
    ('"... -> ..."', "3", "`sharding_rule` must be a text"),
    ('"function", "Straight"', '"function", "os.system; x"', "must be the name of a class"),
    ('"function", "Straight"', '"function", 3', "must be the name of a class"),
    ('"saves", [', '"saves", [7', "`saves` is none"),
    ('"in_tuple", false', '"in_tuple", 2', "`in_tuple` is none"),
    ('"kept_bytes", 0', '"kept_bytes", -1', "`kept_bytes` is none"),
    ('"kept_bytes", 0', '"kept", 0', "`kept_bytes` is none"),
]


def test_a_plan_that_was_changed_is_refused(run: Run) -> None:
    write_model("Straight", "... -> ...")
    assert run("model.py", *SMALL).code == 0
    text = re.sub(r",\s+", ", ", Path("out/plan.json").read_text())
    for old, new, said in CHANGES:
        assert old in text
        Path("out/plan.json").write_text(text.replace(old, new))
        for command in ("show", "verify"):
            ran = run(command, "out")
            assert ran.code == 2 and said in ran.err, (new, ran.out + ran.err)


PACKAGE = {
    "__init__.py": "",
    "steps.py": "STEPS = 4",
    "ops.py": """
import torch

import shardwright
from .steps import STEPS

class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * STEPS).round() / STEPS

    @staticmethod
    def backward(ctx, grad):
        return grad

@torch.library.custom_op("NAME::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, grad: 3 * grad)
shardwright.rule(double, "... -> ...")
""",
}
CALLER = """
import torch
from torch import nn
from NAME.ops import Straight, double

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.down(double(Straight.apply(self.up(x))))

def build_model():
    return Net()

def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 16)}
"""


@pytest.mark.parametrize("lies", ["beside", "installed"])
@pytest.mark.some(1)
def test_a_package_is_imported(run: Run, lies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name where every process finds it, else by the path of its file."""
    name = f"package_{lies}"
    folder = Path("." if lies == "beside" else "site").resolve() / name
    folder.mkdir(parents=True)
    for file, text in PACKAGE.items():
        (folder / file).write_text(text.replace("NAME", name))
    if lies == "installed":
        monkeypatch.syspath_prepend(str(folder.parent))
    Path("model.py").write_text(CALLER.replace("NAME", name))
    ran = run("model.py", *SMALL, *TP)
    assert ran.code == 0, ran.err
    assert "`Straight` (" in ran.out and f"`{name}.double.default` (" not in ran.out
    place = f"{name}.ops" if lies == "installed" else str(folder / "ops.py")
    lines = Path("out/sharded_model.py").read_text().splitlines()
    assert f'Straight = ops.import_user("{place}", "Straight")' in lines
    assert f'ops.import_user("{place}")' in lines
    assert run("verify", "out").out.startswith("PASS")
    as_sent_by_another()
    other = run("verify", "out", "--model", "model.py")
    assert other.code == 2 and f"would import {place}" in other.err
