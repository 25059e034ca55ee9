"""Random numbers that ranks drew, put together, and handed to a reference in the same order.

Ranks draw from generators that no single process has.  So `plan verify` lets the module run, keeps
what it draws, and runs graph and original with these numbers in the place of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .compat.torch import TorchDispatchMode
from .facts.spec import Spec
from .ir.ops.random import is_draw
from .ir.ops.registry import operator_of
from .planner.errors import PlanError
from .planner.plan.program import Compute, LoopCall, Program
from .runtime.mesh.mesh import Mesh
from .runtime.mesh.parts import gather_whole

Drawn: TypeAlias = tuple[tuple[int, ...], Spec, tuple[int, ...]]  # shape, spec, dims in zigzag


def draws_of(program: Program) -> list[Drawn]:
    """What a forward pass of `program` draws, in order, and how ranks hold it."""
    found: list[Drawn] = []
    for item in program.statements:
        if isinstance(item, LoopCall):
            for kind in item.loop.order:
                found += [_drawn(inner, program) for inner in _draws(item.bodies[kind].statements)]
        else:
            found += [_drawn(inner, program) for inner in _draws([item])]
    return found


def _draws(statements: Sequence[object]) -> list[Compute]:
    return [s for s in statements if isinstance(s, Compute) and operator_of(s.node).draws]


def _drawn(item: Compute, program: Program) -> Drawn:
    (result,) = item.outputs
    zigzag = tuple(sorted(program.zigzag.get(result.value.name, ())))
    return result.value.type.shape, result.spec, zigzag


class Recorder(TorchDispatchMode):
    """Inside, `draws` grows by every tensor of random numbers that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if is_draw(str(func)):
            self.draws.append(made.detach().clone())
        return made

    def whole(self, planned: Sequence[Drawn], mesh: Mesh) -> list[Tensor]:
        """What all ranks drew together.  Raises ValueError where it is not what was planned."""
        if len(planned) != len(self.draws):
            raise ValueError(
                f"{len(planned)} draws were planned, the module made {len(self.draws)}"
            )
        return [
            gather_whole(local, spec, shape, mesh, zigzag)
            for local, (shape, spec, zigzag) in zip(self.draws, planned, strict=True)
        ]


class Replayed(TorchDispatchMode):
    """Inside, what is drawn is `draws`, one after the other.

    Raises PlanError where another tensor is drawn, or one more.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        super().__init__()
        self._left = list(draws)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not is_draw(str(func)):
            return made
        if not self._left or self._left[0].shape != made.shape:
            wanted = f"one of {list(self._left[0].shape)}" if self._left else "no more"
            raise PlanError(
                f"the model draws {list(made.shape)} with `{func}`, where the plan has {wanted}: "
                "its draws are not those that were captured, and cannot be compared"
            )
        return made.copy_(self._left.pop(0))


class WithoutDropout(TorchFunctionMode):
    """Inside, dropout lets everything through, also where a model is in training mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else given["input"]
        if func is F.scaled_dot_product_attention:
            args, given = args[:4], {**dict(zip(_REST, args[4:], strict=False)), **given}
            given["dropout_p"] = 0.0
        return func(*args, **given)


_DROPOUTS: frozenset[Callable[..., Any]] = frozenset({F.dropout, torch.dropout, torch.dropout_})
_REST = ("dropout_p", "is_causal")  # arguments of attention that may stand without their names

__all__ = ["Drawn", "Recorder", "Replayed", "WithoutDropout", "draws_of"]
