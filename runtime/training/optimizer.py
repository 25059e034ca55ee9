"""Optimizers over the parts that ranks hold: elementwise ones, which need nothing of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
) -> Optimizer:
    """See `ShardedModule.optimizer`.

    Fused on CUDA: one pass over all parameters, and no second copy of them in a step.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind is one of {', '.join(_KINDS)}; got {kind!r}")
    own = trained(pieces)
    if not own:
        raise ValueError("there is no parameter to train")
    fused = all(piece.tensor.is_cuda for piece in own)
    return _KINDS[kind](_grouped(own, groups), lr=lr, fused=fused, **options)


def _grouped(
    pieces: Sequence[Piece], groups: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A group for each pattern of names, and one of all others; empty ones are left out."""
    unused = [p for p in groups if not any(fnmatchcase(piece.original, p) for piece in pieces)]
    if unused:
        names = ", ".join(sorted({piece.original for piece in pieces})[:5])
        raise ValueError(
            f"no trained parameter matches {', '.join(unused)}; names are {names}, ..."
        )
    members: dict[str, list[Any]] = {pattern: [] for pattern in ("", *groups)}
    for piece in pieces:
        found = [pattern for pattern in groups if fnmatchcase(piece.original, pattern)]
        members[found[0] if found else ""].append(piece.tensor)
    return [{"params": own, **groups.get(pattern, {})} for pattern, own in members.items() if own]
