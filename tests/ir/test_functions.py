"""Functions with their own backward: what a capture keeps of them, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from shardwright.ir.capture.capture import CaptureError, capture_folded
from shardwright.ir.graph import Loop, Node
from shardwright.ir.ops.registry import local_of, operator_of, saved_values
from shardwright.ir.ops.user_rules import rule
from shardwright.ir.ops.users import FUNCTION
from shardwright.ir.reference.interpret import interpret

TABLE = torch.ones(8)


class Doubled(Function):
    """The base of those below: a gradient that is not that of the forward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return args[0] * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 5 * gradients[0]


class Square(Doubled):
    """Keeps what it is given, as a memory-saving activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 7 * gradients[0] * F.relu(x)


class Masked(Doubled):
    """Keeps its result, a mask of a byte for each element, and a row of numbers on ctx."""

    @staticmethod
    def forward(x: Tensor, scale: float, mode: str = "plain") -> Tensor:
        return x.clamp_min(0) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0] > 0, output)
        ctx.rows = inputs[0].sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, y = ctx.saved_tensors
        return gradients[0] * mask + y + ctx.rows[..., None], None, None


class Nothing(Doubled):
    """A view, of which nothing is kept, and a weight to which nothing flows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return -gradients[0], None


class Alone(Doubled):
    """A tuple of one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor]:
        return (x * torch.tensor(2.0),)


class Within(Doubled):
    """Calls another one, and differentiates inside its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return Square.apply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return 3 * torch.autograd.grad(x**3, x, gradients[0])[0]


class Net(nn.Module):
    """A linear layer, and what `act` makes of its result and a weight."""

    def __init__(self, act: Callable[[Tensor, nn.Parameter], Tensor], layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.weight, self.act = nn.Parameter(torch.randn(8)), act

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x), self.weight)
        return x.sum() + (x * self.weight).sum()


KEPT: list[tuple[Any, str, int]] = [
    (lambda x, w: Doubled.apply(x), "", 0),
    (lambda x, w: Square.apply(x), "x", 0),
    (lambda x, w: Masked.apply(x, 0.5), "result", 6 * 8 + 6 * 8),
    (lambda x, w: Nothing.apply(x, w), "", 0),
    (lambda x, w: Alone.apply(x)[0], "", 0),
    (lambda x, w: Within.apply(x), "x", 0),
    (lambda x, w: x * torch.no_grad()(lambda: Square.apply(x))(), "", 0),
]


@pytest.mark.parametrize("act, saved, besides", KEPT)
def test_what_is_kept(act: Any, saved: str, besides: int) -> None:
    """Values and gradients are the model's own; it saves what the function saves, and no more."""
    torch.manual_seed(0)
    model, x = Net(act).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    graph = capture_folded(model, {"x": x}, training=True)
    (node,) = (node for node in graph.nodes if node.op == FUNCTION)
    names = {node.operands[0].name: "x", node.output.name: "result"}
    assert [names[value.name] for value in saved_values(node)] == saved.split()
    assert operator_of(node).extra_bytes(local_of(node)) == besides
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    (found,) = interpret(graph, params, {"x": x}).values()
    found.backward()
    own = model(x)
    own.backward()
    torch.testing.assert_close(found, own, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(params[name].grad, p.grad, rtol=1e-12, atol=1e-12)


class Clipped(Doubled):
    """The gradient of two uses is not the sum of what each gives."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(-0.1, 0.1)


def test_two_calls_stay_two() -> None:
    """Equal operators on equal operands are merged, and a layer's invariants leave the loop."""
    net = Net(lambda x, w: x + Clipped.apply(w) + 3 * Clipped.apply(w), layers=2)
    graph = capture_folded(net, {"x": torch.randn(2, 8)}, training=True)
    in_body = [item for item in graph.body if isinstance(item, Node) and item.op == FUNCTION]
    in_layers = [node for node in graph.nodes if node.op == FUNCTION and node not in in_body]
    assert len(in_body) + 2 * len(in_layers) == 4


class Inherited(Clipped):
    """Has a backward of its own alone."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 9 * gradients[0]


clipped, masked, inherited = Clipped.apply, Masked.apply, Inherited.apply


@pytest.mark.parametrize(
    ("act", "function"),
    [
        (lambda x, w: clipped(x), "Clipped"),
        (lambda x, w: masked(x, 0.5), "Masked"),
        (lambda x, w: inherited(x), "Inherited"),
    ],
)
def test_what_was_bound_before_is_kept(act: Any, function: str) -> None:
    """`f = Doubled.apply` at the top of a file is how most call one."""
    graph = capture_folded(Net(act), {"x": torch.randn(2, 8)}, training=True)
    (node,) = [node for node in graph.nodes if node.op == FUNCTION]
    assert function in str(node)
    assert "forward" not in vars(Inherited) and Inherited.forward is Clipped.forward


class Layer(nn.Linear):
    """Gives its function a number."""

    def __init__(self, number: float) -> None:
        super().__init__(8, 8)
        self.number = number

    def forward(self, input: Tensor) -> Tensor:
        return Masked.apply(super().forward(input), self.number)


@pytest.mark.parametrize("numbers", [[0.5] * 6, [0.5, 0.5, 2, 0.5, 0.5, 2], [1, 1, 1, True, 1, 1]])
def test_layers_that_are_given_other_numbers_are_not_alike(numbers: list[float]) -> None:
    """Of deep models a few layers are exported; numbers that are given to functions count, too."""
    net = Net(lambda x, w: x)
    net.layers = nn.ModuleList(map(Layer, numbers))
    graph = capture_folded(net, {"x": torch.randn(2, 8)}, training=True)
    given: list[object] = []
    for item in graph.body:
        for kind in item.order if isinstance(item, Loop) else ():
            (node,) = (node for node in item.blocks[kind].nodes if node.op == FUNCTION)
            arguments = node.arg("arguments")
            assert isinstance(arguments, tuple)
            given.append(arguments[1])
    assert repr(given) == repr(numbers)


class Dirty(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)


class Around(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * TABLE


class AroundLater(Doubled):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * TABLE


class Drawing(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Reading(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x.max().item()


class Counting(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, 3


def local() -> Any:
    class Local(Doubled):
        pass

    return Local


LOCAL = local()


def in_autocast(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return Doubled.apply(x)


def frozen(weight: Tensor, x: Tensor) -> Tensor:
    weight.requires_grad_(False)
    y = x * weight
    weight.requires_grad_(True)
    return y


def frozen_by_setting(weight: Tensor, x: Tensor) -> Tensor:
    weight.requires_grad = False
    return x * weight


def clamped(changed: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        changed.clamp_(max=1)
    return changed * x


def kept_otherwise(x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        return x.tanh()


Moved = type("Moved", (Doubled,), {"__module__": "__main__"})
REFUSED: list[tuple[Any, str]] = [
    (lambda x, w: Dirty.apply(x * 1), "`Dirty`, which changes a tensor that it is given in place"),
    (lambda x, w: Around.apply(x), "`Around`, which reads a tensor that it is not given"),
    (lambda x, w: AroundLater.apply(x), "`AroundLater`, which reads a tensor that it is not given"),
    (lambda x, w: Drawing.apply(x), "`Drawing`, which draws random numbers"),
    (lambda x, w: Reading.apply(x), "`Reading`, whose forward cannot be run on tensors without"),
    (lambda x, w: Counting.apply(x)[0], "`Counting`, whose forward returns more than tensors"),
    (lambda x, w: LOCAL.apply(x), "`local.<locals>.Local`, .* define it at the top of a file"),
    (lambda x, w: Moved.apply(x), "`Moved`, .* that `__main__` does not have"),
    (lambda x, w: Doubled.apply(x, F.relu), "with a function among its arguments"),
    (lambda x, w: Doubled.apply(x, [w]), "with a list of tensors among its arguments"),
    (lambda x, w: Doubled.apply(x, '"'), "with the text '\"' among its arguments"),
    (lambda x, w: x + Doubled.apply(1.0), "which is given no tensor"),
    (
        lambda x, w: torch.autograd.grad(Doubled.apply(x).sum(), x, create_graph=True)[0],
        "takes a gradient through `Doubled`",
    ),
    (in_autocast, "`Doubled` is called inside of `torch.autocast`"),
    (lambda x, w: x.register_hook(lambda g: g), "`register_hook` sets a hook on gradients"),
    (lambda x, w: frozen(w, x), "`requires_grad` of a parameter is changed"),
    (lambda x, w: frozen_by_setting(w, x), "`requires_grad` of a parameter is changed"),
    (lambda x, w: kept_otherwise(x), "`saved_tensors_hooks` keeps tensors in a way"),
    (lambda x, w: clamped(w, x * w), "changes the parameter `weight` in place after it was read"),
    (
        lambda x, w: x * w * w.data.clamp_(max=1),
        "the parameter `weight` in place after it was read",
    ),
    (lambda x, w: clamped(x * w, x), "changes a tensor in place that comes from outside"),
]


@pytest.mark.parametrize("act, said", REFUSED)
def test_what_is_refused(act: Any, said: str) -> None:
    with pytest.raises(CaptureError, match=rf"test_functions.py:\d+: .*{said}"):
        capture_folded(Net(act), {"x": torch.randn(2, 8)}, training=True)
    assert Doubled.apply(torch.ones(2)).tolist() == [2, 2]  # as it was


def test_a_function_of_a_script_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: there is no module to import."""
    monkeypatch.setattr(sys.modules["__main__"], "Moved", Moved, raising=False)
    with pytest.raises(CaptureError, match=r"test_functions.py:\d+: `Moved` is defined in `__main"):
        capture_folded(Net(lambda x, w: Moved.apply(x)), {"x": torch.randn(2, 8)}, training=True)


@pytest.mark.parametrize("on", ["", "layers.0"])
def test_hooks_on_results_are_a_part_of_the_model(on: str) -> None:
    net = Net(lambda x, w: x)
    net.get_submodule(on).register_forward_hook(lambda module, given, result: 3 * result)
    x = torch.randn(2, 8)
    (found,) = interpret(
        capture_folded(net, {"x": x}, training=True), dict(net.named_parameters()), {"x": x}
    ).values()
    torch.testing.assert_close(found, net(x))


@pytest.mark.parametrize("on", ["layers.5", "weight", "everything"])
def test_hooks_on_gradients_are_refused(on: str) -> None:
    """Also on a layer that is not exported, since it is like others."""
    net = Net(lambda x, w: F.relu(x), layers=6)
    if on == "everything":
        handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    elif on == "weight":
        handle = net.weight.register_hook(lambda grad: grad)
    else:
        handle = net.get_submodule(on).register_full_backward_hook(lambda *_: None)
    said = "hook on all modules" if on == "everything" else f"`{on}`.* hook"
    try:
        with pytest.raises(CaptureError, match=said):
            capture_folded(net, {"x": torch.randn(2, 8)}, training=True)
    finally:
        handle.remove()
    capture_folded(net, {"x": torch.randn(2, 8)}, training=True)


@pytest.mark.parametrize(
    "trick", [lambda x, w: x + (x.round() - x).detach(), lambda x, w: x + (x.round() - x).data]
)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_detached_has_no_gradient(trick: Any, training: bool) -> None:
    graph = capture_folded(Net(trick), {"x": torch.randn(2, 8)}, training=training)
    (cut,) = (node for node in graph.nodes if node.op == "aten.detach.default")
    assert cut.operands[0].differentiable and not cut.output.differentiable


@torch.inference_mode()
def measured(x: Tensor) -> Tensor:
    return x.mean()


@pytest.mark.parametrize(
    "act",
    [
        lambda x, w: x * measured(x * w).clone(),
        lambda x, w: saved_on_cpu(x * w),
    ],
)
def test_what_says_less_than_how_gradients_flow_is_planned(act: Any) -> None:
    """What is made without gradients has none, and what is kept elsewhere is the same."""
    net, x = Net(act), torch.randn(2, 8)
    graph = capture_folded(net, {"x": x}, training=True)
    (found,) = interpret(graph, dict(net.named_parameters()), {"x": x}).values()
    wanted = torch.autograd.grad(net(x).sum(), net.weight, allow_unused=True)
    found = torch.autograd.grad(found.sum(), net.weight, allow_unused=True)
    torch.testing.assert_close(found, wanted)


def saved_on_cpu(x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return x.tanh()


def test_a_gradient_inside_of_forward_is_refused() -> None:
    def act(x: Tensor, w: Tensor) -> Tensor:
        return torch.autograd.grad((x * w).tanh().sum(), x, create_graph=True)[0]

    with pytest.raises(CaptureError, match=r"a gradient that is taken inside of `forward`"):
        capture_folded(Net(act), {"x": torch.randn(2, 8)}, training=True)


# --- shardwright.rule ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("b s h", "has no single arrow"),
        ("b -> b -> b", "has no single arrow"),
        ("b (s h) -> b s h", r"has `\(s`"),
        ("b S -> b S", "has `S`"),
        ("b s -> b s k", r"has `k` in a result alone: write `\[k\]`"),
        ("b s, b s -> ... s", "has `...` in a result alone"),
        ("b b -> b b", "has `b` twice"),
        ("i0 -> i0", "has `i0`"),
    ],
)
def test_texts_that_are_no_rules(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^rule `.*` {said}"):
        rule(Doubled, text)


@pytest.mark.parametrize("op", [torch.relu, torch.ops.aten.relu, nn.Linear, "mylib::relu", Tensor])
def test_what_has_no_rules(op: object) -> None:
    with pytest.raises(TypeError, match="shardwright.rule is for operators of"):
        rule(op, "... -> ...")


class Ruled(Doubled):
    pass


@pytest.mark.parametrize(
    "text, said",
    [
        ("b s h, h -> b s h", "has 3 terms for 2 tensors"),
        ("b s -> b s", "has 2 dims for a tensor of 3"),
        ("b s 1 -> b s 1", "has `1` for a dim of size 8"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(text: str, said: str) -> None:
    rule(Ruled.apply, text)
    net = Net(lambda x, w: Ruled.apply(x))
    with pytest.raises(CaptureError, match=rf"test_functions.py:\d+: .*{said}.*\[2, 3, 8\]"):
        capture_folded(net, {"x": torch.randn(2, 3, 8)}, training=True)
