"""What an optimizer keeps for each parameter: to and from the names of the original model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .pieces import Piece

Numbers = dict[str, dict[str, Any]]  # of each original: its states that are one number
Kept = tuple[str, Piece, Tensor]  # `optimizer.<original>.<state>`, whose, and what is kept
Group = tuple[dict[str, Any], list[str]]  # options, and the originals that they are for


@dataclass(frozen=True, slots=True)
class OptimizerStates:
    """The states of an elementwise optimizer.

    `tensors` are shaped like their parameters.
    """

    tensors: Sequence[Kept]
    numbers: Numbers
    groups: list[Group]

    @staticmethod
    def of(optimizer: Optimizer | None, pieces: Sequence[Piece]) -> OptimizerStates:
        """What `optimizer` has.  Raises ValueError for states that belong to no single number."""
        tensors: list[Kept] = []
        numbers: Numbers = {}
        for piece in _owned(optimizer, pieces):
            assert optimizer is not None
            for state, x in optimizer.state.get(piece.tensor, {}).items():
                if isinstance(x, Tensor) and x.shape == piece.tensor.shape and x.ndim:
                    tensors.append((f"optimizer.{piece.original}.{state}", piece, x))
                elif x is None or not isinstance(x, Tensor) or x.numel() == 1:
                    value = x.item() if isinstance(x, Tensor) else x
                    numbers.setdefault(piece.original, {})[state] = value
                else:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps `{state}` of shape {tuple(x.shape)} for"
                        f" {piece.original}, of which this rank holds {tuple(piece.tensor.shape)}:"
                        " its steps are not elementwise, and wrong for parts of a parameter"
                    )
        return OptimizerStates(tensors, numbers, _groups(optimizer, pieces))

    @staticmethod
    def planned(
        optimizer: Optimizer | None, pieces: Sequence[Piece], saved: Mapping[str, Any]
    ) -> OptimizerStates:
        """Room for what a checkpoint has, whose tensors are `saved` by name."""
        tensors: list[Kept] = []
        for piece in _owned(optimizer, pieces):
            prefix = f"optimizer.{piece.original}."
            for name in saved:
                state = name.removeprefix(prefix)
                if name != state and "." not in state:
                    dtype = saved[name].properties.dtype
                    room = torch.zeros_like(piece.tensor, dtype=dtype, requires_grad=False)
                    tensors.append((name, piece, room))
        return OptimizerStates(tensors, {}, _groups(optimizer, pieces))

    def load_into(self, optimizer: Optimizer, numbers: Numbers, groups: Sequence[Group]) -> None:
        """Give `optimizer` the tensors here, and the numbers and options of a checkpoint.

        Raises ValueError where its groups have other parameters than those of the checkpoint, of
        those that are here.
        """
        own = [sorted(set(names)) for _, names in self.groups]
        here = {name for names in own for name in names}
        if own != [sorted(here.intersection(names)) for _, names in groups]:
            raise ValueError(
                "the optimizer has other groups of parameters than that of the checkpoint: make it"
                " with the same patterns"
            )
        loaded = optimizer.state_dict()
        index = _numbered(optimizer)
        for name, piece, x in self.tensors:
            state = loaded["state"].setdefault(index[id(piece.tensor)], {})
            state[name.rpartition(".")[2]] = x
            for key, value in numbers.get(piece.original, {}).items():
                state[key] = torch.tensor(value) if isinstance(value, float) else value
        for group, (options, _) in zip(loaded["param_groups"], groups, strict=True):
            group.update(options)
        optimizer.load_state_dict(loaded)


def merged(parts: Sequence[tuple[Numbers, list[Group]]]) -> tuple[Numbers, list[Group]]:
    """The numbers and groups of ranks that hold different parameters, whose optimizers have the
    same groups."""
    numbers: Numbers = {}
    for own, _ in parts:
        numbers |= own
    groups: list[Group] = []
    for same in zip(*(groups for _, groups in parts), strict=True):
        names = dict.fromkeys(name for _, names in same for name in names)
        groups.append((same[0][0], list(names)))
    return numbers, groups


def _owned(optimizer: Optimizer | None, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces that `optimizer` steps, in its order; ValueError for a tensor that is none."""
    if optimizer is None:
        return []
    by_tensor = {id(piece.tensor): piece for piece in pieces}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(p) not in by_tensor for p in parameters):
        raise ValueError("the optimizer steps tensors that are no parameters of this module")
    return [by_tensor[id(p)] for p in parameters]


def _groups(optimizer: Optimizer | None, pieces: Sequence[Piece]) -> list[Group]:
    if optimizer is None:
        return []
    names = {id(piece.tensor): piece.original for piece in pieces}
    return [
        (
            {key: value for key, value in group.items() if key != "params"},
            [names[id(p)] for p in group["params"]],
        )
        for group in optimizer.param_groups
    ]


def _numbered(optimizer: Optimizer) -> dict[int, int]:
    """The number of each parameter in the optimizer's `state_dict`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(p): number for number, p in enumerate(parameters)}
