"""Muon over the parts that ranks hold: momentum where it lies, whole matrices made orthogonal.

As `torch.optim.Muon`, whose defaults these are, on the matrices of the original model; all other
parameters are stepped by AdamW.  A parameter of three dims is a stack of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ...facts.orthogonal import STEPS
from ..mesh.mesh import Mesh
from .groups import Groups, grouped, pattern
from .pieces import Box, Piece, Whole
from .wholes import Matrices, Round, Task, rounds_of, within

_COEFFICIENTS = (3.4445, -4.775, 2.0315)  # DEFAULT_A, _B and _C of torch/optim/_muon.py
_RATES = ("original", "match_rms_adamw")


def make_muon(
    pieces: Sequence[Piece],
    matrices: Matrices,
    lr: float,
    groups: Groups,
    options: Mapping[str, Any],
    names: Collection[str] = (),
) -> Muon:
    """Muon for `matrices`, AdamW for the rest; see `ShardedModule.optimizer`.

    Raises ValueError where one rate is given that does not suit both, for impossible options, for
    groups of Muon that have no matrices, and where nothing is one.
    """
    defaults = _defaults(lr, options)

    def kind(name: str) -> str:
        asked = groups.get(pattern(name, groups), {}).get("kind")
        return asked or ("muon" if name in matrices.names else "adamw")

    members = grouped(pieces, groups, names, kind)
    made = [
        {"params": some, **_options({**defaults.get(by, {}), **groups.get(name, {}), "kind": by})}
        for (name, by), some in members.items()
    ]
    own = {name for name in (*names, *(p.original for p in pieces)) if kind(name) == "muon"}
    if not own:
        raise ValueError(
            "no parameter is a matrix that Muon steps: NOT_MATRICES of the module names those of"
            ' two or three dims that are none; groups={"*.weight": {"kind": "muon"}} says otherwise'
        )
    return Muon(made, matrices.wholes(own), matrices.mesh)


def _defaults(lr: float, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options that were given, by kind of group."""
    own: dict[str, Any] = {"lr": lr, **options}
    others: dict[str, Any] | None = own.pop("adamw", None)
    if others is None and own.get("adjust_lr_fn") != "match_rms_adamw":
        raise ValueError(
            "Muon steps matrices, and AdamW the rest, at another rate: give that as"
            ' adamw={"lr": 3e-4}, or adjust_lr_fn="match_rms_adamw", with which one rate is for'
            " both"
        )
    return {"muon": own, "adamw": {"lr": lr, **(others or {})}}


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """All options of a group of its kind; TypeError for one that it does not know."""
    kind = given.pop("kind")
    if kind == "muon":
        return {"kind": kind, **_muon_options(**given)}
    if kind != "adamw":
        raise ValueError(f"a group's kind is muon or adamw, got {kind!r}")
    known = AdamW([torch.zeros(1)], **given).param_groups[0]
    return {"kind": kind, **{name: value for name, value in known.items() if name != "params"}}


def _muon_options(
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
    eps: float = 1e-7,
    ns_steps: int = STEPS,
    adjust_lr_fn: str | None = None,
) -> dict[str, Any]:
    """The options of torch.optim.Muon, with its defaults; ValueError for impossible ones."""
    if min(lr, weight_decay, momentum) < 0:
        raise ValueError(
            f"lr, weight_decay and momentum are 0 or more, got {lr}, {weight_decay} and {momentum}"
        )
    if len(ns_coefficients) != 3 or not 0 < ns_steps < 100:
        raise ValueError(
            "ns_coefficients are three numbers and ns_steps 1 to 99, got"
            f" {ns_coefficients} and {ns_steps}"
        )
    if adjust_lr_fn not in (None, *_RATES):
        raise ValueError(f"adjust_lr_fn is one of {', '.join(_RATES)}, got {adjust_lr_fn!r}")
    return dict(
        lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
        ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
    )  # fmt: skip


class Muon(Optimizer):
    """Steps `wholes`, which the ranks of `mesh` hold parts of, by Muon, and the rest by AdamW.

    Groups say by which in `kind`.  All ranks step together; a parameter has a gradient on all of
    them or on none.
    """

    def __init__(self, groups: list[dict[str, Any]], wholes: Sequence[Whole], mesh: Mesh) -> None:
        for whole in wholes:
            if len(whole.shape) not in (2, 3) or not whole.pieces[0].tensor.is_floating_point():
                raise ValueError(
                    f"Muon steps real matrices, or stacks of them; `{whole.original}` of shape"
                    f" {whole.shape} and {whole.pieces[0].tensor.dtype} is none: its group's kind"
                    " is adamw"
                )
        super().__init__(groups, {})
        self._mesh = mesh
        self._wholes = list(wholes)
        self._adamw = AdamW([{"params": []}])  # for others' groups, with this one's states
        self._rounds = cache(self._rounds_of)
        if mesh.size > 1:
            mesh[mesh.names]  # whose process group all ranks make together

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_kind: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
        for group in self.param_groups:
            by_kind[group["kind"]].append(group)
        self._adamw.param_groups, self._adamw.state = by_kind["adamw"], self.state
        self._adamw.step()
        self._step_matrices(by_kind["muon"])
        return loss

    def _step_matrices(self, groups: Sequence[Mapping[str, Any]]) -> None:
        options = {id(p): group for group in groups for p in group["params"]}
        active = [i for i, whole in enumerate(self._wholes) if _has_gradient(whole)]
        for i in active:
            for piece in self._wholes[i].pieces:
                self._keep_momentum(piece.tensor, options[id(piece.tensor)]["momentum"])

        def read(piece: Piece, box: Box) -> Tensor:
            grad, kept = self._at(piece, box)
            group = options[id(piece.tensor)]
            return (grad.lerp(kept, group["momentum"]) if group["nesterov"] else kept).bfloat16()

        def work(task: Task, update: Tensor) -> Tensor:
            group = options[id(task.whole.pieces[0].tensor)]
            return orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])

        def write(piece: Piece, box: Box, update: Tensor) -> None:
            group = options[id(piece.tensor)]
            x = piece.tensor[within(box, piece.box)]
            x.mul_(1 - float(group["lr"]) * group["weight_decay"])
            x.add_(update, alpha=-adjusted_rate(group, piece.shape))

        for each in self._rounds(tuple(active)):
            each.run(self._mesh, read, work, write)

    def _rounds_of(self, active: tuple[int, ...]) -> list[Round]:
        return rounds_of([self._wholes[i] for i in active], self._mesh)

    def _keep_momentum(self, x: Tensor, momentum: float) -> None:
        """Of a part of a fused weight that has no gradient it is that of zeros."""
        if x.grad is None:
            x.grad = torch.zeros_like(x)
        state = self.state[x]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(x.grad)
        state["momentum_buffer"].lerp_(x.grad, 1 - momentum)

    def _at(self, piece: Piece, box: Box) -> tuple[Tensor, Tensor]:
        """Gradient and momentum of a piece at a box of the original."""
        own, x = within(box, piece.box), piece.tensor
        assert x.grad is not None
        return x.grad[own], self.state[x]["momentum_buffer"][own]


def orthogonal(
    update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """About the nearest orthogonal matrix to each (..., r, c), in bfloat16.

    Newton-Schulz iterations of a polynomial of fifth degree with these coefficients, on the matrix
    over its norm, which is at least `eps`; the values of the result's SVD are near 1.
    """
    a, b, c = coefficients
    add = torch.addmm if update.ndim == 2 else torch.baddbmm
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adjusted_rate(group: Mapping[str, Any], shape: Sequence[int]) -> float:
    """The learning rate of a matrix, the last two dims of `shape`."""
    rows, columns = shape[-2:]
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return float(group["lr"]) * 0.2 * math.sqrt(max(rows, columns))
    return float(group["lr"]) * math.sqrt(max(1.0, rows / columns))


def _has_gradient(whole: Whole) -> bool:
    return any(piece.tensor.grad is not None for piece in whole.pieces)


__all__ = ["Muon", "make_muon", "orthogonal"]
