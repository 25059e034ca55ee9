"""Run a plan's module on gloo ranks beside the original model, and compare every number.

The module that runs is the plan's own file where this machine can run it; else the module that
the same decisions give for smaller sizes (`ir.shrink`).  Everything is computed in float64, also
what a model computes or keeps in a format of its own, so that the order of sums does not matter and
a wrong result cannot hide behind rounding.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .codegen.write import programs_source
from .compat.torch import TorchDispatchMode
from .conversation import (
    Step,
    by_graph,
    by_module,
    by_whole,
    conversation,
    is_served,
    length_of,
)
from .draws import Drawn, Recorder, Replayed, WithoutDropout, draws_of
from .facts.mesh import Mesh
from .facts.spec import R, Spec
from .facts.updated import updated_buffer, updated_path
from .folder import MODULE_FILE, PLAN_FILE
from .ir.capture.flex import written_out_flex
from .ir.capture.huggingface_experts import experts_in_loops
from .ir.graph import Graph, Node, Value
from .ir.ops.indices import index_limits
from .ir.ops.registry import local_of, operator_of
from .ir.passes.serving import POSITIONS
from .ir.reference.interpret import interpret
from .ir.reference.shrink import Planned, buffers_of, shrink, state_of
from .ir.reference.widen import wide, widened, without_dropout
from .loading import Loaded, given_inputs, load_target, with_positions, with_tokens_alone
from .original import build_original
from .planner.errors import PlanError
from .planner.plan.plan import PlanData
from .planner.plan.program import PricedStep, Program, lower
from .planner.plan.store import read_plan
from .runtime import PipelinedModule, RankError, RankPool
from .runtime.cache.declared import TOKENS
from .runtime.mesh.batches import arguments_of, tensors_of
from .trusted import import_source, import_users, module_in
from .written import wrote

# What runs on this machine as it is: bytes of parameters, gradients and results; FLOPs of a step.
_PARAMETER_BYTES, _RESULT_BYTES, _FLOPS = 4e9, 1e9, 1e12
_MOST_PARAMETERS = 2e8  # and after shrinking
_MOST_RANKS = 8
_TIMEOUT_S = 600.0
# Largest relative error that rounding explains in float64.
_TOLERANCE = 1e-9
# A tensor is compared on the scale of its largest entry, or of this part of its kind's largest.
_FLOOR = 1e-3


@dataclass(frozen=True, slots=True)
class Comparison:
    """The largest relative errors against one reference: what -> (error, name of the worst)."""

    reference: str
    errors: dict[str, tuple[float, str]]

    @property
    def ok(self) -> bool:
        """Is every error within the tolerance?  (NaN is not.)"""
        return all(error <= _TOLERANCE for error, _ in self.errors.values())


@dataclass(frozen=True, slots=True)
class Verification:
    """What `plan verify` found; `failure` is why the module could not be run or compared."""

    name: str
    planned: Mesh
    mesh: Mesh
    ran: str
    changes: tuple[tuple[str, int, int], ...]
    comparisons: tuple[Comparison, ...]
    failure: str = ""
    steps: str = ""  # of a served model: new tokens of each sequence
    note: str = ""  # on the original

    @property
    def ok(self) -> bool:
        """Does the plan's module do what the original does?"""
        return not self.failure and all(comparison.ok for comparison in self.comparisons)

    def __str__(self) -> str:
        lines = [f"{'PASS' if self.ok else 'FAIL'}: {self.name} on {self.mesh.ranks} ranks"]
        lines.append(f"  mesh        {self.mesh}" + _planned(self.planned, self.mesh))
        lines.append(f"  module      {self.ran}")
        if self.changes:
            lines += _wrapped("  sizes       ", [f"{w} {a} -> {b}" for w, a, b in self.changes])
        if self.steps:
            lines.append(f"  new tokens  {self.steps}")
        for comparison in self.comparisons:
            lines.append(
                f"  reference   {comparison.reference}: relative errors up to "
                f"{_TOLERANCE:.0e} are rounding"
            )
            for what, (error, worst) in comparison.errors.items():
                mark = "" if error <= _TOLERANCE else "   TOO LARGE"
                lines.append(f"    {what:<10}{error:10.2e}   {worst}{mark}")
        if self.note:
            lines.append(f"  original    {self.note}")
        if self.failure:
            lines.append(f"  {self.failure}")
        return "\n".join(lines)


def _planned(planned: Mesh, mesh: Mesh) -> str:
    return "" if planned == mesh else f" (planned: {planned})"


def _wrapped(head: str, items: list[str]) -> list[str]:
    lines = [head]
    for item in items:
        if len(lines[-1]) + len(item) > 98:
            lines.append(" " * len(head))
        lines[-1] += item if not lines[-1].strip() or lines[-1] == head else f", {item}"
    return lines


def verify(folder: Path, ranks: int | None = None, model: str | None = None) -> Verification:
    """Run the module in `folder` on `ranks` processes, and the original, on the same numbers.

    Default: the plan's own number of ranks where that is at most 8 and this machine can run the
    model as it is, else as few as keep every mesh axis.  The original is `model` (as `plan MODEL`
    takes it), else what the plan names; but no Python file that a plan from elsewhere names.
    Raises PlanError where no such run exists.
    """
    plan = read_plan(folder)
    text, edited = module_in(folder, plan)
    own = wrote(folder / PLAN_FILE)
    import_users(plan, model, own)
    plan, note = _with_original(plan, model, own)
    return replace(_verified(plan, folder / MODULE_FILE, text, edited, ranks), note=note)


def _with_original(plan: PlanData, model: str | None, own: bool) -> tuple[PlanData, str]:
    """The plan with the model file to compare with, and what is to be said of another."""
    named = plan.request.target
    is_code = named.partition(":")[0].endswith(".py")
    if model is None and (own or not is_code):
        return plan, ""
    note = "" if model else (
        f"{named} was not run: this plan was not written here by you; --model {named} runs it"
    )  # fmt: skip
    return replace(plan, request=replace(plan.request, target=model or "")), note


def _verified(
    plan: PlanData, path: Path, text: str, edited: bool, ranks: int | None
) -> Verification:
    runnable, few_tokens = _runs_here(plan.graph), _loads_here(plan.graph)
    own = plan.mesh.ranks <= _MOST_RANKS if ranks is None else ranks == plan.mesh.ranks
    if plan.pipeline is not None:
        _check_pipeline(plan, own=own and runnable)
    if own and runnable:
        ran = f"{path}" + (", which differs from what the plan generates" if edited else "")
        graph = widened(without_dropout(plan.graph))
        draws = [] if plan.pipeline is not None else draws_of(plan.program)
        case = _Case(plan, graph, plan.mesh, _widened_source(text), ran, (), True, draws)
        return _run(case)
    mesh = _smaller_mesh(plan.mesh, ranks)
    case = _shrunk_case(plan, mesh, tokens_only=few_tokens)
    if edited:
        reason = (
            f"{path} differs from what the plan generates, and only a plan can be run smaller: "
            f"{_advice(plan, runnable)}, or plan again"
        )
        return Verification(plan.graph.name, plan.mesh, mesh, case.ran, case.changes, (), reason)
    return _run(case)


def _check_pipeline(plan: PlanData, *, own: bool) -> None:
    """Raises PlanError where a pipeline cannot be run as it is."""
    assert plan.pipeline is not None
    if not own:
        raise PlanError(
            f"a pipeline is verified as it was planned, on its own {plan.mesh.ranks} ranks, at most"
            f" {_MOST_RANKS}, where this machine can run the whole model; verify the layout of a"
            " smaller configuration of the model, on fewer GPUs"
        )
    if any(draws_of(kind.program) for kind in plan.pipeline.kinds):
        raise PlanError(
            f"{plan.graph.name} draws random numbers, and stages of a pipeline draw apart from one"
            " another: they cannot be compared with one process"
        )


def _advice(plan: PlanData, runnable: bool) -> str:
    if runnable:
        return f"give --ranks {plan.mesh.ranks} to run the file itself"
    return "this model is too large to run as it is on this machine"


# --- what is run --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    """A module to run, with the graph that says what it must give, both in float64."""

    plan: PlanData
    graph: Graph
    mesh: Mesh
    source: str
    ran: str
    changes: tuple[tuple[str, int, int], ...]
    real: bool  # sizes of parameters are the original's
    draws: list[Drawn]  # what a forward pass draws, in order


def _shrunk_case(plan: PlanData, mesh: Mesh, *, tokens_only: bool) -> _Case:
    shrunk = shrink(
        [Planned(each.graph, each.decisions.choices, list(_specs(each))) for each in plan.phases],
        plan.mesh,
        mesh,
        tokens_only=tokens_only,
    )
    count = sum(value.type.numel for value in state_of(shrunk[0].graph).values())
    if count > _MOST_PARAMETERS:
        raise PlanError(
            f"{plan.graph.name} still has {count:.2g} parameter elements when its sizes are shrunk "
            f"as far as they can be (at most {_MOST_PARAMETERS:.0e} are run): it has an op whose "
            "sizes are not known to be free; verify a smaller configuration of the same model"
        )
    wide = [widened(each.graph) for each in shrunk]
    programs = [_program(each, graph) for each, graph in zip(plan.phases, wide, strict=True)]
    summary = f"{plan.graph.name}, smaller, on {mesh}."
    source = programs_source(plan, programs, mesh, summary=summary, optimizer="none")
    return _Case(
        plan,
        without_dropout(wide[0]),
        mesh,
        source,
        "generated from the plan's decisions for these sizes",
        shrunk[0].changes,
        tokens_only,
        draws_of(programs[0]),
    )


def _program(plan: PlanData, graph: Graph) -> Program:
    """The program of `plan` for `graph`, which has other sizes.

    Where some layers are recomputed and others are not, so it is in fewer layers.
    """
    free = {k: tuple(_unpriced(s) for s in steps) for k, steps in plan.paths.items()}

    def paths(value: Value, a: Spec, b: Spec) -> tuple[PricedStep, ...]:
        return free[value.name, a, b]

    most = min((len(loop.order) for loop in graph.loops), default=1) - 1
    layers = plan.decisions.recomputed.in_fewer(most + 1)
    decisions = replace(plan.decisions, kept_layers=layers.kept, part_layers=layers.part)
    return lower(graph, decisions, paths, training=plan.training)


def _unpriced(priced: PricedStep) -> PricedStep:
    """The same step without price and bytes, which do not hold for other sizes."""
    return replace(priced, seconds=0.0, traffic=())


def _specs(plan: PlanData) -> Iterator[tuple[str, Spec]]:
    """Every spec that a value takes, with the value's name."""
    yield from plan.decisions.specs.items()
    yield from plan.decisions.outputs.items()
    for (name, a, b), steps in plan.paths.items():
        yield name, a
        yield name, b
        for priced in steps:
            axes = priced.step.axes
            a = tuple(priced.step.b if i in axes else state for i, state in enumerate(a))
            yield name, a
    nodes = {node.name: node for node in plan.graph.nodes}
    for recache in plan.recached:  # batch and heads are cut as those of new keys; tokens are pages
        keys = nodes[recache.node].operands[1].name
        for spec in recache.path:
            yield keys, tuple(R if state == TOKENS else state for state in spec)


def _smaller_mesh(mesh: Mesh, ranks: int | None) -> Mesh:
    """Axis sizes that divide the planned ones: `ranks` in all, every axis kept if possible.

    Default: each axis as short as it can be, and at most 8 ranks.
    """
    every = list(product(*(_divisors(size) for size in mesh.sizes)))
    allowed = [s for s in every if (prod(s) <= _MOST_RANKS if ranks is None else prod(s) == ranks)]
    if not allowed:
        options = sorted({prod(sizes) for sizes in every})
        raise PlanError(
            f"--ranks {ranks}: each axis of the plan's mesh {mesh} must shrink to a divisor of its "
            f"size; possible numbers of ranks are {', '.join(map(str, options[:12]))}"
        )
    best = min(allowed, key=lambda s: (s.count(1), prod(s), [-n for n in s]))
    return Mesh(tuple(zip(mesh.names, best, strict=True)))


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _loads_here(graph: Graph) -> bool:
    """May every rank and this process hold all parameters?"""
    count = sum(value.type.numel for value in state_of(graph).values())
    return 8 * count * (_MOST_RANKS + 1) < _PARAMETER_BYTES


def _runs_here(graph: Graph) -> bool:
    """May every rank hold parameters and results, and run a step in well under a minute?"""
    results = flops = 0.0
    for node, repeats in _repeated(graph):
        size = float(sum(out.type.numel for out in node.outputs)) * repeats
        results += 8 * size
        operator = operator_of(node)
        flops += 3 * operator.flops(local_of(node)) * repeats  # backward takes two of three
        if operator.attends:
            keys = node.operands[1].type.shape[2]
            keys *= 3 if operator.remembers else 1  # as many are cached before, and more than that
            results += 24 * size / node.output.type.shape[-1] * keys
    return _loads_here(graph) and results < _RESULT_BYTES and flops < _FLOPS


def _repeated(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Every node with how often it runs."""
    for item in graph.body:
        if isinstance(item, Node):
            yield item, 1
        else:
            for kind, block in enumerate(item.blocks):
                yield from ((node, item.order.count(kind)) for node in block.nodes)


def _widened_source(text: str) -> str:
    """The module with every floating dtype as float64, every complex one as pairs of them."""
    text = re.sub(r"\btorch\.(bfloat16|float16|float32)\b", "torch.float64", text)
    return re.sub(r"\btorch\.(complex32|complex64)\b", "torch.complex128", text)


# --- the run ------------------------------------------------------------------------------------


def _run(case: _Case) -> Verification:
    state, steps = _random_state(case), _steps(case)
    inputs = _random_tokens(case.graph, steps) if steps else _random_inputs(case.graph)
    if steps and case.draws:
        raise PlanError(
            f"{case.plan.graph.name} draws random numbers while it answers; the answers of a "
            "conversation cannot be compared"
        )
    failure, training = "", case.plan.training
    comparisons: tuple[Comparison, ...] = ()
    with (
        tempfile.TemporaryDirectory(prefix="shardwright-verify-") as folder,
        RankPool(case.mesh.ranks) as pool,
    ):
        (Path(folder) / "generated.py").write_text(case.source, encoding="utf-8")
        try:
            try:
                references = _references(case, pool, folder, state, inputs, steps)
            except _OtherInputs:
                inputs = _own_inputs(case)
                references = _references(case, pool, folder, state, inputs, steps, " of its own")
            torch.save([r.expected for r in references], Path(folder) / "expected.pt")
            found = pool.run(compare_on_rank, folder, training, timeout_s=_TIMEOUT_S)
        except (RankError, TimeoutError) as error:
            failure = f"the module did not run: {_brief(error)}"
        except _OtherFormats as error:
            failure = str(error)
        else:
            comparisons = tuple(
                Comparison(r.title, _worst([rank[i] for rank in found]))
                for i, r in enumerate(references)
            )
    plan = case.plan
    return Verification(
        plan.graph.name, plan.mesh, case.mesh, case.ran, case.changes, comparisons, failure,
        ", ".join(map(str, steps)),
    )  # fmt: skip


def _brief(error: BaseException) -> str:
    """The first and the last line of a rank's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1]}"


Errors = dict[str, tuple[float, str]]


def _worst(ranks: list[Errors]) -> Errors:
    """Per kind the largest error on any rank; NaN counts as largest."""
    return {
        what: max((rank[what] for rank in ranks), key=lambda e: (e[0] != e[0], e[0]))
        for what in ranks[0]
    }


@dataclass(frozen=True, slots=True)
class _Reference:
    title: str
    expected: tuple[dict[str, Tensor], dict[str, Tensor]]  # outputs by path, gradients by name


class _OtherFormats(Exception):
    """The plan stores something in another dtype than the original has it in."""


class _OtherInputs(Exception):
    """The original does not take random inputs."""


def _references(
    case: _Case,
    pool: RankPool,
    folder: str,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    steps: Sequence[Step],
    told: str = "",
) -> list[_Reference]:
    """What the module is compared with; the case is in `folder` then.

    Raises _OtherInputs where the original refuses the inputs, and its file may have some.
    """
    content = {"state": state, "inputs": dict(inputs), "steps": list(map(tuple, steps))}
    torch.save(content, Path(folder) / "case.pt")
    draws: list[Tensor] = []
    if case.draws:
        draws = pool.run(draw_on_rank, folder, case.draws, timeout_s=_TIMEOUT_S)[0]
    references = [_captured(case, state, inputs, steps, draws)]
    if case.real and case.plan.request.target:
        references.append(_original(case, state, inputs, steps, draws, told))
    return references


def _own_inputs(case: _Case) -> dict[str, Tensor]:
    """The example inputs of the model's file for one micro-batch, in the formats of the graph."""
    request = case.plan.request
    given = given_inputs(request.target, _loaded(case.plan).model, request.rows, request.seq)
    found: dict[str, Tensor] = {}
    for item in case.graph.inputs:
        x, kind = given[item.name], item.value.type
        if tuple(x.shape) != kind.shape:
            raise PlanError(
                f"`{request.target}` has other example inputs than when it was planned:"
                f" `{item.name}` is {tuple(x.shape)}, planned {kind.shape}; plan it again"
            )
        found[item.name] = x.detach().to("cpu", kind.dtype)
    return found


def _captured(
    case: _Case,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    steps: Sequence[Step],
    draws: Sequence[Tensor],
) -> _Reference:
    """The captured graph in one process, which draws what ranks drew."""
    if steps:
        title = "the captured graph in one process, its cache whole, float64"
        with _float64_by_default():
            expected = by_graph(case.graph, state, steps, inputs["input_ids"])
        return _Reference(title, (expected, {}))
    leaves, given = _leaves(case, state), _given(case, inputs)
    with torch.set_grad_enabled(case.plan.training), _float64_by_default(), Replayed(draws):
        entries = {str(path): t for path, t in interpret(case.graph, leaves, given).items()}
    title = "the captured graph in one process, float64"
    return _Reference(title, _expected(case, entries, leaves, given))


def _original(
    case: _Case,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    steps: Sequence[Step],
    draws: Sequence[Tensor],
    told: str,
) -> _Reference:
    """The user's own model in float64, as it trains but for dropout, with what ranks drew.

    A served one gets whole sequences at once.  Where it refuses inputs that were drawn, and its
    file may have others, raises _OtherInputs; `told` says that these are such.
    """
    model = build_original(case.plan.request.target, case.plan.request.formats)
    model.train(case.plan.training)
    experts_in_loops(model)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    unknown = _wide_model(model).load_state_dict(dict(state), strict=False).unexpected_keys
    if unknown:
        raise PlanError(
            f"`{case.plan.request.target}` has changed since it was planned: it has no "
            f"{', '.join(unknown[:3])}; plan it again"
        )
    for name, value in state_of(case.plan.graph).items():
        if value.type.dtype != dtypes[name]:
            raise _OtherFormats(f"`{name}` is {dtypes[name]}, and {value.type.dtype} in the plan")
    leaves = {n: p for n, p in model.named_parameters() if n in state}
    given = _given(case, inputs)
    call = _call_of(case, given, steps)
    with (
        torch.set_grad_enabled(case.plan.training),
        _float64_by_default(),
        _WideDtypes(),
        Replayed(draws),
        WithoutDropout(),
        written_out_flex() as written_out,
    ):
        try:
            out = call(model)
        except Exception as error:
            if told or steps or not _file_of(case.plan):
                raise PlanError(
                    f"{type(model).__name__} from {case.plan.request.target} does not run on"
                    f" inputs{told or ' drawn at random'}: {type(error).__name__}: {error}"
                ) from error
            raise _OtherInputs from error
    found = {str(path): t for path, t in _flatten(out)}
    paths = [str(output.path) for output in case.graph.outputs]
    buffers = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for output in case.graph.outputs:
        if name := updated_buffer(output.path):
            found[str(output.path)] = buffers[name].detach()
    entries = {path: found[path] for path in paths if path in found}
    at_once = ", whole sequences at once" if steps else ""
    at_once += ", `flex_attention` replaced by its formula" if written_out else ""
    at_once += f", on example inputs{told}" if told else ""
    title = f"{type(model).__name__} itself from {case.plan.request.target}{at_once}, float64"
    if steps:
        expected = by_whole(entries[paths[0]], steps), {}
    else:
        expected = _expected(case, entries, leaves, given)
    return _Reference(title, expected)


def _wide_model(model: nn.Module) -> nn.Module:
    """`model` itself, all of its real and complex numbers in 64 bits each."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(wide(tensor.dtype))
    return model


def _call_of(
    case: _Case, inputs: Mapping[str, Tensor], steps: Sequence[Step]
) -> Callable[[nn.Module], Any]:
    """Calls the original on these tensors, in the form in which it takes them."""
    if not steps and case.graph.signature is None:
        return lambda model: model(**inputs)
    loaded = _loaded(case.plan)
    if steps:
        whole = _whole_sequences(loaded, inputs)
        return lambda model: model(**whole)
    arguments = loaded.arguments
    if repr(arguments.signature) != repr(case.graph.signature):  # NaN is like itself
        raise PlanError(
            f"`{case.plan.request.target}` has other example inputs than when it was planned; plan "
            "it again"
        )
    return lambda model: arguments.call(model, inputs)


def _file_of(plan: PlanData) -> bool:
    """Is the model from a Python file, which has example inputs?"""
    return plan.request.target.partition(":")[0].endswith(".py")


def _loaded(plan: PlanData) -> Loaded:
    """The plan's model and example inputs as they are now."""
    request = plan.request
    return load_target(
        request.target,
        batch=request.rows,
        seq=request.seq,
        phase=request.phase,
        formats=request.formats,
    )


def _whole_sequences(loaded: Loaded, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens and positions under the names that the original model has for them."""
    served = with_positions(loaded) or with_tokens_alone(loaded)
    assert served is not None  # it was planned so
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {name: positions if name in POSITIONS else ids for name in served.tensors}


class _WideDtypes(TorchDispatchMode):
    """Wherever a model names a floating format, it gets float64: what `widened` does to a graph.

    Numbers that it writes out as a tensor are rounded to their own format first, as in a graph.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = {name: _wide(arg) for name, arg in (kwargs or {}).items()}
        made = func(*map(_wide, args), **keywords)
        return made.to(wide(made.dtype)) if func is _WRITTEN else made


_WRITTEN = torch.ops.aten.lift_fresh.default  # what `torch.tensor(0.1)` ends with


def _wide(arg: Any) -> Any:
    return wide(arg) if isinstance(arg, torch.dtype) else arg


@contextmanager
def _float64_by_default() -> Generator[None]:
    """Inside, what is computed of whole numbers alone (1 / arange) is float64, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _leaves(case: _Case, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    trained = {n for n, value in state_of(case.graph).items() if value.differentiable}
    train = case.plan.training
    return {name: t.clone().requires_grad_(train and name in trained) for name, t in state.items()}


def _given(case: _Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, those of which gradients were planned as leaves."""
    wanted = {item.name for item in case.graph.inputs if item.value.differentiable}
    train = case.plan.training
    return {name: x.clone().requires_grad_() if train and name in wanted else x
            for name, x in inputs.items()}  # fmt: skip


def _expected(
    case: _Case,
    entries: dict[str, Tensor],
    leaves: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of the loss (or of `_combined` outputs), those of inputs too."""
    if case.plan.training:
        weights = {path: _weights_like(t) for path, t in entries.items()}
        _combined(entries, weights).backward()
    every = {**leaves, **{_input(name): x for name, x in given.items()}}
    gradients = {name: leaf.grad for name, leaf in every.items() if leaf.grad is not None}
    return {path: t.detach() for path, t in entries.items()}, gradients


def _input(name: str) -> str:
    """What the gradient of an input is called among those of parameters."""
    return f"input {name}"


def _combined(entries: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """The loss if there is one, else a sum of all trained outputs with fixed weights."""
    scalars = [t for t in entries.values() if t.ndim == 0 and t.requires_grad]
    if scalars:
        return scalars[0]
    parts = [
        (part * weights[path].to(part)).sum()
        for path, t in entries.items()
        for part in ((t.real, t.imag) if t.is_complex() else (t,))
        if t.requires_grad
    ]
    if not parts:
        raise PlanError("no output of this model has a gradient; plan it with --phase prefill")
    return torch.stack(parts).sum()


def _weights_like(t: Tensor) -> Tensor:
    """Fixed numbers between -1 and 1 of the shape of `t`."""
    return torch.sin(torch.arange(t.numel(), dtype=torch.float64) * 12.9898).reshape(t.shape)


def _flatten(outputs: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """(path, tensor) pairs of a nested structure of outputs."""
    if isinstance(outputs, Tensor):
        return [(path, outputs)]
    if isinstance(outputs, Mapping):
        pairs: Any = outputs.items()
    elif isinstance(outputs, (tuple, list)):
        pairs = enumerate(outputs)
    else:
        return []
    return [leaf for key, item in pairs for leaf in _flatten(item, (*path, key))]


# --- numbers ------------------------------------------------------------------------------------


def _random_state(case: _Case) -> dict[str, Tensor]:
    """Weights under which every op matters: about unit variance through every layer.

    Persistent buffers of the original model keep their values where it can be built.
    """
    generator = torch.Generator().manual_seed(0)
    kept = buffers_of(case.graph)
    buffers: Mapping[str, Tensor] = {}
    if case.real and case.plan.request.target and kept:
        buffers = dict(
            build_original(case.plan.request.target, case.plan.request.formats).named_buffers()
        )
    state: dict[str, Tensor] = {}
    for name, value in state_of(case.graph).items():
        shape, dtype = value.type.shape, value.type.dtype
        if name in kept and name in buffers:
            state[name] = buffers[name].to(wide(buffers[name].dtype))
        elif not value.type.continuous:
            state[name] = torch.ones(shape, dtype=dtype) * (dtype == torch.bool)
        else:
            spread = 0.1 if len(shape) < 2 else shape[-1] ** -0.5
            state[name] = torch.randn(shape, generator=generator, dtype=dtype) * spread
            if len(shape) < 2 and not name.endswith("bias"):
                state[name] += 1.0
    return state


def _steps(case: _Case) -> list[Step]:
    """What a served model is given; no steps for any other."""
    graph = case.graph
    if not is_served(graph):
        return []
    positions = next(item.value for item in graph.inputs if item.name == "position_ids")
    batch, tokens = positions.type.shape
    rows, _ = index_limits(graph, positions.name)
    return conversation(
        batch, tokens, case.plan.request.context, case.mesh.ranks, min([*rows, sys.maxsize])
    )


def _random_tokens(graph: Graph, steps: Sequence[Step]) -> dict[str, Tensor]:
    """Tokens (b, s) of sequences as long as `steps` need."""
    generator = torch.Generator().manual_seed(1)
    tokens = next(item.value for item in graph.inputs if item.name == "input_ids")
    limits, _ = index_limits(graph, tokens.name)
    shape = (tokens.type.shape[0], length_of(steps))
    return {"input_ids": torch.randint(0, min(limits), shape, generator=generator)}


def _random_inputs(graph: Graph) -> dict[str, Tensor]:
    """Inputs as the graph can take them: indices in range, one label in eight ignored."""
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Tensor] = {}
    for item in graph.inputs:
        shape, dtype = item.value.type.shape, item.value.type.dtype
        if item.value.type.continuous:
            inputs[item.name] = torch.randn(shape, generator=generator, dtype=dtype)
            continue
        limits, ignored = index_limits(graph, item.value.name)
        if not limits:
            inputs[item.name] = torch.ones(shape, dtype=dtype)
            continue
        numbers = torch.randint(0, min(limits), shape, generator=generator)
        if ignored is not None:
            numbers[torch.rand(shape, generator=generator) < 1 / 8] = ignored
        inputs[item.name] = numbers.to(dtype)
    return inputs


# --- in each rank -------------------------------------------------------------------------------


def draw_on_rank(folder: str, planned: list[Drawn]) -> list[Tensor]:
    """What all ranks draw together in a forward pass of what `compare_on_rank` runs."""
    case, model = _loaded_on_rank(folder)
    local = _own_arguments(model, case)
    with torch.no_grad(), _float64_by_default(), Recorder() as recorder:
        model(**local)
    return recorder.whole(planned, model.mesh)


def _loaded_on_rank(folder: str) -> tuple[dict[str, Any], Any]:
    """`folder`/case.pt, and `folder`/generated.py with its weights, which draws always alike."""
    case = torch.load(Path(folder) / "case.pt", mmap=True, weights_only=True)
    module = import_source(Path(folder) / "generated.py")
    model = module.ShardedModel.from_state_dict(case["state"]).eval()
    model.training = bool(_updates(model))  # layers stay without dropout
    model.mesh.manual_seed(0)
    return case, model


def compare_on_rank(folder: str, training: bool) -> list[Errors]:
    """Run `folder`/generated.py on the numbers in `folder`/case.pt; errors per reference."""
    case, model = _loaded_on_rank(folder)
    wanted = torch.load(Path(folder) / "expected.pt", mmap=True, weights_only=True)
    steps = [Step(*step) for step in case["steps"]]
    if not steps and _in_stages(model):
        return _compare_step(model, case, wanted)
    leaves: dict[str, Tensor] = {}
    if steps:
        with _float64_by_default():
            outputs = by_module(model, steps, case["inputs"]["input_ids"])
    else:
        local = _own_arguments(model, case)
        leaves = _input_leaves(model, local) if training else {}
        with torch.set_grad_enabled(training), _float64_by_default():
            out = model(**local)
        if training:
            _local_loss(model, out).backward()
        with torch.no_grad():
            outputs = {str(path): t for path, t in _flatten(model.gather_outputs(out))}
        state = model.full_state_dict() if _updates(model) else {}
        outputs |= {str(updated_path(name)): state[name] for name in _updates(model)}
    found: list[Errors] = []
    for expected, all_gradients in wanted:
        errors = _output_errors(outputs, expected)
        if training:
            own = {
                _input(name): model.local_part(all_gradients[_input(name)], model.INPUTS[name].spec)
                for name in leaves
                if _input(name) in all_gradients
            }
            got = model.full_gradients() | {_input(name): x.grad for name, x in leaves.items()}
            errors["gradients"] = _errors(got, all_gradients | own)
        found.append(errors)
    return found


def _input_leaves(model: Any, local: Mapping[str, object]) -> dict[str, Tensor]:
    """The inputs among this rank's arguments of which it gets its part of the gradient."""
    tensors = tensors_of(model.INPUTS, local, model.FIXED)
    return {name: x.requires_grad_() for name, x in tensors.items() if model.INPUTS[name].gradient}


def _compare_step(
    model: PipelinedModule, case: Mapping[str, Any], wanted: Sequence[Any]
) -> list[Errors]:
    """Errors of the loss and of all gradients of a step of a pipeline.

    Its micro-batches have the same rows, each in an order of its own, so that the loss of all is
    that of one, and what is of different ones does not fit together.
    """
    shard, inputs, count = model.data_shard, model.inputs, model.MICRO_BATCHES
    rows: dict[str, Tensor] = {}
    for name, form in inputs.items():
        x, free = case["inputs"][name], 0 in form.free
        parts = [shard.of(x.roll(k, 0)) if free else x for k in range(count)]
        rows[name] = torch.cat(parts) if x.ndim else x
    with _float64_by_default():
        loss = model.step(**dict[str, Any](rows))
    gradients = model.full_gradients()
    found: list[Errors] = []
    for outputs, of in wanted:
        scalar = next(path for path, t in outputs.items() if t.ndim == 0)
        found.append(
            {
                "loss": _errors({scalar: loss}, {scalar: outputs[scalar]}),
                "gradients": _errors(gradients, of),
            }
        )
    return found


def _in_stages(model: Any) -> bool:
    """Is it a pipeline?"""
    return isinstance(model, PipelinedModule)


def _updates(model: Any) -> list[str]:
    """The buffers that the module's program changes."""
    if _in_stages(model):
        return []
    return [name for output in model.OUTPUTS if (name := updated_buffer(output.path))]


def _own_arguments(model: Any, case: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's part of the case's inputs, in the form in which the module takes them."""
    return model.shard_inputs(**arguments_of(model.INPUTS, case["inputs"], model.FIXED))


def _local_loss(model: Any, out: Any) -> Tensor:
    """This rank's part of `_combined`."""
    specs = {str(o.path): o for o in model.OUTPUTS}
    entries = {str(path): t for path, t in _flatten(out)}
    weights = {
        path: model.local_part(_weights_like(torch.empty(specs[path].shape)), specs[path].spec)
        for path in entries
    }
    return _combined(entries, weights)


def _output_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Errors:
    """Scalars (the loss) apart from the others."""
    parts = {
        "loss": {path: t for path, t in want.items() if t.ndim == 0 and not _is_buffer(path)},
        "outputs": {path: t for path, t in want.items() if t.ndim and not _is_buffer(path)},
        "buffers": {path: t for path, t in want.items() if _is_buffer(path)},
    }
    return {what: _errors(got, part) for what, part in parts.items() if part}


def _is_buffer(path: str) -> bool:
    """Is it the new value of a buffer that stands at this path, written as text?"""
    return path.startswith(str(updated_path(""))[:-3])


def _errors(got: Mapping[str, Tensor | None], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest error and whose it is; a tensor that is missing or misshapen counts as inf."""
    largest = max((_largest(t) for t in want.values()), default=0.0)
    worst = (0.0, "")
    for name, expected in want.items():
        found = got.get(name)
        error = float("inf")
        if found is not None and found.shape == expected.shape:
            scale = max(_largest(expected), _FLOOR * largest) or 1.0
            error = _largest(_exact(found) - _exact(expected)) / scale
        if not worst[1] or error > worst[0] or error != error:
            worst = (error, name)
        if error != error:
            break
    return worst


def _exact(t: Tensor) -> Tensor:
    """In numbers of 64 bits, complex ones with both parts."""
    return t.to(torch.complex128) if t.is_complex() else t.double()


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


__all__ = ["Comparison", "Verification", "verify"]
