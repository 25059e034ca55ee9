"""Mixtures of experts are captured with one operator per layer, which means the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright
from shardwright.facts.spec import P, R, S, V
from shardwright.ir.capture.capture import CaptureError, capture, capture_folded
from shardwright.ir.capture.huggingface_experts import form_of
from shardwright.ir.graph import Graph, Node
from shardwright.ir.ops.experts import Form, moe_math, moe_operator
from shardwright.ir.ops.labels import label_dims
from shardwright.ir.ops.moe import layer_of
from shardwright.ir.ops.registry import find_op, local_of, rule_of
from shardwright.ir.passes.unfuse import unfuse
from tests.examples.test_examples import load

from .models import VOCABULARY, batch
from .test_capture import TOLERANCE, check_same

# how many kinds of layers: DeepSeek's first is dense, GPT-OSS's alternate in their window, and
# Llama 4's in their positions
FAMILIES = {"mixtral": 1, "qwen3_moe": 1, "deepseek_v3": 2, "gpt_oss": 2, "llama4": 2}


def config_of(family: str) -> Any:
    """A tiny config with 8 experts."""
    import transformers as t

    base = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    small = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
    latent = {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 12, "head_dim": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    groups = {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    local = {"num_local_experts": 8}
    match family:
        case "mixtral":
            return t.MixtralConfig(**base, **local, num_experts_per_tok=2)
        case "qwen3_moe":
            return t.Qwen3MoeConfig(**base, **small, head_dim=8, num_experts=8, norm_topk_prob=True)
        case "deepseek_v3":
            few = small | {"num_experts_per_tok": 4}
            return t.DeepseekV3Config(**base | latent, **few, **groups, n_routed_experts=8)
        case "gpt_oss":
            sizes = {"head_dim": 8, "num_experts_per_tok": 2, "sliding_window": 5}
            return t.GptOssConfig(**base, **local, **sizes)
        case _:
            sizes = {"intermediate_size_mlp": 40, "head_dim": 8, "interleave_moe_layer_step": 1}
            return t.Llama4TextConfig(**base, **local, **sizes, num_experts_per_tok=2)


def model_of(family: str, device: str = "cpu", **changes: Any) -> nn.Module:
    """The model in float64 with transformers' own loops over experts: the reference.

    `changes` are made to its config.
    """
    import transformers as t

    torch.manual_seed(0)
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float64}
    if family != "llama4":
        options["experts_implementation"] = "eager"
    config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device(device):
        model = t.AutoModelForCausalLM.from_config(config, **options)
    model.config.use_cache = False
    if device != "meta":
        for name, parameter in model.named_parameters():  # they start at zero, or alike
            if any(part in name for part in ("bias", "router", "gate.weight", "sinks")):
                nn.init.normal_(parameter, std=0.5)
    return model


def operators(graph: Graph) -> list[Node]:
    """The experts of a graph, folded or not."""
    nodes = [item for item in graph.body if isinstance(item, Node)]
    nodes += [node for loop in graph.loops for block in loop.blocks for node in block.nodes]
    return [node for node in nodes if node.op == "shardwright.moe"]


# ---- Hugging Face ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.some(2)
def test_family_equals_its_graph(family: str) -> None:
    model = model_of(family).train()
    inputs = batch(2, 12, "input_ids", "labels")
    graph = capture(model, inputs, training=True)
    assert len(operators(graph)) == 4 - (family == "deepseek_v3")
    check_same(model, graph, inputs, TOLERANCE)


@pytest.mark.parametrize(("family", "kinds"), FAMILIES.items())
@pytest.mark.some(2)
def test_family_is_a_loop_whose_ops_have_rules(family: str, kinds: int) -> None:
    inputs = {name: t.to("meta") for name, t in batch(2, 12, "input_ids").items()}
    graph = capture_folded(model_of(family, "meta"), inputs, training=True)
    (loop,) = graph.loops
    assert len(loop.blocks) == kinds and len(loop.order) == 4
    unknown = {n.op for block in loop.blocks for n in block.nodes if find_op(n.op) is None}
    assert not unknown


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.some(2)
def test_batch_and_sequence_reach_the_experts(family: str) -> None:
    inputs = {name: t.to("meta") for name, t in batch(2, 12, "input_ids").items()}
    graph = capture_folded(model_of(family, "meta"), inputs, training=True)
    for node in operators(graph):
        assert node.operands[0].type.shape == (2, 12, 32)
        choices = rule_of(node).choices()
        assert {"i0", "i1", "e", "o"} <= choices.keys()


def test_router_of_deepseek_is_cut_by_tokens() -> None:
    inputs = {name: t.to("meta") for name, t in batch(2, 12, "input_ids").items()}
    graph = capture_folded(model_of("deepseek_v3", "meta"), inputs, training=True)
    block = graph.loops[0].blocks[1]
    router = [n for n in block.nodes if n.op.startswith(("aten.topk", "aten.scatter", "aten.gath"))]
    assert len(router) == 5
    assert all({"d0", "d1"} <= rule_of(node).choices().keys() for node in router)
    keys = next(n for n in block.nodes if n.op == "shardwright.attention").operands[1]
    made = next(n for n in block.nodes if keys in n.outputs)
    assert made.op == "aten.cat.default" and "d1" in rule_of(made).choices()  # by heads


class Gated(nn.Module):
    """A module as transformers marks it, with any gate."""

    has_gate, is_transposed = True, False

    def __init__(self, gate: Callable[[Tensor], Tensor], **numbers: float) -> None:
        super().__init__()
        self._apply_gate = gate
        self.__dict__.update(numbers)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=-1)
    return first, second


def clipped(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


@pytest.mark.parametrize(
    ("gate", "numbers", "form"),
    [
        (lambda x: F.silu(halves(x)[0]) * halves(x)[1], {}, Form()),
        (lambda x: F.gelu(halves(x)[0]) * halves(x)[1], {}, Form(activation="gelu")),
        (
            lambda x: F.silu(halves(x)[0].clamp(max=50)) * halves(x)[1].clamp(-50, 50),
            {"limit": 50, "width": 4096},
            Form(limit=50.0),
        ),
        (clipped, {"limit": 7.0}, Form(gating="pairs", alpha=1.702, limit=7.0, offset=1.0)),
    ],
)
def test_form_of_a_gate(
    gate: Callable[[Tensor], Tensor], numbers: dict[str, float], form: Form
) -> None:
    assert form_of(Gated(gate, **numbers)) == form
    assert form_of(Gated(gate, **numbers), Form(activation="relu")) == form


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: torch.tanh(halves(x)[0]) * halves(x)[1],
        lambda x: F.silu(halves(x)[1]) * halves(x)[0],  # the gate last
        lambda x: F.silu(halves(x)[0].clamp(max=3.0)) * halves(x)[1],  # a limit nobody names
    ],
)
def test_a_gate_of_another_kind_is_refused(gate: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="gates its experts in a way of its own"):
        form_of(Gated(gate))


def test_a_model_with_another_gate_is_refused_and_named() -> None:
    model = model_of("mixtral")
    model.model.layers[1].mlp.experts.act_fn = nn.Tanh()
    with pytest.raises(CaptureError, match="MixtralExperts gates its experts in a way of its own"):
        capture(model, batch(2, 12, "input_ids"), training=True)
    assert model.config._experts_implementation == "eager"  # as it was


# ---- plain PyTorch -----------------------------------------------------------------------------


def test_plain_model_marked_in_one_line() -> None:
    torch.manual_seed(0)
    model: nn.Module = load("moe").build_model().double()
    inputs = load("moe").example_inputs(2, 8)
    graph = capture_folded(model, inputs, training=True)
    assert len(operators(graph)) == 1 and len(graph.loops) == 1
    model.zero_grad()
    check_same(model, graph, inputs, 1e-6)  # its loss is in float32


def test_plain_loop_without_the_line_is_refused() -> None:
    example = load("moe")
    model: nn.Module = example.build_model()
    for layer in model.layers:  # type: ignore[union-attr]
        layer.moe.experts.forward = _unmarked(layer.moe.experts)
    with pytest.raises(CaptureError, match=r"mark the module of the experts with `@shardwright"):
        capture(model, example.example_inputs(2, 8), training=True)


def _unmarked(module: nn.Module) -> Callable[..., Tensor]:
    return type(module).forward.__wrapped__.__get__(module)  # type: ignore[attr-defined]


class Direct(nn.Module):
    """Calls the operator itself, with a gate apart and biases, on flat tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"up": (4, 6, 8), "gate": (4, 6, 8), "down": (4, 8, 6)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
            bias = torch.randn(shape[:2], dtype=torch.float64)
            self.register_parameter(f"{name}_bias", nn.Parameter(bias))
        self.router = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, 8)
        weights, indices = torch.topk(torch.sigmoid(self.router(flat)), 2)
        tensors = {name: t for name, t in self.named_parameters() if "router" not in name}
        out = shardwright.moe(flat, indices, weights, **tensors, gating="separate", limit=0.5)
        return out.view(x.shape)


def test_operator_called_by_the_model() -> None:
    model, x = Direct(), torch.randn(2, 3, 8, dtype=torch.float64)
    graph = capture(model, {"x": x}, training=True)
    (node,) = operators(graph)
    assert node.output.type.shape == (2, 3, 8)  # the tokens are not merged
    assert node.loc.file == "test_moe.py"
    check_same(model, graph, {"x": x})


class Dense(nn.Module):
    """All experts on all tokens, weighed before; `kept` says which scores are zero."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kept = kept
        self.up = nn.Parameter(torch.randn(4, 8, 12, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(4, 6, 8, dtype=torch.float64))
        self.router = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        logits = self.router(flat)
        top, indices = torch.topk(logits, 2, dim=1)
        nothing = 0.0 if self.kept == "half" else float("-inf")
        scores = torch.full_like(logits, nothing).scatter(1, indices, top).sigmoid()
        if self.kept == "twice":
            scores = scores.sigmoid()
        x2 = flat.repeat(4, 1) * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(x2.view(4, -1, 8), self.up).chunk(2, dim=-1)
        if self.kept == "gate last":
            gate, up = up, gate
        out = torch.bmm(up * F.silu(gate), self.down).view(-1, 8)
        return out.reshape(4, -1, 8).sum(dim=0).view(x.shape)


@pytest.mark.parametrize(
    ("kept", "raised"), [("chosen", 1), ("half", 0), ("twice", 0), ("gate last", 0)]
)
def test_experts_on_all_tokens(kept: str, raised: int) -> None:
    """Those that are raised and those that must not be give what the model gives."""
    model, x = Dense(kept), torch.randn(2, 3, 8, dtype=torch.float64)
    graph = capture(model, {"x": x}, training=True)
    assert len(operators(graph)) == raised
    check_same(model, graph, {"x": x})


# ---- the operator ------------------------------------------------------------------------------


def arguments(**form: Any) -> dict[str, Any]:
    """Arguments of 4 experts on 5 tokens."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    tensors: dict[str, Any] = {
        "x": random(5, 8), "indices": torch.randint(0, 4, (5, 2)), "weights": random(5, 2),
        "up": random(4, 12, 8), "gate": None, "down": random(4, 8, 6),
        "up_bias": random(4, 12), "gate_bias": None, "down_bias": random(4, 8),
    }  # fmt: skip
    return tensors | dict(Form(**form).arguments())


def test_operator_is_its_formula_with_gradients() -> None:
    given = arguments(gating="pairs", limit=1.0)
    leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
    out, formula = moe_operator(**given), moe_math(**given)
    torch.testing.assert_close(out, formula)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    for mine, want in zip(got, torch.autograd.grad(formula, leaves, grad), strict=True):
        torch.testing.assert_close(mine, want)
    torch.library.opcheck(moe_operator, tuple(arguments().values()))


def test_rule() -> None:
    (node,) = operators(capture(Direct(), {"x": torch.randn(2, 4, 8).double()}, training=True))
    choices = rule_of(node).choices()
    # x, indices, weights, up, gate, down, up_bias, gate_bias, down_bias
    assert choices["i1"] == ((S(1), S(1), S(1), V, V, V, V, V, V), (S(1),))
    assert choices["e"] == ((V, V, V, S(0), S(0), S(0), S(0), S(0), S(0)), (P,))
    assert choices["f"] == ((V, V, V, S(1), S(1), S(2), S(1), S(1), P), (P,))
    assert choices["o"] == ((V, V, V, V, V, S(1), V, V, S(1)), (S(2),))
    assert choices["R"] == ((R,) * 9, (R,))
    tokens, stacked = (S(1),) * 3, (S(0),) * 6
    assert choices["dispatch_i1"] == ((*tokens, *stacked), (S(1),))
    assert set(choices) == {"R", "i0", "i1", "e", "f", "o", "dispatch_i0", "dispatch_i1"}
    assert rule_of(node).ways(("dispatch_i1", "f"), (2, 2)) == {"i1": 2, "e": 2, "f": 2}
    layer = layer_of(local_of(node, ("i0", "e", "f"), (2, 4, 2)))
    assert (layer.tokens, layer.choices, layer.experts, layer.matrices) == (4, 2, 1, 2)
    assert (layer.width, layer.hidden, layer.out) == (8, 3, 8)


def test_hidden_units_of_halves_stay_whole() -> None:
    inputs = {name: t.to("meta") for name, t in batch(2, 12, "input_ids").items()}
    mixtral, gpt_oss = (
        operators(capture_folded(model_of(family, "meta"), inputs, training=True))[0]
        for family in ("mixtral", "gpt_oss")
    )
    assert "f" not in rule_of(mixtral).choices()
    assert rule_of(gpt_oss).choices()["f"][0][3] == S(2)  # pairs: cut between two of them


def test_gate_and_up_apart() -> None:
    """With a parameter of its own each, the hidden units of an expert can be cut."""
    model, inputs = model_of("mixtral"), batch(2, 12, "input_ids")
    whole = capture_folded(model, inputs, training=True)
    graph = unfuse(whole)
    (node,) = operators(graph)
    assert node.arg("gating") == "separate" and "f" in rule_of(node).choices()
    parts = [p for p in graph.loops[0].blocks[0].params if p.part is not None]
    assert [(p.part.dim, p.part.start) for p in parts if p.part] == [(1, 0), (1, 48)]
    assert {p.part.name for p in parts if p.part} == {"mlp.experts.gate_up_proj"}
    assert unfuse(graph) is graph


def test_labels_pass_through() -> None:
    graph = capture(Direct(), {"x": torch.randn(2, 4, 8).double()}, training=True)
    assert operators(graph)[0].output.name in label_dims(graph)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="gating is one of none, separate, halves, pairs"):
        Form(gating="third")
    with pytest.raises(ValueError, match="experts know the activations silu, gelu"):
        shardwright.experts(up="up", down="down", activation="tanh")
    with pytest.raises(ValueError, match="`alpha` is for silu"):
        Form(activation="relu", alpha=2.0)
    given = arguments()
    with pytest.raises(ValueError, match="`gate` is a tensor with gating='separate'"):
        shardwright.moe(
            *(given[n] for n in ("x", "indices", "weights", "up", "down")), gating="separate"
        )
