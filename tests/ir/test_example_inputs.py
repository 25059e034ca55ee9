"""Example inputs of Hugging Face models of several modalities, made from their configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from shardwright.ir.capture.capture import capture
from shardwright.ir.capture.huggingface import from_config
from shardwright.ir.capture.huggingface_inputs import example_inputs

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
WHISPER: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 10, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "CLIPModel": t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8),
    "WhisperForConditionalGeneration": t.WhisperConfig(**WHISPER),
    "ViTForImageClassification": t.ViTConfig(**VISION),
    "LlavaForConditionalGeneration": t.LlavaConfig(
        text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION)
    ),
}

# what each takes in training: shapes for a batch of 3 with 7 tokens, and flags
TAKEN = {
    "CLIPModel": {"input_ids": (3, 7), "pixel_values": (3, 3, 16, 16), "return_loss": True},
    "WhisperForConditionalGeneration": {"input_features": (3, 8, 20), "labels": (3, 7)},
    "ViTForImageClassification": {"pixel_values": (3, 3, 16, 16), "labels": (3,)},
    # its images stand for tokens of the text, whose values a config does not tell
    "LlavaForConditionalGeneration": {"input_ids": (3, 7), "labels": (3, 7)},
}


@pytest.mark.parametrize("name", TAKEN)
def test_inputs_of_all_modalities(name: str) -> None:
    config = CONFIGS[name]
    config.architectures = [name]
    model = from_config(config, dtype=torch.float32)
    inputs = example_inputs(model, 3, 7, labels=True)
    shapes = {k: tuple(x.shape) if isinstance(x, Tensor) else x for k, x in inputs.items()}
    assert shapes == TAKEN[name]
    graph = capture(model, inputs, training=True)
    assert ("loss",) in [output.path for output in graph.outputs]


def test_a_config_that_does_not_say_how_large_inputs_are() -> None:
    layer = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (2,)}
    config = t.Wav2Vec2Config(**SMALL, **layer, architectures=["Wav2Vec2ForCTC"])
    model = from_config(config, dtype=torch.float32)
    with pytest.raises(ValueError, match="how large its `input_values` is: write a Python file"):
        example_inputs(model, 3, 7, labels=True)
