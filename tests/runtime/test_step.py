"""Steps of several micro-batches under every way to store weights, beside one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.runtime import (
    Home,
    Input,
    Labels,
    Layer,
    Output,
    Param,
    RankError,
    RankPool,
    ShardedModule,
    Weight,
    count_collectives,
    ops,
)

Pool = Callable[[int], RankPool]
ROWS, LENGTH, WIDTH, CLASSES, DEPTH = 12, 5, 6, 7, 3
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
STEPS, RATE = 2, 0.1


@dataclass(frozen=True)
class Case:
    """How matrices lie and go, and how often in a step of m micro-batches their units do what.

    `forward` and `backward` name a collective and say how many of it there are per step, and how
    many more per micro-batch.
    """

    mesh: dict[str, int]
    weight: Weight
    forward: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    backward: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])


N = DEPTH + 1  # units: the layers and the head
TWO, FOUR = {"x": 2}, {"x": 2, "y": 2}
LATE = Home("V", kept=False, late=True)
AGAIN = N - 1  # the first layer's weight is not needed again, as the input has no gradient
CASES = {
    "ddp": Case(TWO, Weight("R", "V"), backward={"all_reduce": (0, N)}),
    "ddp, late": Case(TWO, Weight("R", "V", home=LATE), backward={"all_reduce": (N, 0)}),
    "zero-1": Case(
        TWO, Weight("S0", "V", home=Home("V", late=True)),
        {"all_gather": (N, 0)}, {"reduce_scatter": (N, 0)},
    ),
    "zero-2": Case(
        TWO, Weight("S0", "V", home=Home("V")), {"all_gather": (N, 0)}, {"reduce_scatter": (0, N)}
    ),
    "fsdp": Case(
        TWO, Weight("S1", "V"),
        {"all_gather": (0, N)}, {"all_gather": (0, AGAIN), "reduce_scatter": (0, N)},
    ),
    "fsdp in copies that are added up late": Case(
        FOUR, Weight("R,S0", "V,V", home=Home("V,S0", kept=False, late=True)),
        {"all_gather": (0, N)},
        {"all_gather": (0, AGAIN), "reduce_scatter": (0, N), "all_reduce": (N, 0)},
    ),
    "kept in halves": Case(
        FOUR, Weight("S0,S1", "V,V", home=Home("V,S1")),
        {"all_gather": (N, N)}, {"all_gather": (0, AGAIN), "reduce_scatter": (0, 2 * N)},
    ),
    "kept in halves, late": Case(
        FOUR, Weight("S0,S0", "V,V", home=Home("S0,V", late=True)),
        {"all_gather": (N, N)},
        {"all_gather": (0, AGAIN), "reduce_scatter": (N, N)},
    ),
    "zero-1 over both": Case(
        FOUR, Weight("S0,S0", "V,V", home=Home("V,V", via=("S0,V",), late=True)),
        {"all_gather": (2 * N, 0)}, {"reduce_scatter": (2 * N, 0)},
    ),
}  # fmt: skip


def state(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"layers.{i}.w": torch.randn(WIDTH, WIDTH, dtype=F64, generator=generator) * 0.5
        for i in range(DEPTH)
    }
    found["head"] = torch.randn(CLASSES, WIDTH, dtype=F64, generator=generator)
    return {name: x.to(dtype) for name, x in found.items()}


def batch(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Rows of a step; few labels count, in the first rows none."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=F64, generator=generator).to(dtype)
    labels = torch.randint(CLASSES, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(1, 0, ROWS)[:, None]] = -9
    labels[0] = -9
    return {"x": x, "labels": labels}


def module(
    mesh: Mapping[str, int],
    weight: Weight,
    *,
    dtype: torch.dtype = F64,
    reduce: torch.dtype | None = None,
    recompute: bool = False,
    cut: int = -1,
) -> Any:
    """Layers, a head, and a loss of a cross entropy and another term; rows over all axes.

    Gradients of forward number `cut` reach the head alone.
    """
    rows = ",".join(["S0"] * len(mesh))
    whole = ",".join(["R"] * len(mesh))

    class Block(Layer):
        WEIGHTS = {"w": weight}
        w: Tensor

        def forward(self, h: Tensor) -> Tensor:
            return torch.tanh(h @ self.w.t())

    class Model(ShardedModule):
        MESH = mesh
        REDUCE = reduce
        LABELS = Labels("labels", 1, -9)
        LAYERS = {"layers": [Block] * DEPTH}
        PARAMETERS = {"head": Param((CLASSES, WIDTH), dtype, weight.stored)} | {
            f"layers.{i}.w": Param((WIDTH, WIDTH), dtype, weight.stored) for i in range(DEPTH)
        }
        WEIGHTS = {
            "head": Weight(
                weight.stored, weight.used, weight.via, stages=(1, 1), dtype=weight.dtype,
                home=weight.home,
            )
        }  # fmt: skip
        INPUTS = {
            "x": Input(rows, (ROWS, LENGTH, WIDTH), weight.dtype or dtype, free=(0,)),
            "labels": Input(rows, (ROWS, LENGTH), torch.int64, free=(0,)),
        }
        OUTPUTS = (
            Output(("h",), rows, (ROWS, LENGTH, WIDTH)), Output(("loss",), whole, ()),
        )  # fmt: skip
        layers: nn.ModuleList
        head: Tensor
        runs = 0

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            h, axes = x, self.mesh.axes
            for each in self.layers:
                h = self.recompute(cast(Layer, each), h) if recompute else each(h)
            h = h.detach() if self.runs == cut else h
            self.runs += 1
            logits = h[:, :-1] @ self.head.t()
            loss = ops.cross_entropy(logits, labels[:, 1:], ignore_index=-9, token_axes=axes)
            other = h.square().mean() / self.mesh.size
            loss = loss + 0.1 * other.to(loss.dtype)
            for axis in axes:
                loss = axis.all_reduce(loss)
            return self.pack(h, loss)

    return Model


def micro_batch(rows: Tensor, number: int, many: int, shards: int) -> Tensor:
    """The rows of all shards that are in one micro-batch of `many`."""
    return torch.cat([own.chunk(many)[number] for own in rows.chunk(shards)])


def expected(many: int, shards: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(loss, gradients) of each step of one process."""
    leaves = {name: x.requires_grad_() for name, x in state().items()}
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for _ in range(STEPS):
        total = int((batch()["labels"][:, 1:] != -9).sum())
        loss = torch.zeros((), dtype=F64)
        for k in range(many):
            x, labels = (micro_batch(t, k, many, shards) for t in batch().values())
            for i in range(DEPTH):
                x = torch.tanh(x @ leaves[f"layers.{i}.w"].t())
            logits, wanted = x[:, :-1] @ leaves["head"].t(), labels[:, 1:]
            sums = F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=-9, reduction="sum"
            )
            loss = loss + sums / total + 0.1 * x.square().mean() / many
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found.append((loss.detach(), dict(zip(leaves, gradients, strict=True))))
        for x, gradient in zip(leaves.values(), gradients, strict=True):
            x.data -= RATE * gradient
    return found


def rows_of(model: ShardedModule, dtype: torch.dtype = F64) -> dict[str, Any]:
    """What this rank gives to `step`."""
    return {name: model.data_shard.of(x) for name, x in batch(dtype).items()}


Found = list[tuple[Tensor, dict[str, Tensor]]]


def train(
    cases: list[Case], many: int, how: Mapping[str, Any]
) -> list[tuple[Found, dict[str, int]]]:
    """Of each case what `expected` has, and the collectives of the last step."""
    results: list[tuple[Found, dict[str, int]]] = []
    for case in cases:
        kind = module(case.mesh, case.weight, **how)
        model = kind.from_state_dict(state(how.get("dtype", F64)))
        own = rows_of(model, case.weight.dtype or F64)
        found: Found = []
        calls: dict[str, int] = {}
        for _ in range(STEPS):
            model.zero_grad()
            with count_collectives() as counter:
                loss = model.step(**own, micro_batches=many)
            evaluated = model.evaluate(**own, micro_batches=many)
            assert not evaluated.requires_grad and torch.allclose(evaluated, loss, rtol=1e-6)
            gradients = {n: x for n, x in model.full_gradients().items() if x is not None}
            found.append((loss, gradients))
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None and p.grad.dtype == p.dtype
                    p.data -= RATE * p.grad
            calls = {}
            for key, count in counter.counts.items():
                name = f"{key.op} {key.phase}"
                calls[name] = calls.get(name, 0) + count.calls
        results.append((found, calls))
    return results


def compare(found: Found, many: int, shards: int, tolerance: float) -> None:
    for (loss, gradients), (want, wanted) in zip(found, expected(many, shards), strict=True):
        torch.testing.assert_close(loss.to(F64), want, rtol=tolerance, atol=tolerance)
        for name, gradient in wanted.items():
            got, most = gradients[name].to(F64), gradient.abs().max().item()
            torch.testing.assert_close(got, gradient, rtol=0, atol=tolerance * most, msg=name)


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_way_gives_what_one_process_does(pool: Pool, ranks: int, many: int) -> None:
    named = {name: case for name, case in CASES.items() if prod(case.mesh.values()) == ranks}
    for results in pool(ranks).run(train, list(named.values()), many, {}):
        for (name, case), (found, calls) in zip(named.items(), results, strict=True):
            compare(found, many, ranks, 1e-9)
            want = {
                f"{op} {phase}": once + many * each
                for phase, counted in (("forward", case.forward), ("backward", case.backward))
                for op, (once, each) in counted.items()
            }
            axes = len(case.mesh)  # over each, labels of a loss are counted and the loss added up
            want["all_reduce forward"] = 2 * axes * many + (many > 1)
            assert calls == want, name


def mixed(weight: Weight) -> Weight:
    return replace(weight, dtype=BF16)


@pytest.mark.parametrize("recompute", [False, True])
def test_float32_parameters_used_in_bfloat16(pool: Pool, recompute: bool) -> None:
    cases = [replace(c, weight=mixed(c.weight)) for c in CASES.values() if c.mesh == TWO]
    how = {"dtype": F32, "reduce": F32, "recompute": recompute}
    for results in pool(2).run(train, cases, 3, how):
        for found, _ in results:
            compare(found, 3, 2, 0.05)


@pytest.mark.parametrize("home", [None, LATE])
def test_gradients_of_bfloat16_parameters_are_summed_up_in_float32(home: Home | None) -> None:
    class Weighed(ShardedModule):
        MESH = {"x": 1}
        PARAMETERS = {"w": Param((1,), BF16, "R")}
        WEIGHTS = {"w": Weight("R", "V", home=home)}
        INPUTS = {"x": Input("S0", (16, 1), BF16, free=(0,))}
        OUTPUTS = (Output((), "R", ()),)
        w: Tensor

        def forward(self, x: Tensor) -> Any:
            return self.pack((x * self.w).sum())

    model = Weighed()
    model.step(x=torch.tensor([[4096.0]] + [[8.0]] * 15).to(BF16), micro_batches=16)
    assert model.w.grad == (4096 + 15 * 8) / 16 + 0.5  # of 263.5; in bfloat16 256 + 0.5 is 256


def sizes(weight: Weight, many: int) -> tuple[float, float]:
    """(bytes gathered, bytes reduced) in a step in mixed precision."""
    model = module(TWO, weight, dtype=F32, reduce=F32).from_state_dict(state(F32))
    with count_collectives() as counter:
        model.step(**rows_of(model, BF16), micro_batches=many)
    return counter.bytes("all_gather"), counter.bytes("reduce_scatter")


def test_values_go_in_the_dtype_of_use_and_gradients_in_that_of_reductions(pool: Pool) -> None:
    matrices = DEPTH * WIDTH * WIDTH + (CLASSES + 1) * WIDTH  # 7 rows are padded to 8
    weight = mixed(CASES["zero-1"].weight)
    for gathered, reduced in pool(2).run(sizes, weight, 3):
        assert gathered == matrices * 2 / 2  # half of it comes from the other rank
        assert reduced == matrices * 4 / 2


def unreached() -> list[dict[str, Tensor | None]]:
    """Gradients where the last of three micro-batches reaches the head alone, and all do."""
    found: list[dict[str, Tensor | None]] = []
    for weight, cut in ((CASES["zero-1"].weight, 2), (CASES["fsdp"].weight, 2)):
        model = module(TWO, weight, cut=cut).from_state_dict(state())
        model.step(**rows_of(model), micro_batches=3)
        found.append(model.full_gradients())
    return found


def test_sums_that_the_last_backward_does_not_reach_are_reduced(pool: Pool) -> None:
    for late, each in pool(2).run(unreached):
        for name, gradient in each.items():
            assert gradient is not None and gradient.abs().max() > 0
            torch.testing.assert_close(late[name], gradient, rtol=1e-12, atol=1e-12)


def around(kind: str) -> dict[str, Any]:
    """What a module with copies at home says and does beside its steps."""
    model = module(TWO, CASES["zero-1"].weight).from_state_dict(state())
    optimizer = model.optimizer("sgd", lr=RATE)
    if kind == "compiled":
        model.compile_layers("aot_eager")
    rows = rows_of(model)
    own = model.shard_rows(**rows)
    model.step(**rows, micro_batches=3)
    norm = model.clip_grad_norm_(1e9)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        before = model(**own).loss
    model.get_parameter("head").data.mul_(2)
    with torch.no_grad():
        changed = model(**own).loss
    model.get_parameter("head").data.div_(2)
    loss = model(**own).loss
    loss.backward()
    return {
        "norm": norm, "losses": (before, changed, loss.detach()),
        "state": model.full_state_dict(), "gradients": model.full_gradients(),
        "held": [tuple(p.shape) for p in model.parameters()],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "compiled"])
def test_what_else_a_module_does_knows_its_parameters_alone(pool: Pool, kind: str) -> None:
    (_, first), _ = expected(3, 2)
    leaves = {name: (x - RATE * first[name]).requires_grad_() for name, x in state().items()}
    norm = torch.linalg.vector_norm(torch.cat([x.flatten() for x in first.values()]))
    for found in pool(2).run(around, kind):
        torch.testing.assert_close(found["norm"], norm, rtol=1e-9, atol=0)
        before, changed, loss = found["losses"]
        torch.testing.assert_close(before, loss, rtol=1e-12, atol=0)  # of other kernels
        assert (loss - changed).abs() > 1e-3
        assert found["held"] == [(4, WIDTH), *[(3, WIDTH)] * DEPTH]
        for name, x in leaves.items():
            torch.testing.assert_close(found["state"][name], x.detach(), rtol=0, atol=1e-12)
        want = torch.autograd.grad(alone(leaves), list(leaves.values()))
        for name, gradient in zip(leaves, want, strict=True):
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=0, atol=1e-10)


def alone(leaves: Mapping[str, Tensor]) -> Tensor:
    """The loss of the whole batch at once."""
    h, labels = batch().values()
    for i in range(DEPTH):
        h = torch.tanh(h @ leaves[f"layers.{i}.w"].t())
    logits, wanted = h[:, :-1] @ leaves["head"].t(), labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-9)
    return loss + 0.1 * h.square().mean()


def evaluated(weight: Weight, mesh: Mapping[str, int]) -> tuple[list[Tensor], list[float]]:
    """Losses and bytes gathered of evaluations: two, one of doubled weights, and one again; then
    the loss that training computes, of the same weights."""
    model = module(mesh, weight).from_state_dict(state())
    model.step(**rows_of(model), micro_batches=3)
    model.eval()
    losses: list[Tensor] = []
    gathered: list[float] = []
    for factor in (1, 1, 2, 1):
        if factor == 2:
            model.get_parameter("head").data.mul_(2)
        with torch.no_grad(), count_collectives() as counter:
            losses.append(model(**model.shard_rows(**rows_of(model))).loss)
        gathered.append(counter.bytes("all_gather"))
    losses.append(model.step(**rows_of(model.train())))
    return losses, gathered


@pytest.mark.parametrize("case", ["zero-1", "zero-2", "fsdp"])
def test_evaluation_makes_copies_once(pool: Pool, case: str) -> None:
    weight, mesh = CASES[case].weight, CASES[case].mesh
    want = alone(state()), alone(state() | {"head": 2 * state()["head"]})
    for losses, gathered in pool(2).run(evaluated, weight, mesh):
        for loss, wanted in zip(losses, (want[0], want[0], *[want[1]] * 3), strict=True):
            torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
        once, again, changed, last = gathered
        assert once == changed > 0
        assert again == last == (once if case == "fsdp" else 0)


def wrapped() -> str:
    try:
        nn.parallel.DistributedDataParallel(module(TWO, CASES["fsdp"].weight)())
    except RuntimeError as error:
        return str(error)
    return ""


def test_nobody_wraps_a_module_that_is_sharded(pool: Pool) -> None:
    assert all("train it as it is" in said for said in pool(2).run(wrapped))


def test_a_resumed_run_goes_on(pool: Pool, tmp_path: Path) -> None:
    first, second = pool(2).run(resumed, tmp_path)
    assert first == second
    straight, again = first
    assert straight == again


def resumed(folder: Path) -> tuple[list[float], list[float]]:
    """Losses of steps 2 and 3 of a run, and of another that goes on after step 1."""

    def fresh() -> tuple[Any, Any]:
        model = module(TWO, CASES["zero-1"].weight).from_state_dict(state())
        return model, model.optimizer(lr=RATE)

    def losses(model: Any, optimizer: Any, steps: int) -> list[float]:
        found: list[float] = []
        for _ in range(steps):
            found.append(model.step(**rows_of(model), micro_batches=2).item())
            optimizer.step()
            optimizer.zero_grad()
        return found

    model, optimizer = fresh()
    losses(model, optimizer, 1)
    model.save_checkpoint(folder, optimizer, step=1)
    straight = losses(model, optimizer, 2)
    model.wait_for_checkpoint()
    model, optimizer = fresh()
    model.load_checkpoint(folder, optimizer)
    return straight, losses(model, optimizer, 2)


def test_a_demonstration_takes_whole_steps(capfd: pytest.CaptureFixture[str]) -> None:
    kind = module({"x": 1}, CASES["ddp"].weight, dtype=F32)
    kind.MICRO_BATCHES, kind.OPTIMIZER = 3, "adamw"
    kind.demo(2)
    said = capfd.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["warm-up", "step 1", "step 2", "x=1"]
    assert all(", loss " in line for line in said[:3])


def refused(what: str) -> str:
    kind = module({"x": 1}, CASES["ddp"].weight)
    given: dict[str, Any] = batch()
    many = 3
    match what:
        case "rows":
            many = 5
        case "none":
            many = 0
        case "masks":
            kind.LABELS = "labels are computed with masks (model.py:3)"
        case "phase":
            kind.PHASE = "prefill"
        case "nan":
            given["x"][0, 0] = torch.nan
        case _:
            kind.LABELS = None
            given = {n: x.requires_grad_() if n == "x" else x for n, x in given.items()}
    model = kind.from_state_dict(state())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        with torch.set_grad_enabled(what != "no loss"):
            model.step(**given, micro_batches=many, error_if_nonfinite=True)
    return str(caught.value)


@pytest.mark.parametrize(("what", "message"), [
    ("rows", "input `x` has 12 rows here, which are not 5 equal micro-batches"),
    ("none", "a step has 1 micro-batch or more, got micro_batches=0"),
    ("masks", "takes steps of one micro-batch: labels are computed with masks (model.py:3)"),
    ("phase", "planned for prefill, which has no backward pass"),
    ("nan", "the loss of this step is nan"),
    ("no loss", "a step needs a loss: no output is a single number with a gradient"),
])  # fmt: skip
def test_what_can_not_be_is_said(what: str, message: str) -> None:
    assert message in refused(what)


@pytest.mark.parametrize(("weight", "message"), [
    (Weight("S0", "V", home=Home("S1")), "a home is on each axis as the parameter is stored, or V"),
    (Weight("S0", "V", home=Home("V", kept=False)), "keep it there, or give it no home"),
])  # fmt: skip
def test_homes_that_can_not_be(pool: Pool, weight: Weight, message: str) -> None:
    with pytest.raises(RankError, match=message):
        pool(2).run(train, [Case(TWO, weight)], 1, {})
