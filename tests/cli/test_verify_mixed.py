"""A model with some parameters in a format of their own is planned and verified as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import shardwright
from shardwright import loading
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
        x = x * torch.erfinv(torch.tensor(0.7, dtype=torch.float32)).to(x)  # as Gemma 3n has one
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
    ("bfloat16", "own", torch.bfloat16, torch.float32),
    ("float64", "own", torch.float64, torch.float32),
    ("bfloat16", "float32", torch.float32, torch.float32),
    ("float32", "bfloat16", torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(("built", "asked", "main", "own"), CASES)
def test_a_dtype_is_that_of_every_parameter(
    tmp_path: Path, built: str, asked: str, main: torch.dtype, own: torch.dtype
) -> None:
    path = tmp_path / "mixed.py"
    path.write_text(MIXED.replace("MAIN", built))
    loaded = load_target(str(path), batch=2, seq=4, phase="train", formats=asked)
    state = {name: tensor.dtype for name, tensor in loaded.model.state_dict().items()}
    assert formats(state) == ({own}, {main})
    assert loaded.rebuild is not None
    again = {name: tensor.dtype for name, tensor in loaded.rebuild().state_dict().items()}
    assert again == state


@pytest.mark.parametrize(("built", "asked", "main", "own"), CASES[:3])
@pytest.mark.some(1)
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
    words = f"--gpus 2 --mesh 2 --cluster cpu --dtype {asked} --batch 4 --seq 16 --out out"
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
        x = x.to(self.up.weight)
        pairs = torch.view_as_complex(self.up(x).float().unflatten(-1, (-1, 2)))
        return self.down(torch.view_as_real(pairs * self.turns[: x.shape[1]]).flatten(2).to(x))

def build_model():
    torch.manual_seed(0)
    return Turned()

def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 16)}
"""


def broken(model: nn.Module, formats: str) -> nn.Module:
    """A cast that takes real parts of complex numbers."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.real.to(getattr(torch, formats))
    return model


def dropped(model: nn.Module, formats: str) -> nn.Module:
    """A cast that casts nothing."""
    return model


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize(
    ("cast", "persistent", "said"),
    [
        (broken, True, "`turns` is torch.complex64, and torch.bfloat16 in the plan"),
        (broken, False, "TOO LARGE"),
        (dropped, True, "`up.weight` is torch.bfloat16, and torch.float32 in the plan"),
    ],
)
@pytest.mark.some(1)
def test_the_reference_does_not_share_a_mistake_of_the_cast(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cast: Callable[[nn.Module, str], nn.Module],
    persistent: bool,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("turned.py").write_text(TURNED.replace("PERSISTENT", str(persistent)))
    monkeypatch.setattr(loading, "in_formats", cast)
    words = "--gpus 2 --cluster cpu --dtype bfloat16 --batch 4 --seq 16 --out out"
    assert run("turned.py", *words.split()).code == 0
    ran = run("verify", "out")
    assert ran.code == 1 and ran.out.startswith("FAIL: ") and said in ran.out, ran.out + ran.err


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.some(1)
def test_complex_tables_are_those_of_the_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, persistent: bool
) -> None:
    """A table without its imaginary part would be 0.5 off in outputs and gradients."""
    monkeypatch.chdir(tmp_path)
    Path("turned.py").write_text(TURNED.replace("PERSISTENT", str(persistent)))
    words = "--gpus 2 --cluster cpu --batch 4 --seq 16 --out out"
    ran = run("turned.py", *words.split())
    assert ran.code == 0, ran.err
    ran = run("verify", "out")
    assert ran.code == 0 and ran.out.startswith("PASS: "), ran.out + ran.err
    assert "Turned itself from turned.py, float64" in ran.out


CASTING = """
class Casting(Mixed):
    def forward(self, tokens, labels):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            return super().forward(tokens, labels)

def build_model():
    return Casting()
"""


def test_a_model_that_turns_autocast_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("casting.py").write_text(MIXED + CASTING)
    ran = run(*"casting.py --gpus 2 --cluster cpu --batch 4 --seq 16 --out out".split())
    assert ran.code == 0, ran.err
    text = Path("out/sharded_model.py").read_text()
    assert "weight.to(torch.bfloat16)" in text and "Param((50, 32), torch.float32" in text
    ran = run("verify", "out")
    assert ran.code == 0 and ran.out.startswith("PASS: "), ran.out + ran.err


QUANTISED = """import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(8, 8, dtype=torch.KIND), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(8, 1))

    def forward(self, x):
        return x @ (self.codes.float() * self.scale)

def build_model():
    return Scaled()

def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 8)}
"""


@pytest.mark.parametrize("kind", ["int8", "uint8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("words", ["", " --dtype float32"])
def test_quantised_weights_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scaled.py").write_text(QUANTISED.replace("KIND", kind))
    ran = run(*f"scaled.py --gpus 2 --cluster cpu{words}".split())
    assert ran.code == 2 and f"`codes` of Scaled is stored as {kind}, and" in ran.err


LLAMA = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64MORE}"""


@pytest.mark.parametrize(
    ("more", "words", "dtype"),
    [
        ("", "", torch.float32),
        (', "torch_dtype": "bfloat16"', "", torch.bfloat16),
        (', "dtype": "float16"', "", torch.float16),
        (', "dtype": "float16"', " --dtype float64", torch.float64),
    ],
)
@pytest.mark.some(2)
def test_a_configuration_has_its_own_dtype(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, words: str, dtype: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(LLAMA.replace("MORE", more))
    ran = run(*f"config.json --gpus 2 --cluster cpu --seq 8 --out out{words}".split())
    assert ran.code == 0, ran.err
    state = state_of(shardwright.load_plan("out").graph)
    assert {value.type.dtype for value in state.values()} == {dtype}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (', "quantization_config": {"quant_method": "fp8"}', "`quantization_config` ('fp8'"),
        (', "torch_dtype": "float8_e4m3fn"', "has the dtype torch.float8_e4m3fn"),
        (', "torch_dtype": "int8"', "has the dtype torch.int8"),
        (', "torch_dtype": "auto"', "transformers cannot read this config"),
    ],
)
def test_configurations_of_quantised_weights_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(LLAMA.replace("MORE", more))
    ran = run(*"config.json --gpus 2 --cluster cpu --seq 8".split())
    assert ran.code == 2 and said in ran.err, ran.err
