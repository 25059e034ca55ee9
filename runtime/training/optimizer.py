"""Optimizers over the parts that ranks hold: elementwise ones, which need nothing of the rest, and
Muon."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch.optim import Optimizer

from .groups import Groups, grouped
from .muon import make_muon
from .pieces import Piece, trained
from .wholes import Matrices

Kind: TypeAlias = Literal["adamw", "sgd", "muon"]
_KINDS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def make_optimizer(
    pieces: Sequence[Piece],
    kind: Kind,
    lr: float,
    groups: Groups,
    options: Mapping[str, Any],
    matrices: Matrices,
    names: Collection[str] = (),
) -> Optimizer:
    """See `ShardedModule.optimizer`; `names` are those of all trained originals, where other ranks
    hold other ones: then every rank has the same groups, some with no parameter.

    Fused on CUDA: one pass over all parameters, and no second copy of them in a step.
    """
    if kind not in (*_KINDS, "muon"):
        raise ValueError(f"kind is one of {', '.join(_KINDS)}, muon; got {kind!r}")
    own = trained(pieces)
    if not own:
        raise ValueError("there is no parameter to train")
    if kind == "muon":
        return make_muon(own, matrices, lr, groups, options, names)
    members = grouped(own, groups, names)
    made = [{"params": some, **groups.get(name, {})} for (name, _), some in members.items()]
    fused = all(piece.tensor.is_cuda for piece in own)
    return _KINDS[kind](made, lr=lr, fused=fused, **options)
