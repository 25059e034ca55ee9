"""Experts in checkpoints: stacked, or a tensor for each expert and matrix.

The reference is transformers: `state_dict()` has experts stacked, and `save_pretrained` writes the
form that the family publishes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardwright.ir.capture.capture import capture
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.unfuse import unfuse
from shardwright.runtime import Param, Part, RankError, RankPool, ShardedModule
from shardwright.runtime.module.checkpoint import Safetensors
from tests.ir.models import batch
from tests.ir.test_moe import model_of
from tests.sharded import builder_of, import_source, mesh_of, random_decisions, source_of

Pool = Callable[[int], RankPool]
State = Mapping[str, Tensor]
EXPERTS, HIDDEN, INNER = 3, 16, 10  # 3 experts on 2 ranks: one rank has padding

# what each family publishes, as `full_state_dict` calls it; None: something else
FAMILIES = {
    "mixtral": "mixtral",
    "minimax_m2": "mixtral",
    "qwen3_moe": "separate",
    "deepseek_v3": "separate",
    "exaone_moe": None,  # `separate`, but a bias has another name
    "phimoe": None,  # `mixtral`, but the router has another name
    "granitemoe": None,  # stacked, under other names
    "gpt_oss": "stacked",
}


def model(family: str) -> nn.Module:
    """A tiny model with random weights, two layers."""
    import transformers as t

    torch.manual_seed(0)
    latent = {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    config = t.AutoConfig.for_model(
        family, vocab_size=32, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, pad_token_id=0,
        intermediate_size=INNER, moe_intermediate_size=INNER,
        num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS,
        **(latent if family == "deepseek_v3" else {}),
    )  # fmt: skip
    made = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in made.state_dict().values():
        nn.init.normal_(parameter)
    return made


def published(family: str, folder: Path) -> tuple[State, State]:
    """(`state_dict()`, what `save_pretrained` wrote into `folder`)."""
    made = model(family)
    made.save_pretrained(folder)
    return {n: t.clone() for n, t in made.state_dict().items()}, load_file(
        folder / "model.safetensors"
    )


def module_of(
    state: State, spec_of: Callable[[str], str], ways: int, apart: int | None = None
) -> type[ShardedModule]:
    """A module on one axis of `ways` ranks; gate and up are parts along `apart` if given."""
    table: dict[str, Param] = {}
    for name, tensor in state.items():
        shape, spec = list(tensor.shape), spec_of(name)
        if apart is not None and name.endswith("gate_up_proj"):
            shape[apart] //= 2
            for start, suffix in ((0, "gate"), (shape[apart], "up")):
                part = Part(name, apart, start)
                table[f"{name}_{suffix}"] = Param(tuple(shape), tensor.dtype, spec, part=part)
        else:
            table[name] = Param(tuple(shape), tensor.dtype, spec)
    space = {"MESH": {"x": ways}, "PARAMETERS": table, "INPUTS": {}, "OUTPUTS": ()}
    return type("Whole", (ShardedModule,), space)


def whole(state: State, apart: int | None = None) -> type[ShardedModule]:
    """A module on one rank."""
    return module_of(state, lambda _: "R", 1, apart)


def assert_equal(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


# ---- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes(family: str, tmp_path: Path) -> None:
    state, file = published(family, tmp_path)
    assert (file.keys() == state.keys()) == (family == "gpt_oss")
    loaded = whole(state).from_checkpoint(tmp_path)
    assert_equal(loaded.full_state_dict(), state)
    assert_equal(whole(state).from_state_dict(state).full_state_dict(), state)
    form: Any = FAMILIES[family]
    if form is not None:
        assert_equal(loaded.full_state_dict(form), file)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_transformers_reads_what_is_written(family: str, tmp_path: Path) -> None:
    import transformers as t

    original: Any = model(family)
    original.config.save_pretrained(tmp_path)
    loaded = whole(original.state_dict()).from_state_dict(original.state_dict())
    form: Any = FAMILIES[family]
    save_file(loaded.full_state_dict(form), tmp_path / "model.safetensors", {"format": "pt"})
    again = t.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal(again.state_dict(), original.state_dict())


def by_hand(state: State, transposed: bool) -> Iterator[tuple[str, Tensor]]:
    """Experts of `state` one by one, written out; gates come before ups."""
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        roles = ("gate_proj", "up_proj") if leaf.startswith("gate_up") else ("down_proj",)
        if not module.endswith(".experts"):
            yield name, tensor
            continue
        for number, expert in enumerate(tensor):
            if transposed and expert.ndim == 2:
                expert = expert.T
            for role, matrix in zip(roles, expert.chunk(len(roles)), strict=True):
                kind = "bias" if leaf.endswith("_bias") else "weight"
                yield f"{module}.{number}.{role}.{kind}", matrix.contiguous()


def stacked_state(transposed: bool, biased: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    state = {"norm.weight": torch.randn(HIDDEN)}
    for leaf, shape in shapes.items():
        own = shape[::-1] if transposed else shape
        state[f"layers.0.moe.experts.{leaf}"] = torch.randn(EXPERTS, *own)
        if biased:
            state[f"layers.0.moe.experts.{leaf}_bias"] = torch.randn(EXPERTS, shape[0])
    return state


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_and_biased(transposed: bool, biased: bool) -> None:
    """Parts tell that all gates come before all ups."""
    state = stacked_state(transposed, biased)
    table = dict(whole(state, 2 if transposed else 1).PARAMETERS)
    bias = "layers.0.moe.experts.gate_up_proj_bias"
    if biased and transposed:
        del table[bias]
        for start, suffix in ((0, "gate"), (INNER, "up")):
            part = Part(bias, 1, start)
            table[f"{bias}_{suffix}"] = Param((EXPERTS, INNER), torch.float32, "R", part=part)
    made: Any = type("Made", (whole(state),), {"PARAMETERS": table})
    separate = dict(by_hand(state, transposed))
    loaded = made.from_state_dict(separate)
    assert_equal(loaded.full_state_dict(), state)
    assert_equal(loaded.full_state_dict("separate"), separate)


# ---- ranks ---------------------------------------------------------------------------------------

SPECS: dict[str, tuple[str, str, int | None]] = {  # (gate and up, down, dim of parts)
    "experts": ("S0", "S0", None),
    "hidden units": ("S1", "S2", 1),
    "all rows": ("S1", "S1", None),  # one rank has the gates, the other the ups
    "columns": ("S2", "S2", None),
    "experts, gate and up apart": ("S0", "S0", 1),
}


def in_rank(
    folder: Path, state: State, specs: tuple[str, str, int | None], form: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int], int]:
    """(stacked, in `form`, numbers read of each tensor, numbers of experts held)."""
    up, down, apart = specs

    def spec_of(name: str) -> str:
        return up if name.endswith("gate_up_proj") else down if name.endswith("down_proj") else "R"

    counts: dict[str, int] = {}
    read = Safetensors.read

    def counted(self: Safetensors, name: str, slices: tuple[slice, ...]) -> Tensor:
        part = read(self, name, slices)
        counts[name] = counts.get(name, 0) + part.numel()
        return part

    with patch.object(Safetensors, "read", counted):
        loaded = module_of(state, spec_of, 2, apart).from_checkpoint(folder)
    held = sum(p.numel() for n, p in loaded.named_parameters() if ".experts." in n)
    return loaded.full_state_dict(), loaded.full_state_dict(form), counts, held


@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_two_ranks(pool: Pool, tmp_path: Path, family: str, specs: str) -> None:
    """Each rank reads its own slices; together they read every number of the experts once."""
    state, file = published(family, tmp_path)
    results = pool(2).run(in_rank, tmp_path, state, SPECS[specs], FAMILIES[family])
    experts = {name for name in file if ".experts." in name}
    for full, separate, counts, held in results:
        assert_equal(full, state)
        assert_equal(separate, file)
        assert sum(n for name, n in counts.items() if name in experts) <= held
    for name in experts:
        assert sum(counts.get(name, 0) for _, _, counts, _ in results) == file[name].numel()
    if specs == "experts":  # no rank touches the experts of another
        read_by = [{n for n, count in counts.items() if count} for _, _, counts, _ in results]
        assert not read_by[0] & read_by[1] & experts


def through(source: str, folder: Path, form: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In a rank: (stacked, in `form`) of a generated module that loads `folder`."""
    loaded = import_source(source).ShardedModel.from_checkpoint(folder)
    return loaded.full_state_dict(), loaded.full_state_dict(form)


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_generated_module(pool: Pool, tmp_path: Path, family: str) -> None:
    """Gate and up apart, as planning has them; Llama 4's are transposed."""
    made: Any = model_of(family)
    graph = unfuse(fold(capture(made, batch(2, 8, "input_ids", "labels"), training=True)))
    state = {n: t.float() for n, t in made.state_dict().items()}
    builder = builder_of(graph, mesh_of(2))
    source = source_of(builder, random_decisions(builder, 0))
    assert "gate_up_proj_gate" in source
    if family == "mixtral":
        made.save_pretrained(tmp_path)
    else:
        save_file(dict(by_hand(made.state_dict(), True)), tmp_path / "model.safetensors")
    file = load_file(tmp_path / "model.safetensors")
    for full, separate in pool(2).run(
        through, source, tmp_path, FAMILIES.get(family) or "separate"
    ):
        assert {n: t.float() for n, t in full.items()}.keys() == state.keys()
        assert_equal({n: t.float() for n, t in full.items()}, state)
        assert_equal(separate, file)


# ---- what is refused -----------------------------------------------------------------------------

UP = "layers.0.moe.experts.gate_up_proj"
ONE = "layers.0.moe.experts.1"


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """Separate experts with some tensors of expert 1 replaced, or gone."""
    tensors = dict(by_hand(stacked_state(False, False), False))
    for matrix, tensor in changes.items():
        name = f"{ONE}.{matrix}.weight"
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


def test_problems_are_listed_by_name() -> None:
    made = whole(stacked_state(False, False))
    tensors = changed(gate_proj=None, up_proj=torch.zeros(INNER, HIDDEN - 1), w2=torch.zeros(1))
    tensors["layers.0.moe.experts.3.gate_proj.weight"] = torch.zeros(INNER, HIDDEN)
    with pytest.raises(ValueError) as error:
        made.from_state_dict(tensors)
    assert error.value.args[0].splitlines() == [
        "the state dict does not fit this module (4 problems):",
        f"  missing: {ONE}.gate_proj.weight (of {UP})",
        f"  wrong shape: {ONE}.up_proj.weight is (10, 15), the plan has (10, 16) (of {UP})",
        "  given twice: layers.0.moe.experts.down_proj, by "
        f"layers.0.moe.experts.0.down_proj.weight and by {ONE}.w2.weight; keep one",
        "  unexpected: layers.0.moe.experts.3.gate_proj.weight",
    ]


def test_stacked_and_separate_at_once() -> None:
    state = stacked_state(False, False)
    with pytest.raises(ValueError, match=f"1 problems.*\n  given twice: {UP}, by {UP} and by "):
        whole(state).from_state_dict({**changed(), UP: state[UP]})


def test_no_experts_at_all() -> None:
    with pytest.raises(ValueError, match=f"2 problems.*\n  missing: {UP}\n  missing: .*down_proj$"):
        whole(stacked_state(False, False)).from_state_dict({"norm.weight": torch.zeros(HIDDEN)})


def test_experts_of_two_dtypes() -> None:
    tensors = changed(up_proj=torch.zeros(INNER, HIDDEN, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="1.up_proj.weight is torch.bfloat16, .*convert all"):
        whole(stacked_state(False, False)).from_state_dict(tensors)


def test_pairs_cannot_be_told_from_halves() -> None:
    """Matrices (in, out), one parameter for gate and up: GPT-OSS has pairs, Llama 4 halves."""
    state = stacked_state(True, True)
    made = whole(state)
    with pytest.raises(ValueError) as error:
        made.from_state_dict(dict(by_hand(state, True)))
    assert f"cannot stack: {UP} from" in str(error.value)
    assert f"cannot stack: {UP}_bias from" in str(error.value)
    assert "(2 problems)" in str(error.value) and "in pairs with ups" in str(error.value)
    with pytest.raises(ValueError, match=f'ask for experts="stacked":\n  {UP} .*in pairs'):
        made.from_state_dict(state).full_state_dict("separate")


def test_shapes_that_do_not_tell() -> None:
    """Without a gate, matrices (out, in) and (in, out) have the same shapes."""
    state = {
        "experts.up_proj": torch.randn(EXPERTS, INNER, HIDDEN),
        "experts.down_proj": torch.randn(EXPERTS, HIDDEN, INNER),
    }
    made = whole(state).from_state_dict(state)
    with pytest.raises(ValueError, match="experts.down_proj .shapes do not tell"):
        made.full_state_dict("separate")


def test_forms_that_cannot_be_written() -> None:
    dense = {"weight": torch.randn(2, 2)}
    made: Any = whole(dense).from_state_dict(dense)
    with pytest.raises(ValueError, match="one of stacked, separate, mixtral; got 'qwen'"):
        made.full_state_dict("qwen")
    with pytest.raises(ValueError, match="no tensors `<...>.experts.gate_up_proj` to take apart"):
        made.full_state_dict("separate")


def load_two(state: State, tensors: State) -> None:
    module_of(state, lambda _: "R", 2).from_state_dict(tensors)


def test_ranks_refuse_alike(pool: Pool) -> None:
    with pytest.raises(RankError, match=f"missing: {ONE}.gate_proj.weight"):
        pool(2).run(load_two, stacked_state(False, False), changed(gate_proj=None))
