"""`plan verify` for plans with a KV cache: what passes, what is shrunk, what is caught."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardwright import load_plan
from shardwright.conversation import conversation, length_of

if TYPE_CHECKING:
    from .conftest import Ran, Run

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--gpus 2 --cluster cpu --dtype float32"
MISTRAL = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "sliding_window": 12,
}  # fmt: skip
OPT = {  # position i is row i + 2 of its table
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 64, "ffn_dim": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 32, "word_embed_proj_dim": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(run: Run, target: str | Mapping[str, object], words: str) -> str:
    """The report of a plan, which lies in `out`, of an example or of a config."""
    if isinstance(target, str):
        path = str(ROOT / "examples" / target)
    else:
        path = "config.json"
        Path(path).write_text(json.dumps(target))
    ran = run(path, "--out", "out", *words.split())
    assert ran.code == 0, ran.err
    return ran.out


def passed(ran: Ran, *said: str, references: int = 2) -> None:
    assert ran.code == 0 and ran.out.startswith("PASS: "), ran.out + ran.err
    for text in said:
        assert text in ran.out, ran.out
    errors = [float(e) for e in re.findall(r"outputs +(\S+)   logits after step", ran.out)]
    assert len(errors) == references and max(errors) < 1e-9, ran.out


@pytest.mark.slow
def test_decode_and_broken_modules(run: Run) -> None:
    """A wrong scale is caught, and a cache whose last token is not attended."""
    planned(run, "llama.py", f"{SMALL} --phase decode --batch 4 --context 64")
    passed(
        run("verify", "out"),
        "new tokens  prefill 1, prefill 37 to 40, append 1, append 0 to 1, decode 1\n",
        "its cache whole, float64",
        "Llama itself from",
        "whole sequences at once",
    )
    path = Path("out/sharded_model.py")
    good = path.read_text()
    for wrong in (
        re.sub(r"(cached_attention\(.*)\)$", r"\1, scale=0.177)", good, flags=re.M),
        re.sub(r"(cached_attention\(\w+), (\w+), (\w+)", r"\1, \2, \2", good),
        re.sub(r"ops\.last_token\((.+?), position_ids\)", r"\1[:, :1].roll(1, 0)", good),
    ):
        assert wrong != good
        path.write_text(wrong)
        ran = run("verify", "out")
        assert ran.code == 1 and ran.out.startswith("FAIL: ") and "TOO LARGE" in ran.out, ran.out


@pytest.mark.slow
def test_prefill_of_a_sharded_sequence_and_a_dropped_step(run: Run) -> None:
    pins = [f"--pin model.layers.*.self_attn.{name}_proj=S1" for name in "qkvo"]
    words = f"{SMALL} --phase prefill --batch 1 --seq 64 --mesh 2 {' '.join(pins)}"
    report = planned(run, MISTRAL, words)
    assert re.search("cached_attention +cp: sequence, ", report), report
    passed(run("verify", "out"), "prefill 64, prefill 40, append 64, append 64, decode 1")
    path = Path("out/sharded_model.py")
    good = path.read_text()
    wrong = good.replace("window=12", "window=13")
    assert wrong != good
    path.write_text(wrong)
    ran = run("verify", "out")
    assert ran.code == 1 and "differs from what the plan generates" in ran.out, ran.out


@pytest.mark.long
def test_no_more_tokens_than_the_model_has_positions(run: Run) -> None:
    planned(run, OPT, f"{SMALL} --phase prefill --batch 2 --seq 32")
    passed(run("verify", "out"), "prefill 32, prefill 14 to 15, append 8, append 0 to 8")


@pytest.mark.long
def test_two_programs_of_one_module(run: Run) -> None:
    """A mistake in the second one is caught, too."""
    words = "--phase serve --batch 2 --seq 16 --output-tokens 8"
    planned(run, MISTRAL, f"{SMALL} {words}")
    passed(run("verify", "out"), "append 0 to 16, decode 1")
    path = Path("out/sharded_model.py")
    text = path.read_text()
    first, second = text.split("class Decoding(")
    wrong = second.replace("self.pack(", "self.pack(1.01 * ", 1)
    assert wrong != second
    path.write_text(f"{first}class Decoding({wrong}")
    ran = run("verify", "out")
    assert ran.code == 1 and re.search("logits after step 5: decode 1 +TOO LARGE", ran.out), ran.out


SERVED = [
    *(
        pytest.param(name, f"{words} --seq 4096", converted, marks=pytest.mark.slow)
        for name, words, converted in (
            ("llama3-70b", "--gpus 8 --mesh 2x4 --batch 16", 80),
            ("mistral-7b", "--gpus 16 --mesh 2x8 --batch 8", 0),
            ("gemma2-9b", "--gpus 16 --mesh 4x4 --batch 16", 42),
            ("gpt-oss-20b", "--gpus 16 --mesh 4x4 --batch 32", 24),
            ("deepseek-v3", "--gpus 32 --cluster h800 --mesh 4x8 --batch 64", 61),
        )
    ),
]


@pytest.mark.parametrize("name, words, converted", SERVED)
def test_two_programs_run_smaller_together(run: Run, name: str, words: str, converted: int) -> None:
    """With the conversion of caches between them, and attention of two forms (DeepSeek)."""
    words += " --phase serve --output-tokens 128"
    planned(run, f"configs/{name}", words)
    assert sum(cache.count for cache in load_plan("out").recached) == converted
    passed(run("verify", "out"), "(planned: ", "sequence ", "decode 1", references=1)
    path = Path("out/sharded_model.py")
    path.write_text(path.read_text().replace("class Decoding(", "class  Decoding("))
    ran = run("verify", "out")
    assert ran.code == 1 and "differs from what the plan generates" in ran.out, ran.out


@pytest.mark.parametrize(
    "config, words, said",
    [
        (
            "llama3-8b", "--gpus 8 --mesh tp=8 --batch 1 --seq 128 --context 65536 --phase append",
            ("on 2 ranks", "(planned: tp=8)", "layers of model.layers 32 -> 2"),
        ),
        pytest.param(
            "gemma2-9b", "--gpus 16 --mesh 4x4 --batch 16 --context 8192 --phase decode",
            ("on 4 ranks", "append 0 to 1, decode 1"), marks=pytest.mark.slow,
        ),
        (
            "gpt2", "--gpus 4 --mesh 2x2 --batch 4 --phase prefill",
            ("on 4 ranks", "sequence 1024 -> 16"),
        ),
    ],
)  # fmt: skip
@pytest.mark.some(1)
def test_large_models_are_shrunk(config: str, words: str, said: tuple[str, ...], run: Run) -> None:
    planned(run, f"configs/{config}", words)
    passed(run("verify", "out"), *said, references=1)


@pytest.mark.parametrize("batch, tokens, context", [(1, 1, 0), (3, 1, 9000), (4, 16, 64)])
@pytest.mark.parametrize("capacity", [4, 7, 32, 10**9])
def test_conversations_fit(batch: int, tokens: int, context: int, capacity: int) -> None:
    steps = conversation(batch, tokens, context, 2, capacity)
    assert 1 <= length_of(steps) <= capacity
    assert all(len(step.counts) == batch and max(step.counts) >= 1 for step in steps)
    assert all(min(step.counts) >= 1 for step in steps[:3])
