"""`plan verify`: what passes, what is shrunk, and that a wrong module is caught."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Ran, Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


TINY = """import torch
from torch import nn
from torch.nn import functional as F

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(128, 32)

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        return {"logits": x @ self.table.weight.t()}

def build_model():
    return Tiny()

def example_inputs(batch, seq):
    return {"tokens": torch.randint(0, 50, (batch, seq))}
"""


def planned(run: Run, target: str, words: str) -> None:
    """A plan of an example (or of the tiny model) in the folder `out`."""
    Path("tiny.py").write_text(TINY)
    path = target if target == "tiny.py" else str(ROOT / "examples" / target)
    arguments = [path, "--out", "out", *words.split()]
    ran = run(*arguments)
    assert ran.code == 0, ran.err


def passed(ran: Ran, *said: str) -> None:
    assert ran.code == 0 and ran.out.startswith("PASS: "), ran.out + ran.err
    for text in said:
        assert text in ran.out, ran.out
    errors = [float(e) for e in re.findall(r"(?:loss|outputs|gradients) +(\S+)  ", ran.out)]
    assert len(errors) >= 2 and max(errors) < 1e-9, ran.out


@pytest.mark.slow
def test_fused_projections_in_parts(run: Run) -> None:
    """By the file itself, and smaller; a part's slice that is taken from elsewhere is caught."""
    pin = "--pin blocks.*.attention.qkv.weight_*=S0"
    planned(run, "gpt.py", f"{SMALL} --mesh tp=2 {pin}")
    path = Path("out/sharded_model.py")
    text = path.read_text()
    assert "self.qkv.weight_q" in text and "Part(" in text
    passed(run("verify", "out"), "GPT itself from")

    path.write_text(re.sub(r'(qkv.weight", 0, )512', r"\g<1>511", text))
    ran = run("verify", "out")
    assert ran.code == 1 and "the parts before it end at 512" in ran.out, ran.out

    path.write_text(text)
    planned(run, "configs/gpt2", "--gpus 8 --mesh 8 --batch 1 --pin *.c_attn.weight_*=R")
    passed(run("verify", "out"), "on 2 ranks", "layers of ", "parameter dims ")


PHI3 = """{"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072,
"intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
"num_key_value_heads": 8, "vocab_size": 32064, "pad_token_id": 32000}"""


@pytest.mark.slow
def test_parts_of_unequal_size_are_shrunk(run: Run) -> None:
    Path("phi3").mkdir()
    Path("phi3/config.json").write_text(PHI3)
    ran = run(*"phi3 --gpus 8 --mesh 8 --batch 1 --seq 4096 --out out".split())
    assert ran.code == 0 and "qkv_proj.weight_key_states" in ran.out, ran.out + ran.err
    passed(run("verify", "out"), "on 2 ranks", "(planned: ", "layers of ")


SMALL = "--cluster cpu --dtype float32 --batch 4 --seq 16 --gpus 2"

NESTED = """
class Nested(Tiny):
    def forward(self, batch, scale, return_dict=True):
        out = super().forward(batch["tokens"])
        return out if return_dict else out["logits"] * scale

def build_model():
    return Nested()

def example_inputs(batch, seq):
    return {"tokens": torch.randint(0, 50, (batch, seq))}, 2.0, False
"""


@pytest.mark.slow
def test_inputs_in_a_dict_and_numbers_beside_them(run: Run) -> None:
    """By the file itself, beside the original; smaller; and after the file has changed."""
    Path("nested.py").write_text(TINY + NESTED)
    words = f"{SMALL.replace('--gpus 2', '--gpus 4')} --mesh 4 --out out"
    ran = run("nested.py", *words.split())
    assert ran.code == 0, ran.err
    passed(run("verify", "out"), "Nested itself from nested.py, float64")
    passed(run("verify", "out", "--ranks", "2"), "Nested on 2 ranks")

    Path("nested.py").write_text(TINY + NESTED.replace("2.0", "3.0"))
    ran = run("verify", "out")
    assert ran.code == 2 and "has other example inputs than when it was planned" in ran.err

    ran = run("nested.py", *words.split(), "--phase", "decode")
    assert ran.code == 2 and "no keyword `position_ids`" in ran.err


@pytest.mark.long
def test_the_file_itself_beside_the_original_and_a_broken_one(run: Run) -> None:
    planned(run, "tiny.py", SMALL + " --mesh tp=2")
    passed(
        run("verify", "out"),
        "module      out/sharded_model.py\n",
        "Tiny itself from tiny.py, float64",
    )

    path = Path("out/sharded_model.py")
    good = path.read_text()
    broken = re.sub(r"F\.gelu\((\w+)", r"1.001 * F.gelu(\1", good, count=1)
    assert broken != good
    path.write_text(broken)
    ran = run("verify", "out")
    assert ran.code == 1 and ran.out.startswith("FAIL: "), ran.out
    assert "TOO LARGE" in ran.out and "differs from what the plan generates" in ran.out

    path.write_text(good + "\n1 / 0\n")
    ran = run("verify", "out")
    assert ran.code == 1 and "the module did not run" in ran.out and "ZeroDivision" in ran.out

    path.unlink()
    ran = run("verify", "out")
    assert ran.code == 2 and "there is no module `out/sharded_model.py`" in ran.err


def test_a_dropped_collective_is_caught(run: Run) -> None:
    pin = "--mesh tp=2 --pin layers.*.mlp.up_proj.weight=S0 --pin layers.*.mlp.up_proj=S2"
    planned(run, "llama.py", f"{SMALL} {pin}")
    path = Path("out/sharded_model.py")
    good = path.read_text()
    pattern = r"tp\.(all_reduce|reduce_scatter|all_gather)\((\w+)[^()]*\)"
    broken, count = re.subn(pattern, r"\2", good, count=1)
    assert count == 1, good
    path.write_text(broken)
    ran = run("verify", "out")
    assert ran.code == 1 and ran.out.startswith("FAIL: "), ran.out


@pytest.mark.parametrize(
    "config, words",
    [
        ("gpt2", "--gpus 8 --mesh 2x4 --batch 16 --seq 1024"),
        ("llama3-8b", "--gpus 16 --mesh 4x4 --batch 16 --seq 4096"),
    ],
)
@pytest.mark.slow
def test_large_models_are_shrunk(config: str, words: str, run: Run) -> None:
    planned(run, f"configs/{config}", words)
    ran = run("verify", "out")
    passed(ran, "on 4 ranks", "(planned: ", "layers of ", "sequence ")
    path = Path("out/sharded_model.py")
    path.write_text(path.read_text().replace("all_reduce", "copy", 1) + "\n")
    ran = run("verify", "out")
    assert ran.code == 1 and "only a plan can be run smaller" in ran.out


def test_fewer_ranks(run: Run) -> None:
    planned(run, "tiny.py", SMALL.replace("--gpus 2", "--gpus 4 --mesh dp=2,tp=2"))
    passed(run("verify", "out", "--ranks", "2"), " on 2 ranks", "(planned: ", "Tiny itself")
    ran = run("verify", "out", "--ranks", "3")
    assert ran.code == 2 and "possible numbers of ranks are 1, 2, 4" in ran.err


DRAWN = """from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Batch:
    images: list

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(256, 512)
        self.down = nn.Linear(512, 256)

    def forward(self, batch, scale):
        x = batch.images[0] * scale
        keep = (torch.rand(len(x), 1, 1, device=x.device) > 0.5).to(x.dtype)
        return x + keep * self.down(torch.relu(self.up(x)))

def build_model():
    return Net()

def example_inputs(batch, seq):
    return Batch([torch.zeros(batch, seq, 256)]), 0.5
"""


def test_draws_of_a_model_whose_inputs_lie_in_a_batch(run: Run) -> None:
    """Ranks that cut the batch draw on their own; the draws are replayed in the original."""
    Path("drawn.py").write_text(DRAWN)
    words = "--gpus 2 --cluster h100 --dtype float32 --batch 64 --seq 64 --mesh dp=2"
    ran = run("drawn.py", "--out", "out", *words.split())
    assert ran.code == 0 and "mesh dp=2" in ran.out and "names and sizes alone" not in ran.out
    passed(run("verify", "out"), "Net itself from drawn.py")


COUNTED = """
class Counted(Tiny):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def forward(self, tokens):
        x = self.norm(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return {"logits": self.down(F.gelu(self.up(x)))}

def build_model():
    return Counted()
"""


@pytest.mark.long
def test_changed_buffers_are_compared(run: Run) -> None:
    Path("counted.py").write_text(TINY + COUNTED)
    ran = run("counted.py", "--out", "out", *SMALL.split(), "--mesh", "dp=2")
    assert ran.code == 0 and "changes 3 buffers" in ran.out, ran.out + ran.err
    passed(run("verify", "out"), "Counted itself from counted.py, float64", "    buffers ")

    path = Path("out/sharded_model.py")
    text = path.read_text()
    broken = re.sub(r"(\* |\()0\.9\b", r"\g<1>0.8", text)
    assert broken != text
    path.write_text(broken)
    ran = run("verify", "out")
    assert ran.code == 1, ran.out
    assert re.search(r"buffers +\S+ +\('updated buffer', 'norm.running_\w+'\) +TOO LARGE", ran.out)


IMAGES = """import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.project = nn.Linear(12, 32)

    def forward(self, tokens, images):
        places = tokens == 49
        if not torch.compiler.is_compiling() and places.sum() != images.shape[0] * images.shape[1]:
            raise ValueError("places and images do not match")
        x = self.table(tokens).masked_scatter(places[..., None], self.project(images).flatten(0, 1))
        return self.head(torch.tanh(x))

def build_model():
    return Net()

def example_inputs(batch, seq):
    tokens = torch.randint(0, 49, (batch, seq))
    tokens[:, 1:4] = 49
    return {"tokens": tokens, "images": torch.randn(batch, 3, 12)}
"""


def test_inputs_of_its_own_where_a_model_refuses_others(run: Run) -> None:
    Path("images.py").write_text(IMAGES)
    words = "images.py --gpus 2 --cluster cpu --batch 8 --seq 8 --mesh 2 --pin project.weight=S0"
    ran = run(*words.split(), "--micro-batches", "2", "--out", "out")
    assert ran.code == 0, ran.err
    assert ".masked_scatter(" in Path("out/sharded_model.py").read_text()
    passed(run("verify", "out"), "Net itself from images.py, on example inputs of its own")


FED = (
    TINY[: TINY.index("class Tiny")]
    + """class Fed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).tanh())

def build_model():
    return Fed()

def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 8, requires_grad=True)}
"""
)


def test_gradients_of_inputs_are_compared(run: Run) -> None:
    Path("fed.py").write_text(FED)
    ran = run("fed.py", "--out", "out", *SMALL.split(), "--layout", "tp=2")
    assert ran.code == 0, ran.err
    passed(run("verify", "out"), "Fed itself from fed.py")
    path = Path("out/sharded_model.py")
    broken = path.read_text().replace("tp.copy(x)", "tp.copy(x).detach() + 0 * x")
    assert broken != path.read_text()
    path.write_text(broken)
    ran = run("verify", "out")
    assert ran.code == 1, ran.out
    assert re.search(r"gradients +\S+ +input x +TOO LARGE", ran.out), ran.out
