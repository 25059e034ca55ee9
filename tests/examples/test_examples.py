"""The example models are what they say: they run, learn something, and have the published sizes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    return module


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Vocabulary sizes by hand, so that the expected loss ln(V) does not come from the code under test.
MODELS = [("gpt", 50257), ("llama", 4096), ("encoder_decoder", 8192), ("moe", 4096)]


@pytest.mark.parametrize("name, vocab_size", MODELS)
def test_loss_of_a_new_model_is_that_of_guessing(name: str, vocab_size: int) -> None:
    torch.manual_seed(0)
    example = load(name)
    model: nn.Module = example.build_model()
    inputs: dict[str, Tensor] = example.example_inputs(2, 24)

    out = model(**inputs)

    assert out["logits"].shape == (2, 24, vocab_size)
    assert out["loss"].shape == ()
    assert abs(out["loss"].item() - math.log(vocab_size)) < 0.1 * math.log(vocab_size)


@pytest.mark.parametrize("name, vocab_size", MODELS)
def test_every_parameter_gets_a_gradient_and_a_step_lowers_the_loss(
    name: str, vocab_size: int
) -> None:
    torch.manual_seed(0)
    example = load(name)
    model: nn.Module = example.build_model()
    inputs: dict[str, Tensor] = example.example_inputs(2, 16)

    before = model(**inputs)["loss"]
    before.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    assert model(**inputs)["loss"] < before


@pytest.mark.parametrize("name, vocab_size", MODELS)
def test_model_and_inputs_are_built_on_meta_without_memory(name: str, vocab_size: int) -> None:
    example = load(name)
    with torch.device("meta"):
        model: nn.Module = example.build_model()
        inputs: dict[str, Tensor] = example.example_inputs(4, 32)
        out = model(**inputs)

    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(tensor.is_meta and tensor.shape == (4, 32) for tensor in inputs.values())
    assert out["logits"].shape == (4, 32, vocab_size)


@pytest.mark.parametrize("name, vocab_size", MODELS)
def test_without_labels_there_are_logits_only(name: str, vocab_size: int) -> None:
    example = load(name)
    inputs: dict[str, Tensor] = example.example_inputs(1, 8)
    del inputs["labels"]

    assert set(example.build_model()(**inputs)) == {"logits"}


@pytest.mark.parametrize("name, vocab_size", MODELS)
def test_export_keeps_attention_whole(name: str, vocab_size: int) -> None:
    example = load(name)
    with torch.device("meta"):
        model: nn.Module = example.build_model()
        inputs: dict[str, Tensor] = example.example_inputs(2, 16)
    exported = torch.export.export(model, (), inputs, strict=False)

    attention = [
        node
        for node in exported.graph.nodes
        if node.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    layers = {"gpt": 4, "llama": 4, "encoder_decoder": 3 + 2 * 3, "moe": 4}
    assert len(attention) == layers[name]


@pytest.mark.parametrize("name", ["gpt", "llama", "moe"])
def test_logits_do_not_see_later_tokens(name: str) -> None:
    torch.manual_seed(0)
    example = load(name)
    model: nn.Module = example.build_model().eval()
    tokens: Tensor = example.example_inputs(1, 12)["tokens"]
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 4096

    logits, changed_logits = model(tokens)["logits"], model(changed)["logits"]

    torch.testing.assert_close(logits[:, :8], changed_logits[:, :8])
    assert not torch.allclose(logits[:, 8:], changed_logits[:, 8:])


def test_decoder_sees_the_whole_source_and_no_later_target() -> None:
    torch.manual_seed(0)
    example = load("encoder_decoder")
    model: nn.Module = example.build_model().eval()
    inputs: dict[str, Tensor] = example.example_inputs(1, 12)
    source, target = inputs["source"], inputs["target"]
    logits = model(source, target)["logits"]

    other_source = source.clone()
    other_source[:, -1] = (other_source[:, -1] + 1) % 8192
    assert not torch.allclose(logits[:, 0], model(other_source, target)["logits"][:, 0])

    other_target = target.clone()
    other_target[:, 8:] = (other_target[:, 8:] + 1) % 8192
    torch.testing.assert_close(logits[:, :8], model(source, other_target)["logits"][:, :8])


def test_rotary_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    llama = load("llama")
    angles = llama.rotary_angles(torch.arange(16), 8, 10_000.0)
    q, k = torch.randn(2, 8).unbind()
    q_turned = llama.rotate(q.expand(1, 16, 1, 8), angles)[0, :, 0]
    k_turned = llama.rotate(k.expand(1, 16, 1, 8), angles)[0, :, 0]
    scores = q_turned @ k_turned.T

    torch.testing.assert_close(scores[5, 2], scores[13, 10])
    torch.testing.assert_close(scores[7, 7], q @ k)
    assert not torch.isclose(scores[5, 2], scores[5, 3])


def test_gpt_drops_out_in_training_only() -> None:
    torch.manual_seed(0)
    gpt = load("gpt")
    model = gpt.GPT(gpt.GPTConfig(layers=1, dropout=0.5))
    tokens: Tensor = gpt.example_inputs(1, 8)["tokens"]

    assert not torch.equal(model(tokens)["logits"], model(tokens)["logits"])
    model.eval()
    assert torch.equal(model(tokens)["logits"], model(tokens)["logits"])


def test_llama_refuses_heads_that_do_not_divide() -> None:
    llama = load("llama")
    with pytest.raises(ValueError, match="heads a multiple of kv_heads 3"):
        llama.Llama(llama.LlamaConfig(kv_heads=3))


# Parameters as published with the models (tied weights count once).
@pytest.mark.parametrize(
    "name, builder, parameters",
    [
        ("gpt", "build_gpt2", 124_439_808),
        ("gpt", "build_gpt2_xl", 1_557_611_200),
        ("llama", "build_llama3_8b", 8_030_261_248),
        ("llama", "build_llama3_70b", 70_553_706_496),
        ("llama", "build_llama3_405b", 405_853_388_800),
    ],
)
def test_builders_have_the_published_sizes(name: str, builder: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(getattr(load(name), builder)()) == parameters


def test_large_encoder_decoder_has_the_size_of_bart_large() -> None:
    with torch.device("meta"):
        parameters = count_parameters(load("encoder_decoder").build_large())
    assert abs(parameters / 406_291_456 - 1) < 0.001  # BART differs in where its norms stand


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("bert-base", 109_514_298),
        ("deepseek-v3", 671_026_404_352),  # 671_026_419_200 with the routers' corrections, a buffer
        ("gemma2-9b", 9_241_705_984),
        ("gpt-oss-20b", 20_914_757_184),
        ("gpt2", 124_439_808),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("mistral-7b", 7_248_023_552),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_configs_build_models_of_the_published_sizes(name: str, parameters: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(CONFIGS / name)
    (architecture,) = json.loads((CONFIGS / name / "config.json").read_text())["architectures"]
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)

    assert count_parameters(model) == parameters
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings


def test_every_config_folder_is_checked() -> None:
    listed = {path.parent.name for path in CONFIGS.glob("*/config.json")}
    (mark,) = test_configs_build_models_of_the_published_sizes.pytestmark  # type: ignore[attr-defined]
    assert listed == {name for name, _ in mark.args[1]}
