"""Each function does what its docstring says, in the versions installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.compat import torch as compat


def test_tensors() -> None:
    x, y = torch.zeros(3), torch.zeros(3)
    assert compat.changes(x.add_(1).mul_(2)) == 2
    empty = [torch.empty(0), torch.empty(0)]
    assert len({compat.storage_key(t.untyped_storage()) for t in (x, y, *empty)}) == 4
    assert compat.storage_key(x.untyped_storage()) == compat.storage_key(x[1:].untyped_storage())


def test_modules() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("table", torch.ones(2), persistent=False)
    weight, table = module.weight, module.get_buffer("table")
    module.__dict__["weight"] = torch.zeros(1)
    assert compat.registered(module, "weight") is weight
    assert compat.registered(module, "table") is table
    assert compat.transient_buffers(module) == {"table"}


def test_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    used, unused = x * 2, x * 3
    seen: list[tuple[bool, bool, bool]] = []

    def look(_: Tensor) -> None:
        nodes = [y.grad_fn for y in (used, unused)]
        seen.append((compat.backward_number() >= 0, *(compat.will_run(n) for n in nodes)))  # pyright: ignore

    total = used.sum()
    total.register_hook(look)
    total.backward()
    assert seen == [(True, True, False)]
    assert compat.backward_number() == -1


def test_hooks_on_gradients() -> None:
    x, module = torch.ones(2, requires_grad=True), nn.Linear(2, 2)
    assert not (compat.gradient_hooks(x) or compat.gradient_hooks(module))
    module.register_forward_hook(lambda *_: None)
    assert not compat.gradient_hooks(module)
    ways: tuple[tuple[Any, Tensor | nn.Module], ...] = (
        (x.register_hook, x),
        (x.register_post_accumulate_grad_hook, x),
        (module.register_full_backward_hook, module),
        (module.register_full_backward_pre_hook, module),
    )
    for register, owner in ways:
        handle = register(lambda *_: None)
        assert compat.gradient_hooks(owner)
        handle.remove()
        assert not compat.gradient_hooks(owner)
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    assert compat.gradient_hooks_of_all()
    handle.remove()
    assert not compat.gradient_hooks_of_all()


def test_names_of_operators() -> None:
    double = torch.library.custom_op("compat_tests::double", _double, mutates_args=())
    forms = (double, torch.ops.compat_tests.double, torch.ops.compat_tests.double.default)
    assert {compat.operator_name(form) for form in forms} == {"compat_tests.double"}
    assert compat.operator_name(torch.relu) == ""


def _double(x: Tensor) -> Tensor:
    return 2 * x


class _Doubled(torch.autograd.Function):
    """A function for the test below."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def test_every_way_to_call_a_function_ends_in_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: Any = _Doubled.apply
    apply = classmethod(lambda cls, *args: (cls, *args))
    monkeypatch.setattr(compat.FunctionBase, "apply", apply, raising=False)
    assert _Doubled.apply(1) == (_Doubled, 1)
    if not compat.BINDS_EARLY:
        assert bound(1) == (_Doubled, 1)
    else:  # ends in `forward`, which capture watches
        monkeypatch.setattr(_Doubled, "forward", staticmethod(lambda ctx, x: 3 * x))
        assert bound(torch.ones(1)).item() == 3


def test_outside_modes_nothing_is_faked() -> None:
    with compat.fake_tensors(), torch.device("meta"), compat.outside_modes():
        x = torch.ones(2)
    assert not compat.is_fake(x) and x.tolist() == [1, 1]


def test_capture() -> None:
    with compat.fake_tensors():
        x = torch.zeros(2, 3)
    with compat.fake_tensors(beside_real=True):
        y = torch.ones(3)
    with compat.as_if_exported():
        assert torch.compiler.is_exporting()
    assert not torch.compiler.is_exporting()
    assert (compat.is_fake(x), compat.is_fake(y), compat.is_fake(torch.ones(1))) == (1, 1, 0)
    assert compat.makes_tensors(torch.zeros) and not compat.makes_tensors(torch.relu)
    softmax: Any = torch.ops.aten.softmax.int
    assert isinstance(softmax, compat.OpOverload)
    assert [argument.name for argument in compat.schema_arguments(softmax)] == [
        "self", "dim", "dtype"
    ]  # fmt: skip
    import_module(compat.EXPORT_PRINTS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_flash(causal: bool, apart: bool) -> None:
    """Also where the numbers of a head are not beside each other in memory, as in x[..., ::3]."""
    torch.manual_seed(0)

    def laid(x: Tensor) -> Tensor:
        return x.repeat_interleave(3, -1)[..., ::3] if apart else x

    q, k, v = (torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    mask = torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1)
    scores = q @ k.transpose(-1, -2) * 0.5 + (mask if causal else 0)
    out, grad = scores.softmax(-1) @ v, torch.randn(2, 3, 4, 8, dtype=torch.float64)
    given = [laid(x.detach()) for x in (q, k, v)]
    found, lse = compat.flash(*given, causal, 0.5)
    torch.testing.assert_close((found, lse), (out, scores.logsumexp(-1)))
    found = compat.flash_backward(laid(grad), *given, laid(found), lse, causal, 0.5)
    torch.testing.assert_close(found, torch.autograd.grad(out, (q, k, v), grad))
    if causal:
        torch.testing.assert_close(compat.flash(*given, False, 0.5, mask[None, None])[0], out)


def test_masks_of_transformers() -> None:
    masks: Any = pytest.importorskip("transformers.masking_utils")
    from shardwright.compat import transformers as hf

    packed = masks.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]]))
    causal, window = masks.causal_mask_function, masks.sliding_window_overlay(2)
    chunked = masks.chunked_overlay(3, torch.zeros(1, dtype=torch.int))
    both = masks.and_masks(masks.and_masks(window, causal), packed)
    assert hf.overlays(both, positions_given=False) == (window, causal)
    assert hf.overlays(both, positions_given=True) == (window, causal, packed)
    assert hf.band((window, causal)) == (True, 2)
    assert hf.band((masks.bidirectional_mask_function,)) == (False, 0)
    assert hf.band((causal, packed)) is None
    assert hf.chunk((causal, chunked)) == (3, (causal,))
    assert list(map(hf.mask_name, (causal, window))) == [
        "causal_mask_function", "sliding_window_overlay"
    ]  # fmt: skip
    whole = hf.whole_mask((window, causal), 1, 3, 3, None, "cpu")
    assert whole is not None
    assert whole[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_hooks_that_an_export_leaves_are_taken_away() -> None:
    from torch.nn.modules.module import register_module_buffer_registration_hook

    def refuse(*_: object) -> None:
        raise AssertionError("not mine")

    with compat.own_hooks():
        register_module_buffer_registration_hook(refuse)
    nn.Module().register_buffer("x", torch.ones(1))
