"""A captured graph, interpreted, equals the model: outputs, loss and every gradient."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import CaptureError, capture, capture_folded
from shardwright.ir.graph import Graph, Node
from shardwright.ir.passes.fold import fold
from shardwright.ir.reference.interpret import interpret

from .models import FlatTokens, TinyGPT, batch, huggingface_configs, huggingface_model

FAMILIES = [
    "gpt2", "llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "olmo2", "gpt_neox", "opt",
    "bert", "t5",
]  # fmt: skip

# Hugging Face's eager attention takes the softmax, and some norms, in float32
TOLERANCE = 2e-6


def leaves(result: Any, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Tensor]:
    """Path -> tensor of what a model returns."""
    if isinstance(result, Tensor):
        return {path: result}
    if isinstance(result, (list, tuple)):
        items: Any = enumerate(result)
    else:
        items = result.items() if isinstance(result, Mapping) else ()
    return {k: v for key, part in items for k, v in leaves(part, (*path, key)).items()}


def check_same(
    model: nn.Module, graph: Graph, inputs: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    """Run model and graph forward and backward and compare everything."""
    model.zero_grad()
    expected = leaves(model(**inputs))
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    found = interpret(graph, state, inputs)
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        torch.testing.assert_close(found[path], tensor, rtol=0, atol=tolerance)
    weights = {p: torch.randn_like(t) for p, t in expected.items() if t.is_floating_point()}
    sum((expected[p] * w).sum() for p, w in weights.items()).backward()  # type: ignore[union-attr]
    sum((found[p] * w).sum() for p, w in weights.items()).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        mine = state[name].grad
        if parameter.grad is None:
            assert mine is None or not mine.any(), name
        else:
            assert mine is not None, name
            torch.testing.assert_close(
                mine, parameter.grad, rtol=0, atol=50 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.body if isinstance(node, Node)]


# ---- Hugging Face ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.some(4)
def test_huggingface_family_equals_its_graph(family: str) -> None:
    model = huggingface_model(family, huggingface_configs()[family]).train()
    inputs = batch(2, 12, "input_ids", "labels")
    graph = capture(model, inputs, training=True)
    assert "shardwright.attention" in ops(graph)
    assert "shardwright.cross_entropy" in ops(graph)
    check_same(model, graph, inputs, TOLERANCE)
    check_same(model, fold(graph), inputs, TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bert"])
@pytest.mark.some(1)
def test_meta_model_gives_the_same_graph(family: str) -> None:
    config = huggingface_configs()[family]
    inputs = batch(2, 12, "input_ids", "labels")
    real = capture(huggingface_model(family, config), inputs, training=True)
    meta = {name: value.to("meta") for name, value in inputs.items()}
    assert capture(huggingface_model(family, config, "meta"), meta, training=True) == real


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2"])
def test_padding_mask_is_kept(family: str) -> None:
    model = huggingface_model(family, huggingface_configs()[family])
    inputs = batch(2, 12, "input_ids", "labels")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    inputs |= {"attention_mask": mask}
    graph = capture(model, inputs, training=True)
    masks = [n.arg("mask") for n in graph.body if isinstance(n, Node) and "attention" in n.op]
    assert masks and all(m is not None for m in masks)
    check_same(model, graph, inputs, TOLERANCE)


def test_dropout_is_there_only_in_training() -> None:
    config = huggingface_configs()["gpt2"]
    config.resid_pdrop, config.attn_pdrop = 0.1, 0.2
    model = huggingface_model("gpt2", config)
    inputs = batch(2, 12, "input_ids")
    graph = capture(model, inputs, training=True)
    assert ops(graph).count("aten.dropout.default") == 6
    assert {n.arg("dropout_p") for n in graph.body if n.op == "shardwright.attention"} == {0.2}  # type: ignore[union-attr]
    graph = capture(model, inputs, training=False)
    assert "aten.dropout.default" not in ops(graph)
    check_same(model.eval(), graph, inputs, TOLERANCE)


def test_packed_rows_are_kept_apart() -> None:
    model = huggingface_model("mistral", huggingface_configs()["mistral"])
    inputs = batch(2, 12, "input_ids", "labels")
    inputs["position_ids"] = torch.tensor([[*range(7), *range(5)], [*range(3), *range(9)]])
    graph = capture(model, inputs, training=True)
    check_same(model, graph, inputs, TOLERANCE)


def test_bert_padding() -> None:
    model = huggingface_model("bert", huggingface_configs()["bert"])
    inputs = batch(2, 12, "input_ids", "labels")
    inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    inputs["attention_mask"][0, 7:] = 0
    check_same(model, capture(model, inputs, training=True), inputs, TOLERANCE)


def test_attention_options_are_numbers() -> None:
    config = huggingface_configs()["gemma2"]
    graph = capture(huggingface_model("gemma2", config), batch(2, 12, "input_ids"), training=False)
    calls = [n for n in graph.body if isinstance(n, Node) and n.op == "shardwright.attention"]
    assert [n.arg("window") for n in calls] == [5, 0, 5]
    assert all(n.arg("causal") is True and n.arg("softcap") == 50.0 for n in calls)
    assert all(n.arg("mask") is None for n in calls)


def test_the_model_is_left_as_it_was() -> None:
    model = huggingface_model("llama", huggingface_configs()["llama"]).eval()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    implementation, use_cache = model.config._attn_implementation, model.config.use_cache
    capture(model, batch(2, 12, "input_ids", "labels"), training=True)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert not any(module.training for module in model.modules())
    assert (model.config._attn_implementation, model.config.use_cache) == (
        implementation,
        use_cache,
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bert"])
@pytest.mark.some(1)
def test_deep_models_are_captured_from_a_few_layers(family: str) -> None:
    config = huggingface_configs()[family]
    layers = 12
    config.num_hidden_layers = layers
    if family == "gemma3":
        config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    inputs = {k: v.to("meta") for k, v in batch(2, 12, "input_ids", "labels").items()}
    meta = huggingface_model(family, config, "meta")
    short = capture_folded(meta, inputs, training=True)
    whole = fold(capture(meta, inputs, training=True))
    assert [loop.order for loop in short.loops] == [loop.order for loop in whole.loops]
    assert len(short.loops[0].order) == layers
    assert len(list(meta.parameters())) == len(
        list(huggingface_model(family, config, "meta").parameters())
    )
    model = huggingface_model(family, config)
    check_same(model, short, batch(2, 12, "input_ids", "labels"), TOLERANCE)


def test_models_that_write_attention_out_keep_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as t

    config = t.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = t.FalconForCausalLM(config).double()
    inputs = batch(2, 12, "input_ids", "labels")
    graph = capture_folded(model, inputs, training=True)
    assert graph.loops[0].order == (0, 0, 0, 0)
    model.config.use_cache = False
    check_same(model, graph, inputs, TOLERANCE)
    monkeypatch.setattr(t.FalconForCausalLM, "_can_set_attn_implementation", lambda _: True)
    with pytest.raises(CaptureError, match="computes with the attention mask itself"):
        capture(model, inputs, training=True)


def test_unknown_attention_arguments_are_refused_by_name() -> None:
    """Models pass what they do not know themselves on to their attention."""
    model = huggingface_model("llama", huggingface_configs()["llama"], "meta")
    inputs = batch(2, 12, "input_ids") | {"tree_bias": torch.zeros(2, 4, 12, 12)}
    with pytest.raises(CaptureError, match="LlamaAttention passes `tree_bias`"):
        capture(model, inputs, training=True)


# ---- plain PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["gqa", "expand", "interleave", "mask"])
def test_spellings_of_attention_are_one_operator(spelling: str) -> None:
    model = TinyGPT(spelling=spelling).double()
    inputs = batch(2, 12, "ids", "labels")
    graph = capture(model, inputs, training=True)
    calls = [n for n in graph.body if isinstance(n, Node) and n.op == "shardwright.attention"]
    assert len(calls) == 3
    for call in calls:
        k = call.operands[1]
        assert call.arg("mask") is None and call.arg("causal") is True
        assert k.type.shape == (2, 2, 12, 8)
    check_same(model, graph, inputs)
    check_same(model, fold(graph), inputs)


def test_tied_weights_are_one_parameter() -> None:
    graph = capture(TinyGPT(), batch(2, 12, "ids"), training=True)
    (tied,) = [param for param in graph.params if param.aliases]
    assert (tied.name, tied.aliases) == ("tokens.weight", ("head.weight",))
    assert [output.path for output in graph.outputs] == [("logits",)]


def test_locations_name_the_users_lines() -> None:
    graph = capture(TinyGPT(), batch(2, 12, "ids"), training=True)
    gelu = next(n for n in graph.body if isinstance(n, Node) and n.op == "aten.gelu.default")
    assert gelu.loc.file == "models.py" and gelu.loc.target == "hidden"
    assert gelu.loc.module == "blocks.0" and gelu.loc.module_class == "Block"
    up = next(n for n in graph.body if isinstance(n, Node) and n.loc.module == "blocks.0.up")
    assert up.loc.line == gelu.loc.line and up.loc.target == ""


def test_tokens_stay_apart() -> None:
    model = FlatTokens().double()
    graph = capture(model, batch(2, 12, "ids"), training=True)
    assert "aten.reshape.default" not in ops(graph) and "shardwright.affine" in ops(graph)
    check_same(model, graph, batch(2, 12, "ids"))


def test_float_inputs_need_no_gradient_but_results_do() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            doubled = x * self.frozen
            return self.linear(doubled), [doubled]

    graph = capture(Scaled().double(), {"x": torch.randn(3, 4).double()}, training=True)
    assert [(o.path, o.value.differentiable) for o in graph.outputs] == [
        ((0,), True),
        ((1, 0), False),
    ]
    assert not graph.inputs[0].value.differentiable


def test_in_place_operations_become_functional() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            kept = y.clone()
            y += 1
            y.mul_(2)
            return F.relu(y, inplace=True) + kept

    model = InPlace().double()
    inputs = {"x": torch.randn(3, 4).double()}
    graph = capture(model, inputs, training=True)
    assert not any(op.rpartition(".")[0].endswith("_") for op in ops(graph))
    check_same(model, graph, inputs)


def test_writing_into_a_part_becomes_functional() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            y[:, 0] = 1.0
            y[1:, 1:3] *= 2
            y.t()[3].add_(x[:, 0])
            y.view(2, 2, 4)[0, 1].zero_()
            last = y[2]
            last += 5
            return y * last

    model = Parts().double()
    inputs = {"x": torch.randn(4, 4).double()}
    check_same(model, capture(model, inputs, training=True), inputs)


def test_no_grad_regions_cut_gradients() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                weight = self.a(x).sum(-1, keepdim=True)
            return self.b(x) * weight + self.a(x).detach()

    model = Cut().double()
    inputs = {"x": torch.randn(3, 4).double()}
    check_same(model, capture(model, inputs, training=True), inputs)


def test_encoder_layer_of_torch() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    model = Encoder().double()
    inputs = {"x": torch.randn(2, 6, 16).double()}
    graph = capture(model, inputs, training=True)
    assert ops(graph).count("shardwright.attention") == 3
    check_same(model, graph, inputs)
    check_same(model, fold(graph), inputs)


def test_non_persistent_buffers_are_recovered_by_building_again() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("table", torch.arange(4.0) / 3, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.table

    with torch.device("meta"):
        model = Table()
    inputs = {"x": torch.empty(2, 4, device="meta")}
    with pytest.raises(CaptureError, match=r"buffer `table` of Table is not persistent"):
        capture(model, inputs, training=True)
    graph = capture(model, inputs, training=True, rebuild=Table)
    (constant,) = [param for param in graph.params if param.kind == "constant"]
    assert constant.data == tuple((torch.arange(4.0) / 3).tolist())


# ---- errors ------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """Does what its `kind` says, wrongly."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(4), persistent=False)
        for name in ("mean", "var"):
            self.register_buffer(name, torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        if self.kind == "branch" and y.sum() > 0:
            y = y + 1
        if self.kind == "item":
            y = y * y.max().item()
        if self.kind == "shape":
            y = y[y > 0]
        if self.kind == "raise":
            raise LookupError("no such thing")
        if self.kind == "buffer":
            self.count += 1
        if self.kind == "statistics":
            y = F.instance_norm(y[None], self.mean, self.var)
        if self.kind == "autocast":
            with torch.autocast("cuda", dtype=torch.bfloat16):
                y = self.linear(y)
        if self.kind == "view":
            z = y.view(-1)
            y.add_(1)
            y = y + z.view(y.shape)
        return "text" if self.kind == "nothing" else y


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("branch", r"test_capture\.py:\d+: Wrong decides by the values of a tensor"),
        ("item", r"test_capture\.py:\d+: .*(decides by|depends on) the"),
        ("shape", r"test_capture\.py:\d+: .*depends on the data"),
        ("raise", r"test_capture\.py:\d+: Wrong cannot be traced: LookupError: no such thing"),
        ("buffer", r"test_capture\.py:\d+: .*non-persistent buffer `count`"),
        ("statistics", r"test_capture\.py:\d+: .*changes the running statistics `mean`"),
        ("autocast", r"test_capture\.py:\d+: the model turns autocast on for 'cuda' alone"),
        ("view", r"test_capture\.py:\d+: .*writes in place into memory that another tensor views"),
        ("nothing", r"the model returns no tensor"),
    ],
)
def test_what_cannot_be_captured_is_explained(kind: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Wrong(kind), {"x": torch.randn(3, 4)}, training=True)


def test_inputs_are_checked() -> None:
    model = Wrong("")
    with pytest.raises(CaptureError, match=r"Wrong\.forward takes no `y`; it takes `x`"):
        capture(model, {"x": torch.zeros(2, 4), "y": torch.zeros(2)}, training=True)
    with pytest.raises(CaptureError, match=r"Wrong\.forward needs `x`"):
        capture(model, {}, training=True)
    with pytest.raises(CaptureError, match=r"input `x` is a set, not a tensor"):
        capture(model, {"x": {1.0}}, training=True)  # type: ignore[dict-item]


def first_and_twice(x: Tensor) -> Tensor:
    """A function that a forward calls: of its two results one is used."""
    _, best = x.topk(2, dim=-1)
    doubled = best * 2
    return doubled + 1


class Helped(nn.Module):
    """Calls a function twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        left = first_and_twice(x * self.w)
        right = first_and_twice(x)
        return left + right


def test_functions_of_a_forward_name_what_they_compute() -> None:
    graph = capture(Helped(), {"x": torch.ones(3, 4)}, training=True)
    names = [node.loc.targets for node in graph.nodes]
    helped = [("_", "best"), ("doubled",)]
    assert names == [(), *helped, ("left",), *helped, ("right",), ()]


def test_a_capture_ends_after_so_many_operators() -> None:
    """In a process of its own: C++ ends one in which an exception comes where it awaits none."""
    code = (
        "import torch\n"
        "from shardwright.ir.capture.capture import CaptureError, capture\n"
        "inputs = {'input': torch.zeros(4, 2, 8)}\n"
        "for most in range(12, 20, 2):\n"
        "    try:\n"
        "        capture(torch.nn.GRU(8, 8), inputs, training=True, most=most)\n"
        "    except CaptureError as error:\n"
        "        print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    wanted = [f"GRU runs more than {most} operators" for most in range(12, 20, 2)]
    assert ran.stdout.splitlines() == wanted


def test_functions_of_functions_are_refused() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(self.up)(x)

    with pytest.raises(CaptureError, match=r"test_capture.py:\d+: `torch.func` \(vmap"):
        capture(Mapped(), {"x": torch.zeros(2, 3, 4)}, training=True)
