"""Families with a state, with images or sounds, with experts: each in three layouts and served.

`plan` and `plan verify` as users run them: outputs, all gradients, float64, beside the captured
graph and the model of transformers itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Run

MODEL = """
import torch
import transformers as t

TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
EIGHT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)

def ids(batch, seq):
    x = torch.randint(3, 60, (batch, seq))
    return {"input_ids": x, "labels": x}

def build_model():
    model = MODEL
    model.config.use_cache = False
    return model

def example_inputs(batch, seq):
    INPUTS
"""
TOKENS = "return ids(batch, seq)"
# name -> (the model, its inputs)
FAMILIES: dict[str, tuple[str, str]] = {
    "lfm2": (
        """t.Lfm2ForCausalLM(t.Lfm2Config(**TEXT, num_hidden_layers=3,
        block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention", "conv"]))""",
        TOKENS,
    ),
    "qwen3_next": (
        """t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**TEXT, num_hidden_layers=3, head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"]))""",
        TOKENS,
    ),
    "mamba2": (
        """t.Mamba2ForCausalLM(t.Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2,
        num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2))""",
        TOKENS,
    ),
    "recurrent_gemma": (
        """t.RecurrentGemmaForCausalLM(t.RecurrentGemmaConfig(**TEXT | {"num_key_value_heads": 1},
        num_hidden_layers=3, head_dim=8, lru_width=32, attention_window_size=6))""",
        TOKENS,
    ),
    "gemma3n": (
        """t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**TEXT | {"intermediate_size": [48] * 4},
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, num_hidden_layers=4,
        head_dim=8, laurel_rank=4, num_kv_shared_layers=1, sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0], altup_num_inputs=2,
        altup_coef_clip=0.05, attn_implementation="sdpa"))""",
        TOKENS,
    ),
    "phimoe": (
        """t.PhimoeForCausalLM(t.PhimoeConfig(**TEXT, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64))""",
        TOKENS,
    ),
    "t5": (
        """t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48,
        num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0))""",
        """return {"input_ids": torch.randint(64, (batch, seq)),
            "labels": torch.randint(64, (batch, seq // 2))}""",
    ),
    "whisper": (
        """t.WhisperForConditionalGeneration(t.WhisperConfig(vocab_size=64, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, dropout=0.0))""",
        """return {"input_features": torch.randn(batch, 8, 32),
            "labels": torch.randint(3, 60, (batch, seq))}""",
    ),
    "clip": (
        """t.CLIPModel(t.CLIPConfig(
        text_config={**EIGHT, "vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config={**EIGHT, "image_size": 16, "patch_size": 8}, projection_dim=16))""",
        """return {"input_ids": torch.randint(3, 60, (batch, seq)),
            "pixel_values": torch.randn(batch, 3, 16, 16), "return_loss": True}""",
    ),
    "llava": (
        """t.LlavaForConditionalGeneration(t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**EIGHT, image_size=16, patch_size=8),
        text_config=t.LlamaConfig(**TEXT, num_hidden_layers=2), image_token_index=63,
        image_seq_length=4, vision_feature_layer=-1))""",
        """found = ids(batch, seq)
    found["input_ids"][:, 2:6] = 63
    return {"input_ids": found["input_ids"], "pixel_values": torch.randn(batch, 3, 16, 16),
            "labels": found["input_ids"].masked_fill(found["input_ids"] == 63, -100)}""",
    ),
    "qwen2_vl": (  # whose images come as vectors: their sizes would be read out of a tensor
        """t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(
        text_config={**TEXT, "num_hidden_layers": 2, "rope_parameters":
                     dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)},
        vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4,
                           in_channels=3, mlp_ratio=2)))""",
        """places = torch.arange(seq).expand(3, batch, seq).contiguous()
    return {"inputs_embeds": torch.randn(batch, seq, 32), "position_ids": places,
            "labels": torch.randint(3, 60, (batch, seq))}""",
    ),
}
LAYOUTS = ("tp=2", "fsdp=2,cp=2", "ddp=2,tp=2")
# whose attention over images, or from a decoder with learned biases, is not cut by tokens
UNCUT = {name: "cannot run as FSDP x FSDP+CP" for name in ("t5", "clip", "llava")}
SERVED = ("lfm2", "qwen3_next", "mamba2", "recurrent_gemma", "gemma3n", "phimoe")
SMALL = "--cluster cpu --batch 8 --seq 16 --dtype float32 --out out".split()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str) -> None:
    model, inputs = FAMILIES[name]
    Path("model.py").write_text(MODEL.replace("MODEL", model).replace("INPUTS", inputs))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients(run: Run, name: str, layout: str) -> None:
    write(name)
    ranks = "2" if layout == "tp=2" else "4"
    ran = run("model.py", "--gpus", ranks, "--layout", layout, *SMALL)
    if "cp" in layout and name in UNCUT:
        assert ran.code == 2 and UNCUT[name] in ran.err, ran.out + ran.err
        return
    assert ran.code == 0, ran.err
    verified = run("verify", "out")
    assert verified.code == 0 and " itself from model.py" in verified.out, verified.out


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_answers(run: Run, name: str) -> None:
    write(name)
    ran = run("model.py", "--gpus", "2", "--phase", "serve", *SMALL)
    assert ran.code == 0, ran.err
    verified = run("verify", "out")
    assert verified.code == 0 and " itself from model.py" in verified.out, verified.out
