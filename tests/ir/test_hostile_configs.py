"""Configurations of transformers that are wrong or meant to harm: one sentence each, soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.ir.capture.huggingface import from_config

GOOD: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
SIZES = [name for name, value in GOOD.items() if isinstance(value, int)]
ONE_OF_A_KIND: list[dict[str, Any]] = [
    {"architectures": value}
    for value in (None, [], "LlamaForCausalLM", [3], {}, ["Nothing"], ["AutoModel"], ["pipeline"],
                  ["LlamaConfig"], ["__class__"], [""], 3)
]  # fmt: skip
ONE_OF_A_KIND += [
    {"model_type": value} for value in (None, "unheard", 3, [], "", "../llama", "\u202e")
]
ONE_OF_A_KIND += [
    {"attn_implementation": value} for value in ("kernels/of-someone", "fastest", 3, ["sdpa"])
]
ONE_OF_A_KIND += [
    {"_attn_implementation": "org/kernel@main"},
    {"num_labels": 10**9},
    {"num_labels": -3},
    {"rope_scaling": {"rope_type": "unheard"}, "rope_parameters": None},
    {"rope_parameters": {"rope_type": "unheard", "rope_theta": 1e4}},
    {"rope_parameters": 3},
    {"hidden_act": "unheard"},
    {"hidden_act": 3},
    {"dtype": "float31"},
    {"model_type": "unheard", "auto_map": {"AutoConfig": "code.Config"}},
]
CHANGES = [*({name: value} for name in SIZES for value in (-1, 10**12, "x")), *ONE_OF_A_KIND]


def written(folder: Path, config: object) -> Path:
    (folder / "code.py").write_text("open('proof', 'w')\nclass Config: pass\n")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_good_one(tmp_path: Path) -> None:
    """The one that all others change; code that it names is neither asked for nor run."""
    config = {**GOOD, "auto_map": {"AutoConfig": "code.Config"}}
    model = from_config(written(tmp_path, config), dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.slow
def test_a_number_below_zero_that_configs_of_transformers_have(tmp_path: Path) -> None:
    """DeBERTa's -1 is as many as there are positions."""
    config = {
        "model_type": "deberta-v2", "architectures": ["DebertaV2ForMaskedLM"], "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 64, "max_relative_positions": -1, "relative_attention": True,
    }  # fmt: skip
    model = from_config(written(tmp_path, config), dtype=torch.float32)
    assert type(model).__name__ == "DebertaV2ForMaskedLM"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change)[:60])
def test_refused(change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        from_config(written(tmp_path, {**GOOD, **change}), dtype=torch.float32)
    message = str(caught.value)
    assert message and "\n" not in message
    assert not Path("proof").exists()


@pytest.mark.parametrize("name", [*SIZES, "head_dim", "num_labels"])
def test_zero_is_built_or_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    try:
        from_config(written(tmp_path, {**GOOD, name: 0}), dtype=torch.float32)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("data", [[], 3, "x", None])
def test_what_is_no_object(data: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a config is an object, got"):
        from_config(written(tmp_path, data), dtype=torch.float32)
