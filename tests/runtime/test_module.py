"""A small hand-written sharded model: checkpoints in and out, inputs, outputs, gradients."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.facts import held
from shardwright.runtime import (
    Input,
    Layer,
    Mesh,
    Output,
    Outputs,
    Param,
    Part,
    RankError,
    RankPool,
    Sharded,
    ShardedModule,
    Weight,
    count_collectives,
    cross_entropy_of,
    ops,
)
from shardwright.runtime.module.parameters import originals

Pool = Callable[[int], RankPool]
VOCAB, WIDTH = 11, 6
F64 = torch.float64


class Tied(nn.Module):
    """The original: a tied embedding, one linear layer, a buffer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, dtype=F64)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, dtype=F64)])
        self.register_buffer("shift", torch.randn(WIDTH, dtype=F64))
        self.register_buffer("ramp", torch.arange(1.0, 1.0 + WIDTH, dtype=F64), persistent=False)
        self.unused = nn.Parameter(torch.randn(3, dtype=F64))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=F64)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.layers[0](self.embed(ids))) * self.ramp + self.shift
        logits = self.lm_head(h)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class ShardedTied(ShardedModule):
    """dp: tokens, and parameters as FSDP does; tp: the vocabulary."""

    MESH = {"dp": 2, "tp": 2}
    PARAMETERS = {
        "embed.weight": Param((VOCAB, WIDTH), F64, "S1,S0", aliases=("lm_head.weight",)),
        "layers.0.weight": Param((WIDTH, WIDTH), F64, "S0,S0"),
        "layers.0.bias": Param((WIDTH,), F64, "R,R"),
        "shift": Param((WIDTH,), F64, "R,S0", kind="buffer"),
        "ramp": Param((WIDTH,), F64, "R,R", kind="constant", data=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)),
        "unused": Param((3,), F64, "S0,R"),
    }
    WEIGHTS = {
        "embed.weight": Weight("S1,S0", "V,S0"),
        "layers.0.weight": Weight("S0,S0", "V,R", via=("S0,R",)),
        "layers.0.bias": Weight("R,R", "V,R"),
        "shift": Weight("R,S0", "R,R"),
    }
    INPUTS = {
        "ids": Input("S0,R", (4, 5), torch.int64, free=(0,), high=VOCAB),
        "labels": Input("S0,R", (4, 5), torch.int64, free=(0,), high=VOCAB),
    }
    OUTPUTS = (Output(("loss",), "R,R", ()), Output(("logits",), "S0,S2", (4, 5, VOCAB)))

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        dp, tp = self.mesh.axes
        h = tp.all_reduce(ops.vocab_embedding(ids, self.embed.weight, tp, VOCAB))
        h = F.linear(h, self.layers[0].weight, self.layers[0].bias)
        h = torch.tanh(h) * self.ramp + self.shift
        logits = F.linear(tp.copy(h), self.embed.weight)
        loss = ops.cross_entropy(logits, labels, vocab_axis=tp, vocab_size=VOCAB, token_axes=(dp,))
        return self.pack(dp.all_reduce(loss), logits)


def original() -> Tied:
    torch.manual_seed(0)
    return Tied()


def batch(rows: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, VOCAB, (rows, 5))
    labels[:2] = -100
    return {"ids": torch.randint(0, VOCAB, (rows, 5)), "labels": labels}


def train(source: dict[str, Tensor] | Path, data: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(source, Path):
        model = ShardedTied.from_checkpoint(source)
    else:
        model = ShardedTied.from_state_dict(source)
    out = model(**model.shard_inputs(**data))
    out.loss.backward()
    with torch.no_grad():
        full = model.gather_outputs(out)
    return {
        "type": type(full) is Outputs and not full.logits.requires_grad,
        "outputs": dict(full),
        "gradients": model.full_gradients(),
        "state": model.full_state_dict(),
        "tied": model.lm_head.weight is model.embed.weight,
        "names": [name for name, _ in model.named_parameters()],
        "local": tuple(model.local("embed.weight").shape),
    }


def check(results: list[dict[str, Any]], data: dict[str, Tensor]) -> None:
    model = original()
    out = model(**data)
    out["loss"].backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    state = model.state_dict()
    assert gradients["unused"] is None
    for result in results:
        assert result["type"] and result["tied"] and result["local"] == (6, 3)
        assert set(result["state"]) == set(state)
        assert sorted(result["names"]) == sorted(gradients)
        for name, tensor in state.items():
            torch.testing.assert_close(result["state"][name], tensor, rtol=0, atol=0)
        for name, tensor in out.items():
            torch.testing.assert_close(result["outputs"][name], tensor.detach())
        assert set(result["gradients"]) == set(gradients)
        for name, grad in gradients.items():
            got = result["gradients"][name]
            assert (got is None) == (grad is None), name
            if grad is not None:
                torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [4, 6])
def test_state_dict_in_and_out(pool: Pool, rows: int) -> None:
    data = batch(rows)
    check(pool(4).run(train, dict(original().state_dict()), data), data)


def test_one_name_of_a_tied_tensor_is_enough(pool: Pool) -> None:
    data = batch()
    for name in ("embed.weight", "lm_head.weight"):
        state = dict(original().state_dict())
        del state[name]
        check(pool(4).run(train, state, data), data)


def test_checkpoint_file_and_hugging_face_folders(pool: Pool, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in original().state_dict().items()}
    del state["lm_head.weight"]
    single, folder, parts = tmp_path / "a.safetensors", tmp_path / "one", tmp_path / "two"
    save_file(state, single)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    parts.mkdir()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, parts / file)
    index = parts / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    data = batch()
    for path in (single, folder, parts):
        check(pool(4).run(train, path, data), data)


def load(source: dict[str, Tensor] | Path) -> None:
    train(source, batch())


def test_everything_wrong_with_a_state_dict_is_told_at_once(pool: Pool) -> None:
    state = dict(original().state_dict())
    del state["layers.0.bias"]
    state["layers.0.weight"] = torch.ones(WIDTH, 2)
    state["ramp"] = torch.ones(WIDTH)
    state["extra"] = torch.ones(1)
    with pytest.raises(RankError) as caught:
        pool(4).run(load, state)
    assert str(caught.value).endswith(
        "ValueError: the state dict does not fit this module (4 problems):\n"
        "  missing: layers.0.bias\n"
        "  unexpected: extra\n"
        "  unexpected: ramp (the plan holds its values; leave it out)\n"
        "  wrong shape: layers.0.weight is (6, 2), the plan has (6, 6)"
    )


def test_tied_tensors_that_differ_and_wrong_dtypes_are_refused(pool: Pool) -> None:
    state = dict(original().state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    message = "lm_head.weight and embed.weight are one tensor in this module but differ"
    with pytest.raises(RankError, match=message):
        pool(4).run(load, state)
    state = dict(original().state_dict())
    state["shift"] = torch.ones(WIDTH, dtype=torch.int64)
    with pytest.raises(RankError, match="shift is torch.int64, the plan has torch.float64"):
        pool(4).run(load, state)


def test_bad_checkpoint_paths(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "w.bin").write_bytes(b"")
    (tmp_path / "torn").mkdir()
    index = tmp_path / "torn" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}', encoding="utf-8")
    for name, message in {
        "nothing": "no such file or folder",
        "empty": "holds neither model.safetensors.index.json nor model.safetensors",
        "w.bin": "expected a .safetensors file or a folder",
        "torn": r"names files that are not there: \['model-1.safetensors'\]",
    }.items():
        with pytest.raises(RankError, match=message):
            pool(4).run(load, tmp_path / name)


def feed(changes: dict[str, Tensor | None]) -> None:
    model = ShardedTied()
    data: dict[str, Any] = {**batch(), **changes}
    model.shard_inputs(**{name: x for name, x in data.items() if x is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None, "mask": torch.ones(1)}, "takes the inputs ids, labels; missing: labels"),
        ({"ids": torch.ones(4, 5)}, r"`ids` is torch.float32 \(4, 5\); the plan has torch.int64"),
        ({"ids": torch.ones(4, 6).long()}, r"the plan has torch.int64 \(4, 5\) \(dims \[0\] may"),
        ({"ids": torch.ones(4).long()}, r"`ids` is torch.int64 \(4,\)"),
        ({"ids": torch.ones(3, 5).long()}, "`ids` dim 0 has size 3, which dp=2 does not divide"),
    ],
)
def test_bad_inputs(pool: Pool, changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(RankError, match=message):
        pool(4).run(feed, changes)


class Replicated(ShardedTied):
    """The same parameters, not sharded, on one rank."""

    MESH = {"dp": 1}
    WEIGHTS = {}
    PARAMETERS = {
        name: Param(p.shape, p.dtype, "R", p.kind, p.aliases, p.data)
        for name, p in ShardedTied.PARAMETERS.items()
    }


class Failing(Replicated):
    """Whose forward raises `own`, whatever it is given."""

    own = RuntimeError("of the user's own")

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        raise self.own


def test_an_error_of_the_users_own_stays() -> None:
    """Arguments are looked at after a failure: it is the cause of what is said of wrong ones."""
    with pytest.raises(RuntimeError) as right:
        Failing()(**batch())
    assert right.value is Failing.own and right.value.__cause__ is None
    with pytest.raises(ValueError, match="input `ids` is None") as wrong:
        Failing()(**{**batch(), "ids": None})
    assert wrong.value.__cause__ is Failing.own


def reset() -> dict[str, Tensor]:
    model = ShardedTied()
    model.reset_parameters(seed=3)
    return model.full_state_dict()


def test_random_weights_do_not_depend_on_the_layout(pool: Pool) -> None:
    model = Replicated()
    model.reset_parameters(seed=3)
    want = model.full_state_dict()
    for state in pool(4).run(reset):
        for name, tensor in want.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)
    assert want["embed.weight"].std() > 0.1 and not want["shift"].any()


class InParts(ShardedTied):
    """The linear layer's weight and bias as two parts of unequal size, each cut by itself."""

    PARAMETERS = {
        name: param
        for name, param in ShardedTied.PARAMETERS.items()
        if not name.startswith("layers.0.")
    } | {
        "layers.0.weight_a": Param((4, WIDTH), F64, "S0,S0", part=Part("layers.0.weight", 0, 0)),
        "layers.0.weight_b": Param((2, WIDTH), F64, "R,S1", part=Part("layers.0.weight", 0, 4)),
        "layers.0.bias_a": Param((4,), F64, "R,S0", part=Part("layers.0.bias", 0, 0)),
        "layers.0.bias_b": Param((2,), F64, "R,R", part=Part("layers.0.bias", 0, 4)),
    }
    WEIGHTS = {}


def parts_in_and_out(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """(state from a file, gradients with one part only, messages)."""
    model = InParts.from_checkpoint(path)
    state = model.full_state_dict()
    assert model.local("layers.0.weight_a").shape == (1, WIDTH)
    model.local("layers.0.bias_a").sum().backward()
    messages: list[str] = []
    for failing in (
        lambda: model.local("layers.0.weight"),
        lambda: InParts.from_state_dict(state | {"layers.0.weight_a": torch.zeros(4, WIDTH)}),
        lambda: InParts.from_state_dict(state | {"layers.0.bias": torch.zeros(4, dtype=F64)}),
    ):
        with pytest.raises((KeyError, ValueError)) as error:
            failing()
        messages.append(str(error.value))
    return state, model.full_gradients(), messages


def test_parts_of_a_tensor(pool: Pool, tmp_path: Path) -> None:
    path, whole = tmp_path / "model.safetensors", original().state_dict()
    save_file({n: t.clone() for n, t in whole.items()}, path)
    for state, gradients, messages in pool(4).run(parts_in_and_out, path):
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())
        assert gradients["layers.0.bias"].tolist() == [1.0] * 4 + [0.0] * 2
        assert gradients["layers.0.weight"] is None
        assert "in parts: layers.0.weight_a, layers.0.weight_b" in messages[0]
        assert "unexpected: layers.0.weight_a" in messages[1]
        assert "leave it out" not in messages[1]
        assert "wrong shape: layers.0.bias is (4,), the plan has (6,)" in messages[2]


@pytest.mark.parametrize("start", [3, 5])
def test_parts_that_do_not_meet(start: int) -> None:
    with pytest.raises(ValueError, match=f"`b` begins at {start} in dim 0 of `w`.*end at 4"):
        originals(
            {
                "a": Param((4,), F64, "R", part=Part("w", 0, 0)),
                "b": Param((2,), F64, "R", part=Part("w", 0, start)),
            }
        )


def test_random_weights_do_not_depend_on_parts(pool: Pool) -> None:
    model = Replicated()
    model.reset_parameters(seed=3)
    want = model.full_state_dict()
    for state in pool(4).run(reset_in_parts):
        for name, tensor in want.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


def reset_in_parts() -> dict[str, Tensor]:
    model = InParts()
    model.reset_parameters(seed=3)
    return model.full_state_dict()


def test_a_module_refuses_another_mesh() -> None:
    with pytest.raises(ValueError, match="planned for mesh dp=2 x tp=2, got tp=1"):
        ShardedTied(Mesh.create({"tp": 1}))


def demonstrate() -> tuple[str, int, int]:
    """(what it prints, gathers over dp in forward, in backward)."""
    printed = io.StringIO()
    with count_collectives() as counter, contextlib.redirect_stdout(printed):
        ShardedTied.demo(steps=1)
    forward, backward = (
        counter.calls("all_gather", "dp", "forward"),
        counter.calls("all_gather", "dp", "backward"),
    )
    return printed.getvalue(), forward, backward


def test_demo_runs_and_gathers_parameters_again(pool: Pool) -> None:
    texts, *calls = zip(*pool(4).run(demonstrate), strict=True)
    assert calls == [(2, 2, 2, 2)] * 2  # both parameters together in each of 2 steps
    warm_up, step, summary = texts[0].splitlines()
    assert warm_up.startswith("warm-up: ") and step.startswith("step 1: ") and "loss" in step
    assert summary.startswith("dp=2 x tp=2: best") and summary.endswith("GB on rank 0")
    assert texts[1:] == ("", "", "")


@pytest.mark.parametrize(
    ("rank", "says"), [("0", "planned for 4 ranks .* started 3"), ("2", "^0$")]
)
def test_on_a_wrong_number_of_ranks_the_first_says_so(
    rank: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match=says):
        ShardedTied.demo()


def test_names_that_a_module_has_for_itself() -> None:
    """Those that torch refuses by itself aside."""

    def own(*classes: type[nn.Module]) -> set[str]:
        names = {name for cls in classes for name in (*dir(cls), *cls.__annotations__)}
        return {name for name in names - set(dir(nn.Module)) if not name.startswith("_")}

    assert own(Sharded, Layer) | {"mesh"} == held.BY_ALL
    assert own(ShardedModule) - held.BY_ALL == held.BY_MODEL
    result = doctest.testmod(held)
    assert result.attempted and not result.failed


def with_loss_outside(data: dict[str, Tensor]) -> tuple[float, dict[str, Tensor | None]]:
    model = ShardedTied.from_state_dict(original().state_dict())
    out = model.gather_outputs(model(**model.shard_inputs(**data)))
    loss = F.cross_entropy(out.logits.transpose(1, 2), data["labels"]) + out.logits.square().mean()
    loss.backward()
    return loss.item(), model.full_gradients()


def test_a_loss_outside_of_the_module(pool: Pool) -> None:
    """Of logits whose vocabulary, of 11, is cut over tp, and whose rows are cut over dp."""
    model, data = original(), batch()
    logits = model(**data)["logits"]
    loss = F.cross_entropy(logits.transpose(1, 2), data["labels"]) + logits.square().mean()
    loss.backward()
    for got, gradients in pool(4).run(with_loss_outside, data):
        assert got == pytest.approx(loss.item(), rel=1e-12)
        for name, param in model.named_parameters():
            torch.testing.assert_close(gradients[name], param.grad, rtol=1e-10, atol=1e-13)


def without_gathering(
    data: dict[str, Tensor], reduction: Any
) -> tuple[float, dict[str, Tensor | None], float]:
    model = ShardedTied.from_state_dict(original().state_dict())
    out = model(**model.shard_inputs(**data))
    with count_collectives() as counter:
        loss = cross_entropy_of(model, out, data["labels"], reduction=reduction)
    loss.backward()
    with pytest.raises(ValueError, match="returns no `scores`; it returns loss, logits"):
        cross_entropy_of(model, out, data["labels"], output="scores")
    return loss.item(), model.full_gradients(), counter.bytes("all_gather")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_cross_entropy_outside_gathers_no_logits(pool: Pool, reduction: str) -> None:
    model, data = original(), batch(8)
    logits = model(**data)["logits"]
    loss = F.cross_entropy(logits.transpose(1, 2), data["labels"], reduction=reduction)
    loss.backward()
    for got, gradients, gathered in pool(4).run(without_gathering, data, reduction):
        assert got == pytest.approx(loss.item(), rel=1e-12) and gathered == 0
        for name, param in model.named_parameters():
            torch.testing.assert_close(gradients[name], param.grad, rtol=1e-10, atol=1e-13)
