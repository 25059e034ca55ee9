"""`capture`: from a PyTorch module and example inputs to a `Graph`, without allocating weights.

1. check the inputs against `forward`
2. replace every tensor of the model by a fake one: shape and dtype, no memory
3. `torch.export` runs `forward` once and records what it calls
4. convert the recording to our graph, and bring it to canonical form
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from ...compat.torch import (
    TooManyOperators,
    at_most,
    fake_tensors,
    is_fake,
    own_hooks,
    transient_buffers,
    tree_unflatten,
    whole_stacks,
)
from ...compat.transformers import State, is_pretrained
from ...facts.updated import updated_path
from ..graph import Graph, Input, Loop, Output, Param, TensorType, Value
from ..graph.rewrite import flat
from ..ops.live import remove_dead
from ..ops.random import draws_otherwise
from ..passes.fold import fold
from ..passes.invariants import computed_once
from ..passes.matrices import with_matrices
from ..passes.raising import raised
from . import huggingface
from .arguments import Arguments
from .autocast import ForeignAutocast, own_autocast
from .canonical import canonicalise
from .constants import UnknownConstant, recover
from .errors import CaptureError
from .flex import captured_flex
from .functions import OwnBackward, keeping_functions
from .fx import EXPERTS_HINT, UnsupportedNode, convert
from .hooks import PlainCalls, check_hooks, refusing_hooks
from .location import first_calls, innermost_frame, place
from .remembered import Watched
from .repeat import Repeats, cut, repeats
from .states import StartsAnew, kept_states

# Operators of a capture at another size: a loop over its tokens would not end.
_MOST_OPERATORS = 20_000
# A constant with more elements than this would make the plan file unreadable.
_CONSTANT_LIMIT = 2**22


def capture(
    model: nn.Module,
    inputs: object,
    *,
    training: bool,
    serving: bool = False,
    rebuild: Callable[[], nn.Module] | None = None,
    most: int | None = None,
) -> Graph:
    """The flat, canonical graph of `model(**inputs)`, every layer written out.

    `inputs` may have any form that `forward` takes, a tuple for positional ones (`arguments.py`).
    `model` and `inputs` may be on the meta device; neither is changed.  `training` decides about
    dropout.  `serving` says that `position_ids` among the inputs tell where new tokens of one
    sequence per row stand, and not that rows are packed.  `rebuild` makes the model anew; it is
    called only if a non-persistent buffer has no value.  Raises CaptureError, also where more than
    `most` operators run, and where the next forward pass would be another one (`remembered.py`;
    with `most`, this was looked at before).
    """
    arguments = Arguments.of(model, inputs)
    build = _rebuilding(model, rebuild)

    def once() -> tuple[Graph, Watched]:
        watched = Watched(model)
        try:
            with watched:
                found = export(model, arguments, training=training, serving=serving, most=most)
        except StartsAnew:  # whose lines may show a recurrence even so
            with watched:
                found = export(model, arguments, training=training, serving=serving, states=False)
        return _finish(model, arguments, *found, build), watched

    graph, watched = once()
    if watched.installs:
        graph, watched = once()
    if most is None:
        for left in watched.later():
            with watched.as_left(left):
                try:
                    same = repr(once()[0]) == repr(graph)
                except CaptureError:
                    same = False
            if not same:
                raise CaptureError(watched.told(left))
    return graph


def capture_folded(
    model: nn.Module,
    inputs: object,
    *,
    training: bool,
    serving: bool = False,
    rebuild: Callable[[], nn.Module] | None = None,
) -> Graph:
    """The folded graph, but fast for deep models: layers that repeat are not all exported.

    Formulas that the model writes out are one operator each, and nothing is computed twice.
    Arguments and errors as `capture`.
    """
    return captured(model, inputs, training=training, serving=serving, rebuild=rebuild).graph


@dataclass(frozen=True, slots=True)
class Captured:
    """The folded graph of a model, and the way to it for other tensors by the names of its inputs.

    `again` takes layers to repeat as they did, and raises CaptureError where they do not.
    """

    graph: Graph
    again: Callable[[Mapping[str, Tensor]], Graph]


def captured(
    model: nn.Module,
    inputs: object,
    *,
    training: bool,
    serving: bool = False,
    rebuild: Callable[[], nn.Module] | None = None,
) -> Captured:
    """As `capture_folded`, for models that are captured with several sizes."""
    if training:
        check_hooks(model)
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    arguments = Arguments.of(model, inputs)
    tensors = arguments.tensors
    with _mode(model, training), arguments.flat_forward(model):
        short = repeats(model, tensors, lambda: _on_meta(model, tensors, serving, training))
    build = _rebuilding(model, rebuild)
    once = build and functools.cache(build)

    def folded(given: Arguments, layers: Repeats | None, most: int | None = None) -> Graph | None:
        with cut(model, layers.kept if layers else {}):
            flat = capture(
                model, given, training=training, serving=serving, rebuild=once, most=most
            )
            graph = fold(with_matrices(flat) if training else flat, classes)
        whole = _extended(graph, layers) if layers else graph
        return whole and computed_once(raised(whole))

    made = short and folded(arguments, short)
    layers = short if made else None
    graph = made or folded(arguments, None)
    assert graph is not None

    def again(other: Mapping[str, Tensor]) -> Graph:
        found = folded(arguments.with_tensors(other), layers, _MOST_OPERATORS)
        if found is None:
            raise CaptureError("the layers that repeat are others then")
        return found

    return Captured(graph, again)


def _rebuilding(
    model: nn.Module, rebuild: Callable[[], nn.Module] | None
) -> Callable[[], nn.Module] | None:
    """What makes the model anew, if anything does."""
    if rebuild is None and is_pretrained(model):
        return functools.partial(huggingface.rebuild, model)
    return rebuild


def _extended(graph: Graph, short: Repeats) -> Graph | None:
    """The graph of the cut model with its loops run over all layers; None if one is no loop."""
    loops = {loop.path: loop for loop in graph.loops}
    for path, kept in short.kept.items():
        like = short.like[path]
        if kept == len(like):
            continue
        if path not in loops or len(loops[path].order) != kept:
            return None
        order = loops[path].order
        loops[path] = replace(loops[path], order=tuple(order[layer] for layer in like))
    body = tuple(loops[item.path] if isinstance(item, Loop) else item for item in graph.body)
    return replace(graph, body=body)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The model's tensors: name -> tensor, and each tensor's first name -> further names."""

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    persistent: frozenset[str]
    first: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> _Tensors:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        transient = {
            f"{path}.{name}" if path else name
            for path, module in model.named_modules(remove_duplicate=False)
            for name in transient_buffers(module)
        }
        by_id: dict[int, str] = {}
        first = {name: by_id.setdefault(id(t), name) for name, t in (parameters | buffers).items()}
        return cls(parameters, buffers, frozenset(buffers) - transient, first)


def export(
    model: nn.Module,
    inputs: Arguments,
    *,
    training: bool,
    serving: bool = False,
    states: bool = True,
    most: int | None = None,
) -> tuple[ExportedProgram, _Tensors]:
    """Run `torch.export` on fake tensors; for serving with the `states` of layers as inputs.

    Raises CaptureError for what it refuses, StartsAnew where a layer reads no state.
    """
    if training:
        check_hooks(model)
    tensors = _Tensors.of(model)
    fake = fake_tensors(beside_real=True)
    arguments = {name: _fake(value, fake) for name, value in inputs.tensors.items()}
    make = functools.partial(_fake, mode=fake)
    try:
        with (
            _mode(model, training),
            _attention(model, arguments, serving),
            _replaced(model, make),
            inputs.flat_forward(model),
            _gradients(training),
            own_autocast(),
            whole_stacks(),
            own_hooks(),
            at_most(most),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", ".* assigned during export")  # see remembered.py
            kept = _states(model, arguments, fake) if serving and states else {}
            given = arguments | {huggingface.state_name(state): x for state, x in kept.items()}
            with huggingface.states_given(model, tuple(arguments), tuple(kept)):
                program = torch.export.export(model, args=(), kwargs=given, strict=False)
    except (OwnBackward, ForeignAutocast) as error:
        raise CaptureError(str(error)) from error
    except (StartsAnew, CaptureError):
        raise
    except TooManyOperators as error:
        raise CaptureError(f"{type(model).__name__} runs more than {most:,} operators") from error
    except Exception as error:  # `forward` is the user's code: it may raise anything
        raise CaptureError(_explain(model, error)) from error
    return program, tensors


def _states(
    model: nn.Module, inputs: Mapping[str, Tensor], mode: AbstractContextManager[object]
) -> dict[State, Tensor]:
    """The states that layers of a Hugging Face model keep in its cache, on fake tensors."""
    if not is_pretrained(model):
        return {}
    with mode:
        found = huggingface.state_shapes(model, inputs)
    return {state: _fake(value, mode) for state, value in found.items()}


@contextmanager
def _attention(model: nn.Module, inputs: Mapping[str, Tensor], serving: bool) -> Generator[None]:
    """Inside, Hugging Face models and `flex_attention` call our attention operator."""
    with captured_flex():
        if not is_pretrained(model):
            yield
            return
        packed = "position_ids" in inputs and not serving
        with huggingface.shardwright_attention(model, positions_given=packed, serving=serving):
            yield


@contextmanager
def _gradients(training: bool) -> Generator[None]:
    """Inside, what says itself how gradients flow is kept or refused, where there are any."""
    with PlainCalls(training=training):
        if not training:
            yield
            return
        with keeping_functions(), refusing_hooks():
            yield


# ---- fake tensors ------------------------------------------------------------------------------


def _fake(value: Tensor, mode: AbstractContextManager[object]) -> Tensor:
    """A tensor of the same shape and dtype, without memory, that says it is on the CPU.

    Fake CPU tensors rather than meta tensors: `torch.arange(n)` in a forward gives a CPU tensor,
    and a model on the meta device could not add the two.
    """
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")


@contextmanager
def _on_meta(
    model: nn.Module, inputs: Mapping[str, Tensor], serving: bool, training: bool
) -> Generator[None]:
    """Inside, `model` runs on meta tensors as it would be exported."""
    with (
        _attention(model, inputs, serving),
        _gradients(training),
        _replaced(model, functools.partial(torch.empty_like, device="meta")),
        Watched(model),
    ):
        yield


@contextmanager
def _replaced(model: nn.Module, make: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Inside, the model's parameters and buffers are what `make` makes of them; ties are kept."""
    twins: dict[int, Tensor] = {}
    before: list[tuple[nn.Module, str, Tensor]] = []

    def twin(value: Tensor) -> Tensor:
        if id(value) not in twins:
            new = make(value.detach())
            if isinstance(value, nn.Parameter):
                new = nn.Parameter(new, requires_grad=value.requires_grad)
            twins[id(value)] = new
        return twins[id(value)]

    try:
        for module in model.modules():
            own = (
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            )
            for name, value in own:
                before.append((module, name, value))
                setattr(module, name, twin(value))
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Generator[None]:
    """Inside, the model is in training or evaluation mode."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was in before:
            module.training = was


# ---- from the exported program to the graph ----------------------------------------------------


def _finish(
    model: nn.Module,
    arguments: Arguments,
    program: ExportedProgram,
    tensors: _Tensors,
    rebuild: Callable[[], nn.Module] | None,
) -> Graph:
    """Convert and canonicalise."""
    bound, inputs, params, lifted = _bind_placeholders(program, tensors, arguments)
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"the model changes `{spec.target}` while it runs; a sharded model has no such "
                "state yet"
            )
    try:
        nodes, returned, updated = convert(program.graph_module, bound, first_calls(model), params)
    except UnsupportedNode as error:
        raise CaptureError(str(error)) from error
    body, inputs, outputs = kept_states(nodes, inputs, _outputs(program, returned), arguments.paths)
    outputs += tuple(Output(updated_path(name), value) for name, value in updated.items())
    graph = remove_dead(
        Graph(
            type(model).__name__,
            tuple(_placed(item, arguments) for item in inputs),
            params,
            body,
            outputs,
            arguments.signature,
        )
    )
    _check_masks(graph)
    _check_products(graph)
    found = canonicalise(_with_data(graph, model, tensors, lifted, rebuild))
    _check_draws(found)
    return found


def _check_draws(graph: Graph) -> None:
    """Raise CaptureError where a node draws random numbers that ranks cannot draw alike."""
    for node in flat(graph):
        if draws_otherwise(node):
            raise CaptureError(
                f"{node.loc}: `{node.op}` draws random numbers in a way of its own, and copies of "
                "a tensor would get different ones; draw them with `torch.rand`, `torch.randn`, "
                "`torch.bernoulli` or `F.dropout`, and compute with the result"
            )


def _placed(item: Input, arguments: Arguments) -> Input:
    """The input with its path where it is no argument itself."""
    path = arguments.paths[item.name]
    return item if len(path) == 1 else replace(item, path=path)


def _check_masks(graph: Graph) -> None:
    """Raise CaptureError where a node reads a mask that only our attention operator understands."""
    stand_ins: set[str] = set()
    for node in flat(graph):
        if node.op == "shardwright.mask_stand_in.default":
            stand_ins.add(node.output.name)
        elif any(value.name in stand_ins for value in node.operands):
            raise CaptureError(
                f"{node.loc}: {node.loc.module_class} computes with the attention mask itself, "
                "outside transformers' attention functions; its attention cannot be kept whole. "
                'Pass a whole 4-D `attention_mask`, or build the model with attention "sdpa"'
            )


_PRODUCTS = frozenset(
    {"aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default"}
)


def _check_products(graph: Graph) -> None:
    """Raise CaptureError for products of numbers in unlike formats: torch refuses them as they run,
    but not on fake tensors."""
    for node in flat(graph):
        found = {value.type.dtype for value in node.operands}
        if node.op in _PRODUCTS and len(found) > 1:
            kinds = " by ".join(sorted(str(kind).removeprefix("torch.") for kind in found))
            raise CaptureError(
                f"{node.loc}: {node.loc.module_class or graph.name} multiplies {kinds}, which "
                "torch does not; cast one in `forward`, or compute in the model's own formats "
                "(--precision own)"
            )


def _keywords(program: ExportedProgram) -> dict[str, str]:
    """The keyword behind each of the inputs' placeholders: export writes `F` as `f`."""
    placeholders = list(program.graph_signature.user_inputs)
    structure = program.call_spec.in_spec
    assert structure is not None
    _, keywords = tree_unflatten(placeholders, structure)
    return {placeholder: keyword for keyword, placeholder in keywords.items()}


def _bind_placeholders(
    program: ExportedProgram, tensors: _Tensors, arguments: Arguments
) -> tuple[dict[fx.Node, Value | None], tuple[Input, ...], tuple[Param, ...], dict[str, Tensor]]:
    """Values of the graph's placeholders; all inputs; all parameters, buffers and constants of the
    model; the tensors of those constants that are no buffers, by name."""
    params = {p.name: p for p in _params(tensors)}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    bound: dict[fx.Node, Value | None] = {}
    keywords = _keywords(program)
    inputs: list[Input] = []
    lifted: dict[str, Tensor] = {}
    for node in program.graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        value = node.meta.get("val")
        if spec.kind is InputKind.USER_INPUT:
            if not isinstance(value, Tensor):
                bound[node] = None
                continue
            name = node.name
            while name in params:  # a part of the model that is called as an argument is
                name = f"given_{name}"
            passed = arguments.tensors.get(keywords[node.name])
            wanted = passed is not None and passed.requires_grad
            given = Value(name, TensorType(tuple(value.shape), value.dtype), wanted)
            bound[node] = given
            inputs.append(Input(keywords[node.name], given))
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            bound[node] = params[tensors.first[spec.target]].value
        elif spec.kind is InputKind.CONSTANT_TENSOR and isinstance(value, Tensor):
            assert spec.target is not None
            # export numbers them through the model; numbered by module, equal layers stay equal
            owner = spec.target.rpartition(".")[0]
            owner = f"{owner}." if owner else ""
            number = sum(name.startswith(f"{owner}constant_") for name in lifted)
            name = f"{owner}constant_{number}"
            tensor = program.constants[spec.target]
            assert isinstance(tensor, Tensor)
            lifted[name] = tensor
            constant = Value(name, TensorType(tuple(value.shape), value.dtype))
            params[name] = Param(name, constant, "constant")
            bound[node] = constant
        else:
            raise CaptureError(f"the model uses `{spec.target}`, which is no tensor")
    return bound, tuple(inputs), tuple(params.values()), lifted


def _params(tensors: _Tensors) -> Iterator[Param]:
    """Every parameter and buffer once, under its first name."""
    for name, tensor in (tensors.parameters | tensors.buffers).items():
        if tensors.first[name] != name:
            continue
        aliases = tuple(other for other, first in tensors.first.items() if first == name != other)
        parameter = isinstance(tensor, nn.Parameter)
        kept = parameter or name in tensors.persistent
        kind = "parameter" if parameter else "buffer" if kept else "constant"
        kind_of_tensor = TensorType(tuple(tensor.shape), tensor.dtype)
        value = Value(name, kind_of_tensor, tensor.requires_grad and kind_of_tensor.continuous)
        yield Param(name, value, kind, aliases)


def _outputs(program: ExportedProgram, returned: Any) -> tuple[Output, ...]:
    """The returned tensors with their paths; None and plain numbers are dropped."""
    spec = program.call_spec.out_spec
    assert spec is not None
    structure = spec.unflatten(list(returned))
    outputs = tuple(Output(path, value) for path, value in _leaves(structure, ()))
    if not outputs:
        raise CaptureError("the model returns no tensor")
    return outputs


def _leaves(
    item: Any, path: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], Value]]:
    """(path, value) of every value in nested dicts, tuples and lists."""
    if isinstance(item, Value):
        yield path, item
    elif isinstance(item, Mapping):
        for key, inner in item.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(item, (tuple, list)):
        for index, inner in enumerate(item):
            yield from _leaves(inner, (*path, index))
    elif item is not None and not isinstance(item, (int, float, bool, str)):
        raise CaptureError(
            f"the model returns a {type(item).__name__}; return tensors, or tuples, lists and "
            "dicts of them"
        )


def _with_data(
    graph: Graph,
    model: nn.Module,
    tensors: _Tensors,
    lifted: Mapping[str, Tensor],
    rebuild: Callable[[], nn.Module] | None,
) -> Graph:
    """Fill in the values of the constants that the graph reads, and drop the others."""
    used = {v.name for node in graph.nodes for v in node.operands}
    used |= {output.value.name for output in graph.outputs}
    needed = [p for p in graph.params if p.kind == "constant" and p.name in used]
    buffers = [p.name for p in needed if p.name in tensors.buffers]
    try:
        data: dict[str, Tensor] = recover(model, buffers, rebuild)
    except UnknownConstant as error:
        raise CaptureError(str(error)) from error
    for param in needed:
        value = data[param.name] if param.name in data else lifted[param.name]
        if is_fake(value):
            raise CaptureError(
                f"{graph.name} uses a tensor of shape {tuple(value.shape)} that has no values while"
                " it is captured, as weights in a gradient that is taken inside of `forward`"
                " (`torch.autograd.grad`), which cannot be planned; write that gradient out"
            )
        if value.device.type == "meta":
            raise CaptureError(
                f"a tensor of shape {tuple(value.shape)} that `forward` uses has no values: it is "
                "kept as a plain attribute of a module on the meta device. Register it as a buffer"
            )
        if value.numel() > _CONSTANT_LIMIT:
            raise CaptureError(
                f"constant `{param.name}` has {value.numel():,} elements; above "
                f"{_CONSTANT_LIMIT:,} register it as a persistent buffer or compute it in `forward`"
            )
        data[param.name] = value
    params = tuple(
        Param(p.name, p.value, p.kind, p.aliases, _nested(data[p.name].tolist()))
        if p.kind == "constant"
        else p
        for p in graph.params
        if p.kind != "constant" or p.name in used
    )
    return replace(graph, params=params)


def _nested(value: Any) -> Any:
    """Nested lists as nested tuples."""
    return tuple(_nested(item) for item in value) if isinstance(value, list) else value


# ---- what went wrong ---------------------------------------------------------------------------


def _embedded(model: nn.Module) -> str:
    """What to pass to a model that may be given its tokens as vectors."""
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        return ""
    return (
        "If it decides by sizes of images or sounds, plan it without them: let a model file give"
        " `inputs_embeds`, with theirs in place, and `position_ids`. "
    )


def _explain(model: nn.Module, error: Exception) -> str:
    """A failed export in words: the user's line, and what its kind of failure means."""
    where, current = "", error.__traceback__
    while current is not None:
        path = current.tb_frame.f_code.co_filename
        frame = innermost_frame(f'  File "{path}", line {current.tb_lineno}, in f')
        if frame[0] and not path.startswith("<"):
            where = f"{place(path, current.tb_lineno)}: "
        current = current.tb_next
    kind, text = type(error).__name__, str(error).strip().split("\n")[0]
    if kind in ("GuardOnDataDependentSymNode", "DynamicOutputShapeException") or (
        "data-dependent" in text.lower() or "DataDependent" in kind
    ):
        return (
            f"{where}{type(model).__name__} decides by the values of a tensor (an `if`, a "
            "`.item()`, or a shape that depends on the data); a plan must hold for all inputs. "
            f"Use `torch.where`, or move the decision out of `forward`. {_embedded(model)}"
            f"{EXPERTS_HINT}"
        )
    return f"{where}{type(model).__name__} cannot be traced: {kind}: {text}"


__all__ = ["CaptureError", "Captured", "capture", "capture_folded", "captured", "export"]
