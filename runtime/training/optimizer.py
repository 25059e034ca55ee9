"""Optimizers over the parts that ranks hold: elementwise ones, which need nothing of the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch.optim import Optimizer

from .pieces import Piece, trained

Kind: TypeAlias = Literal["adamw", "sgd"]
_KINDS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def make_optimizer(
    pieces: Sequence[Piece],
    kind: Kind,
    lr: float,
    groups: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    names: Collection[str] = (),
) -> Optimizer:
    """See `ShardedModule.optimizer`; `names` are those of all trained originals, where other ranks
    hold other ones: then every rank has the same groups, some with no parameter.

    Fused on CUDA: one pass over all parameters, and no second copy of them in a step.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind is one of {', '.join(_KINDS)}; got {kind!r}")
    own = trained(pieces)
    if not own:
        raise ValueError("there is no parameter to train")
    fused = all(piece.tensor.is_cuda for piece in own)
    return _KINDS[kind](_grouped(own, groups, names), lr=lr, fused=fused, **options)


def _grouped(
    pieces: Sequence[Piece], groups: Mapping[str, Mapping[str, Any]], names: Collection[str]
) -> list[dict[str, Any]]:
    """A group for each pattern of names, and one of all others; those of no name are left out."""
    every = {*names, *(piece.original for piece in pieces)}
    used = {_pattern(name, groups) for name in every}
    if unused := [p for p in groups if not any(fnmatchcase(name, p) for name in every)]:
        raise ValueError(
            f"no trained parameter matches {', '.join(unused)}; names are"
            f" {', '.join(sorted(every)[:5])}, ..."
        )
    members: dict[str, list[Any]] = {p: [] for p in ("", *groups) if p in used}
    for piece in pieces:
        members[_pattern(piece.original, groups)].append(piece.tensor)
    return [{"params": own, **groups.get(pattern, {})} for pattern, own in members.items()]


def _pattern(name: str, patterns: Collection[str]) -> str:
    """The first pattern that a name matches; "" for none."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), "")
