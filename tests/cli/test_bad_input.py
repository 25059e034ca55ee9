"""Bad input: exit code 2 (1 where no plan fits), one sentence that helps, nothing written.

The real planner behind the real command line, in this process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from shardwright.runtime import RankError, run_ranks
from shardwright.trusted import import_source

if TYPE_CHECKING:
    from .conftest import Ran, Run

NET = """import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        {line}
        return self.down(torch.relu(self.up(x)))

"""
BUILD = """
def build_model():
    return Net()
"""
INPUTS = """
def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 16)}
"""
FORWARD = NET.format(line="pass")
OPTIONS = (
    "--cluster cpu --dtype float32 --batch 4 --seq 8 --optimizer none --out folder/out".split()
)


def refused(run: Run, *arguments: str, code: int = 2) -> str:
    """Run `plan` on what is refused: its one sentence, after checking that all else is right."""
    before = snapshot()
    ran = run(*arguments)
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert snapshot() == before
    said = [line for line in ran.err.splitlines() if not progress(line)]
    assert len(said) == 1, ran.err
    return said[0]


def progress(line: str) -> bool:
    """Is this what is being done, not what went wrong?"""
    words = line.removeprefix("plan: ")
    doing = (
        "load PyTorch",
        "build the model",
        "capture",
        "solving",
        "pricing",
        "write",
        "run both",
    )
    return line.startswith("plan: ") and words.startswith(doing)


def snapshot() -> dict[str, bytes | None]:
    """Every file and folder here, with the files' contents."""
    paths = [p for p in Path().rglob("*") if "__pycache__" not in p.parts]
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in an empty folder."""
    monkeypatch.chdir(tmp_path)


def model(text: str) -> str:
    """A model file with this text."""
    Path("model.py").write_text(text)
    return "model.py"


def planned(run: Run, gpus: int = 2) -> Ran:
    """A good plan in folder/out."""
    ran = run(model(FORWARD + BUILD + INPUTS), "--gpus", str(gpus), *OPTIONS)
    assert ran.code == 0, ran.err
    return ran


# --- the model file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        (FORWARD + INPUTS, "model.py does not define `build_model`; it must define `build_model()"),
        (FORWARD + INPUTS, "It defines: example_inputs"),
        (FORWARD + BUILD, "model.py does not define `example_inputs`"),
        (
            FORWARD + "def build_model():\n    return Net(8 // 0)\n" + INPUTS,
            "model.py:15: `build_model` failed: ZeroDivisionError: integer division",
        ),
        (
            FORWARD + "def build_model():\n    Net()\n" + INPUTS,
            "`build_model` must return an nn.Module, got NoneType",
        ),
        (
            FORWARD + "def build_model(size):\n    return Net(size)\n" + INPUTS,
            "`build_model` failed: TypeError: build_model() missing 1 required",
        ),
        ("def build_model(:\n", "model.py: importing the file failed: SyntaxError: invalid syntax"),
        (
            "import nosuchmodule\n",
            "model.py:1: importing the file failed: ModuleNotFoundError: No module named 'nosuchm",
        ),
    ],
)
def test_build_model(text: str, said: str, run: Run) -> None:
    assert said in refused(run, model(text), "--gpus", "2", *OPTIONS)


@pytest.mark.parametrize(
    "inputs, said",
    [
        ('{"y": torch.randn(batch, seq, 16)}', "Net.forward takes no `y`; it takes `x`"),
        ("{}", "Net.forward needs `x`, which is not among the inputs"),
        (
            "torch.randn(batch, seq, 16)",
            "the inputs are a Tensor; give forward's arguments as a dict",
        ),
        ('{"x": {batch}}', "does not fit: input `x` is a set, not a tensor; inputs may also be"),
        ('{"x": torch.randn(batch, 0 // 0)}', "`example_inputs` failed: ZeroDivisionError"),
        (
            '{"x": torch.randn(batch, seq, 15)}',
            "model.py:12: Net cannot be traced: RuntimeError: a and b must have same reduction dim",
        ),
    ],
)
def test_example_inputs(inputs: str, said: str, run: Run) -> None:
    text = f"def example_inputs(batch, seq):\n    return {inputs}\n"
    assert said in refused(run, model(FORWARD + BUILD + text), "--gpus", "2", *OPTIONS)


@pytest.mark.parametrize(
    "line, said",
    [
        ("x = x * x.mean().item()", "model.py:11: a number that depends on the data is read out"),
        ("x = -x if x.sum() > 0 else x", "model.py:11: Net decides by the values of a tensor"),
        ("x = x[torch.nonzero(x > 0)[0]]", "model.py:11: `aten.nonzero.default` returns a tensor"),
        ("x = torch.from_numpy(x.numpy())", "model.py:11: Net cannot be traced: RuntimeError"),
    ],
)
def test_what_export_refuses_names_the_line(line: str, said: str, run: Run) -> None:
    text = NET.format(line=line) + BUILD + INPUTS
    assert said in refused(run, model(text), "--gpus", "2", *OPTIONS)


@pytest.mark.parametrize(
    "target, content, said",
    [
        ("nowhere.py", None, "`nowhere.py` does not exist; give the path of the Python file"),
        ("notes.txt", "", "`notes.txt` is not a model: give a Python file"),
        ("config.json", "{not json", "`config.json` is not JSON: line 1: "),
        ("config.json", '{"model_type": "unheard"}', "transformers cannot read this config"),
    ],
)
def test_models_that_are_none(target: str, content: str | None, said: str, run: Run) -> None:
    if content is not None:
        Path(target).write_text(content)
    assert said in refused(run, target, "--gpus", "2", *OPTIONS)


# --- meshes, sizes, pins, clusters, memory ------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        ("--gpus 2 --mesh 2x4", "--mesh 2x4 has 8 GPUs, --gpus says 2; they must agree"),
        ("--gpus 2 --mesh twoxfour", "expected sizes such as 2x4, or dp=2,tp=4"),
        ("--gpus 2 --mesh 1x1x1x2", "a mesh has one to three axes"),
        ("--gpus 4 --mesh dp=2,dp=2", "mesh axis names must be distinct identifiers"),
        ("--gpus 2 --cluster h10", "unknown cluster `h10`; did you mean `h100`?"),
        ("--gpus 2 --cluster mine.toml", "cluster file: cannot read `mine.toml`"),
        ("--gpus 2 --pin up.weight=R", "--pin needs --mesh"),
        ("--gpus 2 --mesh 2 --pin up.wait=R", "--pin up.wait: no parameter or module has such"),
        ("--gpus 2 --mesh 2 --pin up.weight=Q", "`Q` is not a sharding state"),
        ("--gpus 2 --mesh 2 --pin up.weight=S0,R", "2 states for a mesh of 1 axes"),
        (
            "--gpus 2 --mesh 2 --pin up.weight=S2",
            "`up.weight` of shape [64, 16] cannot be kept so on a mesh of 2: it has no dim 2",
        ),
        (
            "--gpus 9 --mesh 3x3 --pin up.weight=S0,S0",
            "on a mesh of 3 x 3: 9 ranks do not divide its dim 0 of size 64",
        ),
    ],
)
def test_options(words: str, said: str, run: Run) -> None:
    target = model(FORWARD + BUILD + INPUTS)
    assert said in refused(run, target, *OPTIONS, *words.split())


# --- phases of serving --------------------------------------------------------------------------

DECODER = """import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.places = nn.Embedding(24, 16)

    def forward(self, tokens, {positions}):
        x = self.table(tokens) + self.places({places})
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q, {attention}).transpose(1, 2).flatten(2)
        return {{"{output}": x{last} @ self.table.weight.t()}}

def build_model():
    return Net()

def example_inputs(batch, seq):
    return {{"tokens": torch.randint(0, 50, (batch, seq))}}
"""
SERVING = "--gpus 2 --cluster cpu --dtype float32 --batch 4 --out folder/out".split()


def decoder(
    positions: str = "position_ids=None", attention: str = "is_causal=True", **others: str
) -> str:
    """A file with a decoder whose `forward` is as described."""
    words = {"output": "logits", "last": "", "places": "position_ids"} | others
    return model(DECODER.format(positions=positions, attention=attention, **words))


def test_a_decoder_as_it_should_be(run: Run) -> None:
    """What the next tests change something of; its plan says what a token costs."""
    ran = run(decoder(), *SERVING, "--phase", "decode", "--context", "23")
    assert ran.code == 0, ran.err
    assert "per decode" in ran.out and "tokens/s/GPU" in ran.out and "cached token takes" in ran.out
    assert "compute binds" not in ran.out
    assert run("show", "folder/out").out == ran.out.split("\n\nWritten")[0] + "\n"


def test_a_pinned_plan_is_not_said_to_be_the_best(run: Run) -> None:
    target = model(FORWARD + BUILD + INPUTS)
    ran = run(target, "--gpus", "2", "--mesh", "2", "--pin", "up.weight=R", *OPTIONS)
    assert ran.code == 0 and "no better plan exists" not in ran.out


@pytest.mark.parametrize(
    "changes, words, said",
    [
        ({}, "--phase prefill --seq 8 --context 8", "phase prefill begins with an empty cache"),
        ({}, "--phase train --seq 8 --context 8", "--context 8) are for decode and append"),
        ({}, "--phase decode --output-tokens 8", "only phase serve has output tokens"),
        ({}, "--phase decode --context 24", "24 cached tokens and 1 new ones need 25; plan with a"),
        ({}, "--phase append --seq 8", "Net has 24 positions, but 8192 cached tokens and 8 new"),
        ({}, "--phase serve --seq 16 --output-tokens 10", "Net has 24 positions, but 24 cached"),
        (
            {"positions": "labels=None", "places": "torch.arange(tokens.shape[1])"},
            "--phase decode --context 8",
            "Net.forward has no keyword `position_ids` (batch, tokens), so phase decode cannot",
        ),
        (
            {"attention": "is_causal=True, dropout_p=0.1"},
            "--phase append --seq 8 --context 8",
            "model.py:14: this attention has dropout; it cannot have a KV cache",
        ),
        (
            {"attention": "is_causal=False"},
            "--phase append --seq 8 --context 8",
            "model.py:14: this attention is not causal; it cannot have a KV cache",
        ),
        (
            {"attention": "is_causal=False"},
            "--phase decode --context 8",
            "model.py:14: this attention is not causal; it cannot have a KV cache",
        ),
        (
            {"output": "score", "last": ".mean(1)"},
            "--phase append --seq 8 --context 8",
            "Net has no output `logits` (batch, tokens, vocabulary)",
        ),
    ],
)
def test_what_cannot_be_served(changes: dict[str, str], words: str, said: str, run: Run) -> None:
    assert said in refused(run, decoder(**changes), *SERVING, *words.split())


def test_an_encoder_decoder_cannot_decode(run: Run) -> None:
    path = str(Path(__file__).parents[2] / "examples" / "encoder_decoder.py")
    said = refused(run, path, *SERVING, "--phase", "decode")
    assert "EncoderDecoder.forward has no keyword `position_ids`" in said


def test_dims_that_do_not_divide_are_planned_around(run: Run) -> None:
    ran = run(model(FORWARD + BUILD + INPUTS), "--gpus", "3", *OPTIONS)
    assert ran.code == 0, ran.err
    assert "PASS" in run("verify", "folder/out").out


@pytest.mark.parametrize(
    "toml, said",
    [
        ("name = \n", "bad.toml` is not valid TOML: Invalid value (at line 1"),
        ("flopz = 3\n", "bad.toml: flopz: no such field"),
        ('base = "h10"\n', "did you mean `h100`?"),
        ('base = "h100"\nmemory_bytes = "many"\n', "memory_bytes"),
    ],
)
def test_cluster_files(toml: str, said: str, run: Run) -> None:
    Path("bad.toml").write_text(toml)
    target = model(FORWARD + BUILD + INPUTS)
    assert said in refused(run, target, "--gpus", "2", *OPTIONS, "--cluster", "bad.toml")


def test_too_little_memory(run: Run) -> None:
    target = model(FORWARD + BUILD + INPUTS)
    said = refused(run, target, "--gpus", "2", *OPTIONS, "--memory", "1KB", code=1)
    assert said.startswith("plan: no plan fits") and "parameters" in said


def test_a_layout_of_too_little_memory(run: Run) -> None:
    """Fewer rows at once cannot be cut so; what is told is that the memory is too small."""
    target = model(FORWARD + BUILD + INPUTS)
    words = ["--gpus", "2", *OPTIONS, "--batch", "2", "--layout", "ddp=2", "--memory", "1KB"]
    said = refused(run, target, *words, code=1)
    assert "no plan fits" in said and "GPUs do not divide" not in said


def test_an_output_folder_that_holds_something_else(run: Run) -> None:
    Path("folder/out").mkdir(parents=True)
    Path("folder/out/thesis.tex").write_text("x")
    target = model(FORWARD + BUILD + INPUTS)
    said = refused(run, target, "--gpus", "2", *OPTIONS)
    assert "holds `thesis.tex`, which is not a plan; nothing there is overwritten" in said


# --- saved plans --------------------------------------------------------------------------------


def test_malformed_plans_name_the_field_and_run_nothing(run: Run) -> None:
    planned(run)
    path = Path("folder/out/plan.json")
    good = json.loads(path.read_text())
    evil = "__import__('pathlib').Path('owned').touch()"

    def edited(**changes: Any) -> str:
        path.write_text(json.dumps(good | changes))
        return refused(run, "show", "folder/out")

    assert "`plan.schema`: expected `shardwright.plan/3`, which this version" in edited(schema="9")
    assert "the plan is of format 1, which another" in edited(schema="shardwright.plan/1")
    assert "`plan.mesh`: expected a list, got 2" in edited(mesh=2)
    assert "`plan.mesh[0]`: expected a list of 2 items" in edited(mesh=[["x"]])
    assert "`plan.mesh[0][1]`" in edited(mesh=[["x", evil]])
    assert "`mesh` has not 2 ranks" in edited(mesh=[["x", 4]])
    assert "`plan.seconds`: expected a number from 1e-18" in edited(seconds=evil)
    assert "`plan.seconds`: expected a number from 1e-18" in edited(seconds=-1.0)
    assert "`plan.request`: there is no field `target`" in edited(request={})
    assert "`plan.request.gpus`" in edited(request=good["request"] | {"gpus": "2"})
    assert "a field 'more', which is not known" in edited(request=good["request"] | {"more": "2"})
    assert "`plan.specs." in edited(specs={name: "Q" for name in good["specs"]})
    assert "S9 cannot cut" in edited(specs={name: "S9" for name in good["specs"]})
    assert "plan field `specs` has no" in edited(specs={})
    assert "`plan.choices." in edited(choices={name: 3 for name in good["choices"]})
    assert "must have, per mesh axis, one of" in edited(
        choices=dict.fromkeys(good["choices"], ["z"])
    )
    assert "plan field `work` has no" in edited(work={})
    assert "`plan.work." in edited(work={name: [evil, 1] for name in good["work"]})
    assert "`plan.graph`: there is no field" in edited(graph={"name": evil})
    body = [{**node, "op": evil} for node in good["graph"]["body"]]
    assert "graph.body[0].op`: expected a full name" in edited(graph=good["graph"] | {"body": body})
    body = [{**node, "op": "aten.relu.default"} for node in good["graph"]["body"]]
    assert "its arguments do not fit: it takes self" in edited(graph=good["graph"] | {"body": body})
    missing = {key: value for key, value in good.items() if key != "memory"}
    path.write_text(json.dumps(missing))
    assert "`plan`: there is no field `memory`" in refused(run, "show", "folder/out")
    path.write_text("{")
    assert "is not JSON: line 1" in refused(run, "show", "folder/out")
    path.write_text("[]")
    assert "`plan`: expected an object with `schema`, got []" in refused(run, "show", "folder/out")
    assert not Path("owned").exists()


def load_error(text: str, tensors: Mapping[str, torch.Tensor], ranks: int) -> str:
    """What a rank says about a checkpoint with these tensors."""
    save_file(dict(tensors), "weights.safetensors")
    Path("generated.py").write_text(text)
    here = Path.cwd()
    with pytest.raises(RankError) as error:
        run_ranks(_load, ranks, str(here / "generated.py"), str(here / "weights.safetensors"))
    return str(error.value)


def _load(module: str, weights: str) -> None:
    import_source(Path(module)).ShardedModel.from_checkpoint(weights)


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_and_a_plan_on_other_ranks(run: Run) -> None:
    planned(run)
    text = Path("folder/out/sharded_model.py").read_text()
    good = {
        "up.weight": torch.zeros(64, 16),
        "up.bias": torch.zeros(64),
        "down.weight": torch.zeros(16, 64),
        "down.bias": torch.zeros(16),
    }
    said = load_error(text, {n: t for n, t in good.items() if n != "up.bias"}, 2)
    assert "weights.safetensors does not fit this module (1 problems)" in said
    assert "missing: up.bias" in said
    said = load_error(text, good | {"down.bias": torch.zeros(17)}, 2)
    assert "wrong shape: down.bias is (17,), the plan has (16,)" in said
    said = load_error(text, good | {"extra": torch.zeros(1)}, 2)
    assert "unexpected: extra" in said
    said = load_error(text, good, 1).splitlines()[-1]
    assert "2" in said and "1" in said and "rank" in said
