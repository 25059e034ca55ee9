"""What a model is called with: arguments of any form, and the tensors in them by names of our own.

Tensors may stand in dicts, lists, tuples and dataclasses.  Numbers, flags, text and None beside
them are part of the graph.  `flat_forward` has a model take the tensors alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias, cast

import torch
from torch import Tensor, nn

from ...facts.nested import Constant, Path, leaves, spelled, with_leaves
from ..graph import Signature
from .errors import CaptureError

_Parameters: TypeAlias = Mapping[str, inspect.Parameter]


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of a model's `forward` by name, in its order.

    The first `by_position` may be given without their names, and the first `unnamed` must be.
    Extra positional ones, of `*images`, are called `images_0`, `images_1`.
    """

    given: Mapping[str, object]
    by_position: int
    unnamed: int
    paths: Mapping[str, Path]  # of the tensors, by the names that the graph has for them
    fixed: tuple[tuple[Path, Constant], ...]

    @classmethod
    def of(cls, model: nn.Module, inputs: object) -> Self:
        """`inputs` as `forward` takes them: a dict by name, or a tuple or list by position.

        Raises CaptureError for what is no argument of `forward`, or cannot be in a graph.
        """
        if isinstance(inputs, cls):
            return inputs
        if not isinstance(inputs, (Mapping, tuple, list)):
            raise CaptureError(
                f"the inputs are a {type(inputs).__name__}; give forward's arguments as a dict by "
                "name, or as a tuple by position"
            )
        parameters = inspect.signature(model.forward).parameters
        title = f"{type(model).__name__}.forward"
        given = (
            _by_name(title, parameters, cast("Mapping[object, object]", inputs))
            if isinstance(inputs, Mapping)
            else _by_position(title, parameters, cast("Sequence[object]", inputs))
        )
        _check_missing(title, parameters, given)
        found = dict(leaves(given))
        for path, leaf in found.items():
            _check_leaf(path, leaf)
        tensors = [path for path, leaf in found.items() if isinstance(leaf, Tensor)]
        fixed = [(p, cast(Constant, x)) for p, x in found.items() if not isinstance(x, Tensor)]
        places = _places(parameters, given)
        matching = [a == b for a, b in zip(given, places, strict=False)]
        return cls(
            given,
            (*matching, False).index(False),
            _unnamed(title, parameters, given),
            {name: path for path, name in _names(tensors).items()},
            tuple(fixed),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that the graph has for them."""
        found = dict(leaves(self.given))
        return {name: cast(Tensor, found[path]) for name, path in self.paths.items()}

    @property
    def signature(self) -> Signature | None:
        """What a graph says of arguments that are more than tensors by name; None if none is."""
        plain = not self.fixed and all(len(path) == 1 for path in self.paths.values())
        return None if plain else Signature(tuple(self.given), self.by_position, self.fixed)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Arguments of the same form with other tensors."""
        new = {self.paths[name]: tensor for name, tensor in tensors.items()}
        return replace(self, given=with_leaves(self.given, new))

    def call(self, function: Callable[..., Any], tensors: Mapping[str, Tensor]) -> Any:
        """`function` of arguments of the same form, with other tensors."""
        given = self.with_tensors(tensors).given
        names = list(given)
        unnamed = [given[name] for name in names[: self.unnamed]]
        return function(*unnamed, **{name: given[name] for name in names[self.unnamed :]})

    @contextmanager
    def flat_forward(self, model: nn.Module) -> Generator[None]:
        """Inside, `model` takes `tensors` by name, and nothing else."""
        if self.signature is None and not self.unnamed:
            yield
            return
        own = model.forward

        def forward(**tensors: Tensor) -> Any:
            return self.call(own, tensors)

        with called_by_name(model, forward, list(self.paths)):
            yield


@contextmanager
def called_by_name(
    model: nn.Module, forward: Callable[..., Any], names: Sequence[str]
) -> Generator[None]:
    """Inside, `forward`, which takes tensors of these names, is that of `model`."""
    kept, kind = model.__dict__.get("forward"), inspect.Parameter.KEYWORD_ONLY
    shape = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    forward.__signature__ = shape  # pyright: ignore[reportFunctionMemberAccess]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if kept is not None:
            model.__dict__["forward"] = kept


# ---- from what is given to arguments by name -----------------------------------------------------


def _by_name(
    title: str, parameters: _Parameters, inputs: Mapping[object, object]
) -> dict[str, object]:
    """In the order of `forward`; what it takes as `**kwargs` comes last."""
    kinds = {p.kind for p in parameters.values()}
    accepted = [
        name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unknown = [name for name in inputs if name not in accepted]
    wrong = [name for name in unknown if not isinstance(name, str)]
    if wrong or (unknown and inspect.Parameter.VAR_KEYWORD not in kinds):
        raise CaptureError(
            f"{title} takes no `{(wrong or unknown)[0]}`; it takes "
            + ", ".join(f"`{name}`" for name in accepted)
        )
    known = [name for name in accepted if name in inputs]
    return {name: inputs[name] for name in (*known, *cast("list[str]", unknown))}


def _by_position(
    title: str, parameters: _Parameters, inputs: Sequence[object]
) -> dict[str, object]:
    places = list(_places(parameters, inputs))
    if len(inputs) > len(places):
        raise CaptureError(
            f"{title} takes {len(places)} positional arguments, the inputs are {len(inputs)}; give "
            "the others by name: a dict"
        )
    return dict(zip(places, inputs, strict=False))


def _places(
    parameters: _Parameters, given: Mapping[str, object] | Sequence[object]
) -> Iterator[str]:
    """Names of what may be given by position; those of `*images` as far as they are given."""
    for name, p in parameters.items():
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            yield name
        elif p.kind is p.VAR_POSITIONAL:
            yield from (f"{name}_{i}" for i in range(len(given)))


def _unnamed(title: str, parameters: _Parameters, given: Mapping[str, object]) -> int:
    """How many of the first arguments `forward` takes by position alone."""
    alone = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    places = list(_places(parameters, given))
    extra = [name for name in given if name not in parameters and name in places]
    count = max((places.index(name) + 1 for name in (*alone, *extra) if name in given), default=0)
    if list(given)[:count] != places[:count]:
        raise CaptureError(
            f"{title} takes {', '.join(f'`{name}`' for name in alone)} by position alone: give all "
            "before the last that is given"
        )
    return count


def _check_missing(title: str, parameters: _Parameters, given: Mapping[str, object]) -> None:
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in optional and name not in given
    ]
    if missing:
        raise CaptureError(
            f"{title} needs `{missing[0]}`, which is not among the inputs "
            + ", ".join(f"`{name}`" for name in given)
        )


def _check_leaf(path: Path, leaf: object) -> None:
    """Raises CaptureError for what a graph cannot have, or a plan not hold."""
    where = f"input `{spelled(path)}`"
    if wrong := [key for key in path if type(key) not in (str, int) or not _is_plain(str(key))]:
        raise CaptureError(
            f"{where} stands under the key {wrong[0]!r}; keys must be whole numbers, or a line of "
            "text without quotes and backslashes"
        )
    # a tuple that is a leaf is an empty container
    if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout is not torch.strided):
        kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
        raise CaptureError(
            f"{where} is a {kind} tensor; plans cut dense ones: pad it, or give its parts and put "
            "them together in `forward`"
        )
    if isinstance(leaf, Tensor) or type(leaf) in (bool, int, float, type(None), tuple):
        return
    if type(leaf) is not str:
        raise CaptureError(
            f"{where} is a {type(leaf).__name__}, not a tensor; inputs may also be numbers, flags, "
            "text and None, and dicts, lists, tuples and dataclasses of all these"
        )
    if not _is_plain(leaf):
        raise CaptureError(
            f"{where} is text that a plan can't hold: it must be one line without quotes and "
            "backslashes"
        )


def _is_plain(text: str) -> bool:
    return text.isprintable() and not set(text) & {'"', "\\"}


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for each tensor: the argument's, or made of its path (`batch_ids`, `images_0`)."""
    names: dict[Path, str] = {path: str(path[0]) for path in paths if len(path) == 1}
    taken = set(names.values())
    for path in paths:
        if path in names:
            continue
        name = re.sub(r"\W", "_", "_".join(map(str, path)), flags=re.ASCII)
        number = 0
        while (candidate := f"{name}_{number}" if number else name) in taken:
            number += 1
        names[path] = candidate
        taken.add(candidate)
    return {path: names[path] for path in paths}


__all__ = ["Arguments"]
