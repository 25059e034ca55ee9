"""A model with some parameters in a format of their own is planned and verified as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import shardwright
from shardwright.ir.reference.shrink import state_of
from shardwright.loading import load_target

if TYPE_CHECKING:
    from .conftest import Run

# A router and a norm in float32, which compute in float32, in a model of another format.  Positions
# are divided as whole numbers, which gives the default format.
MIXED = """import torch
from torch import Tensor, nn
from torch.nn import functional as F

class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight).to(x)

class Router(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, width))
        self.register_buffer("bias", torch.zeros(8))

    def forward(self, x):
        return torch.sigmoid(F.linear(x.type(torch.float32), self.weight) + self.bias)

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.router = Norm(width), Router(width)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(8 * width, width)

    def forward(self, x):
        h = self.norm(x)
        gates = self.router(h).to(h).repeat_interleave(h.shape[-1], -1)
        return x + self.down(F.silu(self.up(h)) * gates)

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor, labels: Tensor | None = None):
        x = self.table(tokens)
        x = x + (torch.arange(tokens.shape[1])[:, None] / 7).to(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

def build_model():
    model = Mixed().to(torch.MAIN)
    for block in model.blocks:
        block.norm.float()
        block.router.float()
    return model

def example_inputs(batch, seq):
    tokens = torch.randint(0, 50, (batch, seq))
    return {"tokens": tokens, "labels": tokens}
"""

OWN = {"norm.weight", "router.weight", "router.bias"}


def formats(state: dict[str, torch.dtype]) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Formats of the router and the norms, and of all else."""
    own = {name for name in state if any(name.endswith(end) for end in OWN)}
    assert len(own) == 6 and len(state) == 17
    return {state[name] for name in own}, {
        dtype for name, dtype in state.items() if name not in own
    }


CASES = [
    ("bfloat16", "bfloat16", torch.bfloat16, torch.float32),
    ("float64", "float64", torch.float64, torch.float32),
    ("bfloat16", "float32", torch.float32, torch.float32),
    ("float64", "bfloat16", torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("built", "asked", "main", "own"), CASES)
def test_dtype_is_that_of_most_parameters(
    tmp_path: Path, built: str, asked: str, main: torch.dtype, own: torch.dtype
) -> None:
    path = tmp_path / "mixed.py"
    path.write_text(MIXED.replace("MAIN", built))
    loaded = load_target(str(path), batch=2, seq=4, phase="train", dtype=asked)
    state = {name: tensor.dtype for name, tensor in loaded.model.state_dict().items()}
    assert formats(state) == ({own}, {main})
    assert loaded.rebuild is not None
    again = {name: tensor.dtype for name, tensor in loaded.rebuild().state_dict().items()}
    assert again == state


@pytest.mark.parametrize(("built", "asked", "main", "own"), CASES[:3])
def test_planned_and_verified_as_it_is(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    built: str,
    asked: str,
    main: torch.dtype,
    own: torch.dtype,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mixed.py").write_text(MIXED.replace("MAIN", built))
    words = f"--gpus 2 --cluster cpu --dtype {asked} --batch 4 --seq 16 --out out"
    ran = run("mixed.py", *words.split())
    assert ran.code == 0, ran.err
    graph = shardwright.load_plan("out").graph
    state = {name: value.type.dtype for name, value in state_of(graph).items()}
    assert formats(state) == ({own}, {main})
    ran = run("verify", "out")
    assert ran.code == 0 and ran.out.startswith("PASS: "), ran.out + ran.err
    assert "Mixed itself from mixed.py, float64" in ran.out
    errors = [float(e) for e in re.findall(r"(?:loss|outputs|gradients) +(\S+)  ", ran.out)]
    assert len(errors) == 6 and max(errors) < 1e-9, ran.out


TURNED = """import torch
from torch import nn

class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("turns", torch.polar(torch.ones(16, 8), torch.rand(16, 8)), PERSISTENT)

    def forward(self, x):
        pairs = torch.view_as_complex(self.up(x).float().unflatten(-1, (-1, 2)))
        return self.down(torch.view_as_real(pairs * self.turns[: x.shape[1]]).flatten(2).to(x))

def build_model():
    torch.manual_seed(0)
    return Turned()

def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 16).to(next(build_model().parameters()).dtype)}
"""


@pytest.mark.parametrize("persistent", [True, False])
def test_complex_tables_are_those_of_the_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, persistent: bool
) -> None:
    """A table without its imaginary part would be 0.5 off in outputs and gradients."""
    monkeypatch.chdir(tmp_path)
    Path("turned.py").write_text(TURNED.replace("PERSISTENT", str(persistent)))
    words = "--gpus 2 --cluster cpu --dtype float32 --batch 4 --seq 16 --out out"
    ran = run("turned.py", *words.split())
    assert ran.code == 0, ran.err
    ran = run("verify", "out")
    assert ran.code == 0 and ran.out.startswith("PASS: "), ran.out + ran.err
    assert "Turned itself from turned.py, float64" in ran.out
