"""Looks over the loops that users write: whether their optimizers fit a model of which ranks hold
parts.

Ranks meet here once per forward pass of the first steps, in `optimizer.step` or, where a rank does
not step, before its next forward pass.  So they also meet where some step and others do not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ...compat.torch import at_end_of_backward, tree_leaves
from ..mesh import transport
from ..mesh.collectives import Axis
from ..mesh.mesh import Mesh
from .elementwise import not_elementwise
from .muon import Muon
from .pieces import Piece, trained

FIRST_STEPS = 3
"""In which ranks compare what they hold copies of; later they do at checkpoints."""
_MOST_FORWARDS = 1000  # until then steps are waited for
_ROUNDING = 1e-5  # of a norm, where kernels add in no fixed order
_SHOWN = 5

_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_hooks: list[Any] = []


class Watch:
    """Watches the optimizers that step parameters of one module, whose `pieces` it is told."""

    def __init__(self, mesh: Mesh, pieces: Callable[[], Sequence[Piece]]) -> None:
        self._mesh = mesh
        self._pieces = pieces
        self._steps_left = FIRST_STEPS
        self._forwards_left = _MOST_FORWARDS
        self._due = False  # ranks meet before the next forward
        self._after_backward: Tensor | None = None  # a gradient, as backward left it
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, _Stepped] = (
            weakref.WeakKeyDictionary()
        )
        _watches.add(self)
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))
            _hooks.append(register_optimizer_step_post_hook(_after_step))

    # --- what the module tells -------------------------------------------------------------------

    def begin_forward(self) -> None:
        """Before a forward pass; meets ranks that step where this one did not."""
        if _is_recorded():
            return
        self._meet(stepping=False)

    def end_forward(self, outputs: Iterable[Tensor]) -> None:
        """After it, with the tensors that it returned."""
        if _is_recorded():
            return
        self._due = torch.is_grad_enabled() and self._steps_left > 0 and self._forwards_left > 0
        if not self._due:
            return
        self._forwards_left -= 1
        self._after_backward = None
        for x in outputs:
            if x.requires_grad:
                x.register_hook(lambda grad: at_end_of_backward(self._keep_gradient))

    def at_checkpoint(self) -> None:
        """Before a checkpoint: raise RuntimeError on every rank where copies have drifted."""
        self._meet(stepping=False)
        self._refuse_drift(gradients=False)

    def _keep_gradient(self) -> None:
        sample = self._sample()
        if sample is not None and sample.tensor.grad is not None:
            self._after_backward = sample.rows(sample.tensor.grad).detach().clone()

    def _sample(self) -> Piece | None:
        """A small parameter, the same on all ranks, large enough to tell a multiple from chance."""
        own = trained(self._pieces())
        large = [piece for piece in own if _count(piece.shape) >= 8 * self._mesh.size]
        return min(large or own, key=lambda piece: _count(piece.shape), default=None)

    # --- what optimizers do ----------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise RuntimeError where the optimizer, its states or the gradients do not fit."""
        stepped = self._stepped(optimizer)
        if not stepped.own:
            return
        stepped.refuse_states()
        self._meet(stepping=True)

    def after_step(self, optimizer: Optimizer) -> None:
        """The same of the states that it has made."""
        stepped = self._stepped(optimizer)
        if stepped.own:
            stepped.refuse_states()

    def _stepped(self, optimizer: Optimizer) -> _Stepped:
        ids = tuple(id(p) for group in optimizer.param_groups for p in group["params"])
        known = self._optimizers.get(optimizer)
        if known is None or known.ids != ids:
            pieces = {id(piece.tensor): piece for piece in self._pieces()}
            own = [pieces[i] for i in ids if i in pieces]
            known = _Stepped(weakref.ref(optimizer), ids, own, self._mesh.size)
            known.refuse_kind()
            self._optimizers[optimizer] = known
        return known

    # --- where ranks meet ------------------------------------------------------------------------

    @torch.no_grad()
    def _meet(self, *, stepping: bool) -> None:
        if not self._due:
            return
        self._due = False
        high, low = self._largest(torch.tensor([float(stepping), -float(stepping)])).tolist()
        if high != -low:
            raise RuntimeError(
                "some ranks step their optimizer and others do not, so that parameters drift"
                " apart: let all ranks decide alike, by a number that is the same on all"
                " (model.clip_grad_norm_ returns one; a GradScaler looks at this rank's part alone)"
            )
        if not stepping:
            return
        self._steps_left -= 1
        self._refuse_drift(gradients=True)
        self._refuse_scaling()

    def _refuse_scaling(self) -> None:
        """Raise RuntimeError if ranks have multiplied a gradient by different numbers."""
        factor, (before, self._after_backward) = float("nan"), (self._after_backward, None)
        sample = self._sample()
        if before is not None and sample is not None and sample.tensor.grad is not None:
            factor = _factor(before, sample.rows(sample.tensor.grad).detach())
        known = torch.tensor([factor, -factor]).nan_to_num(nan=-torch.inf)
        high, low = self._largest(known).tolist()
        low = -low
        if high - low > 1e-3 * max(abs(high), abs(low)):
            raise RuntimeError(
                f"ranks have multiplied their gradients by different numbers, {low:.4g} to"
                f" {high:.4g}: {_CLIP}"
            )

    def _refuse_drift(self, *, gradients: bool) -> None:
        """Raise RuntimeError on every rank, naming parameters and buffers whose copies differ."""
        sizes = dict(zip(self._mesh.names, self._mesh.sizes, strict=True))
        held = [
            piece
            for piece in self._pieces()
            if any(sizes[axis] > 1 for axis in piece.copied)
            and (piece.tensor.is_floating_point() or piece.tensor.is_complex())
        ]
        kinds = {"parameters and buffers": [(piece, piece.tensor.detach()) for piece in held]}
        if gradients:
            kinds["gradients"] = [(piece, _gradient(piece)) for piece in trained(held)]
        for kind, tensors in kinds.items():
            own = [piece for piece, _ in tensors]
            apart = self._apart(own, [_real(piece.rows(x)) for piece, x in tensors])
            names = [piece.original for piece, bad in zip(own, apart, strict=True) if bad]
            if names:
                shown = ", ".join(dict.fromkeys(names[:_SHOWN]))
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                raise RuntimeError(
                    f"{kind} that ranks hold copies of differ between ranks: {shown}{more}. {_CLIP}"
                )

    def _apart(self, pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> list[bool]:
        """For each piece whether copies of it differ anywhere, by more than rounding."""
        if not pieces:
            return []
        norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors])
        sums = torch.stack([x.sum(dtype=torch.float64) for x in tensors])
        prints = torch.stack([norms, sums]).nan_to_num(nan=1e300).cpu()
        bounds = torch.tensor([_rounding(x) for x in tensors], dtype=torch.float64)
        scales = torch.tensor([sqrt(max(x.numel(), 1)) for x in tensors], dtype=torch.float64)
        apart = torch.zeros(len(pieces))
        for axis in self._mesh.axes:
            held = torch.tensor([axis.name in piece.copied for piece in pieces])
            if not held.any():
                continue
            most = self._largest(torch.cat([prints, -prints]), [axis])
            spread, size = most[:2] + most[2:], torch.maximum(most[0], torch.tensor(1e-300))
            differs = (spread[0] > bounds * size) | (spread[1] > bounds * size * scales)
            apart = torch.maximum(apart, (differs & held).float())
        return [bool(x) for x in self._largest(apart)]

    def _largest(self, x: Tensor, axes: Sequence[Axis] | None = None) -> Tensor:
        """The largest of each number over `axes`, or all; on the CPU.

        No counter is told: what is counted is what the model moves.
        """
        x = x.to(self._mesh.device)
        for axis in self._mesh.axes if axes is None else axes:
            if axis.size > 1:
                x = transport.all_reduce(x, axis.group, "max")
        return x.cpu()


@dataclass(slots=True)
class _Stepped:
    """An optimizer, and the pieces that it steps of a module on `ranks` ranks."""

    optimizer: weakref.ref[Optimizer]
    ids: tuple[int, ...]
    own: Sequence[Piece]
    ranks: int
    _looked_at: object = None  # the states that were all right, and whether there were any

    def refuse_kind(self) -> None:
        """Raise RuntimeError for an optimizer that is wrong for parts of parameters."""
        parts = [piece for piece in self.own if not piece.is_whole(self.ranks)]
        optimizer = self.optimizer()
        if isinstance(optimizer, Muon):  # which gathers whole parameters
            return
        if parts and optimizer is not None and (why := not_elementwise(optimizer)):
            raise RuntimeError(
                f"{type(optimizer).__name__} can't step `{parts[0].original}`, of which each rank"
                f" holds a part: {why}. Use an elementwise one, such as model.optimizer() (AdamW),"
                ' model.optimizer("muon"), or plan with the parameters it steps whole on each GPU'
                " (--pin)"
            )

    def refuse_states(self) -> None:
        """Raise RuntimeError for states of other shapes than their parameters."""
        optimizer = self.optimizer()
        if optimizer is None or self._looked_at is optimizer.state:
            return
        found = False
        for piece in self.own:
            for name, x in optimizer.state.get(piece.tensor, {}).items():
                found = True
                whole = piece.is_whole(self.ranks)
                if not all(_fits(y, piece.tensor, whole=whole) for y in _tensors(x)):
                    shapes = ", ".join(str(tuple(y.shape)) for y in _tensors(x)[:2])
                    raise RuntimeError(
                        f"{type(optimizer).__name__} keeps `{name}` of shape {shapes} for"
                        f" {piece.original}, of which this rank holds"
                        f" {tuple(piece.tensor.shape)}: it is the state of a run on other ranks,"
                        " which model.load_checkpoint(folder, optimizer) can read, or of an"
                        " optimizer that is not elementwise, and wrong for parts of a parameter"
                    )
        if found:
            self._looked_at = optimizer.state


_CLIP = (
    "Clip by model.clip_grad_norm_ instead of torch.nn.utils.clip_grad_norm_, which sees this"
    " rank's parts alone, and change gradients and parameters on all ranks alike"
)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in () if _is_recorded() else tuple(_watches):
        watch.before_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in () if _is_recorded() else tuple(_watches):
        watch.after_step(optimizer)


def _is_recorded() -> bool:
    """Is a step compiled or captured as a CUDA graph now, where the host can't look at numbers?"""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _gradient(piece: Piece) -> Tensor:
    grad = piece.tensor.grad
    return torch.zeros_like(piece.tensor) if grad is None else grad.detach()


def _factor(before: Tensor, now: Tensor) -> float:
    """The number c with now = c before, up to rounding; NaN if there is none."""
    a, b = before.flatten().double(), now.flatten().double()
    size = a.dot(a)
    if before.dtype.is_complex or a.numel() < 8 or not size > 0:
        return float("nan")
    factor = a.dot(b) / size
    error = torch.linalg.vector_norm(b - factor * a)
    bound = max(_ROUNDING, torch.finfo(now.dtype).eps) * factor.abs() * size.sqrt()
    return float(factor) if bool(error <= bound) else float("nan")


def _rounding(x: Tensor) -> float:
    """By how much of its norm that of a copy may differ."""
    return 4 * max(_ROUNDING, torch.finfo(x.dtype).eps / sqrt(max(x.numel(), 1)))


def _tensors(state: object) -> list[Tensor]:
    return [x for x in tree_leaves(state) if isinstance(x, Tensor)]


def _fits(state: Tensor, parameter: Tensor, *, whole: bool) -> bool:
    """May this be kept for a parameter of which a rank has a part, or the whole?"""
    if state.shape == parameter.shape or state.numel() == 1:
        return True
    # sums over rows and columns, say, which are right of whole parameters
    pairs = zip(state.shape, parameter.shape, strict=False)
    return whole and (state.ndim != parameter.ndim or all(a in (1, b) for a, b in pairs))


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


__all__ = ["FIRST_STEPS", "Watch"]
