"""From what the user names on the command line to a model on the meta device and example inputs."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, cast

import torch
from torch import Tensor, nn

from .compat.torch import EXPORT_PRINTS, is_traceable_wrapper_subclass
from .facts.nested import leaves, spelled, with_leaves
from .facts.phases import find_phase
from .facts.users import load_file
from .formats import MIXED, casts, computed_in
from .ir.capture.arguments import Arguments
from .ir.capture.errors import CaptureError
from .ir.passes.extents import base_sizes, resized
from .ir.passes.serving import POSITIONS
from .planner.errors import PlanError


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on the meta device, its example inputs, and how to build it again.

    `inputs` are a dict by name or a tuple by position, in any form that `forward` takes.  `labels`
    names the dims of each tensor in them (`b`, `s`); `rebuild` makes the model anew on the device
    of the caller's choice, None where it cannot be.
    """

    model: nn.Module
    inputs: object
    labels: dict[str, tuple[str, ...]]
    rebuild: Callable[[], nn.Module] | None

    @property
    def arguments(self) -> Arguments:
        """The example inputs as `forward` has them.  Raises CaptureError if it does not."""
        return Arguments.of(self.model, self.inputs)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the inputs, by the names that a graph has for them."""
        return self.arguments.tensors


def load_target(target: str, *, batch: int, seq: int, phase: str, formats: str) -> Loaded:
    """The model that `target` names: `model.py`, `model.py:builder`, `config.json` or its folder.

    `formats`: the dtype that it runs in, `own`, or `mixed` (see `in_formats`).

    Raises PlanError for a target that is missing or does not define what it must.
    """
    path, _, builder = target.partition(":")
    trains = find_phase(phase).backward
    if Path(path).is_dir() or path.endswith(".json"):
        return _load_config(Path(path), batch, seq, formats, trains)
    if not path.endswith(".py"):
        raise PlanError(
            f"`{target}` is not a model: give a Python file (`model.py`, `model.py:builder`), a "
            "Hugging Face config.json, or a folder with one"
        )
    return _load_file(Path(path), builder or "build_model", batch, seq, formats, trains)


@contextmanager
def quiet_torch() -> Generator[None]:
    """What torch.export logs and prints on its way to an exception stays off the user's screen.

    The exception says it in one sentence; other output, of the model too, comes through, on stderr:
    stdout holds our results alone.
    """
    before, stderr = logging.root.manager.disable, sys.stderr
    logging.disable(logging.CRITICAL)
    sys.stderr = cast("TextIO", _WithoutExport(stderr))
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)
        sys.stderr = stderr


class _WithoutExport:
    """stderr without what torch/export/_trace.py prints: the graph up to the failure."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, unless it is torch.export that prints."""
        caller = sys._getframe(1).f_globals.get("__name__")  # pyright: ignore[reportPrivateUsage]
        return len(text) if caller == EXPORT_PRINTS else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def in_formats(model: nn.Module, formats: str) -> nn.Module:
    """`model` itself, its real parameters and buffers in a dtype; as it is where that is `own`.

    `mixed`: a model whose parameters are all float32 is computed in bfloat16; in any other, what is
    float32 is so on purpose.  Complex numbers stay, unlike under `nn.Module.to`, which keeps only
    their real parts.
    """
    change = casts(formats, (p.dtype for p in model.parameters()))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in change:
            tensor.data = tensor.data.to(change[tensor.dtype])
    return model


def in_formats_apart(loaded: Loaded, formats: str) -> Loaded:
    """The same in other formats, the user's own model left as it is.

    Parameters are then on the meta device, where nothing is allocated; real example inputs are cast
    with them.
    """
    model = loaded.model
    change = casts(formats, (p.dtype for p in model.parameters()))
    if not change:
        return loaded
    known: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    apart = in_formats(deepcopy(model, known), formats)
    return replace(loaded, model=apart, inputs=_cast(loaded.inputs, change))


def _cast(inputs: object, change: Mapping[torch.dtype, torch.dtype]) -> Any:
    """The inputs, in any form, with their tensors in other dtypes."""
    found = {
        path: x.to(change[x.dtype])
        for path, x in leaves(inputs)
        if isinstance(x, Tensor) and x.dtype in change
    }
    return with_leaves(inputs, found)


def check_formats(model: nn.Module) -> None:
    """Raises PlanError for tensors that hold codes of numbers (fp8, int8) and not the numbers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = tensor.dtype
        codes = kind.is_floating_point or isinstance(tensor, nn.Parameter)
        if is_traceable_wrapper_subclass(tensor):
            form = f"a {type(tensor).__name__}, a tensor made of others"
        elif tensor.is_quantized or (codes and kind.itemsize == 1 and kind != torch.bool):
            form = f"stored as {str(kind).removeprefix('torch.')}"
        else:
            continue
        raise PlanError(
            f"`{name}` of {type(model).__name__} is {form}, and quantised or sharded weights "
            "cannot be planned: build the model with plain weights, in bfloat16, and plan that"
        )


def _load_config(path: Path, batch: int, seq: int, formats: str, trains: bool) -> Loaded:
    from .ir.capture.huggingface import from_config
    from .ir.capture.huggingface_inputs import example_inputs

    if not path.exists():
        raise PlanError(f"`{path}` does not exist")
    model = from_config(path, dtype=computed_in(formats))
    longest = getattr(model.config, "max_position_embeddings", None)
    learned = getattr(model.config, "position_embedding_type", "absolute") == "absolute"
    if isinstance(longest, int) and seq > longest and learned and _has_position_table(model):
        raise PlanError(
            f"{type(model).__name__} has {longest} positions, the sequence has {seq} tokens; use "
            f"--seq {longest} or less"
        )

    change = casts(formats, [torch.float32]) if formats == MIXED else {}

    def inputs(batch: int, seq: int) -> Arguments:
        given = example_inputs(model, batch, seq, labels=trains)
        return Arguments.of(model, _cast(given, change))

    labels = _labels(inputs(batch, seq), inputs(2 * batch, seq), inputs(batch, 2 * seq))
    return Loaded(model, inputs(batch, seq), labels, None)


def with_positions(loaded: Loaded) -> Loaded | None:
    """The same model with the input `position_ids` (batch, tokens); None if it takes none.

    Raises PlanError where it takes them, and has inputs that are no tensors by name.
    """
    accepted = inspect.signature(loaded.model.forward).parameters
    name = next((name for name in POSITIONS if name in accepted), None)
    if name is None:
        return None
    if name in loaded.tensors or _has_tokens(loaded):
        _check_tensors_alone(loaded)
    if name in loaded.tensors:
        return loaded
    alone = with_tokens_alone(loaded)
    if alone is None:
        return None
    tokens = next(x for x in alone.tensors.values() if x.ndim == 2)
    positions = torch.zeros(tokens.shape, dtype=torch.long, device=tokens.device)
    labels = {**loaded.labels, name: ("b", "s")}
    return replace(alone, inputs={**alone.tensors, name: positions}, labels=labels)


def with_tokens_alone(loaded: Loaded) -> Loaded | None:
    """The same model without labels; None if it takes no tokens (batch, tokens), or has inputs
    that are no tensors by name."""
    if not _has_tokens(loaded) or _other_inputs(loaded):
        return None
    inputs = {name: x for name, x in loaded.tensors.items() if name != "labels"}
    return replace(loaded, inputs=inputs)


def _has_tokens(loaded: Loaded) -> bool:
    return any(x.ndim == 2 for name, x in loaded.tensors.items() if name != "labels")


def takes_tensors_alone(loaded: Loaded) -> bool:
    """Are all inputs tensors by their names?"""
    return not _other_inputs(loaded)


def _other_inputs(loaded: Loaded) -> list[tuple[str | int, ...]]:
    """Where those inputs lie that are no tensors by name."""
    arguments = loaded.arguments
    inner = [path for path in arguments.paths.values() if len(path) > 1]
    return [*(path for path, _ in arguments.fixed), *inner]


def _check_tensors_alone(loaded: Loaded) -> None:
    """Raises PlanError for inputs that serving cannot give: what is no tensor by its name."""
    if others := _other_inputs(loaded):
        raise PlanError(
            f"{type(loaded.model).__name__} is given `{spelled(others[0])}`; to be served, a model "
            "takes tokens and positions alone, by name, so forward must do without the rest"
        )


def of_sizes(loaded: Loaded, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors like those of the inputs, by name, the least dim of each label of another size."""
    tensors = loaded.tensors
    labels = {name: loaded.labels.get(name, ()) for name in tensors}
    base = base_sizes((labels[name], x.shape) for name, x in tensors.items())

    def shape(name: str, x: Tensor) -> list[int]:
        known = [*labels[name], *[""] * x.ndim][: x.ndim]
        return [
            resized(size, base[label], sizes[label]) if label in base and size > 1 else size
            for label, size in zip(known, x.shape, strict=True)
        ]

    return {
        name: torch.empty(shape(name, x), dtype=x.dtype, device="meta")
        for name, x in tensors.items()
    }


def with_rows(loaded: Loaded, rows: int) -> Loaded:
    """The same model with so many sequences as its inputs, or multiples where they have those."""
    arguments = loaded.arguments
    tensors = arguments.tensors
    labels = {name: loaded.labels.get(name, ()) for name in tensors}
    base = base_sizes((labels[name], x.shape) for name, x in tensors.items()).get("b", rows)
    found = {
        arguments.paths[name]: x.narrow(dim, 0, resized(x.shape[dim], base, rows))
        for name, x in tensors.items()
        if "b" in labels[name] and x.shape[dim := labels[name].index("b")] > 1
    }
    if rows == base or not found:
        return loaded
    return replace(loaded, inputs=replace(arguments, given=with_leaves(arguments.given, found)))


def tokens_of(loaded: Loaded) -> int:
    """Tokens of each sequence in the inputs; 0 if none has such a dim."""
    dims = [(x, _token_dim(loaded.labels.get(name, ()))) for name, x in loaded.tensors.items()]
    return max((x.shape[dim] for x, dim in dims if dim >= 0), default=0)


def with_tokens(loaded: Loaded, tokens: int) -> Loaded:
    """The same model with so many tokens of each sequence as its inputs, all like the first."""
    inputs = {
        name: torch.cat([x.narrow(dim, 0, 1)] * tokens, dim)
        if (dim := _token_dim(loaded.labels.get(name, ()))) >= 0
        else x
        for name, x in loaded.tensors.items()
    }
    return replace(loaded, inputs=inputs)


def _token_dim(labels: tuple[str, ...]) -> int:
    return labels.index("s") if "s" in labels else -1


def _has_position_table(model: nn.Module) -> bool:
    return any(
        "position" in name or name.endswith("wpe.weight") for name, _ in model.named_parameters()
    )


def _load_file(
    path: Path, builder: str, batch: int, seq: int, formats: str, trains: bool
) -> Loaded:
    module = import_model(path)
    build = function_of(module, builder, path)
    example = function_of(module, "example_inputs", path)
    with torch.device("meta"):
        model = _call(path, builder, build)
        if not isinstance(model, nn.Module):
            raise PlanError(
                f"{path}: `{builder}` must return an nn.Module, got {type(model).__name__}"
            )
        check_formats(model)
        change = casts(formats, [p.dtype for p in model.parameters()]) if formats == MIXED else {}
        model = in_formats(model, formats)

        def examples(batch: int, seq: int) -> Arguments:
            found = _examples(path, example, model, batch, seq)
            return replace(found, given=_cast(found.given, change))

        inputs = examples(batch, seq)
        labels = _labels(inputs, examples(2 * batch, seq), examples(batch, 2 * seq))
    if not trains and "labels" in inputs.given:
        given = {name: x for name, x in inputs.given.items() if name != "labels"}
        inputs = Arguments.of(model, given)

    def rebuild() -> nn.Module:
        return in_formats(_call(path, builder, build), formats)

    return Loaded(model, inputs, labels, rebuild)


def given_inputs(target: str, model: nn.Module, batch: int, seq: int) -> dict[str, Tensor]:
    """The tensors that `example_inputs` of a model's file gives, with values, by name."""
    path = Path(target.partition(":")[0])
    example = function_of(import_model(path), "example_inputs", path)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return _examples(path, example, model, batch, seq).tensors


def import_model(path: Path) -> ModuleType:
    """The user's file as a module.  Raises PlanError with the line where that fails."""
    if not path.is_file():
        raise PlanError(
            f"`{path}` does not exist; give the path of the Python file with your model"
        )
    with _reported(path, "importing the file"):
        return load_file(path)


@contextmanager
def _reported(path: Path, doing: str) -> Generator[None]:
    """Whatever the user's code raises becomes one sentence with its line, the cause attached.

    What it prints goes to stderr: stdout holds our results alone.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        frames = [f for f in inspect.trace() if Path(f.filename).resolve() == path.resolve()]
        line = f"{path.name}:{frames[-1].lineno}" if frames else path.name
        raise PlanError(f"{line}: {doing} failed: {type(error).__name__}: {error}") from error


def _call(path: Path, name: str, function: Callable[..., Any], *args: object) -> Any:
    with _reported(path, f"`{name}`"):
        return function(*args)


def function_of(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    """What the user's file calls `name`.  Raises PlanError where it defines no such function."""
    function = getattr(module, name, None)
    if not callable(function):
        defined = [
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
        raise PlanError(
            f"{path} does not define `{name}`; it must define `build_model() -> nn.Module` and "
            f"`example_inputs(batch: int, seq: int)`, which returns forward's arguments: a dict by "
            f"name, or a tuple by position. It defines: "
            f"{', '.join(defined) or 'no functions'}"
        )
    return function


def _examples(
    path: Path, example: Callable[..., Any], model: nn.Module, batch: int, seq: int
) -> Arguments:
    """What `example_inputs` returns, as arguments of the model."""
    inputs = _call(path, "example_inputs", example, batch, seq)
    try:
        return Arguments.of(model, inputs)
    except CaptureError as error:
        raise PlanError(f"{path}: what `example_inputs` returns does not fit: {error}") from error


def _labels(inputs: Arguments, wider: Arguments, longer: Arguments) -> dict[str, tuple[str, ...]]:
    """A dim that grows with `batch` is `b`, one that grows with `seq` is `s`."""
    shapes = [{n: x.shape for n, x in each.tensors.items()} for each in (inputs, wider, longer)]
    out: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes[0].items():
        twice = [each.get(name, shape) for each in shapes[1:]]
        names = [""] * len(shape)
        for dim in range(len(shape)):
            grown = [len(each) == len(shape) and each[dim] != shape[dim] for each in twice]
            names[dim] = "b" if grown[0] else "s" if grown[1] else ""
        out[name] = tuple(names)
    return out
