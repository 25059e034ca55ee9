"""Tiny models of every family, captured once: what the end-to-end tests run on ranks."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.unfuse import unfuse
from tests.ir.models import batch, huggingface_configs, huggingface_model
from tests.sharded import reference, widened

ROOT = Path(__file__).parents[2]

HUGGINGFACE = (
    "gpt2", "llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "olmo2", "gpt_neox", "opt",
    "bert", "t5",
)  # fmt: skip
EXAMPLES = ("gpt", "llama_example", "encoder_decoder")
FAMILIES = (*HUGGINGFACE, *EXAMPLES)

# 61 is prime: a vocabulary that no mesh divides, so its shards are padded.
_ODD_VOCABULARY = {"gpt2", "llama", "bert"}
_VOCABULARY = 61
_BATCH, _SEQ = 8, 8  # windows of the Hugging Face configs are 5


@dataclass(frozen=True)
class Case:
    """A model, its graph, a batch, and what one process computes from it."""

    name: str
    graph: Graph
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: tuple[dict[str, Tensor], dict[str, Tensor | None]]


def example_module(name: str) -> Any:
    """The file examples/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def build(name: str) -> nn.Module:
    """The tiny model of a family."""
    torch.manual_seed(0)
    match name:
        case "gpt":
            example = example_module("gpt")
            return example.GPT(
                example.GPTConfig(_VOCABULARY, max_seq=12, layers=2, heads=4, width=32)
            )
        case "llama_example":
            example = example_module("llama")
            config = example.LlamaConfig(64, layers=2, width=32, heads=4, kv_heads=2, mlp_width=48)
            return example.Llama(config)
        case "encoder_decoder":
            example = example_module("encoder_decoder")
            return example.EncoderDecoder(
                example.Seq2SeqConfig(64, 12, encoder_layers=2, decoder_layers=2, width=32, heads=4,
                                      mlp_width=64)
            )  # fmt: skip
        case _:
            config = huggingface_configs()[name]
            if name in _ODD_VOCABULARY:
                config.vocab_size = _VOCABULARY
            return huggingface_model(name, config)


def inputs_of(name: str, sizes: tuple[int, int] = (_BATCH, _SEQ)) -> dict[str, Tensor]:
    """A batch whose labels are missing (-100) in other numbers in every row."""
    tokens = {
        "gpt": ["tokens"],
        "llama_example": ["tokens"],
        "encoder_decoder": ["source", "target"],
    }
    names = tokens.get(name, ["input_ids"])
    inputs = {k: v % 61 for k, v in batch(*sizes, *names, "labels").items()}
    rows, columns = torch.meshgrid(torch.arange(sizes[0]), torch.arange(sizes[1]), indexing="ij")
    inputs["labels"] = inputs["labels"].masked_fill(columns * 3 < rows * 2, -100)
    if name == "t5":  # whose decoder has other lengths than its encoder, some of it padding
        inputs["attention_mask"] = (columns < 3 + rows).long()
        inputs["labels"] = inputs["labels"][:, : sizes[1] // 2].contiguous()
    return inputs


def folded(model: nn.Module, inputs: dict[str, Tensor], training: bool) -> Graph:
    """The graph as it is captured, layers folded."""
    return fold(capture(model, inputs, training=training))


def _captured(model: nn.Module, inputs: dict[str, Tensor], training: bool) -> Graph:
    """The folded graph with its inputs' dims called b and s, fused projections apart."""
    graph = unfuse(folded(model, inputs, training))
    return replace(graph, inputs=tuple(replace(i, labels=("b", "s")) for i in graph.inputs))


@cache
def case(name: str, training: bool = True) -> Case:
    """The family's case in float64, for comparisons to 1e-9."""
    model, inputs = build(name), inputs_of(name)
    graph = widened(_captured(model, inputs, training))
    params = {n: t.double() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    return Case(name, graph, params, inputs, reference(graph, params, inputs))


@cache
def fused_case(name: str) -> Case:
    """As `case`, with the family's fused projections whole."""
    model, inputs = build(name), inputs_of(name)
    apart = case(name)
    graph = widened(folded(model, inputs, True))
    graph = replace(graph, inputs=apart.graph.inputs)
    assert graph != apart.graph
    return Case(name, graph, apart.params, inputs, apart.expected)


@cache
def case32(name: str) -> Case:
    """The family's case in float32; what is expected comes from the original model itself."""
    model, inputs = build(name).float(), inputs_of(name)
    graph = _captured(model, inputs, training=True)
    params = {n: t.detach().clone() for n, t in model.state_dict().items()}
    out = model(**inputs)
    out["loss"].backward()
    outputs = {str(o.path): out[o.path[0]].detach() for o in graph.outputs}
    gradients = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    return Case(name, graph, params, inputs, (outputs, gradients))
