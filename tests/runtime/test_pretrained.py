"""What a module saves, `transformers` loads: the same logits, and no half folders."""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.runtime import Param, Part, RankError, RankPool, ShardedModule
from tests.ir.models import batch, huggingface_configs, huggingface_model

Pool = Callable[[int], RankPool]
State = dict[str, Tensor]
Given = tuple[State, dict[str, Any]]
HALVED = "model.layers.1.mlp.up_proj.weight"  # in parts, in one of the plans
TIED = "model.embed_tokens.weight", "lm_head.weight"


@cache
def original() -> Any:
    config = huggingface_configs()["llama"]
    config.tie_word_embeddings = True
    return huggingface_model("llama", config)


def loaded(ranks: int, state: State) -> ShardedModule:
    """The original, its matrices cut by their last dims, of which some ranks have padding."""
    table = {
        name: Param(
            tuple(x.shape),
            x.dtype,
            f"S{x.ndim - 1}",
            aliases=TIED[1:] if name == TIED[0] else (),
        )
        for name, x in state.items()
    }
    space = {"MESH": {"x": ranks}, "PARAMETERS": table, "INPUTS": {}, "OUTPUTS": ()}
    return type("Cut", (ShardedModule,), space).from_state_dict(state)


def save(given: Given, folder: Path, most: int = 10**9, dtype: torch.dtype | None = None) -> None:
    state, config = given
    model = loaded(3, state)
    model.save_pretrained(folder, config, max_shard_bytes=most, dtype=dtype)


@cache
def given() -> Given:
    """Weights without what is tied, and the configuration."""
    state = {name: x for name, x in original().state_dict().items() if name != TIED[1]}
    return state, json.loads(original().config.to_json_string())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(batch(2, 12, "input_ids")["input_ids"]).logits


def test_transformers_loads_what_is_saved(pool: Pool, tmp_path: Path) -> None:
    import transformers as t

    pool(3).run(save, given(), tmp_path / "whole", 50_000)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = t.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", attn_implementation="eager")
    torch.testing.assert_close(logits(again), logits(original()), rtol=1e-12, atol=1e-12)
    assert next(again.parameters()).dtype == torch.float64
    pool(3).run(save, given(), tmp_path / "cast", 10**9, torch.bfloat16)
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "bfloat16"
    cast = t.AutoModelForCausalLM.from_pretrained(tmp_path / "cast")
    torch.testing.assert_close(
        cast.double().state_dict()[TIED[0]],
        original().state_dict()[TIED[0]].bfloat16().double(), rtol=0, atol=0,
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cast", "whole"]


def handed_over(given: State) -> tuple[State, str]:
    """What a module that is stored otherwise has from `loaded`, in bfloat16; and an error."""
    table: dict[str, Param] = {}
    for name, x in given.items():
        shape = list(x.shape)
        aliases = TIED[1:] if name == TIED[0] else ()
        if name == HALVED:
            shape[0] //= 2
            for start, part in ((0, "_a"), (shape[0], "_b")):
                table[name + part] = Param(
                    tuple(shape), torch.bfloat16, "S1,R", part=Part(name, 0, start)
                )
        else:
            table[name] = Param(tuple(shape), torch.bfloat16, "S0,R", aliases=aliases)
    space: Any = {"MESH": {"x": 1, "y": 3}, "INPUTS": {}, "OUTPUTS": ()}
    kind = type("Served", (ShardedModule,), space | {"PARAMETERS": table})
    model = kind()
    model.load_from(loaded(3, given))
    other = {name.replace("q_proj", "x_proj"): param for name, param in table.items()}
    try:
        type("Other", (ShardedModule,), space | {"PARAMETERS": other})().load_from(model)
    except ValueError as error:
        return model.full_state_dict(), str(error)
    return {}, ""


def test_a_module_hands_its_weights_to_another_plan(pool: Pool) -> None:
    state, _ = given()
    for found, error in pool(3).run(handed_over, state):
        assert found.keys() == {*state, TIED[1]}
        for name, x in state.items():
            assert torch.equal(found[name], x.bfloat16()), name
        assert "missing: model.layers.0.self_attn.x_proj.weight" in error
        assert "unexpected: model.layers.0.self_attn.q_proj.weight" in error


def save_into_a_full_disk(given: Given, folder: Path) -> str:
    """What is said where no file may have more than 60,000 bytes."""
    before = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[0][1]))
    try:
        save(given, folder)
    except RuntimeError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    return ""


def test_what_cannot_be_saved_leaves_nothing(pool: Pool, tmp_path: Path) -> None:
    first, *others = pool(3).run(save_into_a_full_disk, given(), tmp_path / "model")
    assert "nothing is left there" in first and "File too large" in first
    assert all("rank 0 says why" in other for other in others)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "model", tmp_path):
        with pytest.raises(RankError, match="could not be saved"):
            pool(3).run(save, given(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_configuration_is_the_one_given_or_that_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Of(ShardedModule):
        MESH = {"x": 1}
        PARAMETERS = {"w": Param((2,), torch.float32, "R")}
        INPUTS = {}
        OUTPUTS = ()

    (tmp_path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    Of().save_pretrained(tmp_path / "given", tmp_path)
    saved = json.loads((tmp_path / "given" / "config.json").read_text())
    assert saved == {"model_type": "llama", "dtype": "float32"}
    Of().save_pretrained(tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="nowhere"):
        Of().save_pretrained(tmp_path / "other", tmp_path / "nowhere")
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(tmp_path / "sharded_model.py"))
    (tmp_path / "plan.json").write_text(json.dumps({"request": {"target": str(tmp_path)}}))
    Of().save_pretrained(tmp_path / "planned")
    assert json.loads((tmp_path / "planned" / "config.json").read_text()) == saved
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="give save_pretrained its path as config="):
        Of().save_pretrained(tmp_path / "gone")
